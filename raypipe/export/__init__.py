"""`raypipe export`: a run's masks for other tools, in a new folder.

Knows what may be told of a run, how files are named, and which images had to be left out; what a file looks like is a
format's business (`formats/`). Never imports Ray or `pipeline`.
"""
