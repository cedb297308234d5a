"""A method whose segments have a text and an embedding, for the tests of what is made of these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raypipe.types import LabelMap, Segmenter, Segments

WIDTH = 24  # values of an embedding, as of the CLIP of tests
NOT_FINITE, HUGE, MISSING = 1, 2, 3  # what an image's first red value does to its embeddings


@dataclass
class Naming(Segmenter):
    """The upper and the lower half of an image; its first pixel's red value tells what is wrong with it."""

    texts: tuple[str, ...] = ("sky", "grass")

    source = "the tests"
    licence = "Apache-2.0"
    embeds: ClassVar[bool] = True

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for image in images:
            upper = np.arange(len(image))[:, None] < len(image) // 2
            found = np.stack([upper, ~upper]) & np.ones(image.shape[:2], bool)
            texts = [self.texts[(int(image[0, 0, 1]) + i) % len(self.texts)] for i in range(2)]
            yield Segments(found, texts, [0.75, 0.5], "", embeddings_of(image))


@dataclass
class NamingMap(Naming):
    """The same as a label map, with probabilities."""

    soft = exclusive = True

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for found in super().segment(images):
            index = (2 - found.masks[0]).astype(np.uint8)
            values = np.where(found.masks[0], np.float32(0.9), np.float32(0.7))
            yield LabelMap(index, values, found.labels, found.scores, embeddings=found.embeddings)


@dataclass
class NamedMap(NamingMap):
    """The same without embeddings."""

    embeds: ClassVar[bool] = False

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for found in super().segment(images):
            found.embeddings = None
            yield found


def embeddings_of(image: np.ndarray) -> np.ndarray | None:
    """float32 (2, WIDTH), from the pixels."""
    made = image.reshape(-1)[: 2 * WIDTH].reshape(2, WIDTH).astype(np.float32) / 256 - 0.5
    how = image[0, 0, 0]
    if how in (NOT_FINITE, HUGE):
        made[1, 2] = np.nan if how == NOT_FINITE else 70_000
    return None if how == MISSING else made
