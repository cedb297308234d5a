"""Hand-made descriptions of patches by colour, texture and place: features without any weights.

They are no published method. They let the methods on dense features run, in a demonstration or a test, where no network
can be had; a network's features find objects far better.
"""

from __future__ import annotations

import numpy as np

from raypipe.features.grid import Features, resized, seen_size, whole

PLACE = 0.5  # weight of a patch's position beside each other quantity
FLAT = 1 / 255  # deviation of the pixels, of levels in [0, 1], below which an image has one colour


def describe(
    image: np.ndarray, patch: int, *, fit: str = "pad", max_side: int = 1024, method: str = "color"
) -> Features:
    """Mean and deviation of the colour of each patch, its gradients, the mean colour around it and its place.

    image: RGB uint8 (H, W, 3). patch: side of a patch in px. fit, max_side: see `grid.seen_size`; padding repeats the
    edge. method: whose log lines these are. Each quantity has mean 0 and deviation 1 over the image, so that there are
    negative similarities as well as positive ones. Patches of an image of one colour are all alike.
    """
    import torch

    size = seen_size(image.shape[:2], patch, fit, max_side=max_side, method=method)
    levels = _fitted(resized(image, size), whole(size, patch, fit)).astype(np.float32) / 255
    grid = tuple(side // patch for side in levels.shape[:2])
    values = np.ones((grid[0] * grid[1], 1), np.float32)
    if levels.std(axis=(0, 1)).max() > FLAT:
        values = _standardised(_quantities(levels, patch).reshape(len(values), -1))
        values[:, -2:] *= PLACE
    return Features(torch.from_numpy(values), grid, patch, size, fit)


def _fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image cropped, or continued with its edge, to the right and below, to a size."""
    image = image[: size[0], : size[1]]
    added = [(0, side - present) for side, present in zip(size, image.shape[:2], strict=True)]
    return np.pad(image, [*added, (0, 0)], "edge")


def _quantities(levels: np.ndarray, patch: int) -> np.ndarray:
    """What is known of each patch: float32 (h, w, 13), the last two its row and column in [-1, 1]."""
    import cv2

    height, width = (side // patch for side in levels.shape[:2])
    mean, square = (_means(values, patch) for values in (levels, levels**2))
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    grey = levels.mean(2)
    steps = np.stack(
        [np.abs(np.diff(grey, axis=axis, append=grey[-1:] if axis == 0 else grey[:, -1:])) for axis in (0, 1)], 2
    )
    around = cv2.blur(mean, (3, 3), borderType=cv2.BORDER_REPLICATE).reshape(mean.shape)
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.concatenate([mean, deviation, _means(steps, patch), around, np.stack([rows, columns], 2)], 2).astype(
        np.float32
    )


def _means(values: np.ndarray, patch: int) -> np.ndarray:
    """Means over patches of (H, W, C), H and W multiples of the patch: (h, w, C)."""
    height, width, channels = values.shape
    return values.reshape(height // patch, patch, width // patch, patch, channels).mean((1, 3))


def _standardised(values: np.ndarray) -> np.ndarray:
    """Columns (P, D) with mean 0 and deviation 1; a constant column is 0."""
    deviation = values.std(0)
    return (values - values.mean(0)) / np.where(deviation > 1e-6, deviation, np.inf)
