"""`raypipe label` as a script for `ray job submit -- python jobs/label.py METHOD --input ... --output ...`."""

import sys

from raypipe.cli.verbs import main

sys.exit(main(["label", *sys.argv[1:]]))
