"""What the methods that find objects in frozen dense features share: networks, features, images too small for any."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from raypipe import networks
from raypipe.features.dino import Dino, Features
from raypipe.types import Segmenter, Segments

COLOR = "color"  # in the place of weights: `features.color`
CELL = 16  # px of a side of its patches, as of DINO's ViT-S/16


@dataclass
class Discovery(Segmenter):
    """A method on frozen dense features. It says which ones in class attributes, and finds masks in `find`.

    A method with a head of its own has the head in `weights` and the feature network in a field `backbone`, and lists
    both in `networks`.
    """

    # a Hugging Face id, a URL, a folder or a file; color: hand-made features, no weights
    weights: str = "facebook/dino-vits16"
    max_side: int = 1024  # px; longer images are reduced to it first. Twice the side is 16 times the work
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto = bfloat16 on a GPU

    FIT: ClassVar[str] = "pad"  # how an image becomes whole patches; see `features.dino`. Each may be a property
    FACET: ClassVar[str] = "key"
    BLOCK: ClassVar[int] = -1
    CLS_ATTENTION: ClassVar[bool] = False
    POSITIONS: ClassVar[str | None] = None

    networks, licences = ("weights",), {"weights": "Apache-2.0"}
    gpus = 1.0
    batch_size = 16
    timeout = 600.0

    def __post_init__(self):
        """Settle weights. Raises ValueError for options that make no sense."""
        if self.max_side < 1:
            raise ValueError(f"{self.name}: max_side must be at least 1, got {self.max_side!r}")
        if self.weights == COLOR and self.networks == ("weights",):
            if self.dtype != "auto":
                raise ValueError(f"{self.name}: dtype {self.dtype!r} has no effect: weights 'color' is no network")
            self.networks, self.gpus = (), 0.0  # nothing to fetch, nothing for a GPU
        for field in self.networks:
            if getattr(self, field) == COLOR:
                raise ValueError(f"{self.name}: {field} 'color' is no network, and nothing was trained on it; name one")
        networks.settle_options(self)

    def untiled(self) -> str:
        is_box = getattr(self, "result", "mask") == "box"
        return "whose box is that of the one object of an image; leave out --result box" if is_box else ""

    def load(self, device: str) -> None:
        """Read the feature network; a method with a head calls this first, then reads `self._paths["weights"]`."""
        networks.keep_products_exact(device)
        self._device, self._paths, self._dino = device, networks.locate_each(self), None
        if self._paths:
            self._dino = self.network(self._paths["backbone" if "backbone" in self._paths else "weights"], device)

    def network(self, path: Path, device: str) -> Dino:
        """The feature network in a folder or file."""
        return Dino(path, method=self.name, device=device, dtype=self.dtype, positions=self.POSITIONS)

    def checksums(self) -> dict[str, str]:
        if len(self._paths) > 1:
            return networks.checksums_of_each(self._paths)
        return {name: value for path in self._paths.values() for name, value in networks.checksums(path).items()}

    def features(self, images: Sequence[np.ndarray]) -> Iterator[Features]:
        """Features of each image, in order. Depend on no option that `stages` lists."""
        return self.features_of(self._dino, images)

    def features_of(self, network: Dino | None, images: Sequence[np.ndarray]) -> Iterator[Features]:
        """Those of one network; hand-made ones without any."""
        if network is None:
            from raypipe.features import color

            options = {"fit": self.FIT, "max_side": self.max_side, "method": self.name}
            return (color.describe(image, CELL, **options) for image in images)
        options = {"facet": self.FACET, "block": self.BLOCK, "cls_attention": self.CLS_ATTENTION}
        return network(images, fit=self.FIT, max_side=self.max_side, **options)

    @abstractmethod
    def find(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> Iterator[Segments]:
        """Yield what is found in each image, in order. features: one per image, of `features`."""

    def answer(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> Iterator[Segments]:
        """As `find`, with a note and one mask for images in which nothing can be told apart.

        `too_small`, smaller than a patch both ways or a single pixel: an empty mask. `degenerate`, of one colour, in
        which a network's features tell places apart and nothing else: see `of_one_colour`.
        """
        notes = [hopeless(image, each) for image, each in zip(images, features, strict=True)]
        chosen = [(image, each) for image, each, note in zip(images, features, notes, strict=True) if not note]
        found = self.find([image for image, _ in chosen], [each for _, each in chosen]) if chosen else iter(())
        for image, note in zip(images, notes, strict=True):
            if note == "degenerate":
                yield self.of_one_colour(image)
            else:
                yield self.nothing(image, note) if note else next(found)

    def of_one_colour(self, image: np.ndarray) -> Segments:
        """The answer for an image of one colour: no object is there; a box has to be, so it is the whole image."""
        segments = self.nothing(image, "degenerate")
        segments.masks[:] = getattr(self, "result", "mask") == "box"
        return segments

    def nothing(self, image: np.ndarray, note: str) -> Segments:
        """One empty mask of an image."""
        return Segments(np.zeros((1, *image.shape[:2]), np.float32 if self.soft else bool), note=note)

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        for batch in networks.batches(images, self._device):
            yield from self.answer(batch, list(self.features(batch)))


def hopeless(image: np.ndarray, features: Features) -> str:
    """Why nothing in an image can be told apart: `too_small`, `degenerate`; "" where it may be."""
    side = features.patch + 2 * features.margin
    if max(image.shape[:2]) < side or image.shape[:2] == (1, 1):
        return "too_small"
    return "degenerate" if is_one_colour(image) else ""


def is_one_colour(image: np.ndarray) -> bool:
    """Whether all pixels of an image (H, W, 3) are the same."""
    return all((row == image[0, 0]).all() for row in image)  # of a photograph one row is looked at


def by_grid(features: Sequence[Features], most: Callable[[Features], int] | None = None) -> Iterator[list[int]]:
    """The indices of features that lie on one grid, so that methods can take them together; each index once.

    most: how many features like these fit into memory together; less than one counts as one. None = all.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, each in enumerate(features):
        groups.setdefault(each.grid, []).append(i)
    for group in groups.values():
        step = max(1, most(features[group[0]])) if most else len(group)
        yield from (group[first : first + step] for first in range(0, len(group), step))
