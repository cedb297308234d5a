"""`raypipe sweep` as a script for `ray job submit -- python jobs/sweep.py METHOD --input ... --output ...`."""

import sys

from raypipe.cli.verbs import main

sys.exit(main(["sweep", *sys.argv[1:]]))
