"""Ward's tree by SciPy, of vectors as alike as DINO's keys of a photograph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.processes import peak
from raypipe.benchmark.turns import compared, ratios, timed
from raypipe.segmenters.zero_guidance import tree

SIDE, WIDTH = 111, 384  # of a ViT-S/8 at 448 px with a stride of 4
WINDOW, BLACK = 24, 0.75  # px a side of what a vector describes; share of an image that is of one colour


def compare(_subject, _device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """On the CPU. Also an image of which most is of one colour, and memory."""
    seconds, black, memory, unlike = [[], []], [], [], []
    for rows in (keys(image, SIDE, WIDTH) for image in images):
        tree.ward(rows[:WIDTH])  # what torch itself needs is there before memory is looked at
        for _ in range(repeats):
            spent, expected = timed(plain_ward, rows)
            seconds[0].append(timed(tree.ward, rows)[0])
            seconds[1].append(spent)
            black.append(timed(tree.ward, blackened(rows))[0])
        used, found = peak(tree.ward, rows)
        memory.append(used)
        unlike.append(float((found.children != expected.children).any(1).mean()))
    case = f", {SIDE * SIDE:,} x {WIDTH}"
    return [
        *compared("ward", seconds, "scipy.cluster.hierarchy.ward", case=case),
        Figure("ward", f"time where three quarters are equal / photograph{case}", "x", ratios(black, seconds[0])),
        Figure("ward", f"memory beside the vectors{case}", "MB", memory),
        Figure("ward", f"share of merges unlike plain{case}", "", unlike),
    ]


def keys(image: np.ndarray, side: int, width: int) -> np.ndarray:
    """Vectors of length 1, float32 (side * side, width): colours of overlapping windows of RGB uint8, mixed."""
    starts = [np.linspace(0, size - WINDOW, side).astype(int) for size in image.shape[:2]]
    windows = [image[y : y + WINDOW : 3, x : x + WINDOW : 3].ravel() for y in starts[0] for x in starts[1]]
    colours = np.array(windows, np.float32) / 255 - 0.4
    mix = np.random.default_rng(0).normal(size=(colours.shape[1], width)).astype(np.float32) / 8
    found = np.tanh(colours @ mix)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def blackened(rows: np.ndarray) -> np.ndarray:
    """The same vectors with the first ones all equal."""
    rows = rows.copy()
    rows[: int(BLACK * len(rows))] = rows[0]
    return rows


def plain_ward(rows: np.ndarray) -> tree.Tree:
    """As `tree.ward`, with all distances from vector to vector."""
    from scipy.cluster.hierarchy import ward

    merges = ward(rows.astype(np.float64))
    return tree.Tree(merges[:, :2].astype(np.int64), merges[:, 2])
