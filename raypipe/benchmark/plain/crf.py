"""The dense CRF with its kernels summed exactly, neighbour by neighbour within a window."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, in_turns, timed
from raypipe.refiners.crf import OPTIONS, dense_crf

SIDE, LABELS = 224, 9
LARGE = 448, 12  # px a side and labels of zero-guidance segmentation
WINDOW = 3.0  # sigmas of a kernel that count; more change 0.2 % of the labels at most


def compare(refiner, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """`dense_crf` with the refiner's options on energies of nine labels. One photograph: a window takes seconds.

    Also by itself at the size of zero-guidance segmentation.
    """
    import cv2
    import torch

    torch.set_num_threads(1)
    large = cv2.resize(images[0], (LARGE[0], LARGE[0]), interpolation=cv2.INTER_AREA)
    images = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in images[:1]]
    options = {name: getattr(refiner, f"refine_{name}") for name in OPTIONS}
    arms = [lambda image, run=run: run(image, shades(image, LABELS), **options) for run in (dense_crf, windowed_crf)]
    seconds, (ours, other) = in_turns(arms, images, repeats)
    differences = [float((a[1] != b[1]).mean()) for a, b in zip(ours, other, strict=True)]
    against = (
        f"exact kernels within {WINDOW:g} sigmas, {SIDE} x {SIDE}, {LABELS} labels, {options['iterations']} iterations"
    )
    difference = Figure("crf", "share of labels unlike plain", "", differences, "a lattice is an approximation")
    times = [timed(dense_crf, large, shades(large, LARGE[1]), **options)[0] for _ in range(repeats)]
    case = f"time per image, {LARGE[0]} x {LARGE[0]}, {LARGE[1]} labels"
    return [*compared("crf", seconds, against), difference, Figure("crf", case, "s", times)]


def shades(image: np.ndarray, count: int) -> np.ndarray:
    """Energies of labels, float32 (count, H, W): the squared distance in brightness from as many grey levels."""
    levels = np.linspace(0, 4, count, dtype=np.float32)[:, None, None]
    return (image.mean(2, dtype=np.float32) / 64 - levels) ** 2


def windowed_crf(
    image: np.ndarray,
    unary: np.ndarray,
    *,
    gauss_sxy: float,
    gauss_weight: float,
    bilateral_sxy: float,
    bilateral_srgb: float,
    bilateral_weight: float,
    iterations: int,
    window: float = WINDOW,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean field with Potts compatibility (Kraehenbuehl and Koltun, NIPS 2011, algorithm 1).

    image: RGB uint8 (H, W, 3). unary: float (k, H, W). window: how many sigmas of position a kernel reaches; infinity
    for all of the image. Returns q float32 (k, H, W) and its argmax int16 (H, W).
    """
    kernels = [
        (gauss_weight, window_weights(image, window, sxy=gauss_sxy)),
        (bilateral_weight, window_weights(image, window, sxy=bilateral_sxy, srgb=bilateral_srgb)),
    ]
    one = np.ones((1, *image.shape[:2]), np.float32)
    scales = [1 / np.sqrt(summed(weights, one) + 1e-20) for _, weights in kernels]
    unary = unary.astype(np.float32)
    q = softmax(-unary)
    for _ in range(iterations):
        energy = -unary
        for (strength, weights), scale in zip(kernels, scales, strict=True):
            energy = energy + strength * scale * summed(weights, scale * q)
        q = softmax(energy)
    return q, q.argmax(0).astype(np.int16)


def window_weights(image: np.ndarray, window: float, *, sxy: float, srgb: float | None = None) -> list[tuple]:
    """How much each pixel's neighbours count: (dy, dx, float32 weights (H - |dy|, W - |dx|)) of half of the window.

    The other half is its mirror image. The weight of a pixel with itself is 1.
    """
    height, width = image.shape[:2]
    radius = int(min(math.ceil(min(window * sxy, 1e6)), max(height, width) - 1))
    colours = image.astype(np.float32)
    found = []
    for dy in range(min(radius, height - 1) + 1):
        for dx in range(-min(radius, width - 1), min(radius, width - 1) + 1):
            if (dy, dx) <= (0, 0):
                continue
            here, there = pair(dy, dx)
            weights = np.full((height - dy, width - abs(dx)), (dy**2 + dx**2) / sxy**2, np.float32)
            if srgb is not None:
                weights += ((colours[here] - colours[there]) ** 2).sum(2) / srgb**2
            found.append((dy, dx, np.exp(-weights / 2)))
    return found


def pair(dy: int, dx: int) -> tuple[tuple, tuple]:
    """Slices of the pixels that have a neighbour at (dy, dx), dy >= 0, and of these neighbours."""
    rows = slice(None, -dy or None), slice(dy, None)
    columns = slice(max(0, -dx), -max(0, dx) or None), slice(max(0, dx), -max(0, -dx) or None)
    return (rows[0], columns[0]), (rows[1], columns[1])


def summed(weights: list[tuple], values: np.ndarray) -> np.ndarray:
    """The kernel's sum at every pixel, itself included. values: float32 (k, H, W)."""
    total = values.copy()
    for dy, dx, near in weights:
        here, there = (np.s_[:, *part] for part in pair(dy, dx))
        total[here] += near * values[there]
        total[there] += near * values[here]
    return total


def softmax(values: np.ndarray) -> np.ndarray:
    """Over the first axis."""
    powers = np.exp(values - values.max(0))
    return powers / powers.sum(0)
