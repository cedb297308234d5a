"""Coat pattern against base colour by rebuilding each tile of one image from two colours (GloPER: Chen, Koh, Dobbie).

A small U-Net is optimised on the image itself, for each local size (side of the tiles) anew. A pixel belongs to the
pattern when it is nearer to the darker colour of its tile.

Here are the method, its options and presets, and images at working size. `unet` knows the network, many side by side;
`fit` knows its optimisation: colours, noise, losses, steps, on a GPU as captured graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from raypipe.segmenters import _inside
from raypipe.types import PatternSegmenter, Segments, fill_preset

DIVISOR = 16  # sides must be multiples of it: the network halves them four times
SMALLEST = 32  # px: below, the network's deepest map is a single pixel, which cannot be normalised
CONTRAST = 1e-3  # of RGB in [0, 1]: below, the two colours are one and rounding would decide
OPERATIONS = 1.28e6  # per pixel and step with the published widths (20.9e9 at 128 x 128 px)
WIDTHS = (32, 64, 128, 256, 512)  # the published network's
SLOW = 1e10  # operations per second of a busy CPU core: an eighth of an idle one's

HALF = (16, 32, 64, 128, 256)  # a third of the time of the published ones

# Measured on 20 labelled photographs within GrabCut's foreground: mean Dice of the better polarity, half widths. At the
# presets Dice at the photographs' own size (`raypipe evaluate`) and the time per image of one core of an EPYC (Zen 4).
# Compared at working size, to choose them: at 128 px, size 8, of three seeds the one with the least loss
# gives 0.629, the mean of their fur weights 0.614, one alone 0.608. Local sizes 4, 8, 16, 32 alone give 0.561, 0.591,
# 0.607, 0.601, the mean of their fur weights 0.600 (seed 41). At 256 px, size 16: 0.619 (seed 41). Best of three seeds
# on six photographs: 0.686 with half widths, 0.694 with full ones.
PRESETS = {
    "paper": {  # the reference's: 8e15 operations, a day or two on one core
        "size": 1024, "local_sizes": (4, 8, 16, 32, 64, 128), "steps": 1000, "widths": WIDTHS, "seeds": 1,
    },
    "balanced": {  # 105 s, 0.64: finer edges and thin stripes
        "size": 256, "local_sizes": (16,), "steps": 100, "widths": HALF, "seeds": 3,
    },
    "fast": {"size": 128, "local_sizes": (8,), "steps": 100, "widths": HALF, "seeds": 3},  # 27 s, 0.62
}  # fmt: skip


class Prepared(NamedTuple):
    """One image at working size."""

    x: np.ndarray  # (3, h, w) float32 in [0, 1]
    foreground: np.ndarray  # (h, w) bool, False in the padding
    filled: tuple[int, int]  # height and width without the padding
    sizes: tuple[int, ...]  # local sizes that fit
    source: np.ndarray  # (H, W) bool, the foreground at the image's own size
    note: str  # why there is nothing to optimise, or ""


@dataclass
class Gloper(PatternSegmenter):
    """One soft mask: how much nearer each pixel is to the darker of its tile's two colours. A tile of one shade falls
    to one of them as a whole, which shows as a square.
    """

    # Defaults are the reference's; what a preset sets is so in `paper`. tau hardly matters.
    threshold: float | None = None  # rho, 0.5 where it is None: 0.45..0.60 is useful, 0.15 and less is all, 0.85 none
    seed: int = 41  # of initial weights and noise, the same for every image and local size
    preset: Literal["paper", "balanced", "fast"] = "balanced"  # what is None below; a core takes days, 105 s, 27 s
    size: int | None = None  # working side in px
    local_sizes: tuple[int, ...] | None = None  # sides of the tiles in px
    steps: int | None = None  # of the optimiser
    widths: tuple[int, ...] | None = None  # channels of the network's five levels
    lr: float = 1e-3  # of AdamW
    weight_decay: float = 0.01  # of AdamW
    tau: float = 0.1  # temperature of the assignment
    seeds: int | None = None  # optimise with so many seeds, from `seed` on; the least loss counts
    reverse: bool = False  # the pattern is the lighter colour; its threshold is 1 - rho of the paper's reverse
    per_size: bool = False  # after the consensus also one segment per local size
    keep_aspect: bool = False  # keep width to height and pad, instead of a square
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto is bfloat16 on a GPU only

    source = "GloPER (Chen, Koh, Dobbie, University of Auckland 2025)"
    licence = "none needed: own code, no weights"
    soft = random = True
    presets = PRESETS
    gpus = 1.0
    batch_size = 4

    def __post_init__(self):
        fill_preset(self)
        self.local_sizes, self.widths = tuple(self.local_sizes), tuple(self.widths)  # lists cannot be a cache's key
        super().__post_init__()
        _inside.check_size(self.name, self.size, smallest=SMALLEST)
        self._check_numbers()
        if not fitting(self.local_sizes, self.size):
            least = min(self.local_sizes)
            raise ValueError(f"gloper: size must be at least {2 * least} for local size {least}, got {self.size!r}")
        unit = multiple(fitting(self.local_sizes, self.size))
        if not self.keep_aspect and self.size % unit:
            near = max(1, round(self.size / unit)) * unit
            sizes = " ".join(map(str, self.local_sizes))
            raise ValueError(
                f"gloper: size must be a multiple of {unit} for local sizes {sizes}, got {self.size!r}; "
                f"take {near}, or other local sizes"
            )

    def _check_numbers(self) -> None:
        if len(self.widths) != 5 or min(self.widths) < 1:
            raise ValueError(f"gloper: widths must be five numbers of channels, got {self.widths!r}")
        if not self.local_sizes or min(self.local_sizes) < 2 or len(set(self.local_sizes)) < len(self.local_sizes):
            raise ValueError(f"gloper: local_sizes must be different numbers from 2 px on, got {self.local_sizes!r}")
        for name in ("steps", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"gloper: {name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("lr", "tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"gloper: {name} must be above 0, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"gloper: weight_decay must not be negative, got {self.weight_decay!r}")

    @property
    def timeout(self) -> float:
        """Seconds for one image: what its optimisation takes on a busy CPU core, and a minute."""
        share = sum(width**2 for width in self.widths) / sum(width**2 for width in WIDTHS)
        rounds = self.steps * self.seeds * len(self.local_sizes)
        return 60 + rounds * self.size**2 * OPERATIONS * share / SLOW

    def load(self, device: str) -> None:
        from raypipe.segmenters.gloper.fit import Fitter, Settings

        names = ("widths", "steps", "lr", "weight_decay", "tau", "dtype")
        settings = Settings(**{name: getattr(self, name) for name in names})
        self._device, self._fit = device, Fitter(self._seeds(), settings)

    def _seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        together: list[Prepared] = []  # neighbours of one working shape, which a GPU optimises side by side
        for image, foreground in zip(images, foregrounds, strict=True):
            prepared = self._prepared(image, foreground)
            if together and not self._joins(prepared, together):
                yield from self._found(together)
                together = []
            together.append(prepared)
        yield from self._found(together)

    def _prepared(self, image: np.ndarray, foreground: np.ndarray) -> Prepared:
        from PIL import Image

        height, width = self._filled(foreground.shape)
        sizes = fitting(self.local_sizes, min(height, width)) or (min(self.local_sizes),)
        unit = multiple(sizes)
        pad = ((0, -height % unit), (0, -width % unit))
        x = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
        x = np.pad(x, (*pad, (0, 0)), mode="edge").transpose(2, 0, 1)
        # As the reference shrinks its cut-out: whatever an opaque pixel reaches stays opaque, thin legs too.
        opaque = Image.fromarray(foreground.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BICUBIC)
        small = np.pad(np.asarray(opaque) > 0, pad)
        note = ""
        if not small.any():
            note = "empty_foreground"
        elif np.ptp(x[:, small], axis=1).max() < CONTRAST:
            note = "no_contrast"
        return Prepared(x, small, (height, width), sizes, foreground, note)

    def _filled(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which an image of this shape is worked on."""
        if not self.keep_aspect:
            return self.size, self.size
        scale = self.size / max(shape)
        return tuple(max(1, round(side * scale)) for side in shape)

    def _joins(self, prepared: Prepared, together: Sequence[Prepared]) -> bool:
        alike = (prepared.x.shape, prepared.sizes) == (together[0].x.shape, together[0].sizes)
        return alike and len(together) < self._fit.images_at_once(prepared.x.shape, prepared.sizes, self._device)

    def _found(self, together: Sequence[Prepared]) -> Iterator[Segments]:
        """The results of images of one working shape, in their order."""
        fitted = self._fur_weights([image for image in together if not image.note])
        for image in together:
            weights, note = (None, image.note) if image.note else next(fitted)
            yield self._segments(image, weights, note)

    def _fur_weights(self, images: Sequence[Prepared]) -> Iterator[tuple[np.ndarray | None, str]]:
        """For each image the fur weight of each local size, (K, h, w) float32 or None where there is none; a note.

        Of several seeds the one with the least loss counts. A size whose optimisation diverged is NaN.
        """
        import torch

        if not images:
            return
        x, foreground = (torch.from_numpy(np.stack(planes)) for planes in list(zip(*images, strict=True))[:2])
        x, foreground = x.to(self._device), foreground.to(self._device)
        fitted = self._fit(x, foreground.float(), images[0].sizes, self._seeds())
        for i in range(len(images)):
            margins = torch.stack([best_margin(x[i], of_size, i) for of_size in fitted])  # (K, h, w)
            sound = margins.isfinite().all(-1).all(-1)
            if not sound.any():
                yield None, "diverged"
            elif margins[sound][:, foreground[i]].abs().max() < CONTRAST:
                yield None, "no_contrast"
            else:
                yield margins.sigmoid().cpu().numpy(), "" if sound.all() else "diverged"

    def _segments(self, image: Prepared, weights: np.ndarray | None, note: str) -> Segments:
        """Masks of one image: the consensus first, then, if wanted, one per local size."""
        labels = ("consensus", *map(str, image.sizes)) if self.per_size else ()
        count = max(1, len(labels))
        masks = np.zeros((count, *image.source.shape), np.float32)
        if weights is None:
            return Segments(masks, labels, note=note)
        if len(image.sizes) < len(self.local_sizes):
            note = ",".join(filter(None, ("size_skipped", note)))
        for mask, weight in zip(masks, [np.nanmean(weights, 0), *weights], strict=False):
            if np.isfinite(weight).all():
                mask[:] = enlarge(1 - weight if self.reverse else weight, image.filled, mask.shape) * image.source
        return Segments(masks, labels, note=note)


def best_margin(x, fitted, image: int):
    """The margin (h, w) by the seed whose last loss is least; NaN when none is finite. x: (3, h, w). fitted: Fitted."""
    import torch

    from raypipe.segmenters.gloper.fit import margin

    losses = fitted.losses[-1, :, image].sum(-1).nan_to_num(torch.inf, torch.inf)  # (R,)
    best = losses.argmin()
    found = margin(x, fitted.fine[best, image])
    return found if losses[best].isfinite() else torch.full_like(found, torch.nan)


def fitting(sizes: Sequence[int], side: int) -> tuple[int, ...]:
    """The local sizes whose coarse tiles, twice as large, fit into a side of an image."""
    return tuple(size for size in sizes if 2 * size <= side)


def multiple(sizes: Sequence[int]) -> int:
    """What the sides of an image must be multiples of for these local sizes."""
    return math.lcm(DIVISOR, *(2 * size for size in sizes))


def enlarge(weight: np.ndarray, filled: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """A fur weight (h, w) without its padding at the image's own size, bilinear: float32 of `shape`, in [0, 1]."""
    from PIL import Image

    height, width = filled
    image = Image.fromarray(np.ascontiguousarray(weight[:height, :width]))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR)).clip(0, 1)


SEGMENTER = Gloper
