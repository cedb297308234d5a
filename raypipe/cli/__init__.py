"""The command line: words become dataclasses, dataclasses go to the functions of the verbs, errors become exit codes.

Knows the names of all verbs and how the terminal is spoken to. Nothing imports this room but jobs/*.py. Importing it
loads no torch, no Ray, no OpenCV, so that `raypipe --help` answers at once.
"""

from raypipe.cli.verbs import main

__all__ = ["main"]
