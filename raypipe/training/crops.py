"""The squares on which masks are measured by the published protocol, and what becomes of the masks: pure arrays.

`crop320` of the Two Tricks paper: the shorter side of a photograph is brought to 335 px, and its middle 320 x 320 px
are what the network is given and what its masks are measured on. So the margins do not count, and the values are not
those of `evaluate`, which has whole photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from raypipe.evaluation.task import Value
from raypipe.evaluation.tasks.saliency import Saliency, read_grey
from raypipe.inputs import corrections
from raypipe.inputs.maskkinds import Kind
from raypipe.refiners.bilateral import Bilateral
from raypipe.refiners.guided import guided_filter

LONGEST = 4  # times the shorter side: of what is longer, the middle is kept
FILTERS = ("none", "guided", "bilateral")
STATISTICS = ("running", "batch")
POLARITIES = ("batch", "image", "global", "none")


@dataclass(frozen=True)
class Cropped(Saliency):
    """Saliency of such squares, in one variant: how it was measured is in the options of its tables."""

    protocol: Literal["crop320"] = "crop320"
    filter: str = "none"
    statistics: str = "running"
    polarity: str = "batch"

    name: ClassVar[str] = "saliency"
    SHOWN = {
        "acc": Value("Accuracy", "of pixels"),
        "iou": Value("IoU", "above 0.5"),
        "max_f": Value("Max F", "beta² 0.3, best of the mean over images"),
        "f_half": Value("F", "beta² 0.3, above 0.5"),
        "mae": Value("MAE", better="low"),
    }

    def read(self, location: str, *, max_bytes: int, max_pixels: int, kind: Kind | None = None) -> np.ndarray:
        """A label before it is thresholded: uint8 (H, W), grey, or 0 and 255 where it is one's own."""
        if kind is None and corrections.MARK not in location:
            return read_grey(location, max_bytes=max_bytes, max_pixels=max_pixels)
        return super().read(location, max_bytes=max_bytes, max_pixels=max_pixels, kind=kind) * np.uint8(255)

    def measure(self, row: dict, label: np.ndarray) -> dict:
        """COLUMNS of a square. row: with `soft`, float32 (S, S) in [0, 1]. label: bool (S, S)."""
        return self.of_masks(row["soft"] > 0.5, label, row["soft"])

    def tables(self, *measured) -> dict[str, pa.Table]:
        """IoU by the object's size, with what tells the variants apart."""
        bins = super().tables(*measured)["size_bins"]
        for name in ("filter", "statistics"):
            bins = bins.append_column(name, pa.repeat(getattr(self, name), len(bins)))
        return {"size_bins": bins}


def shortened(image: np.ndarray, side: int) -> np.ndarray:
    """An image whose shorter side is brought to `side` px (bilinear, antialiased), the other one in proportion.

    image: uint8 (H, W, 3) or (H, W); of one longer than LONGEST times its shorter side, the middle. The other side is
    rounded as torchvision's Resize does.
    """
    most = LONGEST * min(image.shape[:2])
    top, left = (max(0, (each - most) // 2) for each in image.shape[:2])
    image = np.ascontiguousarray(image[top : top + most, left : left + most])
    height, width = (int(side * each / min(image.shape[:2])) for each in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def middle(image: np.ndarray, size: int) -> np.ndarray:
    """The central size x size pixels of an image (H, W, ...) with no fewer, as torchvision's CenterCrop takes them."""
    top, left = (round((each - size) / 2) for each in image.shape[:2])
    return image[top : top + size, left : left + size].copy()  # a view would keep the whole image


def oriented(masks: np.ndarray, polarity: str) -> np.ndarray:
    """Masks of a batch, float32 (B, S, S) in [0, 1], inverted where the network marks the background.

    polarity: batch, all where the mean of all is above 0.5; image, those where their own is; none.
    """
    means = masks.mean((1, 2), dtype=float)
    means = np.full_like(means, means.mean()) if polarity == "batch" else means
    return masks if polarity == "none" else np.where((means > 0.5)[:, None, None], 1 - masks, masks)


def filtered(mask: np.ndarray, image: np.ndarray, name: str) -> np.ndarray:
    """A mask after one of FILTERS, at the size of its square: float32 (S, S) in [0, 1].

    mask: the same. image: RGB uint8 (S, S, 3). What a filter gives counts, whatever it has left of the mask.
    """
    if name == "none":
        return mask
    if name == "guided":
        return guided_filter(mask[None], image, radius=9, eps=1e-3)[0]  # trick 1
    return Bilateral(refine_preset="sempart")(mask[None], image)[0][0]
