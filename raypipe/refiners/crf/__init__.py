"""Fully connected CRF: masks that agree where pixels are near and alike (Kraehenbuehl and Koltun, NIPS 2011).

Here are the refiner, its options and presets, and how masks become energies. `dense_crf` in `meanfield` takes energies
from anyone; `lattice` is its filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raypipe.refiners._arrays import check, resized
from raypipe.refiners.crf.meanfield import dense_crf
from raypipe.types import fill_preset

CERTAIN = 0.95  # probability of what a binary mask says
FLOOR = 1e-5  # of a probability, before its logarithm
ROUNDING = 1e-6  # by how much probabilities of several masks may sum to more than 1
TOGETHER = 16  # masks of an image that are refined side by side: what bounds the memory
OPTIONS = ("gauss_sxy", "gauss_weight", "bilateral_sxy", "bilateral_srgb", "bilateral_weight", "iterations")


def preset(*values: float) -> dict[str, float]:
    """What a preset sets, in the order of OPTIONS."""
    return {f"refine_{name}": value for name, value in zip(OPTIONS, values, strict=True)}


# Zero-guidance segmentation's code; Amir et al., "Deep ViT features as dense visual descriptors"; Deep Spectral
# Methods; ReCo
PRESETS = {
    "zero_guidance": preset(1.0, 25.0, 5.0, 13.0, 100.0, 10),
    "amir": preset(3.0, 50.0, 5.0, 13.0, 15.0, 10),
    "spectral": preset(3.0, 3.0, 80.0, 13.0, 10.0, 5),
    "reco": preset(1.0, 3.0, 67.0, 3.0, 4.0, 10),
}


@dataclass
class Crf:
    """Give pixels that are near and alike the same mask; the result is soft.

    Masks whose values sum to at most 1 at every pixel are refined together, and against what no mask claims; others
    each by itself.
    """

    refine_preset: str = "zero_guidance"  # what is None below: zero_guidance, amir, spectral or reco
    refine_gauss_sxy: float | None = None  # sigma of smoothness, in px at working size; 1, amir and spectral 3
    refine_gauss_weight: float | None = None  # of smoothness against the mask; 25, amir 50, spectral and reco 3
    refine_bilateral_sxy: float | None = None  # sigma of likeness, in px at working size; 5, spectral 80, reco 67
    refine_bilateral_srgb: float | None = None  # and in levels of each colour, 0..255; 13, reco 3
    refine_bilateral_weight: float | None = None  # of likeness against the mask; 100, amir 15, spectral 10, reco 4
    refine_iterations: int | None = None  # of the mean field; 10, spectral 5
    refine_working_size: int | None = 448  # longest side in px, larger images are reduced; None: the image's own size

    presets: ClassVar = PRESETS

    def __post_init__(self):
        fill_preset(self, "refine_preset")
        for name in ("refine_gauss_sxy", "refine_bilateral_sxy", "refine_bilateral_srgb"):
            if not 0.1 <= getattr(self, name) < math.inf:
                raise ValueError(f"crf: {name} must be at least 0.1, got {getattr(self, name)!r}")
        for name in ("refine_gauss_weight", "refine_bilateral_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"crf: {name} must be at least 0, got {getattr(self, name)!r}")
        if self.refine_iterations < 1:
            raise ValueError(f"crf: refine_iterations must be at least 1, got {self.refine_iterations!r}")
        if self.refine_working_size is not None and self.refine_working_size < 1:
            raise ValueError(f"crf: refine_working_size must be at least 1, got {self.refine_working_size!r}")

    def __call__(self, masks: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, str]:
        """Refine masks (N, H, W), bool or float in [0, 1], along the edges of image (H, W, 3) uint8 RGB.

        Returns float32 (N, H, W) in [0, 1] and a note: `refine_rejected` if a mask lost all its foreground (values
        above 0.5); such a mask is kept as it was. Raises BadImage when the given masks are not finite, ValueError when
        sizes differ.
        """
        check(masks, image, name="crf")
        refined, rejected = masks.astype(np.float32), False
        for i, solution in enumerate(self._solutions(masks, image)):
            if (masks[i] > 0.5).any() and not (solution > 0.5).any():
                rejected = True
            else:
                refined[i] = solution
        return refined, "refine_rejected" if rejected else ""

    def _solutions(self, masks: np.ndarray, image: np.ndarray) -> Iterator[np.ndarray]:
        """Yield what becomes of each mask of (N, H, W): float32 (H, W) in [0, 1]."""
        if not len(masks):
            return
        size = self._size(image)
        small, options = resized(image, size), {name: getattr(self, f"refine_{name}") for name in OPTIONS}
        is_joint = masks.sum(0, dtype=np.float64).max() <= 1 + ROUNDING
        groups = [masks] if is_joint else (masks[i : i + TOGETHER] for i in range(0, len(masks), TOGETHER))
        for group in groups:
            values = np.stack([resized(mask.astype(np.float32), size) for mask in group])
            energies = energies_of(values if is_joint else values[:, None], is_binary=masks.dtype == bool)
            q, _ = dense_crf(small, energies, **options)
            for solution in q[..., 1:, :, :].reshape(values.shape):
                yield np.clip(resized(solution, image.shape[:2]), 0, 1)

    def _size(self, image: np.ndarray) -> tuple[int, int]:
        """Height and width at which an image is worked on."""
        height, width = image.shape[:2]
        scale = min(1.0, (self.refine_working_size or math.inf) / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))


def energies_of(values: np.ndarray, *, is_binary: bool) -> np.ndarray:
    """Energies of "no mask" and of each mask, where the masks of values, float32 (..., N, h, w), share out the image.

    The logarithm of their probabilities. Of binary masks what they say has 0.95, and the other labels share 0.05.
    Returns float32 (..., N + 1, h, w).
    """
    labels = np.concatenate([1 - values.sum(-3, keepdims=True), values], -3)
    if is_binary:
        other = (1 - CERTAIN) / values.shape[-3]
        labels = other + (CERTAIN - other) * labels
    return -np.log(np.maximum(labels, np.float32(FLOOR)))


REFINER = Crf
