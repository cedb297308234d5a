"""Names of categories: written on their objects in a picture, and the colours that tell them apart there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from raypipe import masks
from raypipe.pictures.overlay import COLOURS

LINES, MANY_LINES = 22, 30  # of text that a picture's longer side has room for; where there are many names
MANY = 8  # names
ADVANCE = 0.7  # width of a letter, in heights of a line, on average


class Name(NamedTuple):
    """A name in a picture: its middle, in pixels."""

    text: str  # shortened to the picture's width
    x: float
    y: float
    mask: int  # whose name it is, by its place among those given


def colours(names: Iterable[str]) -> dict[str, int]:
    """For each name a place in COLOURS, in their order; they come again where there are more names than colours."""
    return {name: i % len(COLOURS) for i, name in enumerate(dict.fromkeys(names))}


def height(size: tuple[int, int], count: int = 1) -> float:
    """How high a line of text is in a picture of (height, width) with so many names, in pixels."""
    return max(size) / (LINES if count <= MANY else MANY_LINES)


def written(found: Sequence[tuple[str, np.ndarray]], line: float) -> list[Name]:
    """Where names stand: on the largest connected part of each mask, at its innermost point where no name is near.

    found: names and their pixels, bool (h, w) of one size; "" and what has no pixel is not written. line: its height.
    The innermost point is the farthest from what is not the part, the border of the picture included; of several the
    first in raster order. A name that would not fit into the picture there is moved sideways until it does. Large masks
    come first. Where there is no room at all, names stand over others, but for those that are written elsewhere too.
    """
    areas = [int(mask.sum()) if text else 0 for text, mask in found]
    names: list[Name] = []
    for i in sorted(filter(areas.__getitem__, range(len(found))), key=lambda i: -areas[i]):
        text, mask = found[i]
        text = _shortened(text, int(mask.shape[1] / (ADVANCE * line)))
        half = _half(text, line, mask.shape[1])
        xs, ys = np.clip(np.arange(mask.shape[1]) + 0.5, half, mask.shape[1] - half), np.arange(mask.shape[0]) + 0.5
        inside = _depth(mask)
        free = inside.copy()
        for other in names:
            beside = abs(xs - other.x) < half + _half(other.text, line, mask.shape[1])
            free[np.ix_(abs(ys - other.y) < line, beside)] = 0
        if not free.any():
            if any(name.text == text for name in names):
                continue
            free = inside
        y, x = np.unravel_index(free.argmax(), free.shape)
        names.append(Name(text, float(xs[x]), float(ys[y]), i))
    return sorted(names, key=lambda name: name.mask)


def _depth(mask: np.ndarray) -> np.ndarray:
    """How far each pixel of the largest connected part is from what is not the part: float32 (h, w), 0 elsewhere."""
    import cv2

    part = np.pad(masks.largest_component(mask), 1)
    return cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]


def _half(text: str, line: float, width: int) -> float:
    return min(ADVANCE * line * len(text), width) / 2


def _shortened(text: str, letters: int) -> str:
    return text if len(text) <= max(letters, 1) else f"{text[: max(letters - 1, 0)].rstrip()}…"
