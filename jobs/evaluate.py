"""`raypipe evaluate` as a script for `ray job submit -- python jobs/evaluate.py RUN --dataset ... --root ...`."""

import sys

from raypipe.cli.verbs import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
