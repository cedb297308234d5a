"""The normalised cut by SciPy's dense solver: the whole generalised problem in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe import spectral
from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, in_turns
from raypipe.features import color

TAU, EPS = 0.2, 1e-5  # TokenCut's
SIDES = (28, 60)  # patches a side: 784 and 3600 nodes
PATCH = 16  # px
PHOTOGRAPHS = 2  # a dense solution of 3600 nodes takes about ten seconds


def compare(_subject, _device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """On the CPU, on graphs of photographs and on one of six regions with a few joins between them."""
    figures = []
    for side in SIDES:
        graphs = {"photographs": [photographed(image, side) for image in images[:PHOTOGRAPHS]]}
        graphs["six regions"] = [regions(side**2)]
        for kind, some in graphs.items():
            seconds, found = in_turns([quick_halves, plain_halves], some, repeats)
            unlike = [float((one != other).mean()) for one, other in zip(*found, strict=True)]
            case = f", {side**2} nodes, {kind}"
            figures += compared("spectral", seconds, "scipy.linalg.eigh, float64", per="solve", case=case)
            figures.append(Figure("spectral", f"share of nodes unlike plain{case}", "", unlike))
    return figures


def photographed(image: np.ndarray, side: int) -> np.ndarray:
    """Which of side x side patches are alike by colour, texture and place: float32 (P, P), 0 or 1."""
    import cv2

    square = cv2.resize(image, (side * PATCH, side * PATCH), interpolation=cv2.INTER_AREA)
    patches = color.describe(square, PATCH, max_side=max(square.shape)).patches.numpy()
    patches = patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
    return (patches @ patches.T > TAU).astype(np.float32)


def regions(count: int) -> np.ndarray:
    """Six regions of growing size, nine tenths of their pairs and one of 25 of the others joined: float32 (P, P)."""
    rng = np.random.default_rng(0)
    region = np.repeat(np.arange(6), np.diff(np.linspace(0, count**0.5, 7) ** 2 // 1).astype(int))
    share = np.where(region[:, None] == region, 0.9, 0.04)
    joined = np.triu(rng.random(share.shape, dtype=np.float32) < share)
    return (joined | joined.T | np.eye(count, dtype=bool)).astype(np.float32)


def quick_halves(graph: np.ndarray) -> np.ndarray:
    """The upper half of the cut, bool (P,), of a graph of zeros and ones, float32 (P, P)."""
    import torch

    cut = spectral.second_eigenvectors(torch.from_numpy(np.ascontiguousarray(graph))[None], eps=EPS)
    return spectral.orient(cut.vector)[1][0].numpy()


def plain_halves(graph: np.ndarray) -> np.ndarray:
    """The same by the dense solver."""
    vector, _ = second_eigenvector(np.where(graph > 0, 1.0, EPS))
    return halves(vector)[0]


def second_eigenvector(graph: np.ndarray) -> tuple[np.ndarray, float]:
    """The second solution y of (D - A) y = lambda D y, float64 (P,), and lambda3 - lambda2. graph: A, (P, P)."""
    import scipy.linalg

    degree = np.diag(graph.sum(1))
    values, vectors = scipy.linalg.eigh(degree - graph, degree, subset_by_index=[1, 2])
    return vectors[:, 0], float(values[1] - values[0])


def halves(vector: np.ndarray) -> tuple[np.ndarray, int]:
    """What is above the mean on the side of the entry of the largest size, bool (P,), and that entry."""
    size = np.abs(vector)
    seed = int(np.flatnonzero(size >= (1 - spectral.TIE) * size.max())[0])
    upper = vector > vector.mean()
    return (upper if upper[seed] else ~upper), seed
