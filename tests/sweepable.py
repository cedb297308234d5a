"""A soft method for the tests of sweeps, and `raypipe sweep` with it: `sweepable.py [OPTIONS]`."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raypipe.types import Segmenter, Segments


@dataclass
class Gamma(Segmenter):
    """A soft mask: the image's brightness to the power of gamma, or its reverse."""

    gamma: float = 1.0  # some values fail: 13 raises, 66 kills the process
    is_dark: bool = False  # the reverse
    sleep: float = 0.0  # seconds per image

    source = "the tests"
    licence = "Apache-2.0"
    soft = True
    batch_size = 2

    def __post_init__(self):
        if self.gamma <= 0:
            raise ValueError(f"gamma: gamma must be above 0, got {self.gamma!r}")

    def load(self, device: str) -> None:
        if self.gamma == 13:
            raise RuntimeError("no luck with 13")
        if self.gamma == 66:
            os._exit(7)

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for image in images:
            time.sleep(self.sleep)
            bright = ((image.mean(2) / 255) ** self.gamma)[None].astype(np.float32)
            yield Segments(1 - bright if self.is_dark else bright)


if __name__ == "__main__":
    import sweepable

    from raypipe import cli, segmenters

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    segmenters.find = lambda name: sweepable.Gamma
    sys.exit(cli.main(["sweep", "sweepable", *sys.argv[1:]]))
