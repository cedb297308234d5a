"""Semantic segmentation: how named masks meet the classes of a data set, over all its pixels (VOC; ImageNet-S)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raypipe import classes, lookup
from raypipe.classes import Classes
from raypipe.evaluation import classmaps
from raypipe.evaluation.sums import Sums
from raypipe.evaluation.task import Task, Value
from raypipe.evaluation.tasks._classes import OfClasses
from raypipe.masks import decode_rle
from raypipe.types import LabelMap

CHUNK = 1 << 15  # pixels at once: what is computed of them stays in a core's cache
EXPERT_EPS = 1e-7  # in the denominator of an expert's IoU (NamedMask's code)
SIZES = {"s": 5, "ms": 25, "ml": 50, "l": 100}  # most percent of an image's valid pixels (ImageNet-S's evaluation)
COUNTS = pa.map_(pa.int64(), pa.int64())  # of a confusion matrix: label * classes + prediction -> pixels
EXPERT = {"binary_iou": Value("IoU of the expert", "mean over the images that have its class")}
OF_SIZES = {
    "miou_s": Value("mIoU of objects of size S", "at most 5 % of their image"),
    "miou_ms": Value("mIoU of objects of size MS", "at most 25 %"),
    "miou_ml": Value("mIoU of objects of size ML", "at most 50 %"),
    "miou_l": Value("mIoU of objects of size L", "above"),
}


@dataclass(frozen=True)
class Semantic(OfClasses, Task):
    """How well named masks meet the classes of a data set, or of labels of one's own with --classes.

    Values are shares in [0, 1] of a whole data set's pixels; the background is a class like any other. A class that
    neither labels nor predictions have leaves the means. Masks belong to classes by their names; where they overlap,
    the one with the higher score lies on top, and without scores the smaller one.
    """

    expert: str | None = None  # name of a class: this one against all else, in images that have it, as one mask
    absent_zero: bool = False  # a class that never occurs has IoU 0, as in ImageNet-S's own evaluation
    object_sizes: bool = False  # also mIoU by the object's size (S, MS, ML, L); always for ImageNet-S

    COLUMNS = (
        ("miou", pa.float64()),  # over the classes of the image; null without a valid pixel
        ("confusion", COUNTS),
        ("ignored_pixels", pa.int64()),
        ("is_void", pa.bool_()),  # no pixel of the label counts
    )
    LEAVES = ("size", "counts", "area", "score", "label")
    SHOWN = {
        "miou": Value("mIoU", "mean over the classes"),
        "pixel_acc": Value("Accuracy", "of pixels"),
        "mean_acc": Value("Mean accuracy", "over the classes"),
        "freqw_acc": Value("Frequency-weighted IoU", "over the classes, by their pixels"),
    }
    DETAILS = (
        ("class_names", pa.list_(pa.string())),
        ("class_iou", pa.list_(pa.float64())),  # null for a class that never occurs
        ("class_pixels", pa.list_(pa.int64())),  # in the labels
        ("confusion", COUNTS),
        ("ignored_pixels", pa.int64()),
        ("without_valid", pa.int64()),  # images of whose label no pixel counts
    )
    METRIC = "miou"
    PER_IMAGE = ("miou",)

    def __post_init__(self):
        """Show what the options ask for. Raises ValueError for those that have no effect."""
        if self.expert is not None and (self.absent_zero or self.object_sizes):
            name = "--absent-zero" if self.absent_zero else "--object-sizes"
            raise ValueError(f"{name} has no effect with --expert, which is one class against all else")
        self._of(None)

    @property
    def names(self) -> tuple[str, ...]:
        """What is measured, from 0: the background and the classes, or all else and the expert's one."""
        return ("all else", self.expert) if self.expert is not None else ("background", *self.known.names)

    def options(self) -> dict:
        """The classes too."""
        return super().options() | {"label_classes": self._known and (self._known.source or list(self._known.names))}

    def of_classes(self, text: str | None, dataset: str = "") -> Semantic:
        """A task of these classes; it keeps those that it has. Raises ValueError where there are none."""
        task = copy.copy(self)
        task._of(self.known if text is None else classes.read(text))
        if task.expert is not None and classes.normalised(task.expert) not in task.known.numbers:
            hint = lookup.suggest(task.expert, task.known.names)
            raise ValueError(f"--expert {task.expert!r} is none of the classes; {hint}")
        return task

    def measure(self, row: dict, label: np.ndarray) -> dict:
        """COLUMNS of one image. Raises ValueError for a mask of another class, or of none, and names the image."""
        return self.of_map(self.predicted(row), label)

    def predicted(self, row: dict) -> np.ndarray:
        """The classes of a row's masks: int32 (H, W), 0 where there is none; of an expert 1 for its own."""
        numbers = [self._number(each["label"], row) for each in row["segments"]]
        last_first = reversed(range(len(numbers)))  # so that of equals the first one is painted last
        order = sorted(last_first, key=lambda i: _rank(row["segments"][i]))
        masks = ((numbers[i], decode_rle(row["segments"][i])) for i in order)
        return classmaps.painted(masks, (row["height"], row["width"]))

    def measure_above(self, row: dict, found: LabelMap, label: np.ndarray, thresholds: Sequence[float]) -> list[dict]:
        """COLUMNS at each threshold; all of them from one count of the image's pixels."""
        numbers = [0, *(self._number(name, row) for name in found.labels or [None] * found.count)]
        predicted, target = np.array(numbers)[found.index], self._target(label)
        each = confusion_above(predicted, found.values, target, len(self.names), thresholds)
        return [self._of_counts(counts, target) for counts in each]

    def of_map(self, predicted: np.ndarray, label: np.ndarray) -> dict:
        """COLUMNS of class numbers int32 (H, W), as of `predicted`, against a label, as of `read`."""
        target = self._target(label)
        return self._of_counts(confusion(predicted, target, len(self.names)), target)

    def _target(self, label: np.ndarray) -> np.ndarray:
        """A label as it is measured against: of an expert 1 for its class."""
        if self.expert is None:
            return label
        return np.where(label > 0, label == self.known.numbers[classes.normalised(self.expert)], label)

    def _of_counts(self, counts: dict[int, int], target: np.ndarray) -> dict:
        """COLUMNS of one image's confusion matrix; of an expert whose class is absent little."""
        found = {"ignored_pixels": np.count_nonzero(target < 0), "is_void": bool((target < 0).all())}
        if self.expert is not None and not (target > 0).any():
            return found
        found["confusion"] = counts
        if self.expert is not None:
            found["binary_iou"] = binary_iou(counts)
        else:
            found["miou"] = ratios(counts, len(self.names)).miou
        if self._has_sizes:
            found |= {f"confusion_{size}": its for size, its in of_sizes(counts, len(self.names)).items()}
        return found

    def summary(self, sums: Sums) -> dict[str, float | None]:
        """Ratios of the summed confusion matrix; None without a valid pixel."""
        if self._known is None:
            return dict.fromkeys(self.SHOWN)
        found = self._ratios(sums)
        values = {name: getattr(found, name) for name in Semantic.SHOWN if name in self.SHOWN}
        if self.expert is not None:
            return values | {"binary_iou": sums.mean("binary_iou")}
        if self.absent_zero:
            values["miou"] = float(np.nansum(found.class_iou)) / len(self.names) if found.class_pixels.any() else None
        for size in SIZES if self._has_sizes else ():
            its = ratios(sums.places(f"confusion_{size}"), len(self.names))
            present = its.class_iou[its.class_pixels > 0]
            values[f"miou_{size}"] = float(present.mean()) if len(present) else None
        return values

    def details(self, sums: Sums) -> dict:
        """Each class's IoU, and what was left out."""
        counts = {"confusion": [*sums.places("confusion").items()]}
        counts["ignored_pixels"] = int(sums.total("ignored_pixels") or 0)
        counts["without_valid"] = int(sums.total("is_void") or 0)
        if self._known is None:
            return dict.fromkeys(dict(self.DETAILS)) | counts
        found = self._ratios(sums)
        counts |= {"class_names": list(self.names), "class_pixels": found.class_pixels.tolist()}
        return counts | {"class_iou": [None if np.isnan(each) else each for each in found.class_iou.tolist()]}

    def lines(self, details: Mapping, printed: Sequence[Mapping] = ()) -> tuple[list[str], list[tuple[str, list]]]:
        """A line per class."""
        columns = (details[name] for name in ("class_names", "class_iou", "class_pixels"))
        return ["iou", "pixels"], [(name, [iou, pixels]) for name, iou, pixels in zip(*columns, strict=True)]

    def outline(self, row: dict, label: np.ndarray) -> np.ndarray:
        """What is of a class, whichever it is; of an expert what is of its own."""
        return self._target(label) > 0

    def _of(self, known: Classes | None) -> None:
        """Set the classes, and the columns and values that options and they ask for."""
        columns, shown = Semantic.COLUMNS, Semantic.SHOWN
        has_sizes = self.object_sizes or (known is not None and known.source.startswith("imagenet_s"))
        has_sizes = has_sizes and self.expert is None
        if self.expert is not None:
            columns = (("binary_iou", pa.float64()), *columns[1:])  # instead of miou
            shown = EXPERT | {"pixel_acc": shown["pixel_acc"]}
        if has_sizes:
            columns, shown = (*columns, *((f"confusion_{size}", COUNTS) for size in SIZES)), shown | OF_SIZES
        more = {"_known": known, "_has_sizes": has_sizes, "COLUMNS": columns, "SHOWN": shown}
        more["METRIC"] = "miou" if self.expert is None else "binary_iou"
        for name, value in more.items():
            object.__setattr__(self, name, value)

    def _number(self, label: str | None, row: Mapping) -> int:
        """The class of a mask by its name; of an expert 1 for its own or without a name, 0 for others."""
        where = f"semantic: {row.get('key')}"
        if label is None and self.expert is None:
            text = "a mask without a name; this task is for methods that name their masks"
            raise ValueError(f"{where}: {text}; add --expert CLASS, or --task saliency for the object whatever it is")
        number = 0 if label is None else self.known.numbers.get(classes.normalised(label), 0)
        if label is not None and not number:
            names = self.known.source or f"{len(self.known.names)} classes"
            text = f"a mask is named {label!r}, which is none of {names}"
            raise ValueError(f"{where}: {text}; {lookup.suggest(label, self.known.names)}")
        if self.expert is None:
            return number
        return int(label is None or number == self.known.numbers[classes.normalised(self.expert)])

    def _ratios(self, sums: Sums) -> Ratios:
        return ratios(sums.places("confusion"), len(self.names))


class Ratios(NamedTuple):
    """What a confusion matrix comes to; numbers are None, and `class_iou` NaN, where there is nothing to divide by."""

    miou: float | None
    pixel_acc: float | None
    mean_acc: float | None
    freqw_acc: float | None
    class_iou: np.ndarray  # float64 (C,)
    class_pixels: np.ndarray  # int64 (C,), in the labels


def confusion(predicted: np.ndarray, label: np.ndarray, count: int) -> dict[int, int]:
    """Pixels by label * count + prediction, of the pairs that occur: so 920 classes cost no matrix of 846,400 cells.

    predicted: int (H, W) in 0..count - 1. label: the same, but what is not in that range does not count. Raises
    ValueError for sizes that differ and a prediction out of the range, which would be counted for another class.
    """
    if predicted.shape != label.shape:
        raise ValueError(f"semantic: the prediction has the size {predicted.shape}, the label {label.shape}")
    if predicted.size and not 0 <= predicted.min() <= predicted.max() < count:
        text = f"expected classes 0 to {count - 1}, got {predicted.min()} to {predicted.max()}"
        raise ValueError(f"semantic: the prediction has numbers that are no class: {text}")
    return _placed(*_pairs(label, predicted, count, count), count)


def confusion_above(
    predicted: np.ndarray, values: np.ndarray, label: np.ndarray, count: int, thresholds: Sequence[float]
) -> list[dict[int, int]]:
    """`confusion` of a prediction that holds where its value is above a threshold, else 0, for each of the thresholds.

    values: float32 (H, W). Pixels are counted once, by label, prediction and how many thresholds lie below their value:
    those with more than k are above the k-th. Thresholds are compared in float32, as `values > threshold` does.
    """
    thresholds = np.array(thresholds, np.float32)
    ascending = np.unique(thresholds)
    steps = len(ascending) + 1
    passed = predicted.astype(np.int64) * steps + np.searchsorted(ascending, values)
    rows, columns, pixels = _pairs(label, passed, count, count * steps)
    prediction, below = np.divmod(columns, steps)
    ranks = np.searchsorted(ascending, thresholds)
    return [_placed(rows, np.where(below > rank, prediction, 0), pixels, count) for rank in ranks]


def ratios(counts: Mapping[int, int], count: int) -> Ratios:
    """What a confusion matrix of `count` classes comes to. counts: as of `confusion`, also summed.

    A class that neither labels nor predictions have is in no mean over classes; one that is only predicted has IoU 0.
    """
    places, pixels = (np.fromiter(each, np.int64, len(counts)) for each in (counts.keys(), counts.values()))
    hits, wanted, found = (np.zeros(count, np.int64) for _ in range(3))
    label, prediction = np.divmod(places, count)
    np.add.at(wanted, label, pixels)
    np.add.at(found, prediction, pixels)
    np.add.at(hits, label[label == prediction], pixels[label == prediction])
    with np.errstate(invalid="ignore"):
        iou, recall = hits / (wanted + found - hits), hits / wanted
    if not (total := wanted.sum()):
        return Ratios(None, None, None, None, iou, wanted)
    weighted = (wanted / total * iou)[wanted > 0].sum()
    means = (np.nanmean(iou), hits.sum() / total, np.nanmean(recall), weighted)
    return Ratios(*map(float, means), iou, wanted)


def binary_iou(counts: Mapping[int, int]) -> float:
    """|P and G| / (|P or G| + 1e-7) of a confusion matrix of 2 classes (NamedMask's experts); 0 for two empty masks."""
    both = counts.get(3, 0)
    return both / (both + counts.get(1, 0) + counts.get(2, 0) + EXPERT_EPS)


def of_sizes(counts: Mapping[int, int], count: int) -> dict[str, dict[int, int]]:
    """A confusion matrix of one image by the size of its objects: by S, MS, ML and L, as ImageNet-S counts them.

    A class's size is its share of the image's valid pixels in percent, rounded up. A size that a class has holds the
    pixels of its classes and those of the background; another one holds nothing.
    """
    wanted, total = {}, sum(counts.values())
    for place, pixels in counts.items():
        wanted[place // count] = wanted.get(place // count, 0) + pixels
    found: dict[str, dict[int, int]] = {size: {} for size in SIZES}
    for size, its in found.items():
        low, high = max([0, *(most for most in SIZES.values() if most < SIZES[size])]), SIZES[size]
        labels = {label for label, pixels in wanted.items() if label and low < -(-100 * pixels // total) <= high}
        its |= {place: n for place, n in counts.items() if labels and place // count in labels | {0}}
    return found


def _rank(segment: Mapping) -> tuple[float, int]:
    """What is larger of the segment that lies on top of others: its score, then how small it is."""
    return (-np.inf if segment["score"] is None else segment["score"], -segment["area"])


def _placed(rows: np.ndarray, columns: np.ndarray, pixels: np.ndarray, count: int) -> dict[int, int]:
    """A confusion matrix by place, label * count + prediction. columns: of these predictions, one may stand twice."""
    places, which = np.unique(rows[:, None] * count + columns, return_inverse=True)
    sums = np.zeros(len(places), np.int64)
    np.add.at(sums, which.ravel(), pixels.ravel())
    return {int(place): int(number) for place, number in zip(places, sums, strict=True) if number}


def _pairs(label: np.ndarray, found: np.ndarray, count: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labels below `count` and the numbers below `most` that occur, and the pixels (labels, numbers) of each pair.

    Pixels of another label do not count.
    """
    label, found = np.where((label >= 0) & (label < count), label, count).ravel(), found.ravel()  # `count`: ignored
    (rows, row), (columns, column) = _compact(label, count), _compact(found, most)
    pixels = np.zeros((len(rows) + 1) * len(columns), np.int64)
    for part in range(0, label.size, CHUNK):
        cell = row[label[part : part + CHUNK]] * len(columns) + column[found[part : part + CHUNK]]
        pixels += np.bincount(cell, minlength=len(pixels))
    return rows, columns, pixels.reshape(len(rows) + 1, len(columns))[:-1]


def _compact(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers below `count` that occur, ascending, and of each number its place among them; of `count` the next."""
    there = np.zeros(count + 1, bool)
    there[values] = True
    numbers = np.flatnonzero(there[:count])
    place = np.full(count + 1, len(numbers))
    place[numbers] = np.arange(len(numbers))
    return numbers, place


TASK = Semantic
