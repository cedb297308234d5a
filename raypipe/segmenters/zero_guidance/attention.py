"""What CLIP looks at from a point of an image, and at the end for a segment (the supplement's figure 10)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raypipe.features.clip import Clip
from raypipe.types import BadImage


class Chosen(NamedTuple):
    """A segment, and what makes its embedding."""

    number: int
    name: str
    score: float
    mask: np.ndarray  # bool (H, W)
    rows: np.ndarray  # float32 (l, g, g): what the class token attends to in the masked blocks, also negative


class Looks(NamedTuple):
    """What is attended to in the L blocks of the unmasked network, the mean over heads."""

    maps: np.ndarray  # float32 (L, 2, g, g): from the point's patch, and from the class token
    of_class: np.ndarray  # float32 (L, 2): the class token's share; with a map it adds up to 1
    patch: tuple[int, int]  # the point's: row and column
    chosen: Chosen | None = None


def from_point(clip: Clip, image: np.ndarray, point: tuple[int, int]) -> Looks:
    """What a CLIP looks at. image: RGB uint8 (H, W, 3). point: x and y in its pixels.

    Raises BadImage where CLIP gives no finite numbers.
    """
    from raypipe.features.clip_masked import attention, squashed

    grid = clip.size // clip.patch
    column, row = (place * grid // side for place, side in zip(point, image.shape[1::-1], strict=True))
    rows = attention(clip, squashed(image, clip.size), [1 + row * grid + column, 0])
    if not np.isfinite(rows).all():
        text = "CLIP gives attention that is no finite number; try --dtype float32, or other weights"
        raise BadImage("segment", "non_finite", text)
    return Looks(rows[..., 1:].reshape(-1, 2, grid, grid), rows[..., 0], (row, column))
