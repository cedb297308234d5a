"""Saliency: how well the first mask meets the object of a photograph (Two Tricks, supplement; MOVE; TokenCut)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.evaluation.sums import Sums
from raypipe.evaluation.task import Task, Value
from raypipe.inputs import corrections
from raypipe.inputs.maskkinds import HALF, LIGHT, LUMA, Kind, stored
from raypipe.masks import decode_segments, decode_soft

BETA_SQ = 0.3  # weight of the precision (Two Tricks, supplement; Achanta et al., CVPR 2009)
SELFMASK_BETA_SQ = 0.09  # SelfMask's code squares it once more
SELFMASK_EPS = 1e-7  # it adds this to denominators
THRESHOLDS = np.arange(255, dtype=np.float32) / np.float32(255)  # of the F curve: 0 is one, 1 is none
CHUNK = 1 << 15  # pixels at once: what is computed of them stays in a core's cache
SAME_SHAPE = 0.01  # most by which the ratio of a label's sides may differ from its image's, to be scaled to it
VARIANTS = {
    "per_image_max_f": Value("Max F per image", "best of each image, then the mean"),
    "selfmask_f_max": Value("SelfMask's F max", "beta² 0.09, as FOUND and SelfMask print it"),
    "adaptive_f": Value("Adaptive F", "above twice the mean of the soft mask"),
}


@dataclass(frozen=True)
class Saliency(Task):
    """Accuracy, IoU, F and MAE of an image's first mask, and IoU by the object's size; without a mask it is empty.

    Max F and MAE need soft masks (`label --keep-soft`): without them they are null, never made from what a threshold
    has left. Masks of a method that has no probabilities are taken as 0 and 1, as papers do.
    Labels are set from half of white on, those of data sets after conversion to grey.
    """

    # full: masks of whole images at their size. crop320 (Sempart, Two Tricks) is what training measures
    protocol: Literal["full", "crop320"] = "full"
    f_variants: bool = False  # also the F of other papers' codes: per_image_max_f, selfmask_f_max, adaptive_f
    size_bins: int = 20  # classes of object sizes in size_bins (Two Tricks, supplement)
    size_binning: Literal["equal", "quantile"] = "equal"  # classes of one width, or of as many images each

    COLUMNS = (
        ("acc", pa.float64()),  # share of pixels
        ("iou", pa.float64()),  # null where neither mask nor label has a pixel
        ("f_half", pa.float64()),  # of the mask as stored: above 0.5, unless the run has another threshold
        ("mae", pa.float64()),
        ("area_ratio", pa.float64()),  # share of the label in its image
        ("f_curve", pa.list_(pa.float64(), len(THRESHOLDS))),
        ("is_soft", pa.bool_()),  # whether the image has a soft mask
        ("is_scaled", pa.bool_()),  # whether the label had another size of the same shape
    )
    LEAVES = ("size", "counts", "soft")
    SHOWN = {
        "acc": Value("Accuracy", "of pixels"),
        "iou": Value("IoU", "first mask"),
        "max_f": Value("Max F", "beta² 0.3, best of the mean over images, of soft masks (--keep-soft)"),
        "f_half": Value("F", "beta² 0.3, of the masks as stored"),
        "mae": Value("MAE", "of soft masks (--keep-soft)", better="low"),
    }
    DETAILS = (
        ("f_curve", pa.list_(pa.float64())),  # mean over images at k / 255 for k = 0..254
        ("max_f_threshold", pa.int32()),  # the lowest k of its maximum
        ("iou_undefined", pa.int64()),  # images in which neither mask nor label has a pixel
    )
    METRIC = "iou"
    PER_IMAGE = ("iou", "mae")

    def __post_init__(self):
        """Raise ValueError for a protocol that no run can have."""
        if self.protocol != type(self).protocol:
            text = "belongs to training: it crops photographs before a method sees them, and a run has whole ones"
            raise ValueError(f"--protocol crop320 {text}; `raypipe train sempart --validate DATASET` measures it")
        if self.size_bins < 1:
            raise ValueError(f"--size-bins must be positive, got {self.size_bins}")
        if self.f_variants:
            object.__setattr__(self, "COLUMNS", (*self.COLUMNS, *((name, pa.float64()) for name in VARIANTS)))
            object.__setattr__(self, "SHOWN", self.SHOWN | VARIANTS)

    def read(self, location: str, *, max_bytes: int, max_pixels: int, kind: Kind | None = None) -> np.ndarray:
        """A label as bool (H, W). kind: of one's own labels; those of data sets are grey. Raises BadImage."""
        if kind or corrections.MARK in location:
            return super().read(location, max_bytes=max_bytes, max_pixels=max_pixels, kind=kind or LIGHT)
        return read_grey(location, max_bytes=max_bytes, max_pixels=max_pixels) >= HALF

    def fits(self, row: dict, label: np.ndarray) -> bool:
        """Whether a label has its image's shape; it may be smaller or larger."""
        one, other = label.shape[0] * row["width"], label.shape[1] * row["height"]  # equal where the shapes are
        return abs(one - other) <= SAME_SHAPE * other

    def measure(self, row: dict, label: np.ndarray) -> dict:
        """COLUMNS of one image."""
        size = (row["height"], row["width"])
        mask, is_hard = self.counted(row, {}, "").any(0), row.get("is_hard", False)
        stored = row["segments"][0]["soft"] if row["segments"] else None
        soft = None if row["segments"] and not is_hard else mask.astype(np.float32)
        found = self.of_masks(mask, scaled(label, size), soft if stored is None else decode_soft(stored))
        return found | {"is_soft": stored is not None or is_hard, "is_scaled": label.shape != size}

    def of_masks(self, mask: np.ndarray, target: np.ndarray, soft: np.ndarray | None) -> dict:
        """COLUMNS of a mask and its target, bool (H, W). soft: float32 (H, W) in [0, 1]; None without one."""
        both, either = np.count_nonzero(mask & target), np.count_nonzero(mask | target)
        found = {
            "acc": (mask == target).mean(),
            "iou": both / either if either else None,
            "f_half": f_measure(both, np.count_nonzero(mask), np.count_nonzero(target)),
            "area_ratio": target.mean(),
            "is_soft": soft is not None,
            "is_scaled": False,
        }
        return found if soft is None else found | self._of_soft(soft, target)

    def summary(self, sums: Sums) -> dict[str, float | None]:
        """Means over the images, and the maximum of the mean curve; None for what needs soft masks, without any."""
        means, details = {name: sums.mean(name) for name in self.SHOWN if name != "max_f"}, self.details(sums)
        if details["f_curve"] is None:
            means |= dict.fromkeys({"mae", *VARIANTS} & means.keys())
        return means | {"max_f": None if details["f_curve"] is None else max(details["f_curve"])}

    def details(self, sums: Sums) -> dict:
        """The mean F curve and its first maximum."""
        curve = sums.mean("f_curve") if sums.total("is_soft") else None
        best = None if curve is None else curve.index(max(curve))
        return {"f_curve": curve, "max_f_threshold": best, "iou_undefined": sums.lacking["iou"]}

    def tables(self, images: pa.Table, details: Mapping, printed: Sequence[Mapping] = ()) -> dict[str, pa.Table]:
        """IoU by the object's size: a row per bin, its images those whose IoU is defined."""
        known = images.filter(pc.is_valid(images["iou"]))
        ratios, ious = (known[name].to_numpy() for name in ("area_ratio", "iou"))
        return {"size_bins": size_bins(ratios, ious, bins=self.size_bins, binning=self.size_binning)}

    def counted(self, row: dict, measured: dict, value: str) -> np.ndarray:
        """The first mask, if any."""
        return decode_segments(row["segments"][:1], (row["height"], row["width"]))

    def outline(self, row: dict, label: np.ndarray) -> np.ndarray:
        """The label at the image's size."""
        return scaled(label, (row["height"], row["width"]))

    def _of_soft(self, soft: np.ndarray, target: np.ndarray) -> dict:
        """What a soft mask, float32 (H, W) in [0, 1], tells besides."""
        hits, predicted = counts_above(soft, target)
        wanted = np.count_nonzero(target)
        curve = f_measure(hits, predicted, wanted)
        found = {"mae": np.abs(soft - target).mean(dtype=float), "f_curve": curve}
        if not self.f_variants:
            return found
        above = soft > 2 * soft.mean(dtype=float)
        adaptive = f_measure(np.count_nonzero(above & target), np.count_nonzero(above), wanted)
        selfmask = selfmask_f(hits, predicted, wanted).max()
        return found | {"per_image_max_f": curve.max(), "selfmask_f_max": selfmask, "adaptive_f": adaptive}


def read_grey(location: str, *, max_bytes: int, max_pixels: int) -> np.ndarray:
    """A mask file converted to grey: uint8 (H, W). Raises BadImage."""
    picture = stored(storage.read_bytes(location, max_bytes=max_bytes), max_pixels=max_pixels).picture
    return picture if picture.ndim == 2 else np.rint(picture @ LUMA).astype(np.uint8)


def f_measure(hits: np.ndarray, predicted: np.ndarray, wanted: int) -> np.ndarray:
    """F of counts of pixels, weighted by BETA_SQ: float64 of their shape.

    hits: predicted and wanted at once. Without a predicted pixel the precision is 1, without a wanted one the recall;
    where both are 0, so is F.
    """
    precision = np.where(predicted, hits / np.maximum(predicted, 1), 1.0)
    recall = hits / wanted if wanted else np.ones(np.shape(hits))
    denominator = BETA_SQ * precision + recall
    return (1 + BETA_SQ) * precision * recall / np.where(denominator, denominator, 1.0)


def selfmask_f(hits: np.ndarray, predicted: np.ndarray, wanted: int) -> np.ndarray:
    """The same as SelfMask's and FOUND's code has it: another weight, and 0 where nothing is predicted or wanted."""
    precision, recall = hits / (predicted + SELFMASK_EPS), hits / (wanted + SELFMASK_EPS)
    weighted = SELFMASK_BETA_SQ * precision + recall
    return (1 + SELFMASK_BETA_SQ) * precision * recall / (weighted + SELFMASK_EPS)


def counts_above(soft: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pixels above each of THRESHOLDS that are set in the target, and all: two int64 (255,).

    soft: float32 (H, W) in [0, 1]. target: bool (H, W). One pass over the pixels instead of one per threshold: how
    many thresholds lie below a pixel is its level, and the levels' histograms add up from the top.
    """
    soft, target, pixels = soft.ravel(), target.ravel(), np.zeros(512, np.int64)
    for start in range(0, soft.size, CHUNK):
        values = soft[start : start + CHUNK]
        level = np.ceil(values * 255)  # the level, or by rounding one less: never more, as THRESHOLDS * 255 is exact
        levels = level.astype(np.int16)
        levels += (values > level / 255).view(np.int8)  # a threshold, to the bit
        levels += np.left_shift(target[start : start + CHUNK], 8, dtype=np.int16)
        pixels += np.bincount(levels, minlength=512)
    others, hits = pixels.reshape(2, 256)
    hits, every = (np.cumsum(each[:0:-1])[::-1] for each in (hits, hits + others))
    return hits, every


def scaled(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label (h, w) at its image's size, from the nearest pixels: (H, W)."""
    if label.shape == size:
        return label
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, label.shape, strict=True))
    return label[rows[:, None], columns]


def size_bins(ratios: np.ndarray, ious: np.ndarray, *, bins: int, binning: str = "equal") -> pa.Table:
    """Mean IoU by the object's share of its image: columns bin, low, high, images and iou (null without images).

    ratios, ious: float64 (N,) without NaN. equal: bin b holds b / bins <= ratio < (b + 1) / bins, the last one 1 too.
    quantile: about as many images in each.
    """
    edges = np.arange(bins + 1) / bins
    index = np.minimum((bins * ratios).astype(int), bins - 1)
    if binning == "quantile":
        edges = np.quantile(ratios, edges) if len(ratios) else edges
        index = np.searchsorted(edges[1:-1], ratios, side="right")
    counts, sums = np.bincount(index, minlength=bins), np.bincount(index, ious, minlength=bins)
    means: Sequence = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    columns = {"bin": pa.array(range(bins), pa.int32()), "low": edges[:-1], "high": edges[1:]}
    return pa.table(columns | {"images": counts, "iou": pa.array(means, pa.float64())})


TASK = Saliency
