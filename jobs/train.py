"""`raypipe train` as a script for `ray job submit -- python jobs/train.py METHOD --input ... --output ...`."""

import sys

from raypipe.cli.verbs import main

sys.exit(main(["train", *sys.argv[1:]]))
