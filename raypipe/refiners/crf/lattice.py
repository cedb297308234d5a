"""Gaussian filter of values at any points, on a permutohedral lattice (Adams, Baek, Davis, Eurographics 2010).

The sum over all pairs of points, exp(-|f_i - f_j|^2 / 2) v_j, approximated in time linear in their number: every value
goes to the d + 1 corners of the simplex around its point (splat), the corners mix with their neighbours along each
axis of the lattice (blur), and every point reads its corners (slice). Vertices are found by sorting, not by hashing, so
that whole images are a few calls on a CPU or a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Lattice:
    """The filter for fixed points. Its result is off by a factor that is the same everywhere."""

    def __init__(self, points: torch.Tensor, groups: torch.Tensor | None = None):
        """points: float64 (P, d), in units of the Gaussian's sigma. groups: int64 (P,); points of two do not mix.

        Raises ValueError when the points spread so far that their vertices cannot be counted.
        """
        import torch

        corners, weights = simplices(points)
        keys, steps = packed(corners, groups)
        ordered, order = torch.sort(keys.flatten(), stable=True)
        vertices, gifts = torch.unique_consecutive(ordered, return_counts=True)  # (V,)
        names = torch.arange(len(vertices), dtype=torch.int32, device=points.device)
        self.corner = torch.empty_like(order, dtype=torch.int32)
        self.corner[order] = names.repeat_interleave(gifts)
        self.corner = self.corner.view_as(keys)  # (P, d + 1)
        self.weights = weights
        self.source = (order // keys.shape[1]).int()  # points by the vertex that they give to
        self.source_weights = weights.flatten()[order]
        ends = torch.cumsum(gifts, 0)
        self.first = torch.cat([ends - gifts, ends[-1:]]).int()  # one more vertex stands for absent ones
        self.blurs = [neighbours(vertices, step) for step in steps]
        self.kernel = weights.new_tensor([1.0, 0.5, 0.5]).repeat(len(vertices) + 1, 1)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Filter float32 (P, C), every column by itself; so is the result."""
        from torch.nn.functional import embedding_bag as gather  # sums weighted rows, on a GPU in a fixed order too

        at = gather(self.source, values, self.first, mode="sum", per_sample_weights=self.source_weights)  # (V + 1, C)
        for three in self.blurs:
            at = gather(three, at, mode="sum", per_sample_weights=self.kernel)
        return gather(self.corner, at, mode="sum", per_sample_weights=self.weights)


def simplices(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Corners of the simplex around each point, and how the point is a mean of them.

    points: float64 (P, d). Returns int64 (P, d + 1, d), the first d of the corners' d + 1 coordinates, whose sum is 0,
    and float32 (P, d + 1), their weights.
    """
    import torch

    d = points.shape[1]
    elevated = points @ elevation(d).to(points).T  # (P, d + 1)
    # The nearest point of the lattice whose coordinates are multiples of d + 1, ties down; their sum may not be 0 yet.
    multiple = torch.ceil(elevated / (d + 1) - 0.5)
    rest = elevated - multiple * (d + 1)
    earlier = torch.ones(d + 1, d + 1, dtype=torch.bool, device=points.device).tril(-1)
    mine, other = rest[:, :, None], rest[:, None, :]
    rank = ((other > mine) | ((other == mine) & earlier)).sum(2) + multiple.sum(1, keepdim=True).long()
    turn = (rank < 0).long() - (rank > d).long()  # to where the sum is 0
    multiple, rank = multiple.long() + turn, rank + turn * (d + 1)

    offset = elevated / (d + 1) - multiple
    by_rank = torch.empty_like(offset).scatter_(1, rank, offset).flip(1)
    weights = by_rank - by_rank.roll(1, 1)
    weights[:, 0] += 1

    corner = torch.arange(d + 1, device=points.device)[:, None]
    beyond = rank[:, None, :d] > d - corner  # (P, d + 1, d)
    return (multiple[:, None, :d] - beyond.long()) * (d + 1) + corner, weights.float()


def elevation(d: int) -> torch.Tensor:
    """The matrix (d + 1, d) that takes points to the plane of sum 0, float64; scaled for blurs of sigma 1."""
    import torch

    matrix = torch.ones(d + 1, d, dtype=torch.float64).triu()
    matrix[1:] -= torch.diag(torch.arange(1.0, d + 1, dtype=torch.float64))
    axis = torch.arange(d, dtype=torch.float64)
    return matrix * (d + 1) * torch.sqrt(2 / (3 * (axis + 1) * (axis + 2)))


def packed(corners: torch.Tensor, groups: torch.Tensor | None) -> tuple[torch.Tensor, list[int]]:
    """Corners int64 (P, d + 1, d) as one number each, int64 (P, d + 1), and what a step along each axis adds to it.

    With room at both ends of every coordinate, so that a step never leads to the other side.
    """
    d = corners.shape[2]
    low, high = corners.amin((0, 1)).tolist(), corners.amax((0, 1)).tolist()
    radices = [last - first + 1 + 2 * d for first, last in zip(low, high, strict=True)]
    strides, total = [], 1
    for radix in reversed(radices):
        strides, total = [total, *strides], total * radix
    count = 1 if groups is None else int(groups.max()) + 1
    if total * count > 2**62:
        raise ValueError("crf: kernels are too narrow for an image of this size; raise sxy or srgb or reduce it")
    keys = sum((corners[..., j] - low[j] + d) * strides[j] for j in range(d))
    if groups is not None:
        keys = keys + groups[:, None] * total
    back = -sum(strides)
    return keys, [*(back + (d + 1) * stride for stride in strides), back]


def neighbours(vertices: torch.Tensor, step: int) -> torch.Tensor:
    """Each vertex and those one step before and after it: int32 (V + 1, 3). vertices: int64 (V,), sorted.

    V stands for a vertex that is not there, in the last line too.
    """
    import torch

    count = len(vertices)
    three = torch.full((count + 1, 3), count, dtype=torch.int32, device=vertices.device)
    three[:, 0] = torch.arange(count + 1, device=vertices.device)
    after = torch.searchsorted(vertices, vertices + step).clamp(max=count - 1)
    here = torch.nonzero(vertices[after] == vertices + step)[:, 0]
    three[here, 1] = after[here].int()
    three[after[here], 2] = here.int()
    return three
