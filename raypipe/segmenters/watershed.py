"""Marker watershed of the dark regions inside a foreground (GloPER supplement; Beucher and Meyer)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.segmenters import _inside
from raypipe.types import PatternSegmenter, Segments

BOX = np.ones((3, 3), np.uint8)  # structuring element of all morphology (reference)


@dataclass
class Watershed(PatternSegmenter):
    """One mask: the dark pattern, grown by watershed from the middles of dark regions."""

    # The reference's, but for size.
    blur: int = 5  # side of the binomial blur in px; odd, 1 = none
    open_iterations: int = 2  # erosions, then dilations, of the dark regions
    dilate_iterations: int = 3  # dilations that give the sure background's border
    foreground_fraction: float = 0.1  # pattern for sure: deeper than this part of the deepest point
    size: int | None = None  # square working size; the reference's 1024 gains 0.01 Dice and loses the aspect ratio

    source = "Beucher and Meyer 1993, with the settings of the GloPER supplement (Chen, Koh, Dobbie)"
    licence = "Apache-2.0 (OpenCV), no weights"

    def __post_init__(self):
        super().__post_init__()
        if self.blur not in (1, 3, 5, 7):
            raise ValueError(f"watershed: blur must be 1, 3, 5 or 7, got {self.blur!r}")
        for name in ("open_iterations", "dilate_iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"watershed: {name} must not be negative, got {getattr(self, name)!r}")
        if not 0 <= self.foreground_fraction < 1:
            raise ValueError(f"watershed: foreground_fraction must be in [0, 1), got {self.foreground_fraction!r}")
        _inside.check_size(self.name, self.size, smallest=_inside.MIN_SIDE)

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        for image, foreground in zip(images, foregrounds, strict=True):
            yield _inside.at_working_size(self._pattern, image, foreground, self.size)

    def _pattern(self, image: np.ndarray, foreground: np.ndarray) -> Segments:
        nothing = np.zeros((1, *foreground.shape), bool)
        if note := _inside.unusable(foreground):
            return Segments(nothing, note=note)
        grey = blurred_grey(image, self.blur)
        if grey.min() == grey.max():
            return Segments(nothing, note="no_contrast")  # Otsu's level would be arbitrary
        dark = dark_regions(grey, self.open_iterations)
        border, core = sure_regions(dark, self.dilate_iterations, self.foreground_fraction)
        core &= foreground
        if not core.any():
            return Segments(nothing, note="no_dark_region")
        labels = flood(image, markers(border, core))
        return Segments(((labels > 1) & foreground)[None])


def blurred_grey(image: np.ndarray, blur: int) -> np.ndarray:
    """RGB uint8 (H, W, 3) to grey uint8 (H, W) after a binomial blur of `blur` px a side, mirrored at the border."""
    import cv2

    return cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (blur, blur), 0)


def dark_regions(grey: np.ndarray, open_iterations: int) -> np.ndarray:
    """Where grey (H, W) is at most Otsu's level, without specks: bool (H, W)."""
    import cv2

    _, dark = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY_INV | cv2.THRESH_OTSU)
    return cv2.morphologyEx(dark, cv2.MORPH_OPEN, BOX, iterations=open_iterations).astype(bool)


def sure_regions(dark: np.ndarray, dilate_iterations: int, foreground_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Outer limits and sure cores of the dark regions, bool (H, W) each.

    A core is deeper inside its region than foreground_fraction of the deepest point of the image.
    """
    import cv2

    limit = cv2.dilate(dark.astype(np.uint8), BOX, iterations=dilate_iterations).astype(bool)
    depth = cv2.distanceTransform(dark.astype(np.uint8), cv2.DIST_L2, 5)
    return limit, depth > foreground_fraction * depth.max()


def markers(limit: np.ndarray, core: np.ndarray) -> np.ndarray:
    """Seeds for the watershed, int32 (H, W): 1 outside `limit`, 2, 3, ... the 8-connected cores, 0 to be decided."""
    import cv2

    _, seeds = cv2.connectedComponents(core.astype(np.uint8))
    seeds += 1
    seeds[limit & ~core] = 0
    return seeds


def flood(image: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Watershed of an RGB image from seeds: int32 (H, W) labels, -1 on lines between them and on the border."""
    import cv2

    return cv2.watershed(image, seeds.copy())


SEGMENTER = Watershed
