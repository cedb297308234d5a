"""What refiners share: what they are given is checked, and brought to the size at which they work and back."""

from __future__ import annotations

import numpy as np

from raypipe.types import BadImage


def check(masks: np.ndarray, image: np.ndarray, *, name: str) -> None:
    """Raise ValueError when masks (N, H, W) are not of the size of image (H, W, 3), BadImage for NaN or infinity."""
    if masks.shape[1:] != image.shape[:2]:
        raise ValueError(f"{name}: masks of size {masks.shape[1:]} for an image of size {image.shape[:2]}")
    if not np.isfinite(masks).all():
        raise BadImage("refine", "non_finite", "a mask has values that are not finite")


def resized(plane: np.ndarray, size: tuple[int, int], *, nearest: bool = False) -> np.ndarray:
    """Bilinear, every pixel counted where it shrinks. plane: uint8 (H, W, 3) or float32 (H, W). size: (h, w)."""
    from PIL import Image

    if plane.shape[:2] == size:
        return plane
    kind = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(plane).resize(size[::-1], kind))
