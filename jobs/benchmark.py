"""`raypipe benchmark` as a script for `ray job submit -- python jobs/benchmark.py`."""

import sys

from raypipe.cli.verbs import main

sys.exit(main(["benchmark", *sys.argv[1:]]))
