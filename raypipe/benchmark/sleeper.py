"""A method that only waits: what is left of a run's time is the pipeline's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raypipe.types import Segmenter, Segments


@dataclass
class Sleeper(Segmenter):
    """No masks, after a pause."""

    sleep: float = 0.0  # seconds per image

    source = "the benchmark"
    licence = "none needed: own code, no weights"

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for image in images:
            if self.sleep:
                time.sleep(self.sleep)
            yield Segments(np.zeros((0, *image.shape[:2]), bool))
