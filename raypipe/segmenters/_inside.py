"""What the methods that look inside a foreground share: its options, where it is too little, the working size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np

from raypipe.types import Segmenter, Segments

MIN_SIDE = 5  # px of an image; below, nothing in it can be told apart (GloPER supplement's baselines)


def check_options(method: Segmenter, *, smallest: int) -> None:
    """Raise ValueError for `fg_alpha_min` or `size` out of range, and for an alpha where no foreground has one.

    smallest: the least `size` in px that the method can work at.
    """
    alpha, default = method.fg_alpha_min, next(f.default for f in fields(method) if f.name == "fg_alpha_min")
    if not 0 <= alpha <= 255:
        raise ValueError(f"{method.name}: fg_alpha_min must be between 0 and 255, got {alpha!r}")
    if alpha != default and method.foreground.partition(":")[0] != "rembg":
        text = f"fg_alpha_min {alpha} has no effect: foreground {method.foreground!r} is not soft, only rembg's is"
        raise ValueError(f"{method.name}: {text}")
    if method.size is not None and method.size < smallest:
        raise ValueError(f"{method.name}: size must be at least {smallest}, got {method.size!r}")


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
