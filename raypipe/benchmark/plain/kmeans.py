"""K-Means by OpenCV on every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, in_turns, ratios, segment


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """Time and objective against `cv2.kmeans`."""
    settings = {name: getattr(method, name) for name in ("k", "attempts", "max_iter", "eps")}
    arms = [lambda image: segment(method, [image])[0], lambda image: opencv_kmeans(image, **settings)]
    seconds, found = in_turns(arms, images, repeats)
    against = f"cv2.kmeans, {method.attempts} attempts, k = {method.k}"
    objectives = [[spread(*pair) for pair in zip(images, masks, strict=True)] for masks in found]
    note = "sum of squared distances; 1 or less is as good or better"
    objective = Figure("kmeans", "objective, ours / plain", "x", ratios(*objectives), note)
    return [*compared("kmeans", seconds, against), objective]


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
