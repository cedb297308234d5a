"""Deep Spectral Methods with a dense matrix and SciPy's shift-inverted Lanczos, one image at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import with_features

COUNT = 5  # eigenvectors, as the paper's repository takes for objects too


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """With the method's defaults: the mask of the cut, without colours, on the grid of the features."""

    def plain(image: np.ndarray, features) -> np.ndarray:
        _, vectors = eigenvectors(features.patches.cpu().numpy())
        height, width = image.shape[:2]
        (rows, columns), side = features.grid, features.patch
        cut = (vectors[1] > 0).reshape(features.grid)
        whole = cut[np.arange(height)[:, None] * rows // height, np.arange(width) * columns // width]
        inside = np.kron(cut, np.ones((side, side), bool))[:height, :width]
        whole[: inside.shape[0], : inside.shape[1]] = inside
        return whole[None]

    return with_features(method, device, images, repeats, plain=plain, against="a dense matrix, eigsh of SciPy")


def eigenvectors(patches: np.ndarray, count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    """Smallest eigenvalues (K,) and eigenvectors (K, P) of patches (P, D), ascending, fewer entries positive."""
    from scipy.sparse.linalg import eigsh

    units = patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
    weights = np.maximum(units @ units.T, 0)
    weights /= weights.max()
    degree = np.diag(np.maximum(weights.sum(1), 1e-12))
    # a shift a little below 0, where D - W itself cannot be inverted
    values, vectors = eigsh(degree - weights, k=min(count, len(patches) - 1), M=degree, sigma=-1e-3, which="LM")
    order = np.argsort(values)
    vectors = vectors[:, order].T
    return values[order], np.array([-v if 0.5 < (v > 0).mean() < 1 else v for v in vectors])
