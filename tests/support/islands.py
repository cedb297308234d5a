"""A method for tests of tiles: what is connected and not black, by its colour. It tells what it was given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from raypipe.types import PatternSegmenter, Segmenter, Segments

BROKEN, HUGE = (1, 2, 3), (3, 2, 1)  # colours of a pixel by which a call fails: any call, or one of several images


class Seen:
    """Fails by colour, and keeps the shapes of the images of each call."""

    def look(self, images) -> None:
        self.calls.append([image.shape[:2] for image in images])
        if any((image == HUGE).all(2).any() for image in images) and len(images) > 1:
            raise MemoryError("too many images at once")
        if any((image == BROKEN).all(2).any() for image in images):
            raise RuntimeError("not liked")


@dataclass
class Islands(Seen, Segmenter):
    """A mask for each island, named by its red value."""

    sleep: float = 0.0  # seconds per image
    calls: list = field(default_factory=list, repr=False)

    source = "the tests"
    licence = "Apache-2.0"
    across = "object"
    batch_size = 5

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        import cv2

        self.look(images)
        for image in images:
            time.sleep(self.sleep)
            masks, labels = [], []
            for red in np.setdiff1d(image[..., 0], 0):
                count, parts = cv2.connectedComponents((image[..., 0] == red).astype(np.uint8))
                masks += [parts == i for i in range(1, count)]
                labels += [f"red {red}"] * (count - 1)
            masks = np.array(masks, bool).reshape(-1, *image.shape[:2])
            yield Segments(masks, labels, [1.0] * len(masks))


@dataclass
class Bright(Seen, PatternSegmenter):
    """One soft mask: how bright the foreground is, beside the brightest pixel of the image."""

    foreground: str = "whole"
    calls: list = field(default_factory=list, repr=False)

    source = "the tests"
    licence = "Apache-2.0"
    soft = True
    batch_size = 5

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        self.look(images)
        for image, foreground in zip(images, foregrounds, strict=True):
            grey = image.mean(2)
            yield Segments((grey / max(1.0, grey.max()) * foreground)[None].astype(np.float32))


def picture(seed: int = 0, size: tuple[int, int] = (60, 72)) -> np.ndarray:
    """Black, with a large island over most tiles, two that touch, and small ones."""
    image = np.zeros((*size, 3), np.uint8)
    image[6:50, 8:64] = 40
    image[20:30, 22:40], image[30:36, 22:40] = 90, 120
    for y, x in np.random.default_rng(seed).integers(2, 55, (6, 2)):
        image[y : y + 3, x : x + 4] = 200
    return image


def write(folder: Path, images: list[np.ndarray]) -> None:
    """PNG files 0.png, 1.png, ..."""
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
