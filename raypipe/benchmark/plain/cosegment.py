"""ReCo's co-segmentation as its formulas read: the matrix of all pairs of pixels, then what is needed of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.processes import peak
from raypipe.benchmark.turns import compared, timed
from raypipe.segmenters.reco import cosegment

IMAGES, WIDTH, SIDE = 50, 384, 14  # of a category; of a DeiT-S/16 at 224 px (paper)


def compare(_subject, _device: str, _images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """On the CPU, on made-up features that have something in common."""
    features, weight = made_up(IMAGES, WIDTH, SIDE)
    arms = [cosegment.supports, supports]
    found = [[timed(arm, features, weight) for arm in arms] for _ in range(repeats)]
    seconds = [[run[i][0] for run in found] for i in range(2)]
    memory = [peak(arm, features, weight)[0] for arm in arms]
    case = f", {IMAGES} images of {SIDE} x {SIDE} x {WIDTH}"
    apart = float((found[0][0][1] - found[0][1][1]).abs().max())
    return [
        *compared("cosegment", seconds, "the matrix of all pairs", per="category", case=case),
        Figure("cosegment", f"memory beside the features{case}", "MB", memory[:1]),
        Figure("cosegment", f"memory beside the features, plain{case}", "MB", memory[1:], "the matrix of all pairs"),
        Figure("cosegment", f"largest difference{case}", "", [apart]),
    ]


def made_up(images: int, width: int, side: int) -> tuple[Tensor, Tensor]:
    """Features (n, D, h, w), a part of which is alike in all, and weights (n, h, w) in (0, 1)."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(images, width, side, side, generator=random)
    features += torch.randn(width, 1, 1, generator=random)
    return features, torch.rand(images, side, side, generator=random)


def supports(features: Tensor, weight: Tensor, *, slices: str = "corrected") -> Tensor:
    """As `cosegment.supports`, whose arguments these are: (n * h * w, n)."""
    count, size = len(features), weight[0].numel()
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)  # (n * h * w, D)
    pixels = pixels / (pixels.norm(dim=1, keepdim=True) + cosegment.EPS)
    pairs = (pixels @ pixels.T).mul_(weight.flatten())
    if slices == "corrected":
        return pairs.unflatten(1, (count, size)).amax(2)
    columns = [pairs[:, j * size : j * size + (j + 1) * size].amax(1) for j in range(count)]  # the start, added twice
    return torch.stack(columns, 1)
