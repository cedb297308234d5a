"""The labels of a run's or a sweep's images: which one an image has, and what is wrong where it cannot be used."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raypipe.evaluation.task import Task
from raypipe.storage import Location
from raypipe.types import BadImage

WHY = {  # what is said about images without a measure, by their status
    "failed": "images failed in the run",
    "no_label": "images have no label of their own",
    "other_size": "labels have another size than their image",
    "bad_label": "labels cannot be read",
}


@dataclass(frozen=True)
class Labels:
    """Labels as a task reads them."""

    task: Task
    location: Mapping[str, str]  # image key -> where its label is; images without a label of their own are left out
    max_bytes: int  # larger files and
    max_pixels: int  # larger labels cannot be read
    unused: Sequence[str] = ()  # names of the labels that no image has

    def read(self, row: dict) -> tuple[Any, str]:
        """A row's label and "ok", or None and one of WHY."""
        if row["error"]:
            return None, "failed"
        if row["key"] not in self.location:
            return None, "no_label"
        try:
            label = self.task.read(self.location[row["key"]], max_bytes=self.max_bytes, max_pixels=self.max_pixels)
        except BadImage:
            return None, "bad_label"
        return (label, "ok") if self.task.fits(row, label) else (None, "other_size")


def match(
    task: Task, folder: str, keys: Iterable[str], *, of: str = "an image", max_bytes: int, max_pixels: int
) -> Labels:
    """The labels of some images. keys: those of all; one may stand twice. of: the images, for the message.

    Raises ValueError when no label belongs to an image, besides what the task raises for the folder.
    """
    keys = iter(keys)
    first = next(keys, None)
    matches = task.match(folder, itertools.chain([first] if first is not None else [], keys))
    if not matches.location:
        names = f"; images are named as {first!r}, labels as {matches.unused[0]!r}" if first and matches.unused else ""
        raise ValueError(f"no label in {Location(folder)} has the path or the stem of {of}{names}")
    return Labels(task, matches.location, max_bytes, max_pixels, matches.unused)
