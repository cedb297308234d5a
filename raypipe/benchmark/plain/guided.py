"""The guided filter with box sums from cumulative sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, halves, in_turns

RADIUS, EPS = 29, 1e-3  # the refiner's default of 9 px at 320 px, for 1024 px


def compare(refiner, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """The filter itself: the refiner would keep a mask that vanishes, which the plain formulation does not."""
    from raypipe.refiners.guided import guided_filter

    filters = (guided_filter, cumulative_guided_filter)
    arms = [lambda image, run=run: run(halves(image), image, radius=RADIUS, eps=EPS) for run in filters]
    seconds, (ours, other) = in_turns(arms, images, repeats)
    errors = [float(np.abs(a - b).max()) for a, b in zip(ours, other, strict=True)]
    against = f"cumulative sums in float64, two masks, radius {RADIUS}"
    difference = Figure("guided", "largest difference to plain", "", errors, "ours in float32")
    return [*compared("guided", seconds, against), difference]


def cumulative_guided_filter(masks: np.ndarray, image: np.ndarray, *, radius: int, eps: float) -> np.ndarray:
    """The grey guided filter with box sums from cumulative sums, mask by mask (He, Sun, Tang, TPAMI 2013, alg. 1).

    masks: (N, H, W) bool or float in [0, 1]. image: RGB uint8 (H, W, 3). In float64, since cumulative sums of a large
    image lose digits. Returns float64 (N, H, W), clipped to [0, 1].
    """
    guide = image.mean(2) / 255  # (H, W)
    pixels = box_sum(np.ones(guide.shape), radius)

    def mean(plane: np.ndarray) -> np.ndarray:
        return box_sum(plane, radius) / pixels

    refined = []
    for mask in masks.astype(np.float64):
        mean_guide, mean_mask = mean(guide), mean(mask)
        covariance = mean(guide * mask) - mean_guide * mean_mask
        slope = covariance / (mean(guide * guide) - mean_guide**2 + eps)
        offset = mean_mask - slope * mean_guide
        refined.append(mean(slope) * guide + mean(offset))
    return np.clip(refined, 0, 1)


def box_sum(plane: np.ndarray, radius: int) -> np.ndarray:
    """Sums of float (H, W) over square windows of 2 * radius + 1 px, cut off at the border."""
    for axis in (0, 1):
        sums = np.cumsum(plane, axis)
        sums = np.insert(sums, 0, 0, axis)  # sums[i]: of the first i lines
        line = np.arange(plane.shape[axis])
        ends = np.minimum(line + radius + 1, len(line)), np.maximum(line - radius, 0)
        plane = np.take(sums, ends[0], axis) - np.take(sums, ends[1], axis)
    return plane
