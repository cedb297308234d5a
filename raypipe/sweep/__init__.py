"""`raypipe sweep`: a method's parameters against labels, as trials on Ray Tune.

Knows what to try, how a trial is labelled and scored, and which setting is best. A trial is a run like any other, made
by `pipeline`. Never imports `cli`.
"""
