"""A method for the fault tests: what it does to an image is written in the image's first pixel."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from raypipe.types import Segmenter, Segments

GOOD, DIES, HANGS, RAISES, NO_MEMORY, DIES_ONCE = range(6)


@dataclass
class Faulty(Segmenter):
    """One bool mask: the brighter half of the image. The first pixel's red value tells how it fails."""

    sleep: float = 0.0  # seconds per image
    marks: str = ""  # folder where a worker leaves a file, so that a test sees what was called

    source = "the tests"
    licence = "Apache-2.0"

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        if any(image[0, 0, 0] == NO_MEMORY for image in images) and len(images) > 1:
            raise MemoryError("too many images at once")
        for image in images:
            time.sleep(self.sleep)
            self._fail(int(image[0, 0, 0]))
            yield Segments(image.mean(2)[None] > 127)

    def _fail(self, how: int) -> None:
        if how == DIES:
            os._exit(7)
        if how == HANGS:
            time.sleep(3600)
        if how == RAISES:
            raise RuntimeError("this image is not liked")
        if how == DIES_ONCE and not Path(self.marks, "died").exists():
            Path(self.marks, "died").touch()
            os._exit(7)


@dataclass
class FaultyOnGpu(Faulty):
    """The same with a GPU reserved, so that the three-stage graph runs."""

    gpus = 1.0


@dataclass
class Soft(Segmenter):
    """A soft mask: the image's brightness."""

    source = "the tests"
    licence = "Apache-2.0"
    soft = True

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for image in images:
            yield Segments((image.mean(2) / 255)[None].astype(np.float32))


def write_images(folder: Path, kinds: list[int], size: tuple[int, int] = (24, 32), seed: int = 0) -> None:
    """PNG files 0000.png, 0001.png, ... of random pixels; `kinds` tells how the method fails on each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i, kind in enumerate(kinds):
        pixels = rng.integers(0, 256, (size[0], size[1] + i % 3, 3), np.uint8)
        pixels[0, 0, 0] = kind
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
