"""Sempart: a small head on a frozen DINO, trained so that its mask cuts the image's own graph of patches.

Ravindran and Basu, ICCV 2023, with the two tricks of Sari, Locatello, Favaro, "Two Tricks to Improve Unsupervised
Segmentation Learning", 2024: the guided filter of its masks, and a training on zoomed windows too. Here are the method
and its options; `network` knows the head, `losses` what it was trained with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import networks
from raypipe.features import originals
from raypipe.features.checkpoints import S8, check_checkpoint
from raypipe.features.dino import FACETS
from raypipe.features.grid import Features, say_reduced
from raypipe.lookup import suggest
from raypipe.segmenters._discovery import Discovery, by_grid
from raypipe.types import BadImage, Segments

if TYPE_CHECKING:
    from torch import Tensor

UNSET = "none"  # no address of a published head is known
POLARITIES = ("global", "image", "none", "invert")
IMAGE_SIZE = 320  # px (supplement)
AT_ONCE = 16 * 320 * 320  # px that go through the head together on a GPU


@dataclass
class Sempart(Discovery):
    """One soft mask: the probability of each pixel to be foreground.

    The cut it was trained with is symmetric: a head may mark the background, which `polarity` turns over. An image of
    one colour has an empty mask (note `degenerate`).
    """

    weights: str = UNSET  # a head: what `raypipe train sempart` leaves in its output, or a published .pth
    backbone: str = S8  # what it was trained on. At this default, what the head's own config.json names
    resize: Literal["squash", "keep_ratio"] = "squash"  # to a square, or the shorter side; the whole image either way
    # px of the square or of the shorter side, in whole patches; None = as in the head's training, 320 where its
    # config.json does not tell (supplement); sweep 224..448
    image_size: int | None = None
    max_side: int = 1280  # px that the longer side has at most with keep_ratio; panoramas are squeezed to it
    # whether masks are turned over: global: by the sign that the head's training found; image: each whose mean is above
    # 0.5, wrong for large objects; none: never; invert: all
    polarity: str = "global"
    filter: Literal["guided", "bilateral", "none"] = "guided"  # of the mask at this size: trick 1. bilateral is slow
    filter_radius: int = 9  # px of the guided filter (reference); sweep 3..24
    filter_eps: float = 1e-3  # of the guided filter, in squared units of the image in 0..1 (reference)

    source = "Ravindran and Basu, ICCV 2023; Sari, Locatello, Favaro, 2024"
    licence = "none stated (published heads), Apache-2.0 (backbone)"
    networks, licences = ("weights", "backbone"), {"weights": "none stated", "backbone": "Apache-2.0"}
    model_types = {"backbone": "vit"}
    needs = (
        "a head as --weights: the output of `raypipe train sempart`, or a published .pth; facebook/dino-vits8, 87 MB, "
        "is fetched on the first run"
    )
    soft = True
    stages = {"features": ("polarity", "filter", "filter_radius", "filter_eps")}

    def __post_init__(self):
        super().__post_init__()
        if self.polarity == "batch":
            text = "would let an image's mask depend on the images beside it, which no distributed run keeps the same"
            raise ValueError(f"sempart: polarity 'batch' {text}; use global, or image")
        if self.polarity not in POLARITIES:
            raise ValueError(f"sempart: unknown polarity {self.polarity!r}; {suggest(self.polarity, POLARITIES)}")
        for name, least in (("image_size", 8), ("filter_radius", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"sempart: {name} must be at least {least}, got {value!r}")
        if not self.filter_eps > 0:
            raise ValueError(f"sempart: filter_eps must be above 0, got {self.filter_eps!r}")
        if self.resize == "squash" and self.max_side != type(self).max_side:
            raise ValueError(f"sempart: max_side {self.max_side!r} has no effect: resize 'squash' makes squares")
        for name in ("filter_radius", "filter_eps"):
            if self.filter != "guided" and (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(f"sempart: {name} {value!r} has no effect: the filter is {self.filter!r}")
        if (path := Path(self.weights)).exists():
            self._take_over(path)

    def _take_over(self, path: Path) -> dict:
        """Take backbone and size from the training of the head at a path, unless chosen. Returns its config.json.

        Raises ValueError where the longer side could not be as long as the shorter one.
        """
        told = originals.settings(path.parent if path.is_file() else path, method=self.name)
        if self.backbone == type(self).backbone and isinstance(named := told.get("backbone"), str) and named:
            self.backbone = named
        if self.image_size is None:
            training = told.get("training")
            size = training.get("image_size") if isinstance(training, dict) else None
            self.image_size = size if isinstance(size, int) and size >= 8 else IMAGE_SIZE
        if self.resize == "keep_ratio" and self.max_side < self.image_size:
            text = f"at least image_size {self.image_size}, got {self.max_side!r}"
            raise ValueError(f"sempart: max_side must be {text}")
        return told

    @property
    def refines(self) -> str:
        return "" if self.filter == "none" else f"--filter {self.filter}"

    def fetch(self) -> None:
        """Raise FileNotFoundError, with the way out, where there is no head, or not the network it was trained on."""
        if self.weights == UNSET:
            text = "no head was given; pass --weights DIR, the output of `raypipe train sempart`, or a published .pth"
            raise FileNotFoundError(f"sempart: {text}")
        path = Path(self.weights)
        if (path / "training.json").is_file() and not (path / "head.safetensors").is_file():
            raise FileNotFoundError(f"sempart: the training in {path} has not ended; the same command goes on with it")
        told = self._take_over(networks.locate(self.weights, method=self.name))
        is_known = networks.is_hub_id(self.backbone) or networks.is_address(self.backbone)
        if self.backbone == told.get("backbone") and not is_known and not Path(self.backbone).exists():
            text = f"which {self.weights} was trained on, is not here; pass where it is as --backbone"
            raise FileNotFoundError(f"sempart: {self.backbone}, {text}")

    def load(self, device: str) -> None:
        import torch

        from raypipe.segmenters.sempart import network

        self.fetch()
        super().load(device)
        head, told = network.read(self._paths["weights"], method=self.name)
        self._check(head, told)
        self._head = head.requires_grad_(False).to(device, memory_format=torch.channels_last)
        self._sign, self._facet = told.get("polarity"), told.get("feature", "key")
        if self._facet not in FACETS:
            raise ValueError(f"sempart: {self.weights} was trained on the feature {self._facet!r}, which is none")
        if self.polarity == "global" and self._sign not in (1, -1):
            text = "does not say whether it marks foreground (polarity in config.json): label a few images with"
            way_out = "--polarity none, then all with none or invert, or let `raypipe train sempart --epochs 0"
            way_out += f" --start-from {self.weights} --input IMAGES --output DIR` find it"
            raise ValueError(f"sempart: {self.weights} {text} {way_out}")

    def _check(self, head, told: dict) -> None:
        """Raise ValueError where a head was trained on another network than the backbone; warn where nobody knows."""
        wanted, got = (head.width, head.patch), (self._dino.width, self._dino.patch)
        if wanted != got:
            text = "is for a backbone of width {} and patches of {} px, got {} and {} px".format(*wanted, *got)
            raise ValueError(f"sempart: head {self.weights} {text}; pass the one it was trained on as --backbone")
        if self.image_size % head.patch:
            text = f"a multiple of the {head.patch} px of a patch, got {self.image_size!r}"
            raise ValueError(f"sempart: image_size must be {text}")
        digest = told.get("backbone_digest")
        if digest is None and head.patch == 8:
            check_checkpoint(self.backbone, needed=S8, method=self.name)
        elif digest is not None and digest != self._dino.digest():
            text = f"is another network than the one that {self.weights} was trained on"
            named = told.get("backbone") or f"the one of sha256 {digest}"
            raise ValueError(f"sempart: backbone {self.backbone!r} {text}; pass {named} as --backbone")

    def checksums(self) -> dict[str, str]:
        """Of the weights, and of what the head's config.json says: the sign of its masks is there."""
        path, found = self._paths["weights"], super().checksums()
        if (file := (path.parent if path.is_file() else path) / "config.json").is_file():
            found["weights/config.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return found

    def features(self, images: Sequence[np.ndarray]) -> Iterator[Features]:
        """What the head says of each image: of every patch the probabilities of its pixels, then their colours.

        They are (P, 4 * patch * patch), the colours as the network sees them. Images of one size go together.
        """
        sizes, found = [self._size(image.shape[:2]) for image in images], {}
        for size in dict.fromkeys(sizes):
            same = [i for i, each in enumerate(sizes) if each == size]
            step = max(1, AT_ONCE // (size[0] * size[1])) if self._device == "cuda" else 1
            for first in range(0, len(same), step):
                now = same[first : first + step]
                found |= zip(now, self._seen([images[i] for i in now], size), strict=True)
        return (found.pop(i) for i in range(len(images)))

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size at which an image of a size (height, width) is seen, in whole patches."""
        if self.resize == "squash":
            return self.image_size, self.image_size
        patch, scale = self._dino.patch, self.image_size / min(size)
        if scale * max(size) > self.max_side:
            say_reduced(self.name, self.max_side)
        return tuple(max(1, round(min(side * scale, self.max_side) / patch)) * patch for side in size)

    def _seen(self, images: Sequence[np.ndarray], size: tuple[int, int]) -> Iterator[Features]:
        """`features` of images that go through the networks together, at a size (height, width).

        Raises BadImage where a value is NaN or infinite.
        """
        import torch
        from torch.nn.functional import pixel_unshuffle

        from raypipe.segmenters.sempart.network import keys

        patch = self._dino.patch
        grid = size[0] // patch, size[1] // patch
        pixels = torch.cat([self._dino.pixels(reduced(image, size), size, "resize") for image in images])
        given = keys(self._dino, pixels, facet=self._facet)
        with torch.inference_mode(), networks.autocast(self._device, self.dtype):
            logits = self._head.fine_of(self._head.encode(given), pixels)
        planes = pixel_unshuffle(torch.cat([logits.sigmoid(), pixels], dim=1), patch).flatten(2).transpose(1, 2)
        for each in planes:
            if not each.isfinite().all():
                text = "the network gives values that are no finite numbers; try --dtype float32, or other weights"
                raise BadImage("segment", "non_finite", text)
            yield Features(each, grid, patch, size, "resize")

    def find(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> Iterator[Segments]:
        import torch
        from torch.nn.functional import interpolate

        answers = {}
        for group in by_grid(features):
            with torch.inference_mode():
                masks = self._masks(torch.stack([features[i].patches for i in group]), features[group[0]])
            answers |= zip(group, masks, strict=True)
        for i, image in enumerate(images):
            large = interpolate(answers.pop(i)[None], size=image.shape[:2], mode="bilinear")
            yield Segments(large[0].clamp(0, 1).cpu().numpy())

    def _masks(self, patches: Tensor, like: Features) -> Tensor:
        """Masks (B, 1, H', W') of what `features` gives of images of one size: turned over and filtered."""
        from torch.nn.functional import pixel_shuffle

        from raypipe.segmenters.sempart import losses

        planes = pixel_shuffle(patches.transpose(1, 2).unflatten(2, like.grid), like.patch)
        masks, pixels = planes[:, :1], planes[:, 1:]
        masks = turned(masks, self.polarity, self._sign)
        if self.filter == "guided":
            return losses.guided(masks, pixels, radius=self.filter_radius, eps=self.filter_eps)
        return solved(masks, pixels) if self.filter == "bilateral" else masks


def reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An RGB uint8 image (H, W, 3) at a size (height, width): bilinear over all that a pixel covers, as Pillow does."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def turned(masks: Tensor, polarity: str, sign: int | None) -> Tensor:
    """Masks (B, 1, H, W), foreground and background exchanged where the polarity says so. sign: of a trained head."""
    if polarity == "image":
        return masks.where(masks.mean((1, 2, 3), keepdim=True) <= 0.5, 1 - masks)
    return 1 - masks if polarity == "invert" or (polarity == "global" and sign == -1) else masks


def solved(masks: Tensor, pixels: Tensor) -> Tensor:
    """Masks (B, 1, H, W) after the bilateral solver with Sempart's numbers, on the CPU. pixels: normalised."""
    import torch

    from raypipe.refiners.bilateral import Bilateral

    mean, std = (pixels.new_tensor(each)[:, None, None] for each in (networks.IMAGENET_MEAN, networks.IMAGENET_STD))
    images = ((pixels * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    solver = Bilateral(refine_preset="sempart")
    pairs = zip(masks.cpu().numpy(), images, strict=True)
    return torch.from_numpy(np.stack([solver(mask, image)[0] for mask, image in pairs])).to(masks.device)


SEGMENTER = Sempart
