"""`raypipe archive` as a script for `ray job submit -- python jobs/archive.py --input ... --output ...`."""

import sys

from raypipe.cli.verbs import main

sys.exit(main(["archive", *sys.argv[1:]]))
