"""GrabCut from a rectangle just inside the image's border: a foreground that needs no weights (OpenCV)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.types import Segmenter, Segments


@dataclass
class Grabcut(Segmenter):
    """One mask: the object in the middle, told from the colours along the border."""

    long_side: int = 512  # larger images are shrunk to it, in px; time grows faster than the area
    inset: float = 0.02  # border strip taken for background, as a part of width and height
    iterations: int = 5  # rounds of colour models and graph cut
    min_fraction: float = 0.1  # a smaller foreground is a failure: the whole image is taken instead

    source = "Rother, Kolmogorov, Blake, SIGGRAPH 2004, in OpenCV"
    licence = "Apache-2.0 (OpenCV), no weights"
    random = True

    def __post_init__(self):
        if self.long_side < 1:
            raise ValueError(f"grabcut: long_side must be at least 1, got {self.long_side!r}")
        if not 0 < self.inset < 0.5:
            raise ValueError(f"grabcut: inset must be between 0 and 0.5, got {self.inset!r}")
        if self.iterations < 1:
            raise ValueError(f"grabcut: iterations must be at least 1, got {self.iterations!r}")
        if not 0 <= self.min_fraction <= 1:
            raise ValueError(f"grabcut: min_fraction must be in [0, 1], got {self.min_fraction!r}")

    def untiled(self) -> str:
        return "which looks for the object in the middle of an image"

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        import cv2

        for image in images:
            height, width = image.shape[:2]
            cut = self._cut(shrink(image, self.long_side))
            if not cut.any() or cut.mean() < self.min_fraction:
                yield Segments(np.ones((1, height, width), bool), note="whole_image")
            else:
                mask = cv2.resize(cut.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
                yield Segments(mask[None].astype(bool))

    def _cut(self, image: np.ndarray) -> np.ndarray:
        """Foreground of an image at working size, bool (H, W)."""
        import cv2

        height, width = image.shape[:2]
        left, top = round(self.inset * width), round(self.inset * height)
        if left == top == 0 or 2 * left >= width or 2 * top >= height:
            return np.zeros((height, width), bool)  # no border strip or no inside: GrabCut would have nothing to model
        labels = np.zeros((height, width), np.uint8)
        inside = (left, top, width - 2 * left, height - 2 * top)
        cv2.setRNGSeed(self.seed)
        cv2.grabCut(image, labels, inside, None, None, self.iterations, cv2.GC_INIT_WITH_RECT)
        return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def shrink(image: np.ndarray, long_side: int) -> np.ndarray:
    """The image with its longer side at most long_side px, each pixel the mean of the area it covers."""
    import cv2

    height, width = image.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


SEGMENTER = Grabcut
