"""What tests of sweeps need: a soft method, labelled photographs, and `sweepable.py [OPTIONS]` for `raypipe sweep`."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from raypipe.sweep.trials import Sweep
from raypipe.types import BadImage, LabelMap, Segmenter, Segments

SIZE = (40, 48)
PLACES = {"input": "photos", "labels": "labels", "output": "sweep"}


@dataclass
class Gamma(Segmenter):
    """A soft mask: the image's brightness to the power of gamma, or its reverse."""

    gamma: float = 1.0  # some values fail: 13 cannot load, 66 kills the process, 7 fails on each image
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
            if self.gamma == 7:
                raise RuntimeError("no image with 7")
            time.sleep(self.sleep)
            bright = ((image.mean(2) / 255) ** self.gamma)[None].astype(np.float32)
            yield Segments(1 - bright if self.is_dark else bright)


@dataclass
class Levels(Segmenter):
    """A label map: how bright a pixel is, in levels, and as its score how near it is to the middle of its level."""

    levels: int = 4

    source = "the tests"
    licence = "Apache-2.0"
    soft = exclusive = True

    def segment(self, images, foregrounds=None) -> Iterator[LabelMap]:
        for image in images:
            bright = image.mean(2, dtype=np.float32) / 256 * self.levels  # below the number of levels
            values = np.float32(1) - abs(bright % 1 - np.float32(0.5))
            yield LabelMap(bright.astype(np.uint8) + 1, values, [f"level {i}" for i in range(self.levels)])


@dataclass
class Staged(Segmenter):
    """Two stages, features and these times `gain`, counted in a file; then a mask of what is above `tau` in them."""

    tau: float = 100.0  # grey values; 7 fails on each image, 66 kills the process
    gain: float = 1.0
    power: float = 1.0  # of the features
    counts: str = ""  # a file: a line for each load, and for each image whose features are computed, or which is gained

    source = "the tests"
    licence = "Apache-2.0"
    stages = {"features": ("gain", "tau"), "gained": ("tau",)}
    batch_size = 2

    def load(self, device: str) -> None:
        self._count("load")
        self._power = self.power

    def _count(self, what: str) -> None:
        with Path(self.counts).open("a") as file:
            file.write(f"{what}\n")

    def features(self, images) -> Iterator[np.ndarray]:
        for image in images:
            self._count(f"{image.mean():.6f}")
            if image.mean() < 1:
                raise BadImage("segment", "dark", "no features of a black image")
            yield image.mean(2) ** self._power

    def gained(self, images) -> Iterator[np.ndarray]:
        for features in self.features(images):
            self._count("gained")
            yield features * self.gain

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for features in self.gained(images):
            if self.tau == 7:
                raise RuntimeError("no image with 7")
            if self.tau == 66:
                os._exit(7)
            yield Segments((features > self.tau)[None], scores=[self.tau])


def write_labelled(folder: Path, count: int, first: int = 0) -> None:
    """Photographs of a bright blot on a dark ground with noise, and the blots as labels."""
    (folder / "photos/wild").mkdir(parents=True, exist_ok=True)
    (folder / "labels/wild").mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        y, x = np.mgrid[: SIZE[0], : SIZE[1] + i % 3]
        blot = (y - 20) ** 2 + (x - 24) ** 2 < (8 + i % 5) ** 2
        picture = np.where(blot, 150, 70)[..., None] + rng.normal(0, 30, (*blot.shape, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"photos/wild/cat_{i}.png")
        Image.fromarray(blot.astype(np.uint8) * 255).save(folder / f"labels/wild/cat_{i}.png")


def sweep_of(folder: Path, *over: str, **options) -> Sweep:
    """The options of a sweep over the photographs of `write_labelled`."""
    return Sweep(**{name: str(folder / place) for name, place in PLACES.items()} | options, over=over)


if __name__ == "__main__":
    from raypipe import segmenters
    from raypipe.cli import verbs as cli
    from support import sweepable

    segmenters.find = lambda name: sweepable.Gamma
    sys.exit(cli.main(["sweep", "sweepable", *sys.argv[1:]]))
