"""Rows of features as a binary tree of parts by Ward's linkage, and the parts that the tree falls into from its root.

The clustering of zero-guidance segmentation (Rewatbowornwong et al., ICCV 2023) and the splitting of its supplement.
"Least combined variance" is Ward's criterion (1963), weighted by size, wherever rows lie. Clusters that are mutually
nearest may merge at once without changing the tree, for no merge brings others nearer (Bruynooghe 1978).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

KEPT = {"cpu": 8_000, "cuda": 5_500}  # clusters from which on all distances stay in memory: 512 and 242 MB
BLOCK = {"cpu": 4 << 20, "cuda": 32 << 20}  # float64 values that are made at once: near a CPU's cache, or 256 MB
MANY = "many_segments"


@dataclass(frozen=True)
class Tree:
    """Merges in order of height, numbered as scipy's linkage does: rows are 0 to n - 1, merge i is n + i."""

    children: np.ndarray  # int64 (n - 1, 2), the smaller number first
    heights: np.ndarray  # float64 (n - 1): the root of twice the growth of the sum of squares


class Split(NamedTuple):
    """The parts of rows."""

    labels: np.ndarray  # int64 (n,): the part of each row
    tree_ids: list[int]  # of each part: the root has 0, the children of t have 2 t + 1 and 2 t + 2
    note: str  # "" or many_segments


def ward(rows: np.ndarray, *, device: str = "cpu", kept: int | None = None) -> Tree:
    """Ward's tree of rows, float (n, D), n at least 1: as `scipy.cluster.hierarchy.ward` but for the order of ties.

    In float64. Equal rows merge first, at height 0, and count as many from then on. device: where distances are
    computed. kept: from how many clusters on all distances stay in memory, 8 kept^2 bytes (KEPT). O(n^2 D) time.
    """
    import torch

    group = _groups(rows)
    order = group.argsort(kind="stable")
    is_first = np.diff(group[order], prepend=-1) > 0
    first, again = order[is_first], order[~is_first]  # row of each group, other rows
    points = torch.from_numpy(rows[first].astype(np.float64)).to(device)
    sizes = torch.from_numpy(np.bincount(group).astype(np.float64)).to(device)
    found = [(first[group[again]], again, np.zeros(len(again)))]
    for left, right, heights in _rounds(points, sizes, KEPT[device] if kept is None else kept):
        found.append((first[left], first[right], heights))
    return _numbered(*(np.concatenate(part) for part in zip(*found, strict=True)))


def _groups(rows: np.ndarray) -> np.ndarray:
    """A number for each row, (n,), that equal rows share; from 0 in the order of the rows."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault((row + 0.0).tobytes(), len(numbers)) for row in rows])  # -0.0 becomes 0.0


def _rounds(points: Tensor, sizes: Tensor, kept: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Merges of all mutually nearest clusters, round by round: one point of each cluster (two arrays), and heights.

    points: float64 (n, D), the means. sizes: float64 (n,).
    """
    import torch

    numbers = todo = torch.arange(len(points), device=points.device)  # of a point in each cluster; of unknown nearest
    nearest, cost, squares = torch.empty_like(numbers), torch.empty_like(sizes), None
    while len(points) > 1:
        if squares is None and len(points) <= kept:
            squares = _all_squares(points)
        if squares is None and len(todo) == len(points):
            _look_first(points, sizes, nearest, cost)
        else:
            _look(points, sizes, squares, todo, nearest, cost)
        here = torch.arange(len(points), device=points.device)
        a = ((nearest[nearest] == here) & (here < nearest)).nonzero()[:, 0]
        if not len(a):  # a ring of equal distances that rounding made
            lowest = cost.argmin()
            a = torch.minimum(lowest, nearest[lowest])[None]
            nearest[a] = torch.maximum(lowest, nearest[lowest])
        b = nearest[a]
        yield numbers[a].cpu().numpy(), numbers[b].cpu().numpy(), (2 * cost[a]).sqrt().cpu().numpy()
        is_left = torch.ones_like(here, dtype=torch.bool)
        is_left[b] = False
        left, where = is_left.nonzero()[:, 0], is_left.cumsum(0) - 1
        where[b] = where[a]  # the new number of each cluster
        share = sizes[a] / (sizes[a] + sizes[b])
        if squares is not None:
            squares = _merged(squares, a, b, share, left)
        points[a] = share[:, None] * points[a] + (1 - share)[:, None] * points[b]
        sizes[a] += sizes[b]
        is_changed = ~is_left
        is_changed[a] = True
        # who had none of these as nearest has it still, for no merge brings others nearer
        todo = (is_changed | is_changed[nearest])[left].nonzero()[:, 0]
        points, sizes, numbers, cost = (each[left] for each in (points, sizes, numbers, cost))
        nearest = where[nearest[left]]


def _look_first(points: Tensor, sizes: Tensor, nearest: Tensor, cost: Tensor) -> None:
    """As `_look`, for all clusters: each pair is looked at once."""
    import torch

    norms = points.square().sum(1)
    cost.fill_(float("inf"))
    for here in _steps(points):
        later = slice(here.start, None)
        growth = _squares(points[here], points[later], norms[here], norms[later]).mul_(sizes[here, None])
        growth.mul_(sizes[later]).div_(sizes[here, None] + sizes[later]).fill_diagonal_(float("inf"))
        for who, axis in ((here, 1), (later, 0)):
            least, place = growth.min(axis)
            is_nearer = least < cost[who]
            nearest[who] = torch.where(is_nearer, place + here.start, nearest[who])
            cost[who] = torch.minimum(least, cost[who])


def _look(points, sizes, squares, todo, nearest, cost) -> None:
    """Write the nearest cluster of those in `todo` (of several the first), and the growth of the sum of squares."""
    norms = points.square().sum(1)
    for here in _steps(points, len(todo)):
        some = todo[here]
        growth = _squares(points[some], points, norms[some], norms) if squares is None else squares[some]
        growth.mul_(sizes).div_(sizes[some, None] + sizes).scatter_(1, some[:, None], float("inf"))
        least, nearest[some] = growth.min(1)
        cost[some] = least * sizes[some]


def _steps(points: Tensor, count: int | None = None) -> Iterator[slice]:
    """Slices of `count` rows, or of all, that have no more than BLOCK values with each of the points."""
    step = max(1, BLOCK[points.device.type] // len(points))
    return (slice(start, start + step) for start in range(0, len(points) if count is None else count, step))


def _all_squares(points: Tensor) -> Tensor:
    """Squared distances of all points from each other: float64 (n, n)."""
    norms, found = points.square().sum(1), points.new_empty(len(points), len(points))
    for here in _steps(points):
        later, beyond = slice(here.start, None), slice(here.stop, None)
        rows = _squares(points[here], points[later], norms[here], norms[later])
        found[here, later] = rows
        found[beyond, here] = rows[:, here.stop - here.start :].T
    return found


def _squares(some: Tensor, points: Tensor, their: Tensor, norms: Tensor) -> Tensor:
    """Squared distances of some points from all, (s, n), by their squared norms."""
    return (some @ points.T).mul_(-2).add_(their[:, None]).add_(norms).clamp_(min=0)


def _merged(squares: Tensor, a: Tensor, b: Tensor, share: Tensor, left: Tensor) -> Tensor:
    """Squared distances between means once clusters a and b are one, of which `share` is a's, in the memory of all.

    That from the mean of two is the mean of both less their own (Lance and Williams 1967).
    """
    import torch

    own, count = share * (1 - share) * squares[a, b], len(left)
    for rows in _steps(squares, len(a)):
        mixed = squares[a[rows]].mul_(share[rows, None]).addcmul_(squares[b[rows]], 1 - share[rows, None])
        squares[a[rows]] = mixed.sub_(own[rows, None])
    found = squares.view(-1)[: count * count].view(count, count)
    for here in _steps(squares, count):  # row i of the smaller matrix ends before row left[i] of the larger
        rows = squares[left[here]]
        columns, others, kept = (index.expand(len(rows), -1) for index in (a, b, left))
        mixed = rows.gather(1, columns).mul_(share).addcmul_(rows.gather(1, others), 1 - share).sub_(own)
        torch.gather(rows.scatter_(1, columns, mixed), 1, kept, out=found[here])
    return found


def _numbered(left: np.ndarray, right: np.ndarray, heights: np.ndarray) -> Tree:
    """The tree of merges in any order, each told by a row on either side, (n - 1,) all."""
    count, order = len(left) + 1, heights.argsort(kind="stable")
    above, children = list(range(2 * count - 1)), np.empty((count - 1, 2), np.int64)
    for i, (a, b) in enumerate(zip(left[order].tolist(), right[order].tolist(), strict=True)):
        for side, node in enumerate((a, b)):
            while above[node] != node:  # halved on the way
                above[node] = above[above[node]]
                node = above[node]
            children[i, side] = node
            above[node] = count + i
    return Tree(np.sort(children, 1), heights[order])


def split(
    rows: np.ndarray, tree: Tree, *, t_dino: float = 0.9, num_parts: int | None = 20, max_segments: int = 64,
    splits: str = "all", force_root_split: bool = False,
) -> Split:  # fmt: skip
    """The parts that a tree of rows falls into, the highest merges first, where its sides are unlike.

    rows: float (n, D) of length 1. A node is split if the cosine of the means of its two sides is at most t_dino.
    num_parts: looks at as many nodes less one, the highest ones, also at those inside a node that stays whole; None: at
    all that are no part of such a one, until there are max_segments. splits: "first_half" looks at num_parts / 2 only
    (released code). force_root_split: the root is split whatever the cosine (released code). Equal rows never are.
    Parts are numbered in the order in which splitting made them.
    """
    count = len(rows)
    order, start, stop = _leaves(tree)
    sums = np.concatenate([np.zeros((1, rows.shape[1])), rows[order].cumsum(0, dtype=np.float64)])
    budget = count if num_parts is None else num_parts // 2 if splits == "first_half" else num_parts - 1
    root, note = 2 * count - 2, ""
    whole, frontier = {root: 0}, [-root]  # tree ids of the nodes that are parts; what may be looked at, highest first
    for _ in range(budget):
        if not frontier or (node := -heapq.heappop(frontier)) < count:
            break
        sides = tree.children[node - count].tolist()
        similarity = _cosine(*(sums[stop[side]] - sums[start[side]] for side in sides))
        is_unlike = tree.heights[node - count] > 0 and similarity <= t_dino
        is_split = node in whole and (is_unlike or (node == root and force_root_split))
        if num_parts is None and is_split and len(whole) >= max_segments:
            note = MANY
            break
        if is_split:
            above = whole.pop(node)
            whole |= {sides[0]: 2 * above + 1, sides[1]: 2 * above + 2}
        if is_split or num_parts is not None:
            for side in sides:
                heapq.heappush(frontier, -side)
    labels = np.empty(count, np.int64)
    for label, node in enumerate(whole):
        labels[order[start[node] : stop[node]]] = label
    return Split(labels, list(whole.values()), note)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors; 0 where one has no length."""
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def _leaves(tree: Tree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All rows in an order in which those of each node (2 n - 1) lie together, and where these start and stop."""
    count, pairs = len(tree.children) + 1, tree.children.tolist()
    sizes, start = [1] * count, [0] * (2 * count - 1)
    for a, b in pairs:
        sizes.append(sizes[a] + sizes[b])
    for node in range(2 * count - 2, count - 1, -1):
        a, b = pairs[node - count]
        start[a], start[b] = start[node], start[node] + sizes[a]
    return np.argsort(start[:count]), np.array(start), np.add(start, sizes)
