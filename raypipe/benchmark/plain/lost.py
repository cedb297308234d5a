"""LOST with all similarities of an image in memory, summed over rows of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import with_features


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """In full batches, against one image at a time on the CPU."""

    def plain(image: np.ndarray, features) -> np.ndarray:
        grid = components(features.patches.cpu().numpy(), features.grid, k_patches=method.k_patches)
        return features.enlarged(grid, image.shape[:2])[None]

    return with_features(method, device, images, repeats, plain=plain, against="the P x P similarities in numpy")


def components(patches: np.ndarray, grid: tuple[int, int], *, k_patches: int) -> np.ndarray:
    """The object on the grid, bool (h, w), of patches (P, D)."""
    from skimage.measure import label

    similarities = patches @ patches.T
    degree = (similarities > 0).sum(1) - (np.diag(similarities) > 0)
    order = np.argsort(degree, kind="stable")
    seed, potentials = order[0], order[:k_patches]
    similar = potentials[similarities[seed, potentials] > 0]
    foreground = similarities[similar].sum(0).reshape(grid) > 0
    parts = label(foreground, background=-1, connectivity=1)
    return parts == parts.flat[seed]
