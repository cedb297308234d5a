"""`raypipe benchmark`: ratios of two ways to the same result, measured in turns in one run on this machine.

Knows every method's plain twin (`plain/`) and what a job costs beside the method. Nothing imports this room but `cli`;
what measures methods and refiners needs no Ray.
"""
