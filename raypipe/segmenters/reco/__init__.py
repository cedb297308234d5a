"""ReCo: what the images that CLIP retrieves for a name have in common is looked for in other images.

Shin, Xie, Albanie, "ReCo: Retrieve and Co-segment for Zero-shot Transfer", NeurIPS 2022. Here is the method; `bank` is
what `raypipe train reco` makes of an archive and the method reads, `cosegment` finds what images have in common.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from raypipe import networks
from raypipe.features.clip import Clip
from raypipe.features.grid import say_reduced
from raypipe.refiners.crf import PRESETS
from raypipe.segmenters import _named
from raypipe.segmenters._discovery import Discovery
from raypipe.segmenters.reco import bank
from raypipe.types import BadImage, LabelMap

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("raypipe")
UNSET = "none"  # every bank is of one's own archive
BACKBONE, CLIP = "facebook/dino-vits16", "openai/clip-vit-base-patch16"
MOST = 0.7311  # that a score of `raw` can be: the sigmoid of a cosine of 1
FLAT = 8  # classes above which probabilities behind the CRF stay near 1 / classes: its pull, 7, is shared by them all
FEW = 3  # classes among which the likeliest is likely everywhere: nothing is background
AT_ONCE = 16 * 320 * 640  # px that go through a network together on a GPU


class Scores(NamedTuple):
    """How like each class an image is, in places: float32 (C, h, w) in (0, 1), each on the grid of its network."""

    vectors: Tensor  # by the features that the class's images have in common
    texts: Tensor | None  # by CLIP; None without


@dataclass
class ReCo(Discovery):
    """One soft mask per class that is the likeliest somewhere: its score there, and 0 elsewhere.

    Notes: `few_classes`, with up to three classes the probability of the likeliest is high everywhere: use
    --background-score raw with a --threshold, or name what else is in the images.
    """

    # of the score of the likeliest class; 0 = no background (NamedMask supplement: 0.9, of a score that it does not
    # name; sweep 0..0.95)
    threshold: float | None = 0.9
    weights: str = UNSET  # a bank: the folder that `raypipe train reco` leaves
    backbone: str = BACKBONE  # what the bank was made with. At this default, what the bank's own config.json names
    clip: str = CLIP  # likewise
    dense_clip_inference: bool = True  # CLIP's own opinion of each place counts too (paper)
    # what the threshold is compared with. softmax100: probability of 100 times the scores, over classes; crf: that of
    # the scores themselves behind a dense CRF, whose labels it has (paper), hardly above 1 / classes where these are
    # many: for --threshold 0; raw: the score itself, below 0.73
    background_score: Literal["softmax100", "crf", "raw"] = "softmax100"
    crf_size: int = 448  # px of the longer side at which the CRF works; it keeps all classes at this size in memory
    short_side: int = 320  # px that the shorter side of an image gets (paper's protocol); up to half a patch off
    max_side: int = 1280  # px that the longer side has at most then

    source = "Shin, Xie, Albanie, NeurIPS 2022"
    licence = "Apache-2.0 (backbone), MIT (CLIP); the bank is one's own"
    networks = ("weights", "backbone", "clip")
    licences = {"weights": "one's own", "backbone": "Apache-2.0", "clip": "MIT"}
    model_types = {"weights": bank.KIND, "clip": "clip"}
    needs = (
        "a bank as --weights: the output of `raypipe train reco`; facebook/dino-vits16, 87 MB, and "
        "openai/clip-vit-base-patch16, 0.6 GB, are fetched on the first run"
    )
    soft, exclusive = True, True
    across = "label"
    FACET = "token_norm"
    stages = {"features": ("background_score", "crf_size")}

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("short_side", 8), ("crf_size", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"reco: {name} must be at least {least}, got {value!r}")
        if self.max_side < self.short_side:
            raise ValueError(f"reco: max_side must be at least short_side {self.short_side}, got {self.max_side!r}")
        self._check_effects()
        if (path := Path(self.weights)).exists():
            self._take_over(path)

    def _check_effects(self) -> None:
        """Raise ValueError for options without effect."""
        if self.background_score != "crf" and self.crf_size != type(self).crf_size:
            raise ValueError(f"reco: crf_size has no effect with the background score {self.background_score!r}")
        if not self.dense_clip_inference:
            if self.clip != CLIP:
                raise ValueError(f"reco: clip {self.clip!r} has no effect without dense_clip_inference")
            self.networks = ("weights", "backbone")

    def _take_over(self, path: Path) -> dict:
        """Take the networks that the bank at a path names, unless others are chosen. Returns its config.json."""
        told = bank.told(path, method=self.name)
        for field, default in (("backbone", BACKBONE), ("clip", CLIP)):
            if getattr(self, field) == default and field in self.networks and isinstance(told.get(field), str):
                setattr(self, field, told[field])
        return told

    def categories(self) -> str | None:
        path = Path(self.weights)
        return networks.told_classes(str(path.parent if path.is_file() else path))

    def fetch(self) -> None:
        """Raise FileNotFoundError, with the way out, where there is no bank, or not a network it was made with.

        And ValueError for a threshold that no score can pass; not before, for a sweep compares scores at any threshold.
        """
        if self.background_score == "raw" and self.threshold is not None and self.threshold >= MOST:
            text = f"below {MOST}, for no score is above, got {self.threshold!r}; or choose another --background-score"
            raise ValueError(f"reco: with the background score 'raw' threshold must be {text}")
        if self.weights == UNSET:
            text = "no bank was given; pass --weights DIR, the output of `raypipe train reco --archive ARCHIVE`"
            raise FileNotFoundError(f"reco: {text}")
        told = self._take_over(networks.locate(self.weights, method=self.name))
        for field in self.networks[1:]:
            value = getattr(self, field)
            is_known = networks.is_hub_id(value) or networks.is_address(value)
            if value == told.get(field) and not is_known and not Path(value).exists():
                text = f"which {self.weights} was made with, is not here; pass where it is as --{field}"
                raise FileNotFoundError(f"reco: {field} {value}, {text}")

    def load(self, device: str) -> None:
        import torch

        self.fetch()
        super().load(device)
        found = bank.read(self._paths["weights"], method=self.name)
        self._check_network("backbone", self._dino.width, self._dino.digest(), found.vectors, found.config)
        self._names, self._temperature = found.names, found.config["text_temperature"]
        if self.background_score == "crf" and len(self._names) > FLAT and self.threshold != 0:
            text = "reco: with %d classes hardly any probability behind the CRF is above the threshold: pass "
            log.warning(f"{text}--threshold 0, or --background-score softmax100", len(self._names))
        self._vectors, self._clip = torch.from_numpy(found.vectors).to(device), None
        if self.dense_clip_inference:
            options = {"method": self.name, "device": device, "dtype": self.dtype, "text": False}
            self._clip = Clip(self._paths["clip"], **options)
            self._check_network("clip", self._clip.width, self._clip.digest(), found.texts, found.config)
            self._texts = torch.from_numpy(found.texts).to(device)

    def _check_network(self, field: str, width: int, digest: str, rows: np.ndarray, told: dict) -> None:
        """Raise ValueError for another network than the one that a bank was made with: its vectors are noise there."""
        if width != rows.shape[1] or digest != told.get(f"{field}_digest"):
            text = f"{field} {getattr(self, field)!r} is another network than the one that {self.weights} was made with"
            raise ValueError(f"reco: {text}; pass {told.get(field)} as --{field}, or make a bank with the other")

    def checksums(self) -> dict[str, str]:
        """Of the weights, and of the bank's config.json, which names the classes."""
        path = self._paths["weights"]
        config = (path if path.is_dir() else path.parent) / "config.json"
        return super().checksums() | {"weights/config.json": hashlib.sha256(config.read_bytes()).hexdigest()}

    def features(self, images: Sequence[np.ndarray]) -> Iterator[Scores]:
        """Scores of each image, in order, on the grids of the networks."""
        vectors, texts = self._of_each(images, self._dino.patch, self._like_vectors), [None] * len(images)
        if self._clip:
            texts = self._of_each(images, self._clip.patch, self._like_texts)
        return map(Scores, vectors, texts)

    def _like_vectors(self, pixels: Tensor) -> Tensor:
        from raypipe.segmenters.reco.cosegment import likeness

        return likeness(tokens(self._dino, pixels), self._vectors)

    def _like_texts(self, pixels: Tensor) -> Tensor:
        from raypipe.segmenters.reco.cosegment import likeness

        return likeness(self._clip.dense(pixels), self._texts, temperature=self._temperature)

    def _of_each(self, images: Sequence[np.ndarray], patch: int, scores: Callable) -> list[Tensor]:
        """What a network says of each image: (C, h, w). Images of one size go through it together on a GPU.

        Raises BadImage where a value is NaN or infinite.
        """
        import torch

        sizes, found = [self._size(image.shape[:2], patch) for image in images], {}
        for size in dict.fromkeys(sizes):
            same = [i for i, each in enumerate(sizes) if each == size]
            step = max(1, AT_ONCE // (size[0] * size[1])) if self._device == "cuda" else 1
            for first in range(0, len(same), step):
                now = same[first : first + step]
                seen = [self._dino.pixels(reduced(images[i], size), size, "resize") for i in now]
                found |= zip(now, scores(torch.cat(seen)), strict=True)
        if not all(each.isfinite().all() for each in found.values()):
            text = "a network gives values that are no finite numbers; try --dtype float32, or other weights"
            raise BadImage("segment", "non_finite", text)
        return [found[i] for i in range(len(images))]

    def _size(self, size: tuple[int, int], patch: int) -> tuple[int, int]:
        """The size at which an image of a size (height, width) is seen, in whole patches."""
        scale = self.short_side / min(size)
        if scale * max(size) > self.max_side:
            say_reduced(self.name, self.max_side)
            scale = self.max_side / max(size)
        return tuple(max(1, round(side * scale / patch)) * patch for side in size)

    def answer(self, images: Sequence[np.ndarray], features: Sequence[Scores]) -> Iterator[LabelMap]:
        for image, scores in zip(images, features, strict=True):
            size, kind, few = image.shape[:2], self.background_score, len(self._names) <= FEW
            rows = self._settled(image, scores) if kind == "crf" else product(scores, size)
            temperature = 100.0 if kind == "softmax100" else None
            note = "few_classes" if few and kind != "raw" else ""
            yield _named.label_map(rows, size, self._names, temperature=temperature, note=note)

    find = answer  # nothing is hopeless: a place always has a likeliest class

    def _settled(self, image: np.ndarray, scores: Scores) -> Callable[[int, int], Tensor]:
        """Rows of the probabilities behind the CRF, enlarged from the size at which it works."""
        import torch

        from raypipe.refiners.crf.meanfield import dense_crf

        scale = min(1.0, self.crf_size / max(image.shape[:2]))
        small = tuple(max(1, round(side * scale)) for side in image.shape[:2])
        energies = -product(scores, small)(0, small[0]).log_softmax(0)
        options = {name.removeprefix("refine_"): value for name, value in PRESETS["reco"].items()}
        q, _ = dense_crf(reduced(image, small), energies, device=self._device, **options)
        return _named.Upsampling(torch.from_numpy(q).to(self._device), image.shape[:2])


def tokens(dino, pixels: Tensor) -> Tensor:
    """What the encoder says of each patch behind its last LayerNorm: float32 (B, D, h, w). pixels: as of `forward`."""
    patches, _ = dino.forward(pixels, facet="token_norm")
    return patches.transpose(1, 2).unflatten(2, dino.grid(tuple(pixels.shape[2:])))


def product(scores: Scores, size: tuple[int, int]) -> Callable[[int, int], Tensor]:
    """What gives rows of both scores of each class, enlarged to a size (H, W) and multiplied: (C, rows, W)."""
    like_vectors = _named.Upsampling(scores.vectors, size)
    if scores.texts is None:
        return like_vectors
    like_texts = _named.Upsampling(scores.texts, size)
    return lambda first, last: like_vectors(first, last).mul_(like_texts(first, last))


def reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An RGB uint8 image (H, W, 3) at a size (height, width): bilinear over all that a pixel covers, as Pillow does."""
    from PIL import Image

    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


SEGMENTER = ReCo
