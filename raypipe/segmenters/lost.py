"""LOST: the object is what resembles the patch that resembles the fewest others (Simeoni et al., BMVC 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import masks
from raypipe.segmenters._discovery import COLOR, Discovery, by_grid
from raypipe.types import Segments

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.features.grid import Features

AT_ONCE = 1 << 20  # similarities in memory: 4 MB, which a cache can hold
VISIBLE = 0.5  # least share of a patch inside the image, where others are to be left out
FEW = 2  # patches among which none can resemble fewer others than the rest


@dataclass
class Lost(Discovery):
    """One mask: the object, as the connected patches that resemble a seed and the patches like it.

    The seed is the patch that resembles the fewest others, for objects cover less than their surroundings. The score is
    minus that number. Notes: `degenerate`, every patch resembles as many others, so that the seed is the first one: the
    mask is the whole image where all are alike; `few_patches`, one or two in all.
    """

    # Defaults are the paper's and its reference's.
    facet: Literal["key", "query", "value"] = "key"  # what is compared
    k_patches: int = 100  # of lowest degree, of which those like the seed join it; 1 to 200 are worth a sweep
    exclude_padding: bool = False  # leave out patches that are padding for the most part; the reference keeps them
    result: Literal["mask", "box"] = "mask"  # both are the component whose bounding box is the paper's box

    source = "Simeoni et al., BMVC 2021"
    licence = "Apache-2.0 (weights)"
    needs = "facebook/dino-vits16, 0.1 GB: fetched on the first run, or by `raypipe weights lost`; or `--weights color`"
    stages = {"features": ("k_patches", "exclude_padding", "result")}

    def __post_init__(self):
        super().__post_init__()
        if self.k_patches < 1:
            raise ValueError(f"lost: k_patches must be at least 1, got {self.k_patches!r}")
        if self.weights == COLOR and self.facet != "key":
            raise ValueError(f"lost: facet {self.facet!r} has no effect: weights 'color' is no network")

    @property
    def FACET(self) -> str:
        return self.facet

    def of_one_colour(self, image: np.ndarray) -> Segments:
        return Segments(np.ones((1, *image.shape[:2]), bool), note="degenerate")  # all patches are like the seed

    def find(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> Iterator[Segments]:
        answers = {}
        for group in by_grid(features):
            answers |= zip(group, self._components([features[i] for i in group]), strict=True)
        for i, (image, each) in enumerate(zip(images, features, strict=True)):
            component, degree, note = answers[i]
            yield Segments(each.enlarged(component, image.shape[:2])[None], scores=[-degree], note=note)

    def _components(self, features: Sequence[Features]) -> Iterator[tuple[np.ndarray, int, str]]:
        """The object on the grid, bool (h, w), the seed's degree, and a note, for each image of one grid."""
        import torch

        kept = torch.from_numpy(np.stack([self._kept(each) for each in features])).to(features[0].patches.device)
        patches = torch.stack([each.patches for each in features])
        found = expand(patches * kept[..., None], self.k_patches, kept)
        low, high, seeds, likeness = (tensor.cpu().numpy() for tensor in found)
        for each, least, most, seed, like in zip(features, low, high, seeds, likeness, strict=True):
            note = ("degenerate" if len(like) > FEW else "few_patches") if least == most else ""
            # where rounding puts the seed itself into the background, it is a mask alone
            yield masks.component_of((like > 0).reshape(each.grid), seed), int(least), note

    def _kept(self, features: Features) -> np.ndarray:
        """The patches that take part, bool (P,): all of them or, without padding, those that lie in the image."""
        if not self.exclude_padding:
            return np.ones(len(features.patches), bool)
        rows, columns = (
            ((seen - np.arange(cells) * features.patch) / features.patch).clip(0, 1)
            for seen, cells in zip(features.seen, features.grid, strict=True)
        )
        kept = (np.outer(rows, columns) >= VISIBLE).ravel()
        return kept if kept.any() else ~kept  # of an image thinner than half a patch every patch is mostly padding


def expand(patches: Tensor, k_patches: int, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The seed of each image, and how much each patch is like the seed and its kin (LOST, eq. 1 to 4).

    patches: float32 (B, P, D). kept: bool (B, P), the patches that take part; the vectors of others are 0.
    Returns the lowest and highest degree int64 (B,), the seed int64 (B,), of equal degrees the first, and the likeness
    float32 (B, P): the sum of the products with the patches among the `k_patches` of lowest degree that have a positive
    product with the seed. That is one product with their sum, the P x P matrix is not kept.
    """
    degree = degrees(patches)
    highest = degree.masked_fill(~kept, -1).amax(1)
    degree = degree.masked_fill(~kept, patches.shape[1])
    order = degree.argsort(dim=1, stable=True)[:, :k_patches]
    lowest = patches.gather(1, order[..., None].expand(-1, -1, patches.shape[2]))  # (B, k, D)
    similar = lowest @ lowest[:, 0, :, None] > 0  # (B, k, 1)
    likeness = patches @ (lowest * similar).sum(1)[..., None]
    return degree.amin(1), highest, order[:, 0], likeness[..., 0]


def degrees(patches: Tensor) -> Tensor:
    """How many other patches have a positive product with each: int64 (B, P) of float32 (B, P, D)."""
    batch, count, _ = patches.shape
    rows = max(1, AT_ONCE // (batch * count))
    total = patches.new_zeros(batch, count)  # single precision counts up to 16 million exactly
    for first in range(0, count, rows):  # the matrix is symmetric: what lies below a block is right of it
        positive = (patches[:, first : first + rows] @ patches[:, first:].mT).gt_(0)
        itself = positive.diagonal(dim1=1, dim2=2)
        total[:, first : first + rows] += positive.sum(2) - itself
        total[:, first + rows :] += positive[:, :, rows:].sum(1)
    return total.long()


SEGMENTER = Lost
