"""How Sempart's head is trained (Ravindran and Basu, ICCV 2023), with the second of the Two Tricks (Sari et al., 2024).

The head learns from images alone: its coarse mask cuts the graph of a frozen DINO's features, its fine mask agrees with
the coarse one and ends at the edges of the image. Trick 2: the mask of an enlarged window is a teacher for the window
of the mask; trick 1, the guided filter, makes the teacher's mask follow edges. `student` is the network under training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from raypipe import networks, schema
from raypipe.features.checkpoints import S8
from raypipe.training.recipe import Recipe, Sample

if TYPE_CHECKING:
    import pyarrow as pa

    from raypipe.training.augment import Jitter
    from raypipe.training.sempart.student import SempartStudent

JITTER = (0.4, 0.4, 0.2, 0.1)  # of brightness, contrast, saturation and hue (reference)
CHOICES = {
    "feature": ("key", "query", "value", "token"),
    "gtv_coarse": ("threshold", "kernel"),
    "crop_window": ("uniform", "reference"),
}
OF_ZOOM = ("w_crop_zoom", "w_ncut_crop", "crop_window", "gf_radius", "gf_eps")  # have no effect without trick 2
REFERENCE_SIZE = 320  # px, at which the windows of the published code are known
REFERENCE_TOP, REFERENCE_LEFT = 80, (10, 29)  # px: of each of its windows, and of the first and the last


class Draw(NamedTuple):
    """The random choices of one view of an image."""

    jitter: Jitter | None
    is_grey: bool
    corner: tuple[int, int]  # top and left of the crop, in px of the prepared image
    is_flipped: bool
    zoom: tuple[int, int]  # top and left of trick 2's window, in px of the crop


@dataclass(kw_only=True)
class Sempart(Recipe):
    """Trains Sempart's head on images without labels, with crop-zoom consistency (trick 2) or, without, the baseline.

    The defaults are those of the published code where it and the paper differ.
    """

    backbone: str = S8  # frozen: the id, folder or file of a DINO or iBOT ViT; /16 adds a fourth block to the decoder
    feature: Literal["key", "query", "value", "token"] = "key"  # of its last block, what the head is given
    start_from: str | None = None  # a head to start from: what a training exported, or a published .pth
    hidden: int = 64  # channels of a token in the head
    image_size: int = 320  # px a side of what is trained on
    resize: int = 335  # px that the shorter side of an image gets before the crop; the paper's text says 355
    crop_zoom: bool = True  # trick 2: the mask of an enlarged window teaches the window of the mask
    w_ncut: float = 1.0  # weight of the coarse mask's normalised cut
    w_gtv_fine: float = 1.0  # weight of the fine mask's steps where the image has no edge
    w_gtv_coarse: float = 1.0  # weight of the coarse mask's steps between patches that are alike
    w_consistency: float = 1.0  # weight of the difference of both masks
    w_crop_zoom: float = 0.01  # weight of the difference to the enlarged window's mask
    w_ncut_crop: float = 0.01  # weight of that window's own cut
    tau: float = 0.4  # patches are alike where the cosine of their features is above
    eps: float = 1e-6  # weight of patches that are not
    sigma: float = 1.0  # squared distance of pixels' colours, or with gtv_coarse kernel of features, that counts 1/e
    # weight of a pair of patches: threshold: as in the cut (published code); kernel: by the distance of their features
    gtv_coarse: Literal["threshold", "kernel"] = "threshold"
    # where trick 2 looks: anywhere, or as the published code, whose windows hardly move by a slip
    crop_window: Literal["uniform", "reference"] = "uniform"
    gf_radius: int = 9  # px, half a window of the guided filter of trick 2's teacher
    gf_eps: float = 1e-3  # squared grey levels, their range being 1; more is smoother
    jitter: float = 0.8  # probability that an image's colours are changed
    grey: float = 0.2  # probability that they are taken away
    flip: float = 0.5  # probability that it is mirrored (published code; not in the paper's list)
    epochs: int = 30  # 0 only validates and exports the head of start_from
    batch_size: int = 8  # images per step, of all workers together
    lr: float = 1e-4  # of AdamW, all the time
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    weight_decay: float = 0.0  # of AdamW
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of networks; auto is bfloat16 on a GPU
    precise_bn: bool = False  # at the end, or with epochs 0, batch norms' averages are made anew from training crops

    networks = ("backbone",)
    model_types = {"backbone": "vit"}

    def __post_init__(self):
        if self.start_from is not None:
            self.networks = (*type(self).networks, "start_from")
            if self.hidden != type(self).hidden:
                raise ValueError(f"{self.name}: hidden has no effect with start_from, whose head has its own size")
        networks.settle_options(self)
        self.refuse_unknown(CHOICES, self._ranges())
        self._check_zoom()
        if self.epochs == 0 and self.start_from is None:
            raise ValueError(f"{self.name}: epochs 0 trains nothing: name a head that is there with --start-from")

    def _ranges(self) -> Iterator[tuple[str, str, bool]]:
        """Options whose values are numbers: name, what it must be, whether it is."""
        for name in ("hidden", "image_size", "gf_radius"):
            yield name, "at least 1", getattr(self, name) >= 1
        for name in ("sigma", "gf_eps"):
            yield name, "a finite number above 0", 0 < getattr(self, name) < np.inf
        yield "weight_decay", "a finite number of at least 0", 0 <= self.weight_decay < np.inf
        yield "betas", "two numbers in [0, 1)", len(self.betas) == 2 and all(0 <= each < 1 for each in self.betas)
        yield "tau", "above 0 and below 1, as cosines are", 0 < self.tau < 1
        yield "eps", "above 0 and below 0.5", 0 < self.eps < 0.5
        for name in ("jitter", "grey", "flip"):
            yield name, "a probability in [0, 1]", 0 <= getattr(self, name) <= 1
        yield "resize", f"at least image_size, {self.image_size}", self.resize >= self.image_size
        weights = [field.name for field in fields(self) if field.name.startswith("w_")]
        for name in weights:
            yield name, "a finite number of at least 0", 0 <= getattr(self, name) < np.inf
        has_loss = any(getattr(self, name) for name in weights if name not in OF_ZOOM)
        yield "w_ncut", "above 0 where the other three of the baseline are 0", has_loss

    def _check_zoom(self) -> None:
        """Raise ValueError for options of trick 2 that have no effect, or are not known at this size."""
        defaults = {field.name: field.default for field in fields(self)}
        if not self.crop_zoom:
            for name in OF_ZOOM:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"{self.name}: {name} has no effect without crop_zoom")
        elif not (self.w_crop_zoom or self.w_ncut_crop):
            text = "crop_zoom has no effect where w_crop_zoom and w_ncut_crop are 0; pass --no-crop-zoom"
            raise ValueError(f"{self.name}: {text}")
        if self.crop_window == "reference" and self.image_size != REFERENCE_SIZE:
            text = f"crop_window reference is known for image_size {REFERENCE_SIZE} alone, got {self.image_size!r}"
            raise ValueError(f"{self.name}: {text}")

    def rows(self, manifest: pa.Table | None) -> pa.Table:
        """All images of the input, which `epochs` 0 can do without. It sees whether backbone, head and sizes fit."""
        if manifest is None and (self.epochs or self.precise_bn):
            raise ValueError(f"{self.name}: --input is needed: the images to train on")
        with contextlib.suppress(FileNotFoundError):  # here; workers elsewhere may have the networks
            self.student("cpu")
        return schema.MANIFEST.empty_table() if manifest is None else manifest

    def prepare(self, row: dict, image: np.ndarray) -> Sample:
        """The image with its shorter side at `resize`, bilinear over all that a pixel covers."""
        from raypipe.training.crops import shortened

        return {"image": shortened(image, self.resize)}

    def draw(self, random: np.random.Generator, sample: Sample) -> Draw:
        """In a fixed order, so that what one option asks for does not change what others get."""
        from raypipe.training import augment

        jitter = augment.draw_jitter(random, *JITTER, self.jitter)
        is_grey = augment.draw_chance(random, self.grey)
        corner = augment.draw_corner(random, sample["image"].shape, self.image_size)
        is_flipped = augment.draw_chance(random, self.flip)
        zoom = tuple(int(each) for each in random.integers(self.image_size // 2 + 1, size=2))
        if self.crop_window == "reference":
            zoom = (REFERENCE_TOP, int(random.integers(REFERENCE_LEFT[0], REFERENCE_LEFT[1] + 1)))
        return Draw(jitter, is_grey, corner, is_flipped, zoom)

    def student(self, device: str) -> SempartStudent:
        """The head on its backbone. Raises ValueError where sizes, head and backbone do not fit."""
        from raypipe.training.sempart.student import build

        return build(self, device)


RECIPE = Sempart
