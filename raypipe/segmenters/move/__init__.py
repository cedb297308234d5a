"""MOVE: what can be moved over an inpainted background without anybody noticing is an object.

Trained adversarially and without labels (Bielski and Favaro, NeurIPS 2022). Here are the method and its options.
`network` knows the trained head behind a block of DINO; `losses` what the masks were trained with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks
from raypipe.features.checkpoints import S8, check_checkpoint
from raypipe.features.grid import say_reduced
from raypipe.segmenters._discovery import Discovery
from raypipe.types import BadImage, Segments

if TYPE_CHECKING:
    import torch

    from raypipe.features.grid import Features

UNSET = "none"  # the authors name no file that could be fetched
CHECKPOINTS = "https://github.com/adambielski/move-seg/releases/tag/move_model"


@dataclass
class Move(Discovery):
    """One soft mask: the probability of each pixel to belong to an object that could be moved.

    An image of one colour has an empty mask (note `degenerate`).
    """

    # All numbers are the reference's; there max_side is not limited.
    weights: str = UNSET  # a checkpoint of https://github.com/adambielski/move-seg/releases: a file or its address
    backbone: str = S8  # what it was trained on: DINO ViT-S/8 as torch.hub has it. Another gives noise
    short_side: int = 448  # px that the shorter side is resized to; sweep 224, 320, 448
    max_side: int = 1344  # px that the longer side has at most then: panoramas are worked on at a smaller size
    quantise8: bool = False  # as the reference: 256 levels, resized by Pillow

    FIT, FACET, BLOCK = "reflect", "token", -2

    source = "Bielski and Favaro, NeurIPS 2022"
    licence = "none stated (checkpoint), Apache-2.0 (backbone)"
    networks, licences = ("weights", "backbone"), {"weights": "none stated", "backbone": "Apache-2.0"}
    model_types = {"backbone": "vit"}
    needs = (
        f"a checkpoint from {CHECKPOINTS} as --weights FILE; facebook/dino-vits8, 87 MB, is fetched on the first run"
    )
    soft = True
    stages = {"features": ("quantise8",)}

    def __post_init__(self):
        super().__post_init__()
        if self.short_side < 8:
            raise ValueError(f"move: short_side must be at least 8, got {self.short_side!r}")
        if self.max_side < self.short_side:
            raise ValueError(f"move: max_side must be at least short_side {self.short_side}, got {self.max_side!r}")
        self._check_backbone()

    def fetch(self) -> None:
        """Raise FileNotFoundError, with where to get one, where no checkpoint was given."""
        if self.weights == UNSET:
            text = "no checkpoint was given; pass --weights FILE, or the address of one"
            raise FileNotFoundError(f"move: {text}, of those at {CHECKPOINTS}")

    def load(self, device: str) -> None:
        from raypipe.segmenters.move import network

        self.fetch()
        super().load(device)
        self._check_backbone()  # again, for a folder may be on another machine than the driver's
        self._head = network.load(self._paths["weights"], device)
        wanted, got = (self._head.width, self._head.scale), (self._dino.width, self._dino.patch)
        if wanted != got:
            text = "is for a backbone of width {} and patches of {} px, got {} and {} px".format(*wanted, *got)
            raise ValueError(f"move: checkpoint {self.weights} {text}")

    def _check_backbone(self) -> None:
        check_checkpoint(self.backbone, needed=S8, method=self.name)

    def features(self, images: Sequence[np.ndarray]) -> Iterator[Features]:
        images = [resized(image, self.short_side, self.max_side) for image in images]
        if any(min(image.shape[:2]) < self.short_side for image in images):
            say_reduced(self.name, self.max_side)
        return super().features(images)

    def find(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> Iterator[Segments]:
        for image, each in zip(images, features, strict=True):
            probability = self.probability(each)
            if not probability.isfinite().all():
                raise BadImage("segment", "non_finite", "the head gives values that are no finite numbers")
            yield Segments(restored(probability, image.shape[:2], quantise8=self.quantise8)[None])

    def probability(self, features: Features) -> torch.Tensor:
        """Of each pixel that the network saw, float32 (H', W') without padding."""
        import torch

        tokens = features.patches.reshape(1, *features.grid, -1)
        with torch.inference_mode(), networks.autocast(self._device, self.dtype):
            logits = self._head(tokens)
        return logits.sigmoid()[0, 0, : features.seen[0], : features.seen[1]]


def resized(image: np.ndarray, short_side: int, max_side: int) -> np.ndarray:
    """An image, RGB uint8 (H, W, 3), with a shorter side of some px, bicubic as Pillow does it.

    Sizes are rounded down, as torchvision does it. The longer side has at most max_side px; where it would have more
    the shorter one is smaller instead.
    """
    from PIL import Image

    short, long = sorted(image.shape[:2])
    new = short_side, short_side * long // short
    if new[1] > max_side:
        new = max(1, max_side * new[0] // new[1]), max_side
    size = new if image.shape[0] == short else new[::-1]
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def restored(probability: torch.Tensor, size: tuple[int, int], *, quantise8: bool) -> np.ndarray:
    """A probability, float32 (H', W'), at an image's size (H, W), bilinear: float32 in [0, 1].

    quantise8: in 256 levels, rounded down, and by Pillow, which where it reduces looks at all pixels.
    """
    from torch.nn.functional import interpolate

    if not quantise8:
        return interpolate(probability[None, None], size=size, mode="bilinear")[0, 0].cpu().numpy()
    from PIL import Image

    levels = Image.fromarray((probability.cpu().numpy() * 255).astype(np.uint8))
    return np.asarray(levels.resize(size[::-1], Image.Resampling.BILINEAR), np.float32) / 255


SEGMENTER = Move
