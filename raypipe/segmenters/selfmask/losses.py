"""What SelfMask learns from: each query's mask is to be the given one, and queries of better masks are to be surer.

Shin, Albanie, Xie, "Unsupervised Salient Object Detection with Spectral Cluster Voting", CVPR Workshops 2022. Pure
functions of tensors, differentiable, in their masks' precision: float32, for sums over an image's pixels need it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Order = Literal["corrected", "reference"]


def losses(masks: Tensor, objectness: Tensor, targets: Tensor, *, order: Order = "corrected") -> dict[str, Tensor]:
    """`dice` and `ranking`, summed over blocks and queries, means over the batch. Nothing weighs them.

    masks: probabilities (B, L, Q, h, w) after each of L blocks. objectness: (B, L, Q, 1) in [0, 1]. targets: (B, H, W),
    bool or float in [0, 1]: one mask per image, which all queries are to give; an empty one, as of an object that an
    augmentation lost, costs nothing. order: see `ranking`.
    """
    costs, is_there = dice(masks, targets), targets.flatten(1).any(1)
    terms = {"dice": costs, "ranking": ranking(costs.detach(), objectness[..., 0], order=order)}
    return {name: (values.flatten(1).sum(1) * is_there).sum() / len(masks) for name, values in terms.items()}


def dice(masks: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 p.t + 1) / (sum p + sum t + 1) of masks p (B, L, Q, h, w) and targets t (B, H, W), at the targets' size.

    Returns (B, L, Q). The masks are not enlarged: bilinear enlarging is linear, so its transpose takes the one target
    of an image to the grid of its hundred masks, with the same sums.
    """
    targets, sides = targets.to(masks.dtype), zip(masks.shape[3:], targets.shape[1:], strict=True)
    rows, columns = (_enlarging(cells, side, like=masks) for cells, side in sides)
    inside = (rows @ targets @ columns.mT).flatten(1)  # (B, h * w): what each cell of a mask counts within the target
    anywhere = (rows.sum(1)[:, None] * columns.sum(1)).flatten().expand_as(inside)
    overlap, size = (masks.flatten(3).flatten(1, 2) @ torch.stack([inside, anywhere], dim=2)).unbind(2)  # (B, L * Q)
    costs = 1 - (2 * overlap + 1) / (size + targets.sum((1, 2))[:, None] + 1)
    return costs.unflatten(1, masks.shape[1:3])


def ranking(costs: Tensor, objectness: Tensor, *, order: Order = "corrected") -> Tensor:
    """How much surer worse queries are, summed over the pairs of queries of each block: (B, L). Both: (B, L, Q).

    order: `corrected` charges max(0, o_worse - o_better), where the worse of two has the larger cost. `reference` is
    the released code's, which has them the wrong way round and teaches queries to be surer of worse masks.
    """
    better = costs[..., :, None] < costs[..., None, :]  # than the query along the last axis
    if order == "reference":
        better = better.mT
    return (better * (objectness[..., None, :] - objectness[..., :, None]).relu()).sum((-2, -1))


def _enlarging(cells: int, side: int, *, like: Tensor) -> Tensor:
    """What each of `cells` values in a line adds to each of `side` when they are enlarged: (cells, side)."""
    return F.interpolate(torch.eye(cells, dtype=like.dtype, device=like.device)[None], size=side, mode="linear")[0]
