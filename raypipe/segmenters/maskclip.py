"""MaskCLIP: each place of an image named by the CLIP features of its patch (Zhou, Loy, Dai, ECCV 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from raypipe import classes, networks
from raypipe.features import clip
from raypipe.segmenters._named import Upsampling, label_map
from raypipe.types import BadImage, LabelMap, Segmenter

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 1 << 17  # at once in a batch on a GPU: 0.8 GB for the widest activation of a ViT-B in bfloat16
SUPPRESSED = -100.0  # in the place of the cosine of a class that is nowhere likely (released code)
FEW = 3  # categories among which the likeliest is likely everywhere: nothing is background


class Dense(NamedTuple):
    """What CLIP tells of an image, on the device."""

    patches: Tensor  # float32 (D, h, w), not normalised
    keys: Tensor | None  # float32 (d, h, w), where they are needed
    seen: tuple[int, int]  # (height, width) in px of the image as the network sees it, without padding


@dataclass
class Maskclip(Segmenter):
    """One soft mask for each category that is the likeliest somewhere: how likely it is there, by CLIP's patches.

    No place has two categories; where the likeliest is not likely enough, it has none. Notes: `few_classes`, with up to
    three categories the probability of the likeliest is high everywhere: use --background-score cosine, or name what
    else is in the images; `all_suppressed`, no category is as likely as `pd` anywhere: the likeliest is kept.
    """

    # Of the probability, or cosine, of a place's category (NamedMask supplement, sec. 5); 0 leaves no background
    threshold: float | None = 0.25
    # voc2012 or another data set's list, a file (a name per line, or YAML entries of name and query), or cat,dog,...
    classes: str = "voc2012"
    # a Hugging Face id or a folder, for residual networks (RN50, ...) one of open_clip
    weights: str = "openai/clip-vit-base-patch16"
    templates: str = "default"  # contexts in which CLIP is asked: default (85), none, or a file with one per line
    short_side: int = 512  # px of the image as the network sees it, smaller ones are enlarged; 224 to 640
    max_side: int = 2048  # px of its longer side, which goes first
    normalization: Literal["clip", "imagenet"] = "clip"  # of colours; the authors' configurations have ImageNet's
    literal: bool = False  # GELU and LayerNorm as in the authors' code, not as the network was trained
    residual: Literal["full", "plain"] = "full"  # the last layer as in the authors' code, or as in their paper
    pd: float = 0.0  # prompt denoising: categories nowhere as likely as this are left out; 0 = off, 0.3 to 0.6
    ks: float = 0.0  # key smoothing: places less sure than this ask those with like keys; 0 = off, 0.8 to 1
    # over what keys are normalised; the authors' code: positions
    key_norm: Literal["channels", "positions"] = "channels"
    temperature: float = 100.0  # of the softmax over categories; 20 to 200
    # what the threshold is compared with: the probability at that temperature, or the cosine of image and text
    background_score: Literal["softmax100", "cosine"] = "softmax100"
    crop_padding: bool = True  # no: as in the authors' code, padding shifts masks by up to 15 px
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto = bfloat16 on a GPU

    source = "Zhou, Loy, Dai, ECCV 2022; background as in the NamedMask supplement"
    licence = "MIT (code and weights)"
    networks, licences = ("weights",), {"weights": "MIT"}
    model_types = {"weights": "clip"}
    needs = "openai/clip-vit-base-patch16, 0.6 GB: fetched on the first run, or by `raypipe weights maskclip`"
    soft = exclusive = True
    across = "label"
    gpus = 0.5
    batch_size = 32

    def __post_init__(self):
        networks.settle_options(self)
        self.classes, self.templates = classes.settle(self.classes), clip.settle_templates(self.templates)
        for name in ("short_side", "max_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"maskclip: {name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("pd", "ks"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"maskclip: {name} must be between 0 and 1, got {getattr(self, name)!r}")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"maskclip: temperature must be above 0, got {self.temperature!r}")
        if self.key_norm != "channels" and not self.ks:
            raise ValueError(f"maskclip: key_norm {self.key_norm!r} has no effect without ks")
        if self.background_score == "cosine":
            if self.ks:
                raise ValueError("maskclip: background_score must be 'softmax100' with ks, which leaves no cosines")
            if self.temperature != type(self).temperature and not self.pd:
                raise ValueError("maskclip: temperature has no effect with background_score 'cosine' and without pd")

    @property
    def stages(self) -> dict[str, tuple[str, ...]]:
        names = ("background_score", "crop_padding", "pd", "temperature")
        return {"features": (*names, "ks", "key_norm") if self.ks else names}  # without it no keys are computed

    def load(self, device: str) -> None:
        import torch

        networks.keep_products_exact(device)
        self._device, self._path = device, networks.locate(self.weights, method=self.name)
        found = classes.read(self.classes)
        options = {"method": self.name, "device": device, "dtype": self.dtype, "literal": self.literal}
        self._clip, self._names = clip.Clip(self._path, **options), found.names
        self._texts = self.vectors(found.queries)
        one = torch.zeros((1, 3, self._clip.patch, self._clip.patch), device=device)
        self._clip.dense(one, residual=self.residual, keys=self.ks > 0)  # what it cannot give fails here, once

    def checksums(self) -> dict[str, str]:
        return networks.checksums(self._path)

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[LabelMap]:
        for batch in networks.batches(images, self._device):
            for image, dense in zip(batch, self.features(batch), strict=True):
                yield self.named(dense, image.shape[:2])

    def features(self, images: Sequence[np.ndarray]) -> Iterator[Dense]:
        """What CLIP tells of each image, in order; on a GPU images of one grid go through it together.

        Depends on no option that `stages` lists. Raises BadImage where it is no finite numbers.
        """
        import torch

        sizes = [self.seen_size(image.shape[:2]) for image in images]
        padded = [self._padded(size) for size in sizes]
        done = {}
        for i, size in enumerate(padded):
            if i not in done:
                same = [j for j in range(i, len(images)) if padded[j] == size and j not in done]
                now = same[: self._at_once(size)]
                pixels = torch.cat([self.pixels(images[j], sizes[j]) for j in now])
                found = self._clip.dense(pixels, residual=self.residual, keys=self.ks > 0)
                patches, keys = found if self.ks else (found, [None] * len(now))
                done |= {j: Dense(*each, sizes[j]) for j, *each in zip(now, patches, keys, strict=True)}
            dense = done.pop(i)
            if not all(each.isfinite().all() for each in dense[:2] if each is not None):
                text = "CLIP gives features that are no finite numbers; try --dtype float32, or other weights"
                raise BadImage("segment", "non_finite", text)
            yield dense

    def vectors(self, queries: Sequence[str]) -> np.ndarray:
        """What CLIP makes of texts in all contexts: float32 (C, D), rows of length 1."""
        return self._clip.texts(queries, self.templates)

    def seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) in px of an image as the network sees it. size: its own."""
        factor = min(self.short_side / min(size), self.max_side / max(size))
        return tuple(max(1, int(side * factor + 0.5)) for side in size)

    def pixels(self, image: np.ndarray, size: tuple[int, int]) -> Tensor:
        """An image resized and normalised, then padded with zeros to whole patches: float32 (1, 3, H', W')."""
        import cv2
        import torch
        from torch.nn.functional import pad

        if size != image.shape[:2]:
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        planes = torch.tensor(np.ascontiguousarray(image), device=self._device).permute(2, 0, 1)[None]
        height, width = self._padded(size)
        return pad(clip.normalise(planes, self.normalization), (0, width - size[1], 0, height - size[0]))

    def named(self, dense: Dense, size: tuple[int, int]) -> LabelMap:
        """The label map of an image of (height, width) px."""
        scores, note = self.scores(dense)
        rows = self.enlarged(scores, dense, size)
        notes = [note, *["few_classes"] * (len(scores) <= FEW and self.background_score == "softmax100")]
        options = {"note": ",".join(filter(None, notes))}
        if self.ks:
            return label_map(lambda first, last: shares(rows(first, last)), size, self._names, **options)
        is_cosine = self.background_score == "cosine"
        return label_map(rows, size, self._names, temperature=None if is_cosine else self.temperature, **options)

    def scores(self, dense: Dense) -> tuple[Tensor, str]:
        """Cosines of patches and categories, float32 (C, h, w), refined if that is asked for; and a note."""
        import torch

        units = dense.patches / dense.patches.norm(dim=0).clamp_min(clip.TINY)
        scores = torch.einsum("cd,dhw->chw", torch.tensor(self._texts, device=units.device), units)
        note = ""
        if self.pd:
            scores, note = denoised(scores, self.pd, self.temperature)
        if self.ks:
            scores = smoothed(scores, dense.keys, self.ks, self.temperature, axis=self.key_norm)
        return scores, note

    def enlarged(self, grid: Tensor, dense: Dense, size: tuple[int, int]) -> Upsampling:
        """The rows of an image of (height, width) px from values (C, h, w) of its patches."""
        whole = self._padded(dense.seen) if self.crop_padding else dense.seen
        return Upsampling(grid, size, through=[(whole, dense.seen)])

    def _padded(self, size: tuple[int, int]) -> tuple[int, int]:
        patch = self._clip.patch
        return tuple(-(-side // patch) * patch for side in size)

    def _at_once(self, size: tuple[int, int]) -> int:
        """How many images of a size in px go through the network together."""
        return max(1, TOKENS * self._clip.patch**2 // (size[0] * size[1])) if self._device == "cuda" else 1


def denoised(cosines: Tensor, least: float, temperature: float) -> tuple[Tensor, str]:
    """Cosines without the categories that are nowhere likely, and a note (MaskCLIP, prompt denoising).

    cosines: float32 (C, h, w). least: the probability that a category needs somewhere. Of none the likeliest stays.
    """
    likeliest = (cosines * temperature).softmax(0).flatten(1).amax(1)  # (C,)
    is_out = likeliest < least
    note = "all_suppressed" if is_out.all() else ""
    if note:
        is_out[likeliest.argmax()] = False
    return cosines.masked_fill(is_out[:, None, None], SUPPRESSED), note


def smoothed(cosines: Tensor, keys: Tensor, sure: float, temperature: float, *, axis: str = "channels") -> Tensor:
    """Probabilities in which places that are not sure have what others say, by how like their keys are (key smoothing).

    cosines: float32 (C, h, w). keys: float32 (d, h, w). sure: the probability from which on a place keeps its own.
    axis: over which keys are normalised. Weights do not add up to 1: only ratios of the result have a meaning.
    """
    from torch.nn.functional import normalize

    probability = (cosines * temperature).softmax(0).flatten(1)  # (C, P)
    keys = normalize(keys.flatten(1), dim=0 if axis == "channels" else 1)  # (d, P)
    asks = probability.amax(0) < sure
    probability[:, asks] = probability @ keys.T @ keys[:, asks]
    return probability.view_as(cosines)


def shares(scores: Tensor) -> Tensor:
    """Scores as parts of the sum of those above 0: in [0, 1] where they are. scores: (C, rows, W)."""
    return scores.div_(scores.clamp_min(0).sum(0).clamp_min(clip.TINY))


SEGMENTER = Maskclip
