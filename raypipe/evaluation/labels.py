"""The labels of a run's or a sweep's images: which one an image has, and what is wrong where it cannot be used."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raypipe.evaluation import datasets
from raypipe.evaluation.datasets import DataSet
from raypipe.evaluation.task import Task
from raypipe.inputs import maskfiles
from raypipe.inputs.maskkinds import KINDS, Kind
from raypipe.storage import Location
from raypipe.types import BadImage

WHY = {  # what is said about images without a measure, by their status
    "failed": "images failed",
    "no_label": "images have no label of their own",
    "other_size": "labels have another size than their image",
    "bad_label": "labels cannot be read",
}
HOW = f"--label-kind {'|'.join(KINDS)} or --label-value N[,N]"


@dataclass(frozen=True)
class Labels:
    """Labels as a task reads them."""

    task: Task
    location: Mapping[str, str]  # image, by `task.MATCHED_BY` -> where its label is; those without one are left out
    max_bytes: int  # larger files and
    max_pixels: int  # larger labels cannot be read
    unused: Sequence[str] = ()  # names of the labels that no image has
    kind: Kind | None = None  # of mask files; None where the labels are no such files, or those of a data set
    dataset: DataSet | None = None  # whose labels they are
    outside: Collection[str] = ()  # images that are none of the data set's, or of another split of it
    reasons: dict[str, str] = field(default_factory=dict)  # why labels could not be read, by image, so far
    turned: set[str] = field(default_factory=set)  # images whose label was turned like the photograph, so far

    def read(self, row: dict) -> tuple[Any, str]:
        """A row's label and "ok", or None and one of WHY."""
        if row["error"]:
            return None, "failed"
        if (name := row[self.task.MATCHED_BY]) not in self.location:
            return None, "no_label"
        limits = {"max_bytes": self.max_bytes, "max_pixels": self.max_pixels}
        limits |= {"kind": self.kind} if self.kind else {}
        limits |= {"form": self.dataset.form} if self.dataset and self.dataset.holds == "classes" else {}
        try:
            label = self.task.read(self.location[name], **limits)
            orientation = self.dataset.orientation(row["key"]) if self.dataset else 1
            fits = self.task.fits(row, label)
        except BadImage as error:
            self.reasons[row["key"]] = error.message
            return None, "bad_label"
        if orientation > 1 and self.task.fits(row, turned := self.task.turned(label, orientation)):
            self.turned.add(row["key"])
            return turned, "ok"  # else the images of the run are copies that were not turned
        return (label, "ok") if fits else (None, "other_size")


def match(
    task: Task,
    source: str | DataSet,
    keys: Iterable[str],
    *,
    of: str = "an image",
    kind: Kind | None = None,
    known: Kind | None = None,
    max_bytes: int,
    max_pixels: int,
) -> Labels:
    """The labels of some images. source: a folder of labels, as the task wants it, or a data set.

    keys: those of all images; one may stand twice. of: the images, for the message. kind: of mask files, as a person
    says; None = recognised, and said. known: found out before, so taken as it is. Raises ValueError when no label
    belongs to an image or their kind is not evident, besides what the task raises for the folder.
    """
    keys, limits = list(keys), {"max_bytes": max_bytes, "max_pixels": max_pixels}
    dataset = source if isinstance(source, DataSet) else None
    if dataset and dataset.holds != task.HOLDS:
        text = f"data set {dataset.name} has {dataset.holds}, but task {task.name} measures {task.HOLDS}"
        raise ValueError(f"{text}; add --task {datasets.TASKS[dataset.holds]}")
    matches = dataset.match(keys) if dataset else task.match(source, keys)
    if not matches.location:
        names = maskfiles.difference(keys[0], matches.unused, what="labels") if keys else ""
        raise ValueError(f"no label in {place_of(source)} has the path or the stem of {of}{names}")
    if matches.files:
        kind = known or maskfiles.kind_of(matches, kind, what="labels", option=HOW, **limits)
    elif kind:
        why = f"{dataset.name} has {dataset.holds} of its own" if dataset else f"{task.name} labels are no mask files"
        raise ValueError(f"--label-kind and --label-value have no effect: {why}")
    outside = dataset.outside(keys) if dataset else ()
    return Labels(task, matches.location, **limits, unused=matches.unused, kind=kind, dataset=dataset, outside=outside)


def place_of(source: str | DataSet) -> Location:
    """Where labels are."""
    return Location(source if isinstance(source, str) else source.labels)


def nothing(
    of: str, labels: str | DataSet, counts: Mapping[str, int], examples: Mapping[str, Sequence[str]], reason: str = ""
) -> ValueError:
    """The error for labels by which nothing can be measured.

    of: what cannot, for people. counts, examples: of images by status, and their keys. reason: why a label could not be
    read.
    """
    reasons = "; ".join(f"{counts[status]:,} {WHY[status]}, such as {keys[0]!r}" for status, keys in examples.items())
    advice = "; each label needs the size of its image" if "other_size" in examples else ""
    advice += f"; {reason}" if reason else ""
    return ValueError(f"{of} cannot be measured against {place_of(labels)}: {reasons}{advice}")


def empty(labels: str | DataSet) -> ValueError:
    """The error for labels of which none has a pixel that is set, or is of a class."""
    if isinstance(labels, str) or labels.holds == "classes":
        text = f"no pixel of any label in {place_of(labels)} is of a class, whose numbers are 1, 2, ..."
        return ValueError(f"{text}; masks of 0 and 255 belong into one folder per class, with its name")
    text = f"no pixel is set in any label in {place_of(labels)}, where 128 of 255 and lighter is"
    return ValueError(f"{text}; for labels of 0 and 1 use --labels {place_of(labels)} --label-kind nonzero")
