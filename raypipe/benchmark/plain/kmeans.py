"""What a method is measured against: the same result by the plainest formulation, kept here for that."""

from __future__ import annotations

import numpy as np


def opencv_kmeans(image: np.ndarray, *, k: int, attempts: int, max_iter: int, eps: float) -> np.ndarray:
    """`cv2.kmeans` on every pixel. image: RGB uint8 (H, W, 3). Returns masks, bool (k, H, W), in no order."""
    import cv2

    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, max_iter, eps)
    pixels = image.reshape(-1, 3).astype(np.float32)
    cv2.setRNGSeed(0)
    _, labels, _ = cv2.kmeans(pixels, k, None, criteria, attempts, cv2.KMEANS_RANDOM_CENTERS)
    return labels.reshape(image.shape[:2]) == np.arange(k)[:, None, None]


def spread(image: np.ndarray, masks: np.ndarray) -> float:
    """K-Means' objective: the sum of squared distances of the pixels to the mean of their mask."""
    groups = [image[mask].astype(np.float64) for mask in masks if mask.any()]
    return sum(((group - group.mean(0)) ** 2).sum() for group in groups)


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
