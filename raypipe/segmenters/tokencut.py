"""TokenCut: the normalised cut of a graph whose patches are joined where a network finds them alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import masks, spectral
from raypipe.segmenters._discovery import COLOR, Discovery, by_grid
from raypipe.types import Segments

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.features.grid import Features

AT_ONCE = 1 << 28  # similarities in memory: 1 GB, of 16 images of 480 px and more with patches of 8 px
UNDEFINED = 1e-6  # gap below which they are equally good but for rounding
FEW = 2  # patches among which there is nothing to choose


@dataclass
class Tokencut(Discovery):
    """One mask: what the normalised cut of an image's patches sets apart, connected with the patch that stands out.

    The score is the gap between the second and the third eigenvalue: the larger, the clearer the cut. Notes:
    `degenerate`, the image has one colour, all patches are alike or none are, or several cuts are equally good: the
    mask is empty, with `result` box the whole image; `ambiguous_cut`, a gap below 0.001: another cut is nearly as good;
    `few_patches`, one or two.
    """

    # Defaults are the paper's and its reference's.
    result: Literal["mask", "box"] = "mask"  # mask: the image is resized to whole patches; box: it is padded
    facet: Literal["key", "query", "value", "kqv"] = "key"  # what is compared
    graph: Literal["binary", "weighted"] = "binary"  # patches are alike or not, or by how much
    tau: float = 0.2  # cosine above which two patches are joined; 0 to 0.4 are worth a sweep
    eps: float = 1e-5  # weight between any other two; 1e-6 to 1e-2

    source = "Wang et al., CVPR 2022 and TPAMI 2023"
    licence = "Apache-2.0 (weights)"
    needs = (
        "facebook/dino-vits16, 0.1 GB: fetched on the first run, or by `raypipe weights tokencut`; or `--weights color`"
    )
    stages = {"features": ("graph", "tau", "eps")}

    def __post_init__(self):
        super().__post_init__()
        lowest = 0 if self.graph == "weighted" else -1  # weights are not negative
        if not lowest <= self.tau < 1:
            raise ValueError(f"tokencut: tau must be from {lowest} to below 1, got {self.tau!r}")
        if not 0 < self.eps < 1:
            raise ValueError(f"tokencut: eps must be between 0 and 1, got {self.eps!r}")
        if self.weights == COLOR and self.facet != "key":
            raise ValueError(f"tokencut: facet {self.facet!r} has no effect: weights 'color' is no network")

    @property
    def FIT(self) -> str:
        return "resize" if self.result == "mask" else "pad"

    @property
    def FACET(self) -> str:
        return self.facet

    def find(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> Iterator[Segments]:
        answers = {}
        for group in by_grid(features, lambda each: AT_ONCE // len(each.patches) ** 2):
            answers |= zip(group, self._parts([features[i] for i in group]), strict=True)
        for i, (image, each) in enumerate(zip(images, features, strict=True)):
            part, gap, note = answers[i]
            yield Segments(each.enlarged(part, image.shape[:2])[None], scores=[gap], note=note)

    def _parts(self, features: Sequence[Features]) -> Iterator[tuple[np.ndarray, float, str]]:
        """What is set apart on the grid, bool (h, w), the gap, and a note, for each image of one grid."""
        import torch

        grid, few = features[0].grid, ["few_patches"] * (len(features[0].patches) <= FEW)
        nothing = np.full(grid, self.result == "box")
        if grid == (1, 1):
            yield from [(nothing, 0.0, "degenerate,few_patches")] * len(features)
            return
        cut = self.cut(torch.stack([each.patches for each in features]))
        _, uppers, seeds = (tensor.cpu() for tensor in spectral.orient(cut.vector))
        for upper, seed, value, gap in zip(uppers, seeds, cut.value.tolist(), cut.gap.tolist(), strict=True):
            if gap < UNDEFINED or value > 1 - UNDEFINED:
                yield nothing, 0.0, ",".join(["degenerate", *few])
            else:
                note = ",".join(["ambiguous_cut"] * (gap < spectral.AMBIGUOUS) + few)
                yield masks.component_of(upper.reshape(grid).numpy(), int(seed)), gap, note

    def cut(self, patches: Tensor) -> spectral.Cut:
        """The normalised cuts of images of one grid, by the features of their patches: float32 (B, P, D), P >= 2.

        Joins are decided on similarities in single precision, in place: one float32 (B, P, P) is all that is kept.
        """
        from torch.nn.functional import normalize

        patches = normalize(patches, dim=2)
        weights = patches @ patches.mT
        if self.graph == "binary":
            weights.gt_(self.tau)
        else:
            weights.masked_fill_(weights < self.tau, self.eps)
        weights.diagonal(dim1=1, dim2=2).fill_(1)
        return spectral.second_eigenvectors(weights, eps=self.eps if self.graph == "binary" else 0.0)


SEGMENTER = Tokencut
