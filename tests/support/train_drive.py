"""`raypipe train` with the tests' own recipe: `train_drive.py [OPTIONS]`."""

import sys

from raypipe import training
from raypipe.cli import verbs as cli
from support import toy

find = training.find
training.find = lambda name: toy.Toy if name == "toy" else find(name)
sys.exit(cli.main(["train", "toy", *sys.argv[1:]]))
