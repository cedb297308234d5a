"""The parts of one image: the tree of its keys, its splitting, and a dense CRF that moves edges to the image's.

Zero-guidance segmentation (Rewatbowornwong et al., ICCV 2023), section 3.1 and its supplement.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raypipe.segmenters.zero_guidance.tree import Tree, split


class Grown(NamedTuple):
    """An image with the tree of its keys: 20 MB at 448 px and 111 x 111 keys of ViT-S."""

    image: np.ndarray  # RGB uint8 (h, w, 3) at the working size, as DINO sees it
    rows: np.ndarray  # float32 (n, D) of length 1
    grid: tuple[int, int]  # rows and columns of the n keys, row-major
    tree: Tree
    note: str = ""  # or too_small


class Parts(NamedTuple):
    """The parts of an image at the working size."""

    segment_map: np.ndarray  # int16 (h, w): the part of each pixel, 0 to K - 1
    tree_ids: list[int]  # of each part
    note: str  # "", many_segments or too_small


def parts(grown: Grown, *, device: str = "cpu", **options) -> Parts:
    """The parts of an image, by the dense CRF of zero-guidance segmentation. options: as of `split`.

    A part that loses all its pixels to others is gone, with its tree id.
    """
    from raypipe.refiners.crf.meanfield import dense_crf

    image, rows, size = grown.image, grown.rows, grown.image.shape[:2]
    labels, tree_ids, note = split(rows, grown.tree, **options)
    if len(tree_ids) == 1:
        return Parts(np.zeros(size, np.int16), tree_ids, grown.note or note)
    energies = enlarged(distances(rows, labels, len(tree_ids)).T.reshape(-1, *grown.grid), size)
    _, segment_map = dense_crf(image, energies, device=device)
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
