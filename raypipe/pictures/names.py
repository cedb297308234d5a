"""Names of categories: written on their objects in a picture, and the colours that tell them apart there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from raypipe import masks
from raypipe.pictures.overlay import COLOURS

LINES = 22  # of text that a picture's longer side has room for
ADVANCE = 0.6  # width of a letter, in heights of a line, on average


class Name(NamedTuple):
    """A name in a picture: its middle, in pixels."""

    text: str
    x: float
    y: float


def colours(names: Iterable[str]) -> dict[str, int]:
    """For each name a place in COLOURS, in their order; they come again where there are more names than colours."""
    return {name: i % len(COLOURS) for i, name in enumerate(dict.fromkeys(names))}


def height(size: tuple[int, int]) -> float:
    """How high a line of text is in a picture of (height, width), in pixels."""
    return max(size) / LINES


def written(found: Mapping[str, np.ndarray]) -> list[Name]:
    """Where names stand: on the largest connected part of each category, at its innermost point.

    found: the pixels of each category, bool (h, w) of one size; without a pixel it has no name. The innermost point is
    the farthest from what is not the part, the border of the picture included; of several the first in raster order. A
    name that would not fit into the picture there is moved sideways until it does.
    """
    import cv2

    names = []
    for text, mask in found.items():
        if not mask.any():
            continue
        part = np.pad(masks.largest_component(mask), 1)
        inside = cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        y, x = np.unravel_index(inside.argmax(), inside.shape)
        half = min(ADVANCE * height(mask.shape) * len(text), mask.shape[1]) / 2
        names.append(Name(text, float(np.clip(x + 0.5, half, mask.shape[1] - half)), float(y + 0.5)))
    return names
