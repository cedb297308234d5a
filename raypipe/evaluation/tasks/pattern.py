"""Pattern Dice: how well a mask meets a hand-drawn animal pattern, with either polarity (GloPER supplement)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raypipe.schema import VERSION

# One row per image of the run. Counts and ratios are null unless status is "ok".
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("key", pa.string()),
        ("group", pa.string()),
        ("method", pa.string()),
        ("reference", pa.string()),  # the folder of labels
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("tp_fixed", pa.int64()),  # pixels; fixed polarity: segment 0 is the pattern
        ("fp_fixed", pa.int64()),
        ("fn_fixed", pa.int64()),
        ("tn_fixed", pa.int64()),
        ("tp_best", pa.int64()),  # best polarity: `segment` with `sign` is the pattern
        ("fp_best", pa.int64()),
        ("fn_best", pa.int64()),
        ("tn_best", pa.int64()),
        ("segment", pa.int32()),
        ("sign", pa.int8()),  # 1 = the segment itself, -1 = the rest of the foreground
        ("dice_fixed", pa.float64()),
        ("dice_best", pa.float64()),
        ("iou_fixed", pa.float64()),
        ("iou_best", pa.float64()),
        ("status", pa.string()),  # ok, failed (an error row), no_label, other_size, or bad_label
    ],
    metadata={"raypipe.schema": str(VERSION)},
)
LEAVES = ("size", "counts")  # fields of a segment that `score` needs
MEANS = ("dice_fixed", "dice_best", "iou_fixed", "iou_best")


class Counts(NamedTuple):
    """Pixels of a binary prediction against a binary target; they add up over images."""

    tp: int
    fp: int
    fn: int
    tn: int


class Reading(NamedTuple):
    """One way to read the segments of an image as a pattern, and how it meets the target."""

    segment: int
    sign: int  # 1 = the segment itself, -1 = the rest of the foreground
    counts: Counts


def count(pred: np.ndarray, target: np.ndarray) -> Counts:
    """Count the pixels of two bool arrays of one shape, which may be empty."""
    tp = int(np.count_nonzero(pred & target))
    fp, fn = int(np.count_nonzero(pred)) - tp, int(np.count_nonzero(target)) - tp
    return Counts(tp, fp, fn, pred.size - tp - fp - fn)


def dice(counts: Counts) -> float:
    """2 |P and L| / (|P| + |L|) in [0, 1]: 1 when both are empty, 0 when one is."""
    pixels = 2 * counts.tp + counts.fp + counts.fn
    return 2 * counts.tp / pixels if pixels else 1.0


def iou(counts: Counts) -> float:
    """|P and L| / |P or L| in [0, 1]: 1 when both are empty, 0 when one is."""
    pixels = counts.tp + counts.fp + counts.fn
    return counts.tp / pixels if pixels else 1.0


def readings(masks: Iterable[np.ndarray], foreground: np.ndarray, target: np.ndarray) -> Iterator[Reading]:
    """Each segment within the foreground, followed by its inverse there. The first one is the fixed polarity.

    masks: bool (H, W) each; none at all (nothing was found) reads as one empty segment. foreground, target: bool
    (H, W). The target is not clipped to the foreground: what the foreground loses is lost.
    """
    i = -1
    for i, mask in enumerate(masks):
        yield Reading(i, 1, count(mask & foreground, target))
        yield Reading(i, -1, count(foreground & ~mask, target))
    if i < 0:
        yield from readings([np.zeros_like(foreground)], foreground, target)


def best(found: Iterable[Reading]) -> Reading:
    """The reading with the highest Dice, the first among equals: how methods are judged that do not know which colour
    is pattern (GloPER supplement, on K-Means).
    """
    return max(found, key=lambda reading: dice(reading.counts))


def score(row: dict, target: np.ndarray) -> dict:
    """The measures of one masks row against its label: columns of SCHEMA. target: (H, W) bool, of the image's size."""
    from raypipe.masks import decode_rle

    foreground = np.ones(target.shape, bool) if row["foreground"] is None else decode_rle(row["foreground"])
    found = list(readings(map(decode_rle, row["segments"]), foreground, target))
    values = {}
    for kind, reading in (("fixed", found[0]), ("best", best(found))):
        values |= {f"{name}_{kind}": pixels for name, pixels in reading.counts._asdict().items()}
        values |= {f"dice_{kind}": dice(reading.counts), f"iou_{kind}": iou(reading.counts)}
    return values | {"segment": reading.segment, "sign": reading.sign}
