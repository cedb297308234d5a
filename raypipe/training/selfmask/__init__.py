"""How SelfMask is trained on the masks that any method found: "SelfMask w/ ..." of the papers that compare methods.

Shin, Albanie, Xie, "Unsupervised Salient Object Detection with Spectral Cluster Voting", CVPR Workshops 2022. Here is
the recipe; `pseudo_masks` reads what is to be learned, `student` is the network under training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from raypipe import masks, networks, storage
from raypipe.features.checkpoints import S8_300
from raypipe.storage import Location
from raypipe.training.recipe import Recipe, Sample

if TYPE_CHECKING:
    import pyarrow as pa

    from raypipe.training.selfmask.student import SelfMaskStudent

JITTER = (0.8, 0.8, 0.8, 0.2)  # of brightness, contrast, saturation and hue
SIGMA = (0.1, 2.0)  # px, of the blur
POWER = 0.9  # of the polynomial by which the rate falls
CHOICES = {"schedule": ("corrected", "reference"), "ranking_order": ("corrected", "reference")}
OF_NETWORK = ("backbone", "queries", "layers", "heads", "inner")  # have no effect with `start_from`


class Draw(NamedTuple):
    """The random choices of one view of an image, in the order in which they are applied."""

    scaled: Any  # of `augment.draw_scaled`
    is_flipped: bool
    jitter: Any  # of `augment.draw_jitter`
    is_grey: bool
    sigma: float | None  # px, of the blur; None without


@dataclass(kw_only=True)
class SelfMask(Recipe):
    """Trains SelfMask on the masks that a run of any method found; its backbone learns too.

    The defaults are the authors', but for two slips of their released code, which `reference` brings back.
    """

    masks: str  # folder of a labelling run; of each image the first mask, unless it is empty or everything
    backbone: str = S8_300  # to begin with: the id, address, folder or file of a DINO ViT
    start_from: str | None = None  # instead: a whole SelfMask, what a training exported or a published .pt
    queries: int = 20  # masks among which the surest is the answer
    layers: int = 6  # of the decoder
    heads: int | None = None  # of the decoder's attention; None = as many as the backbone's, 6 of a ViT-S
    inner: int | None = None  # width inside its feed-forward layers; None = four times the backbone's, 1536
    image_size: int = 224  # px a side of what is trained on; images are squeezed to it
    w_dice: float = 1.0  # weights of the terms of the loss: masks like the given one,
    w_ranking: float = 1.0  # and surer queries for better masks
    ranking_order: Literal["corrected", "reference"] = "corrected"  # reference: better queries shall be less sure
    schedule: Literal["corrected", "reference"] = "corrected"  # the rate falls to 0; reference: in each epoch to 0.92
    min_scale: float = 0.1  # an image's smallest size in the square; its mean colour fills the rest
    max_scale: float = 1.0  # its largest size there; above 1 a square is cut from it
    flip: float = 0.5  # probability that it is mirrored
    jitter: float = 0.8  # probability that its colours are changed
    grey: float = 0.2  # probability that they are taken away
    blur: float = 0.5  # probability that it is blurred
    epochs: int = 12  # times that each image is seen
    batch_size: int = 8  # images per step, of all workers together
    lr: float = 6e-6  # of the first step
    weight_decay: float = 0.01  # of AdamW
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto is bfloat16 on a GPU

    networks = ("backbone",)
    model_types = {"backbone": "vit", "start_from": "selfmask"}

    def __post_init__(self):
        self.masks = Location(storage.absolute(self.masks))
        if self.start_from is not None:
            self.networks = ("start_from",)
            for name, default in ((each.name, each.default) for each in fields(self) if each.name in OF_NETWORK):
                if (value := getattr(self, name)) != default:
                    text = f"{name} {value!r} has no effect with start_from, which is a whole network"
                    raise ValueError(f"{self.name}: {text}")
        networks.settle_options(self)
        self.refuse_unknown(CHOICES, self._ranges())
        if not self.w_ranking and self.ranking_order != "corrected":
            raise ValueError(f"{self.name}: ranking_order has no effect where w_ranking is 0")

    def _ranges(self) -> Iterator[tuple[str, str, bool]]:
        """Options whose values are numbers: name, what it must be, whether it is."""
        for name in ("epochs", "batch_size", "queries", "layers", "heads", "inner", "image_size"):
            value = getattr(self, name)
            yield name, "at least 1", value is None or value >= 1
        yield "lr", "a finite number above 0", 0 < self.lr < np.inf
        for name in ("weight_decay", "w_dice", "w_ranking"):
            yield name, "a finite number of at least 0", 0 <= getattr(self, name) < np.inf
        yield "w_dice", "above 0, for nothing else teaches masks", self.w_dice > 0
        for name in ("flip", "jitter", "grey", "blur"):
            yield name, "a probability in [0, 1]", 0 <= getattr(self, name) <= 1
        yield "max_scale", "a finite number above 0", 0 < self.max_scale < np.inf
        yield "min_scale", f"above 0 and at most max_scale, {self.max_scale}", 0 < self.min_scale <= self.max_scale

    def rows(self, manifest: pa.Table | None) -> pa.Table:
        """The images of the run, found again in the input where there is one. Also sees whether the network fits."""
        from raypipe.run import Run
        from raypipe.training.selfmask import pseudo_masks

        with contextlib.suppress(FileNotFoundError):  # here; workers elsewhere may have it
            self.student("cpu")
        return pseudo_masks.read(Run(self.masks), manifest, size=self.image_size)

    def prepare(self, row: dict, image: np.ndarray) -> Sample:
        """The image squeezed to a square, and its mask, bool, of the same size."""
        size = (self.image_size, self.image_size)
        return {
            "image": networks.squeeze(image, self.image_size),
            "mask": masks.decode_rle({"size": size, "counts": row["mask"]}),
        }

    def draw(self, random: np.random.Generator, sample: Sample) -> Draw:
        """In a fixed order, so that what one option asks for does not change what others get."""
        from raypipe.training import augment

        scaled = augment.draw_scaled(random, sample["image"].shape, self.image_size, self.min_scale, self.max_scale)
        is_flipped = augment.draw_chance(random, self.flip)
        jitter = augment.draw_jitter(random, *JITTER, self.jitter)
        is_grey = augment.draw_chance(random, self.grey)
        return Draw(scaled, is_flipped, jitter, is_grey, augment.draw_blur(random, *SIGMA, self.blur))

    def student(self, device: str) -> SelfMaskStudent:
        """The network. Raises ValueError where sizes and backbone do not fit."""
        from raypipe.training.selfmask.student import SelfMaskStudent

        return SelfMaskStudent(self, device)

    def rate(self, step: int, steps: int) -> float:
        """(1 - t / T)^0.9 over all T steps. In the released code t starts anew in each epoch."""
        done = step % (steps // self.epochs) if self.schedule == "reference" else step
        return (1 - done / steps) ** POWER


RECIPE = SelfMask
