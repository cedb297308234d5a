"""`raypipe label` with the tests' own method: `drive.py SECONDS_PER_IMAGE [OPTIONS]`."""

import sys

from raypipe import segmenters
from raypipe.cli import verbs as cli
from support import faulty

find = segmenters.find
segmenters.find = lambda name: faulty.Faulty if name == "faulty" else find(name)
sys.exit(cli.main(["label", "faulty", "--sleep", sys.argv[1], *sys.argv[2:]]))
