"""Hand-made descriptions of patches by colour, texture and place: features without any weights.

They are no published method. They let the methods on dense features run, in a demonstration or a test, where no network
can be had. A network's features find objects far better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raypipe.features.grid import Features, resized, seen_size, whole

if TYPE_CHECKING:
    from torch import Tensor

# How much each quantity counts beside the others: the best of 200 combinations on 13 photographs with saliency maps of
# U-2-Net, for `lost`, `tokencut`, `deep_spectral` and `spectral_voting` together. Their mean IoU with the maps is 0.50,
# that of the whole image 0.26; neighbouring combinations have 0.45 to 0.49.
WEIGHTS = {"colour": 0.5, "deviation": 0.5, "gradient": 1.0, "middle": 0.75, "border": 1.0}
FLAT = 1 / 255  # deviation of the pixels, of levels in [0, 1], below which an image has one colour
NEAREST = 0.1  # share of the patches along the border that a patch is compared with


def describe(
    image: np.ndarray, patch: int, *, fit: str = "pad", max_side: int = 1024, method: str = "color"
) -> Features:
    """Mean and deviation of the colour of each patch, its gradients, how far out it lies, how unlike the border it is.

    image: RGB uint8 (H, W, 3). patch: side of a patch in px. fit, max_side: see `grid.seen_size`; padding repeats the
    edge. method: whose log lines these are. Each quantity has mean 0 over the image, so that there are negative
    similarities as well as positive ones. Patches of an image of one colour are all alike.
    """
    import torch

    size = seen_size(image.shape[:2], patch, fit, max_side=max_side, method=method)
    levels = _fitted(resized(image, size), whole(size, patch, fit)).astype(np.float32) / 255
    grid = tuple(side // patch for side in levels.shape[:2])
    patches = torch.ones(grid[0] * grid[1], 1)
    if levels.std(axis=(0, 1)).max() > FLAT:
        quantities = _quantities(levels, patch)
        patches = torch.cat([weight * _standardised(quantities[name]) for name, weight in WEIGHTS.items()], 1)
    return Features(patches, grid, patch, size, fit)


def _fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image cropped, or continued with its edge, to the right and below, to a size."""
    image = image[: size[0], : size[1]]
    added = [(0, side - present) for side, present in zip(size, image.shape[:2], strict=True)]
    return np.pad(image, [*added, (0, 0)], "edge")


def _quantities(levels: np.ndarray, patch: int) -> dict[str, Tensor]:
    """What WEIGHTS names, each float32 (P, columns). levels: float32 RGB (H, W, 3) in [0, 1], of whole patches."""
    import cv2
    import torch

    lab = cv2.cvtColor(levels, cv2.COLOR_RGB2LAB)
    colour, square = (_means(values, patch) for values in (lab, lab**2))
    grey = levels.mean(2)
    steps = [np.abs(np.diff(grey, axis=0, append=grey[-1:])), np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))]
    rows, columns = (np.linspace(-1, 1, side, dtype=np.float32) for side in colour.shape[:2])
    border = np.concatenate([colour[0], colour[-1], colour[1:-1, 0], colour[1:-1, -1]])
    maps = {
        "colour": colour,
        "deviation": np.sqrt(np.maximum(square - colour**2, 0)),
        "gradient": _means(np.stack(steps, 2), patch),
        "middle": np.hypot(rows[:, None], columns)[..., None],
    }
    found = {name: torch.from_numpy(values).flatten(0, 1) for name, values in maps.items()}
    distances = torch.cdist(found["colour"], torch.from_numpy(border))
    nearest = distances.topk(max(1, round(NEAREST * len(border))), largest=False).values
    return found | {"border": nearest.mean(1, keepdim=True)}


def _means(values: np.ndarray, patch: int) -> np.ndarray:
    """Means over patches of (H, W, C), H and W multiples of the patch: (h, w, C)."""
    height, width, channels = values.shape
    return values.reshape(height // patch, patch, width // patch, patch, channels).mean((1, 3))


def _standardised(values: Tensor) -> Tensor:
    """Columns (P, C) with mean 0 and together a deviation of 1; a constant column is 0."""
    deviation = values.std(0, correction=0)
    scaled = (values - values.mean(0)) / deviation.where(deviation > 1e-6, float("inf"))
    return scaled / values.shape[1] ** 0.5
