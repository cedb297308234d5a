"""Graphs of Deep Spectral Methods: how alike the features of two cells are, and how alike their colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    Edges = tuple[Tensor, Tensor]  # ends int64 (2, m), weights float32 (m,)

NEIGHBOURS = ((20, 2.0), (10, 0.1))  # of each cell, and the weight of its position beside its colour (the paper's code)
SIGMA = 0.033  # of a random walk's weights, in differences of colour in [0, 1] (the paper's code)
ZERO = 1e-6  # eigenvalue up to which it is rounding, relative to the degree
FEWEST = 1e-12  # a degree below it counts as 1 (the paper's code)
SPARE = 8  # neighbours looked at beyond those needed: as many as are equally near on a grid of one colour


def likeness(patches: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Cosines of the features of every two cells, negative ones as 0, the largest as 1: float32 (B, n, n).

    patches: float32 (B, P, D), row-major over grid (h, w). cells: the grid of the result; where it is another, unit
    vectors are interpolated to it and stay as they come out. 0 where no two vectors have a positive product.
    """
    from torch.nn.functional import interpolate, normalize

    units = normalize(patches, dim=2)
    if cells != grid:
        picture = units.mT.unflatten(2, grid)  # (B, D, h, w)
        units = interpolate(picture, size=cells, mode="bilinear", align_corners=False).flatten(2).mT
    cosines = (units @ units.mT).clamp_(min=0)
    return cosines.div_(cosines.amax((1, 2), keepdim=True).clamp(min=FEWEST))


def small(image: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    """An image with one pixel per cell, as Pillow reduces it: uint8 (h, w, 3) of RGB uint8 (H, W, 3)."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(cells[::-1], Image.Resampling.BILINEAR))


def nearest_colours(image: np.ndarray, device: str) -> Edges:
    """Pixels that are among each other's nearest in colour and position, twice each: once from either end.

    As in KNN matting (Chen, Li, Tang, CVPR 2012): with positions that count much, then little; an edge in both counts
    twice. image: uint8 (h, w, 3) RGB. Each pixel is its own neighbour.
    """
    import torch

    height, width, _ = image.shape
    places = np.column_stack([np.tile(np.linspace(0, 1, width), height), np.repeat(np.linspace(0, 1, height), width)])
    ends = []
    for count, weight in NEIGHBOURS:
        points = np.column_stack([image.reshape(-1, 3) / 255, weight * places]).astype(np.float32)
        ends.append(neighbours(points.astype(np.float64), min(count, len(points))))
    ends = torch.from_numpy(np.concatenate(ends, 1)).to(device)
    return both_ways(ends, torch.ones(ends.shape[1], device=device))


def neighbours(points: np.ndarray, count: int) -> np.ndarray:
    """Each point with each of its nearest points, itself among them: int64 (2, n * count) of float64 (n, D).

    Of equally near ones the first count: a k-d tree gives some more than are needed, and where those are not all that
    are as near, every point is looked at.
    """
    from scipy.spatial import KDTree

    several = min(count + SPARE, len(points))
    found = KDTree(points).query(points, [*range(1, several + 1)])[1]  # (n, several)
    found.sort(axis=1)  # a stable sort by distance keeps this order among equals
    distance = ((points[:, None] - points[found]) ** 2).sum(2)
    order = distance.argsort(axis=1, kind="stable")
    nearest = np.take_along_axis(found, order[:, :count], 1)
    last, farthest = (np.take_along_axis(distance, order[:, [i]], 1) for i in (count - 1, several - 1))
    for i in np.flatnonzero(last == farthest) if several < len(points) else ():
        nearest[i] = ((points[i] - points) ** 2).sum(1).argsort(kind="stable")[:count]
    return np.stack([np.repeat(np.arange(len(points)), count), nearest.ravel()])


def random_walk(image: np.ndarray, device: str) -> Edges:
    """Pixels side by side, twice each, as alike as exp(-|difference of colours|^2 / sigma^2) (Grady, TPAMI 2006).

    image: uint8 (h, w, 3) RGB. The four neighbours at distance 1, as the method is described. The authors' experiments
    copy PyMatting's window of 3 x 3 instead: the eight around and the pixel itself, those along the border repeated.
    """
    import torch

    index = torch.arange(image.shape[0] * image.shape[1]).reshape(image.shape[:2])
    across, down = (torch.stack(pair).flatten(1) for pair in ((index[:, :-1], index[:, 1:]), (index[:-1], index[1:])))
    ends = torch.cat([across, down], 1).to(device)
    colours = torch.from_numpy(image.reshape(-1, 3) / np.float32(255)).to(device)
    return both_ways(ends, (-((colours[ends[0]] - colours[ends[1]]) ** 2).sum(1) / SIGMA**2).exp())


def both_ways(ends: Tensor, weights: Tensor) -> Edges:
    """Each edge from either end. ends: int64 (2, m). weights: (m,)."""
    import torch

    return torch.cat([ends, ends.flip(0)], 1), weights.repeat(2)


def matrix(graphs: Sequence[Edges], count: int) -> Tensor:
    """Graphs of `count` nodes each beside each other, as one sparse float32 matrix (B * count, B * count).

    Edges between the same nodes are added up.
    """
    import torch

    ends = torch.cat([pair + i * count for i, (pair, _) in enumerate(graphs)], 1)
    weights = torch.cat([each for _, each in graphs])
    size = (len(graphs) * count, len(graphs) * count)
    return torch.sparse_coo_tensor(ends, weights, size, check_invariants=False).coalesce()


def constant_first(values: Tensor, vectors: Tensor, mass: Tensor) -> Tensor:
    """Eigenvectors (B, K, n) with the constant one first, where a graph of several parts has it mixed with others.

    Each part of a graph adds an eigenvalue 0, and of these any orthogonal mixture is a solution; the cut has to be
    orthogonal to the constant. values: (B, K), ascending. mass: (B, n), y^T diag(mass) y = 1.
    """
    turned = vectors.clone()
    for i in (values[:, 1] < ZERO).nonzero()[:, 0].tolist():
        mixed = vectors[i, values[i] < ZERO]  # (Z, n)
        axis = mixed @ mass[i]
        axis = axis / axis.norm()
        axis[0] += axis[0].sign() if axis[0] else 1
        turned[i, : len(mixed)] = mixed - 2 * axis[:, None] * (axis @ mixed) / (axis @ axis)  # a reflection
    return turned
