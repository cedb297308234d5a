"""NamedMask: a segmenter of named classes that learned from retrieved images and from masks which nobody drew.

Shin, Xie, Albanie, "NamedMask: Distilling Segmenters from Complementary Foundation Models", CVPR Workshops 2023. Here
is the method; `network` is its network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import classes, networks
from raypipe.features.grid import say_reduced
from raypipe.segmenters import _named
from raypipe.types import BadImage, LabelMap, Segmenter

if TYPE_CHECKING:
    from torch import Tensor

# VOC2012, 59.3 % mIoU on val (the authors' README, which lists those of other data sets too)
PUBLISHED = "https://www.robots.ox.ac.uk/~vgg/research/namedmask/shared_files/voc2012/namedmask_voc2012.pt"
AT_ONCE = 16 * 512 * 512  # px that go through the network together on a GPU


@dataclass
class NamedMask(Segmenter):
    """One soft mask per class that is the likeliest somewhere: its probability there, and 0 elsewhere.

    Pixels whose likeliest class is the background belong to none.
    """

    # every pixel of a class counts: there is a class for the background. With --refine, which smears values over edges,
    # 0.3 to 0.5 is what one wants
    threshold: float | None = 0.0
    weights: str = PUBLISHED  # what `raypipe train namedmask` leaves in its output; or a published .pt, as file or URL
    # of a .pt whose name does not tell: a data set's list, a file, or names, in the order of its labels
    classes: str | None = None
    max_side: int | None = None  # px; longer photographs are seen smaller. None = never, as in the paper
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto = bfloat16 on a GPU

    source = "Shin, Xie, Albanie, CVPR Workshops 2023"
    licence = "none stated (published weights)"
    networks, licences = ("weights",), {"weights": "none stated"}
    model_types = {"weights": "namedmask"}
    needs = (
        "the authors' namedmask_voc2012.pt, 0.1 GB: fetched on the first run, or by `raypipe weights namedmask`; or the"
        " output of `raypipe train namedmask` as --weights"
    )
    soft, exclusive = True, True
    across = "label"
    gpus = 0.5  # two actors: one prepares and enlarges while the network of the other works
    batch_size = 16
    timeout = 600.0  # a photograph of 12 megapixels takes minutes on a CPU

    def __post_init__(self):
        networks.settle_options(self)
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"namedmask: max_side must be at least 1, got {self.max_side!r}")
        if self.classes is not None:
            self.classes = classes.settle(self.classes)

    def categories(self) -> str | None:
        return self.classes or networks.told_classes(self.weights) or self._published()

    def fetch(self) -> None:
        """Raise FileNotFoundError for a training that is under way."""
        path = Path(self.weights)
        if (path / "training.json").is_file() and not (path / "config.json").is_file():
            text = f"the training in {path} has not ended; the same command goes on with it"
            raise FileNotFoundError(f"namedmask: {text}")

    def load(self, device: str) -> None:
        from raypipe.segmenters.namedmask import network

        self.fetch()
        self._path = networks.locate(self.weights, method=self.name)
        deeplab, told = network.read(self._path, method=self.name)
        self._names = self._classes(deeplab.classes - 1, told.get("classes"))
        network.fold(deeplab)
        self.use(deeplab.to(device, memory_format=layout(device)), device, self._names)

    def use(self, network, device: str, names: Sequence[str]) -> None:
        """Label with a network on a device, in eval mode, that is no file, in the place of `load`.

        names: of its classes, without the background.
        """
        self._network, self._device, self._names = network, device, tuple(names)

    def _published(self) -> str | None:
        """The data set's list that the name of a published file tells."""
        name = PurePosixPath(self.weights).stem.removeprefix("namedmask_")
        return name if name in classes.names() else None

    def _classes(self, count: int, told: Sequence[str] | None) -> tuple[str, ...]:
        """The names of the network's classes, as many as it has beside the background, by label.

        told: those of its config.json. Raises ValueError where nobody tells them, or others than `classes` does.
        """
        if told is None and (name := self._published()):
            told = classes.read(name).names
        chosen = classes.read(self.classes).names if self.classes else told
        if chosen is None:
            text = (
                f"{self.weights} does not name its {count} classes; pass them as --classes, in the order of its labels"
            )
            raise ValueError(f"namedmask: {text}")
        if len(chosen) != count:
            text = f"classes must be {count}, as many as {self.weights} has beside the background, got {len(chosen)}"
            raise ValueError(f"namedmask: {text}")
        for label, pair in enumerate(zip(chosen, told or chosen, strict=True), 1):
            if len({*map(classes.normalised, pair)}) > 1:
                text = f"class {label} of {self.weights} is {pair[1]!r}, classes say {pair[0]!r}; leave --classes out"
                raise ValueError(f"namedmask: {text}")
        return tuple(told or chosen)

    def checksums(self) -> dict[str, str]:
        """Of the weights, and of config.json, which names the classes."""
        found = networks.checksums(self._path)
        if (file := self._path / "config.json").is_file():
            found["config.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return found

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[LabelMap]:
        sizes, done = [self._size(image.shape[:2]) for image in images], {}
        for i, size in enumerate(sizes):
            if i not in done:
                step = max(1, AT_ONCE // (size[0] * size[1])) if self._device == "cuda" else 1
                now = [j for j in range(i, len(images)) if sizes[j] == size and j not in done][:step]
                done |= zip(now, self._logits([images[j] for j in now], size), strict=True)
            yield self._label_map(done.pop(i), images[i].shape[:2])

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size at which an image of a size (height, width) is seen."""
        if self.max_side is None or max(size) <= self.max_side:
            return size
        say_reduced(self.name, self.max_side)
        return tuple(max(1, round(side * self.max_side / max(size))) for side in size)

    def _logits(self, images: Sequence[np.ndarray], size: tuple[int, int]) -> Tensor:
        """Logits, float32 (B, C, h, w) of a quarter of the size at which the images go through the network."""
        import torch

        seen = torch.from_numpy(np.stack([reduced(image, size) for image in images])).to(self._device)
        mean, std = (
            seen.new_tensor(each, dtype=torch.float32) for each in (networks.IMAGENET_MEAN, networks.IMAGENET_STD)
        )
        pixels = ((seen / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(memory_format=layout(self._device))
        with torch.inference_mode(), networks.autocast(self._device, self.dtype):
            return self._network.coarse(pixels).float()

    def _label_map(self, logits: Tensor, size: tuple[int, int]) -> LabelMap:
        """What the likeliest class of each pixel is, of logits (C, h, w) of the whole image."""
        if not logits.isfinite().all():
            text = "the network gives values that are no finite numbers; try --dtype float32, or other weights"
            raise BadImage("segment", "non_finite", text)
        rows = _named.Upsampling(logits, size)
        return _named.label_map(rows, size, self._names, temperature=1.0, background=True)


def layout(device: str):
    """How images lie in memory: channels last on a GPU; a CPU needs up to twice as long for these."""
    import torch

    return torch.channels_last if device == "cuda" else torch.contiguous_format


def reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An RGB uint8 image (H, W, 3) at a size (height, width): bilinear over all that a pixel covers, as Pillow does."""
    from PIL import Image

    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


SEGMENTER = NamedMask
