"""SelfMask, a detector of the salient object that was trained on masks which nobody drew.

Shin, Albanie, Xie, "Unsupervised Salient Object Detection with Spectral Cluster Voting", CVPR Workshops 2022, section
3.3. Here is the method; `network` is its network, `losses` is what that learns from in `training.selfmask`: masks that
another method found, such as `spectral_voting`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks
from raypipe.features.dino import Dino
from raypipe.features.grid import Features
from raypipe.segmenters._discovery import COLOR, Discovery, by_grid
from raypipe.types import BadImage, Segments

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.segmenters.selfmask.network import MaskFormer

PUBLISHED = "https://github.com/NoelShin/selfmask/releases/download/v1.0.0/selfmask_nq20.pt"  # the authors' README


@dataclass
class SelfMask(Discovery):
    """One soft mask: the salient object, by the query that is surest of its mask.

    The score is the query's objectness in 0..1. It orders the queries of one image; between images it says little. An
    image of one colour has an empty mask (note `degenerate`).
    """

    weights: str = PUBLISHED  # a URL, a file or a folder; 20 queries, of DUTS-TE's 65.3 % IoU (10: selfmask_nq10.pt)

    source = "Shin, Albanie, Xie, CVPR Workshops 2022"
    licence = "MIT (weights)"
    licences, model_types = {"weights": "MIT"}, {"weights": "selfmask"}
    needs = "the authors' selfmask_nq20.pt, 0.14 GB: fetched on the first run, or by `raypipe weights selfmask`"
    soft = True
    FACET, POSITIONS = "token_norm", "hf"

    def __post_init__(self):
        if self.weights == COLOR:
            raise ValueError("selfmask: weights 'color' are no network that was trained to find objects; name one")
        super().__post_init__()

    def network(self, path: Path, device: str) -> Dino:
        from raypipe.segmenters.selfmask import network

        self.use(network.read(path, method=self.name).to(device), device)
        return self._dino

    def use(self, network: MaskFormer, device: str) -> None:
        """Label with a network on a device that is no file, such as one under training, in the place of `load`."""
        options = {"method": self.name, "device": device, "dtype": self.dtype, "positions": self.POSITIONS}
        self._network, self._device, self._dino = network, device, Dino(network.encoder, **options)

    def find(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> Iterator[Segments]:
        import torch

        answers = {}
        for group in by_grid(features):
            with torch.inference_mode(), networks.autocast(self._device, self.dtype):
                patches = torch.stack([features[i].patches for i in group])
                masks, objectness = self._network.best(patches, features[group[0]].grid)
            answers |= zip(group, zip(masks, objectness.tolist(), strict=True), strict=True)
        for i, (image, each) in enumerate(zip(images, features, strict=True)):
            mask, score = answers[i]
            if not (np.isfinite(score) and mask.isfinite().all()):
                raise BadImage("segment", "non_finite", "the decoder gives values that are no finite numbers")
            yield Segments(at_size(mask, each, image.shape[:2]).cpu().numpy()[None], scores=[score])


def at_size(mask: Tensor, features: Features, size: tuple[int, int]) -> Tensor:
    """A mask of two cells a patch each way (2h, 2w), float32 in [0, 1], at an image's size (H, W), bilinear."""
    from torch.nn.functional import interpolate

    whole = tuple(side * features.patch for side in features.grid)
    seen = interpolate(mask[None, None], size=whole, mode="bilinear")[..., : features.seen[0], : features.seen[1]]
    if features.seen != tuple(size):  # it was reduced
        seen = interpolate(seen, size=size, mode="bilinear")
    return seen[0, 0].clamp(0, 1)


SEGMENTER = SelfMask
