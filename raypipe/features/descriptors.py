"""Forms in which patch features were published as descriptors (Amir et al., "Deep ViT Features", 2021)."""

from __future__ import annotations


def by_dimension(features, heads: int):
    """Features with the heads of a dimension side by side, as Amir et al. save them.

    features: a tensor (..., heads * d), channel = head * d + dimension. Returns channel = dimension * heads + head.
    """
    return features.unflatten(-1, (heads, -1)).transpose(-1, -2).flatten(-2)


def log_binned(features, grid: tuple[int, int], *, hierarchy: int = 2):
    """Each patch with what surrounds it, the coarser the further away: float (P, (1 + 8 * hierarchy) * D).

    features: a tensor (P, D), row-major over the grid (h, w). Of level k = 0, 1, ... means over windows of 3^k patches
    are read at distance 3^k in eight directions, and in the middle for k = 0, rows before columns. Windows count what
    lies inside the image; what would be read outside is read at its edge.
    """
    import torch
    from torch.nn.functional import avg_pool2d

    height, width = grid
    picture = features.T.unflatten(1, grid)[None]  # (1, D, h, w)
    rows, columns = (torch.arange(side, device=features.device) for side in grid)
    bins = []
    for step in (3**k for k in range(hierarchy)):
        means = avg_pool2d(picture, step, stride=1, padding=step // 2, count_include_pad=False)[0]
        for down in (-step, 0, step):
            for right in (-step, 0, step):
                if down or right or step == 1:
                    y, x = (rows + down).clamp(0, height - 1), (columns + right).clamp(0, width - 1)
                    bins.append(means[:, y[:, None], x].flatten(1))  # (D, P)
    return torch.cat(bins).T
