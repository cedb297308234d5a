"""What MOVE trains its masks with: objects moved over an inpainted background, and losses of the masks themselves.

Pure functions of tensors, differentiable. Images are float (B, C, H, W) in any range, masks (B, 1, H, W) in [0, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import avg_pool2d, max_pool2d, pad, relu

REACH = 0.125  # of the shorter side, how far an object is moved at most (Bielski and Favaro, NeurIPS 2022)
TILE = 16  # px a side of the inpainting network's patches: masks are also judged at that scale
MIN_AREA = 0.05  # of the image, below which a mask costs (reference)
AREA_WEIGHT = 100.0
BINARY_WEIGHT = 12.5
WARM_UP = 2500  # steps of the segmenter until the weight of binary masks is reached (reference)


class Parts(NamedTuple):
    """What of a composite comes from where, after an object was moved."""

    image: torch.Tensor  # (B, C, H, W), moved
    foreground: torch.Tensor  # (B, 1, H, W), the mask moved
    hole: torch.Tensor  # (B, 1, H, W), where the object was and is not any more
    keep: torch.Tensor  # (B, tiles), 1 where a tile of the background is as it was, 0 where it is to be inpainted


def draw_shifts(count: int, size: tuple[int, int], *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random shifts (dx, dy) in px, uniform up to REACH of the shorter side and rounded: int64 (count, 2)."""
    return ((torch.rand(count, 2, generator=generator) * 2 - 1) * REACH * min(size)).round().long()


def shift(x: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Move each image right by dx and down by dy px; zeros enter. x: (B, C, H, W). shifts: (B, 2) integers (dx, dy)."""
    return torch.stack([pad(one, (dx, -dx, dy, -dy)) for one, (dx, dy) in zip(x, shifts.tolist(), strict=True)])


def take_apart(image: torch.Tensor, mask: torch.Tensor, shifts: torch.Tensor) -> Parts:
    """Move image and mask, and find what the move uncovers. Sides must be multiples of TILE.

    What the object covers after the move need not be inpainted well, but must not be seen by the inpainting network
    either: a copy of it at its old place would give the object away.
    """
    image, foreground = shift(image, shifts), shift(mask, shifts)
    hole = mask * (1 - foreground)
    keep = 1 - max_pool2d(hole + foreground, TILE).flatten(1)
    return Parts(image, foreground, hole, keep)


def paste(image: torch.Tensor, background: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The image where the mask is 1, the background where it is 0.

    Moved image, inpainted background and moved mask give the composite; the image, inpainted background and mask in
    their places a real one; moved image over the image itself the copy that the discriminator learns to refuse.
    """
    return image * mask + background * (1 - mask)


def mask_losses(mask: torch.Tensor, *, min_area: float = MIN_AREA) -> dict[str, torch.Tensor]:
    """`binary` and `area` of a mask, and the same of its means and of its maxima over tiles.

    binary: the mean distance to 0 or 1, whichever is nearer. area: how far each mask stays below `min_area`, on
    average. Keys are `binary`, `binary_mean`, `binary_max`, `area`, `area_mean`, `area_max`.
    """
    scales = {"": mask, "_mean": avg_pool2d(mask, TILE), "_max": max_pool2d(mask, TILE)}
    binary = {f"binary{name}": torch.minimum(values, 1 - values).mean() for name, values in scales.items()}
    area = {f"area{name}": relu(min_area - values.mean((-2, -1))).mean() for name, values in scales.items()}
    return binary | area


def weighted(losses: dict[str, torch.Tensor], step: int = WARM_UP) -> torch.Tensor:
    """The sum of mask losses. step: how often the segmenter was updated; the weight of `binary` grows until WARM_UP."""
    binary = BINARY_WEIGHT * min(1.0, step / WARM_UP)
    return sum(loss * (binary if name.startswith("binary") else AREA_WEIGHT) for name, loss in losses.items())
