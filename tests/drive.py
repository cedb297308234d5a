"""`raypipe label` with the tests' own method: `drive.py SECONDS_PER_IMAGE [OPTIONS]`."""

import os
import sys
from pathlib import Path

import faulty

from raypipe import segmenters
from raypipe.cli import verbs as cli

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
find = segmenters.find
segmenters.find = lambda name: faulty.Faulty if name == "faulty" else find(name)
sys.exit(cli.main(["label", "faulty", "--sleep", sys.argv[1], *sys.argv[2:]]))
