"""The ground truth of a page's images: which labels it is, and what a card shows of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raypipe.classes import normalised
from raypipe.evaluation import datasets, tasks
from raypipe.evaluation.datasets import DataSet
from raypipe.evaluation.evaluate import Evaluate
from raypipe.evaluation.labels import Labels, match, place_of
from raypipe.evaluation.task import Task
from raypipe.evaluation.tasks.boxes import CORRECT_ABOVE
from raypipe.inputs.maskkinds import chosen
from raypipe.storage import map_ahead

OPTIONS = ("labels", "dataset", "root", "split")  # that say where labels are
HOW = ("task", "classes", "label_kind", "label_value", "box_rule")  # that say how they are read
AHEAD = 8  # labels
REMARKS = {  # what is said of an image without a truth, by the status of its label
    "no_label": "no label",
    "other_size": "the label has another size",
    "bad_label": "the label cannot be read",
    "no_object": "no object in the label",
    "outside": "none of the data set's, or of another split",
}


class Truth(NamedTuple):
    """What is true of one image: a mask, classes or boxes."""

    remark: str = ""  # why it is not known; "" where it is
    mask: np.ndarray | None = None  # bool (H, W); of classes their numbers, int (H, W), below 0 where none counts
    shares: Mapping[str, float] = {}  # of the image that it covers, or each of its classes by name
    boxes: Sequence[list[float]] = ()  # left, top, right, bottom in pixels, the latter two exclusive
    label: Any = None  # as the task reads it


def source(options) -> str | DataSet | None:
    """The labels that a report's options ask for; None without any. Raises ValueError for what has no effect."""
    if all(getattr(options, name) is None for name in OPTIONS):
        if idle := [name for name in HOW if getattr(options, name) is not None]:
            raise ValueError(f"--{idle[0].replace('_', '-')} has no effect without --labels or --dataset")
        return None
    return datasets.chosen(options)


def find(options, place: str | DataSet, keys: Iterable[str]) -> Labels:
    """The labels of images. place: of `source`. keys: of all images. Raises what `match` raises."""
    limits = {"max_bytes": Evaluate.max_bytes, "max_pixels": Evaluate.max_pixels}
    kind = chosen(options.label_kind, options.label_value)
    task = datasets.bound(_task(options, place), place, options.classes)
    return match(task, place, keys, of="an image of the runs", kind=kind, **limits)


def read(labels: Labels | None, rows: Iterable[dict]) -> Iterator[Truth]:
    """What is true of the images of some rows, in their order; nothing without labels. They are read ahead."""
    return map_ahead(lambda row: _read(labels, row) if labels else Truth(), rows, depth=AHEAD)


def named(labels: Labels | None, row: dict) -> dict:
    """A row whose masks bear the names that the classes of the labels have, where they are known by others there."""
    if labels is None or labels.task.HOLDS != "classes":
        return row
    known = labels.task.known
    numbers = [known.numbers.get(normalised(each["label"] or "")) for each in row["segments"]]
    named = zip(row["segments"], numbers, strict=True)
    return row | {"segments": [each | {"label": known.names[i - 1] if i else each["label"]} for each, i in named]}


def about(labels: Labels, place: str | DataSet, truths: list[Truth]) -> dict:
    """What the page says of its truth: where it comes from, and how many images have none, by why."""
    name = f"{place.name} {place.split or ''}".strip() if isinstance(place, DataSet) else ""
    remarks = [truth.remark for truth in truths if truth.remark]
    lacking = {remark: remarks.count(remark) for remark in REMARKS.values() if remark in remarks}
    facts = {"name": name, "place": str(place_of(place)), "holds": labels.task.HOLDS}
    return facts | {"lacking": lacking, "above": CORRECT_ABOVE, "of": len(truths)}


def _read(labels: Labels, row: dict) -> Truth:
    label, status = labels.read(row)
    if row["key"] in labels.outside:
        status = "outside"
    if status != "ok":
        return Truth(REMARKS[status])
    if labels.task.HOLDS == "boxes":
        return Truth("" if len(label.boxes) else REMARKS["no_object"], boxes=label.boxes.tolist(), label=label)
    if labels.task.HOLDS == "classes":
        numbers, pixels = np.unique(label[label > 0], return_counts=True)
        names = (labels.task.names[number] for number in numbers)
        return Truth(mask=label, shares=dict(zip(names, (pixels / label.size).tolist(), strict=True)), label=label)
    mask = labels.task.outline(row, label)
    return Truth(mask=mask, shares={"": float(mask.mean())}, label=label)


def _task(options, place: str | DataSet) -> Task:
    """Whoever reads the labels: the task that is named, else one for what a data set holds, for classes or masks."""
    of_own = "classes" if options.classes else "masks"
    task = tasks.find(options.task or datasets.TASKS[place.holds if isinstance(place, DataSet) else of_own])
    if task.HOLDS == "answers":
        raise ValueError(f"--task {options.task} has no truth to show; the page has what `evaluate` measured by it")
    if options.box_rule is None:
        return task()
    if task.HOLDS != "boxes":
        raise ValueError("--box-rule has no effect without boxes; add --task boxes")
    return task(box_rule=options.box_rule)
