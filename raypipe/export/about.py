"""What every format may tell of a run, and how a line of a CSV file is written."""

from __future__ import annotations

import io
from collections.abc import Iterable
from csv import writer as csv_writer
from dataclasses import dataclass
from functools import cached_property

from raypipe import classes
from raypipe.classes import Classes

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # how a spreadsheet recognises a formula


@dataclass(frozen=True)
class About:
    """What every format may tell of the run."""

    method: str
    settings: dict  # the method's parameters
    provenance: dict  # time, versions, weights with sha256
    licence: str  # of the weights or the method; "" when it is not known here
    caution: str  # what whoever reads the labels has to know: see `Segmenter.caution`
    where: str | None
    doubtful: str | None  # how many of the images, those that are trusted least
    labels: tuple[str, ...]  # those of the run's segments, sorted; of the whole run, so that numbers do not change
    most: int  # segments of the image that has the most of them
    parts: tuple[str, ...]  # names of segments without a label, by index; () where the index says nothing
    category: str  # name of segments without a label and without a part's name
    unlabelled: bool  # there are segments without a label
    instances: bool  # label maps hold the segments' own numbers: no name tells those of an image apart
    embeddings: bool  # segments have theirs
    classes: Classes | None  # whose numbers and order the categories have, whether they occur or not

    @cached_property
    def categories(self) -> list[str]:
        """Names of what segments show; the number of a category is its place from 1."""
        if self.classes:
            return list(self.classes.names)
        return list(dict.fromkeys([*self.labels, *((self.parts or (self.category,)) if self.unlabelled else ())]))

    def name(self, segment: dict) -> str:
        """The category's name of a segment."""
        if self.classes:
            return self.categories[self.number(segment) - 1]
        if segment["label"] is not None:
            return segment["label"]
        return self.parts[segment["segment"]] if self.parts else self.category

    def name_of_first(self, row: dict) -> str | None:
        """The category's name of a row's first mask; None where it has none and there are several names."""
        if self.parts:
            return self.parts[0]
        first = next((self.name(each) for each in row["segments"] if each["segment"] == 0), None)
        return self.categories[0] if first is None and len(self.categories) == 1 else first

    def number(self, segment: dict) -> int:
        """The category's number of a segment, from 1."""
        if self.classes:
            return self.classes.numbers[classes.normalised(segment["label"])]
        return self._numbers[self.name(segment)]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.categories, 1)}  # free texts may be many thousands

    def text(self) -> str:
        """One sentence on where the masks come from."""
        version = (self.provenance["packages"] or {}).get("raypipe", "")
        return f"masks by raypipe {version}, method {self.method}"


def csv_line(cells: Iterable) -> bytes:
    """One line of a CSV file. Text that a spreadsheet would run as a formula gets an apostrophe in front."""
    buffer = io.StringIO(newline="")
    csv_writer(buffer).writerow(
        f"'{cell}" if isinstance(cell, str) and cell.lstrip(" ").startswith(FORMULA) else cell for cell in cells
    )
    return buffer.getvalue().encode()
