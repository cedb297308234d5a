"""Pattern Dice: how well a mask meets a hand-drawn animal pattern, with either polarity (GloPER supplement)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raypipe.evaluation.sums import Sums
from raypipe.evaluation.task import Task, Value
from raypipe.masks import decode_rle, decode_segments

READINGS = {"fixed": "first mask", "best": "better polarity"}  # fixed: segment 0 is the pattern
TITLES = {"dice": "Dice", "iou": "IoU", "precision": "Precision", "recall": "Recall"}
TITLES |= {"fp_share": "False-positive share"}  # of the foreground's pixels outside the label


@dataclass(frozen=True)
class Pattern(Task):
    """Dice and IoU of the segments, each within the foreground or inverted there, with a hand-drawn pattern."""

    COLUMNS = (
        *((f"{count}_{kind}", pa.int64()) for kind in READINGS for count in ("tp", "fp", "fn", "tn")),  # pixels
        ("segment", pa.int32()),  # with its `sign` it is the pattern with the best polarity
        ("sign", pa.int8()),  # 1 = the segment itself, -1 = the rest of the foreground
        *((f"{name}_{kind}", pa.float64()) for name in TITLES for kind in READINGS),
    )
    SHOWN = {  # a method and its inverse are equal with the better polarity: the fixed one tells them apart
        f"{name}_{kind}": Value(
            title,
            reading,
            better="low" if name == "fp_share" else "high",
            tie=f"{name}_fixed" if kind == "best" else None,
            peeks=kind == "best",
        )
        for name, title in TITLES.items()
        for kind, reading in READINGS.items()
    }
    METRIC = "dice_best"
    PER_IMAGE = ("dice_best",)

    def measure(self, row: dict, label: np.ndarray) -> dict:
        """COLUMNS of one image. label: bool (H, W), of the image's size."""
        foreground = np.ones(label.shape, bool) if row["foreground"] is None else decode_rle(row["foreground"])
        every = list(readings(map(decode_rle, row["segments"]), foreground, label))
        values, others = {}, int(np.count_nonzero(foreground & ~label))
        for kind, reading in (("fixed", every[0]), ("best", best(every))):
            counts = reading.counts
            values |= {f"{name}_{kind}": pixels for name, pixels in counts._asdict().items()}
            values |= {f"{measure.__name__}_{kind}": measure(counts) for measure in (dice, iou, precision, recall)}
            values[f"fp_share_{kind}"] = counts.fp / others if others else 0.0  # all of them lie in there
        return values | {"segment": reading.segment, "sign": reading.sign}

    def summary(self, sums: Sums) -> dict[str, float | None]:
        """Means over the images."""
        return {name: sums.mean(name) for name in self.SHOWN}

    def counted(self, row: dict, measured: dict, value: str) -> np.ndarray:
        """The mask of the reading that a value speaks of: the first segment as it is, or the best reading."""
        size = (row["height"], row["width"])
        found = decode_segments(row["segments"], size)
        if not measured or not len(found):
            return found
        if value.endswith("_fixed"):
            return found[:1]
        chosen = found[measured["segment"]]
        if measured["sign"] < 0:
            chosen = ~chosen if row["foreground"] is None else decode_rle(row["foreground"]) & ~chosen
        return chosen[None]


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


def precision(counts: Counts) -> float:
    """|P and L| / |P| in [0, 1]: 1 when nothing is predicted."""
    pixels = counts.tp + counts.fp
    return counts.tp / pixels if pixels else 1.0


def recall(counts: Counts) -> float:
    """|P and L| / |L| in [0, 1]: 1 for an empty label."""
    pixels = counts.tp + counts.fn
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


def best(every: Iterable[Reading]) -> Reading:
    """The reading with the highest Dice, the first among equals: how methods are judged that do not know which colour
    is pattern (GloPER supplement, on K-Means).
    """
    return max(every, key=lambda reading: dice(reading.counts))


TASK = Pattern
