"""The parts of one image: the tree of its keys, its splitting, and a dense CRF that moves edges to the image's.

Zero-guidance segmentation (Rewatbowornwong et al., ICCV 2023), section 3.1 and its supplement.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raypipe.features.grid import resized
from raypipe.segmenters.zero_guidance.tree import split, ward


class Parts(NamedTuple):
    """The parts of an image at the working size."""

    segment_map: np.ndarray  # int16 (h, w): the part of each pixel, 0 to K - 1
    tree_ids: list[int]  # of each part
    note: str  # "" or many_segments


def parts(
    image: np.ndarray, rows: np.ndarray, grid: tuple[int, int], size: tuple[int, int], *, device: str = "cpu", **options
) -> Parts:
    """The parts of an image, by the dense CRF of zero-guidance segmentation at a size (height, width).

    image: RGB uint8 (H, W, 3). rows: float32 (n, D) of length 1 on a grid (h, w), row-major. options: as of `split`.
    A part that loses all its pixels to others is gone, with its tree id.
    """
    from raypipe.refiners.crf.meanfield import dense_crf

    labels, tree_ids, note = split(rows, ward(rows, device=device), **options)
    if len(tree_ids) == 1:
        return Parts(np.zeros(size, np.int16), tree_ids, note)
    energies = enlarged(distances(rows, labels, len(tree_ids)).T.reshape(-1, *grid), size)
    _, segment_map = dense_crf(resized(image, size), energies, device=device)
    left, segment_map = np.unique(segment_map, return_inverse=True)
    return Parts(segment_map.astype(np.int16), [tree_ids[label] for label in left], note)


def distances(rows: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Squared distances of rows (n, D) from the mean of each part: float32 (n, count)."""
    centroids = np.stack([rows[labels == label].mean(0, dtype=np.float64) for label in range(count)])
    squares = (rows**2).sum(1)[:, None] - 2 * rows @ centroids.T + (centroids**2).sum(1)
    return squares.clip(0).astype(np.float32)


def enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Planes (k, h, w) at a size (H, W), each pixel as the cell at its place: row i of H is floor(i h / H) of h."""
    rows, columns = (np.arange(size[axis]) * values.shape[axis + 1] // size[axis] for axis in (0, 1))
    return values[:, rows[:, None], columns]
