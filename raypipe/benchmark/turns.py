"""Two ways to one result, called in turns: what every comparison is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.types import PatternSegmenter

THUMBNAIL = 96  # px a side of the image that warms up every arm


def segment(method, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The masks of each image, the whole of it being foreground."""
    if not isinstance(method, PatternSegmenter):
        return [found.masks for found in method.segment(images)]
    wholes = [np.ones(image.shape[:2], bool) for image in images]
    return [found.masks for found in method.segment(images, wholes)]


def in_turns(arms: Sequence[Callable], images: Sequence[np.ndarray], repeats: int) -> tuple[list, list]:
    """Seconds and results of each arm, called with each image in turns (A B A B ...) after a warm-up.

    Returns two lists with one list per arm: repeats * len(images) seconds, and the last result of each image.
    """
    for arm in arms:
        arm(np.ascontiguousarray(images[0][:THUMBNAIL, :THUMBNAIL]))
    seconds, results = [[] for _ in arms], [[None] * len(images) for _ in arms]
    for _ in range(repeats):
        for i, image in enumerate(images):
            for times, kept, arm in zip(seconds, results, arms, strict=True):
                start = time.perf_counter()
                kept[i] = arm(image)
                times.append(time.perf_counter() - start)
    return seconds, results


def compared(name: str, seconds: Sequence[Sequence[float]], against: str) -> list[Figure]:
    """Both arms' times and how many times faster the first one is, pair by pair."""
    ours, other = seconds
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    return [
        Figure(name, "time per image", "s", ours),
        Figure(name, "time per image, plain", "s", other, against),
        Figure(name, "times faster than plain", "x", ratios, "pairs in turns"),
    ]


def with_network(
    method, device: str, images: Sequence[np.ndarray], repeats: int, plain_one: Callable, against: str
) -> list[Figure]:
    """A method in full batches on a GPU, or one by one, against its plain formulation, and how their masks differ."""
    batch = method.batch_size if device == "cuda" else 1
    arms = [lambda image: segment(method, [image] * batch)[0], plain_one]
    (ours, other), found = in_turns(arms, images, repeats)
    threshold = 0.5 if method.threshold is None else method.threshold
    differences = [float(((a > threshold) != b).mean()) for a, b in zip(*found, strict=True)]
    return [
        *compared(method.name, [[total / batch for total in ours], other], f"{device}; {against}"),
        Figure(method.name, "share of pixels unlike plain", "", differences, f"ours in batches of {batch}"),
    ]


def halves(image: np.ndarray) -> np.ndarray:
    """Two masks to refine, bool (2, H, W): the darker and the brighter pixels of RGB uint8 (H, W, 3)."""
    bright = image[..., 1] >= 128
    return np.stack([~bright, bright])
