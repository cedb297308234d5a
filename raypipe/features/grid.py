"""How an image becomes whole patches, and values of patches become an image again."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raypipe.lookup import suggest

if TYPE_CHECKING:
    import torch

log = logging.getLogger("raypipe")

FITS = ("pad", "reflect", "crop", "resize", "free")


@dataclass(frozen=True)
class Features:
    """Dense features of one image, on a grid of patches."""

    patches: torch.Tensor  # float32 (P, D) on the network's device, row-major over the grid, P = h * w
    grid: tuple[int, int]  # (h, w)
    patch: int  # px from one cell to the next, in the image as the network saw it: the stride
    seen: tuple[int, int]  # (height, width) of that image, before it was padded or cropped to whole patches
    fit: str  # how it became whole patches: pad, reflect, crop, resize or free
    # float32 (heads, P): what the class token looks at, of all tokens; those that are no patch are dropped afterwards
    cls_attention: torch.Tensor | None = None
    margin: int = 0  # px of a patch on each side of its cell: more than 0 where patches overlap

    def enlarged(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Values of the cells at an image's size, each pixel as the cell it lies in.

        values: (h, w) or (N, h, w). size: (H, W). Padding falls away. What a crop left out is as its nearest cell.
        Returns (H, W) or (N, H, W) of the same dtype.
        """
        rows, columns = (self._cells(size, axis) for axis in (0, 1))
        return values[..., rows[:, None], columns]

    def _cells(self, size: tuple[int, int], axis: int) -> np.ndarray:
        """The cell of each row (axis 0) or column (axis 1) of an image of a size."""
        seen = np.arange(size[axis]) * self.seen[axis] // size[axis]
        return ((seen - self.margin) // self.patch).clip(0, self.grid[axis] - 1)


def seen_size(size: tuple[int, int], patch: int, fit: str, *, max_side: int, method: str) -> tuple[int, int]:
    """The size at which an image of a size (height, width) is seen, before it is padded or cropped to whole patches.

    Where its longer side has more than max_side px it is reduced to that; said in the log once per method. With
    `resize` a side is the nearest multiple of the patch, halves to the even one (as in TokenCut's code).
    """
    if fit not in FITS:
        raise ValueError(f"{method}: unknown fit {fit!r}; {suggest(fit, FITS)}")
    if max(size) > max_side:
        say_reduced(method, max_side)
        size = tuple(max(1, round(side * max_side / max(size))) for side in size)
    if fit == "resize":
        size = tuple(max(1, round(side / patch)) * patch for side in size)
    return size


def whole(size: tuple[int, int], patch: int, fit: str) -> tuple[int, int]:
    """The size in whole patches that an image of a size (height, width) is padded or cropped to; one patch at least.

    With `free` its own size: patches that overlap need no multiple of their side.
    """
    if fit == "free":
        return tuple(max(patch, side) for side in size)
    rounded = (side // patch if fit == "crop" else -(-side // patch) for side in size)
    return tuple(max(1, cells) * patch for cells in rounded)


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An RGB uint8 image (H, W, 3) at a size (height, width): Lanczos, as Pillow does it."""
    from PIL import Image

    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))


@functools.cache
def say_reduced(method: str, max_side: int) -> None:
    """Say in the log, once, that a method works on long images at a smaller size."""
    log.info("%s: images with a side of more than max_side = %d px are reduced to it first", method, max_side)
