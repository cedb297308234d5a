"""What the methods that look inside a foreground share: where it is too little, and the working size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from raypipe.types import Segments

MIN_SIDE = 5  # px of an image; below, nothing in it can be told apart (GloPER supplement's baselines)


def check_size(method: str, size: int | None, *, smallest: int) -> None:
    """Raise ValueError for a working size below the least side in px that the method can work at; None is fine."""
    if size is not None and size < smallest:
        raise ValueError(f"{method}: size must be at least {smallest}, got {size!r}")


def unusable(foreground: np.ndarray) -> str:
    """Why a foreground, bool (H, W), can hold no pattern: too_small or empty_foreground, or "" where it can."""
    if min(foreground.shape) < MIN_SIDE:
        return "too_small"
    return "" if foreground.any() else "empty_foreground"


def at_working_size(
    find: Callable[[np.ndarray, np.ndarray], Segments], image: np.ndarray, foreground: np.ndarray, size: int | None
) -> Segments:
    """Run find(image, foreground) on a square copy of `size` px a side and scale its masks back; None: as they are.

    An image that is too small stays as it is, for `find` to say so.
    image: (H, W, 3) uint8 RGB. foreground: bool (H, W). find returns bool masks (N, h, w); the result's are (N, H, W),
    and False outside the foreground if they were scaled.
    """
    if size is None or min(foreground.shape) < MIN_SIDE:
        return find(image, foreground)
    import cv2

    small = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    inside = cv2.resize(foreground.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST).astype(bool)
    found = find(small, inside)
    height, width = foreground.shape
    masks = [cv2.resize(m.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) for m in found.masks]
    return Segments(np.stack(masks).astype(bool) & foreground, note=found.note)
