"""Fast bilateral solver: masks that are smooth where the image is (Barron and Poole, ECCV 2016), as TokenCut uses it.

Here are the refiner, its options and presets, and images at working size. `solver` knows the grid and its equations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from raypipe.refiners._arrays import check, resized
from raypipe.refiners.bilateral.solver import Grid, filled_component
from raypipe.types import fill_preset

MEGAPIXEL = 1_000_000
TOKENCUT = {
    "refine_sigma_space": 16.0,
    "refine_sigma_luma": 16.0,
    "refine_sigma_chroma": 8.0,
    "refine_binarize": False,
    "refine_binary": False,
    "refine_accept_iou": 0.5,
}
FINE = {"refine_sigma_space": 24.0, "refine_sigma_luma": 4.0, "refine_sigma_chroma": 4.0, "refine_accept_iou": 0.0}
PSEUDO = {"refine_binarize": True, "refine_binary": True, "refine_accept_iou": 0.0, "refine_working_size": 512}
# TokenCut's, FOUND's and MOVE's; Sempart's; the pseudo-masks of NamedMask
PRESETS = {"tokencut": TOKENCUT, "sempart": TOKENCUT | FINE, "namedmask": TOKENCUT | PSEUDO}


@dataclass
class Bilateral:
    """Solve for masks that are smooth inside the image's regions and near the given ones; the result is soft."""

    refine_preset: str = "tokencut"  # what is None below: tokencut (also FOUND's and MOVE's), sempart or namedmask
    refine_sigma_space: float | None = None  # side of a cell of the grid in px; 16, sempart 24
    refine_sigma_luma: float | None = None  # in levels of brightness, 0..255; 16, sempart 4
    refine_sigma_chroma: float | None = None  # in levels of the two colour differences; 8, sempart 4
    refine_strength: float = 256.0  # lambda, of smoothness against the given mask; 64 to 512 are worth a sweep
    refine_confidence: float = 0.999  # how much the given mask counts at every pixel
    # A photograph needs 60 to 90 iterations to be solved; the papers stop at 25, which is part of their figures.
    refine_iterations: int = 25  # of conjugate gradients, at most
    refine_binarize: bool | None = None  # solve for the mask thresholded at 0.5; namedmask does
    # Image and masks are brought to it. None, with tokencut: reduced to a megapixel where an image has more.
    refine_working_size: int | None = None  # short side in px to work at, None the image's own; namedmask 512
    refine_binary: bool | None = None  # give 0 and 1, what of the solution is above 0.5; namedmask does
    # Otherwise the mask stays as it was, with the note refine_rejected.
    refine_accept_iou: float | None = None  # IoU with its mask that a solution must exceed; 0 none, tokencut 0.5
    refine_clean: Literal["none", "largest"] = "none"  # largest: holes filled, then the largest part, as 0 and 1

    presets: ClassVar = PRESETS

    def __post_init__(self):
        fill_preset(self, "refine_preset")
        cells = (self.refine_sigma_space, self.refine_sigma_luma, self.refine_sigma_chroma)
        for name, cell in zip(("space", "luma", "chroma"), cells, strict=True):
            if not 1 <= cell < math.inf:
                raise ValueError(f"bilateral: refine_sigma_{name} must be at least 1, got {cell!r}")
        if not 0 <= self.refine_strength < math.inf:
            raise ValueError(f"bilateral: refine_strength must be at least 0, got {self.refine_strength!r}")
        if not 0 < self.refine_confidence <= 1:
            text = f"above 0 and at most 1, got {self.refine_confidence!r}"
            raise ValueError(f"bilateral: refine_confidence must be {text}")
        if self.refine_iterations < 1:
            raise ValueError(f"bilateral: refine_iterations must be at least 1, got {self.refine_iterations!r}")
        if self.refine_working_size is not None and self.refine_working_size < 1:
            raise ValueError(f"bilateral: refine_working_size must be at least 1, got {self.refine_working_size!r}")
        if not 0 <= self.refine_accept_iou < 1:
            text = f"at least 0 and below 1, got {self.refine_accept_iou!r}"
            raise ValueError(f"bilateral: refine_accept_iou must be {text}")
        if self.refine_clean not in ("none", "largest"):
            raise ValueError(f"bilateral: refine_clean must be none or largest, got {self.refine_clean!r}")

    @property
    def _is_binary(self) -> bool:
        return self.refine_binary or self.refine_clean == "largest"

    def __call__(self, masks: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, str]:
        """Refine masks (N, H, W), bool or float in [0, 1], along the edges of image (H, W, 3) uint8 RGB.

        Returns float32 (N, H, W) in [0, 1] and a note: `refine_rejected` if a mask changed by more than
        `refine_accept_iou` allows; such a mask is kept as it was. So are masks of one value, their own solution.
        Raises BadImage when the given masks are not finite, ValueError when sizes differ.
        """
        check(masks, image, name="bilateral")
        before = masks > 0.5
        refined = (before if self._is_binary else masks).astype(np.float32)
        varied = np.flatnonzero(masks.min(axis=(1, 2)) != masks.max(axis=(1, 2)))
        note = ""
        for i, solution in zip(varied, self._solutions(masks[varied], image), strict=True):
            if self.refine_accept_iou and iou(solution > 0.5, before[i]) <= self.refine_accept_iou:
                note = "refine_rejected"
            else:
                refined[i] = solution
        return refined, note

    def _solutions(self, masks: np.ndarray, image: np.ndarray) -> Iterator[np.ndarray]:
        """Yield what becomes of each mask of (N, H, W): float32 (H, W) in [0, 1]."""
        if not len(masks):
            return
        size, height, width = self._size(image), *image.shape[:2]
        cells = (self.refine_sigma_space, self.refine_sigma_luma, self.refine_sigma_chroma)
        targets = (resized(mask.astype(np.float32), size) for mask in masks)
        solutions = Grid(resized(image, size), *cells).solve(
            (target > 0.5 for target in targets) if self.refine_binarize else targets,
            strength=self.refine_strength,
            confidence=self.refine_confidence,
            iterations=self.refine_iterations,
        )
        for solution in solutions:
            if self.refine_clean == "largest":
                solution = filled_component(solution > 0.5)
            elif self.refine_binary:
                solution = solution > 0.5
            enlarged = resized(solution.astype(np.float32), (height, width), nearest=self._is_binary)
            yield np.clip(enlarged, 0, 1)

    def _size(self, image: np.ndarray) -> tuple[int, int]:
        """Height and width at which an image is worked on."""
        height, width = image.shape[:2]
        to_megapixel = math.sqrt(MEGAPIXEL / (height * width))
        scale = min(1.0, to_megapixel) if self.refine_preset == "tokencut" else 1.0
        if self.refine_working_size is not None:
            # A strip of 1 x 2000 px does not become one of 512 x 1,024,000.
            scale = min(self.refine_working_size / min(height, width), max(1.0, to_megapixel))
        return max(1, int(height * scale + 1e-6)), max(1, int(width * scale + 1e-6))


def iou(mask: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two bool (H, W); 1 for two empty ones."""
    union = np.count_nonzero(mask | other)
    return np.count_nonzero(mask & other) / union if union else 1.0


REFINER = Bilateral
