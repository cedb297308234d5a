"""A recipe for the tests of what is gathered: what it does to an image is written in the image's first pixel."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from raypipe.training.recipe import Recipe
from raypipe.types import BadImage
from support.faulty import DIES, NO_MEMORY, RAISES

FAULT_OF_RECIPE = 9  # of the image's first pixel, beside those of `faulty`


@dataclass(kw_only=True)
class Halves(Recipe):
    """Keeps every second row of an image, and the length of what stands in the column `mark`."""

    epochs: int = 1
    batch_size: int = 2
    lr: float = 0.1

    def rows(self, manifest):
        return manifest

    def prepare(self, row, image):
        how = int(image[0, 0, 0])
        if how == DIES:
            os._exit(7)
        if how == NO_MEMORY:
            raise MemoryError
        if how == RAISES:
            raise BadImage("decode", "unloved", "this image is not liked")
        if how == FAULT_OF_RECIPE:
            return {"image": row["nowhere"]}
        return {"image": image[::2], "mark": np.array([len(row.get("mark", ""))])}

    def draw(self, random, sample):
        return random.random()

    def student(self, device):
        raise ValueError("halves: has no network")


def contents(samples) -> list:
    """All that there is to read of samples, by plain numbers, last index first."""
    indices = range(len(samples) - 1, -1, -1)
    arrays = [(name, array) for i in indices for name, array in samples[i].items()]
    values = [(name, array.shape, array.dtype.str, array.flags.writeable, array.tobytes()) for name, array in arrays]
    return [samples.keys, samples.digest, values]
