"""`raypipe evaluate`: runs against labels -> measures per image in Parquet, and their means, side by side."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import ModuleType
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from raypipe import storage
from raypipe.evaluation import tasks
from raypipe.inputs import maskfiles
from raypipe.run import Run, rows
from raypipe.storage import map_ahead
from raypipe.types import BadImage

GROUPS = 40  # shown in the terminal
BATCH_ROWS = 1000  # images of the table written at once
EXAMPLES = 10  # images of one status that are named; the table has all
WHY = {  # what is said about images without a measure, by their status
    "failed": "images failed in the run",
    "no_label": "images have no label of their own",
    "other_size": "labels have another size than their image",
    "bad_label": "labels cannot be read",
}


@dataclass(frozen=True)
class Evaluate:
    """Measure runs' masks against labels; several runs are compared."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs: paths or URIs
    labels: str  # folder of label images, matched by relative path, then by a stem that is unique; 128 and above is set
    task: str = "pattern"  # what the labels show; pattern: parts of an animal's coat, Dice and IoU with either polarity
    group: Literal["folder", "prefix", "none"] = "folder"  # means per folder, or per file name up to its last `_`
    max_pixels: int = 100_000_000  # labels with more pixels are listed as unreadable
    max_bytes: int = 500_000_000  # label files with more bytes are listed as unreadable


@dataclass(frozen=True)
class Evaluation:
    """The means of a run's measures. They leave out the images without one, which are counted; None without any."""

    run: str
    labels: str
    table: str  # where the rows per image are
    images: int  # in the run
    counts: dict[str, int]  # images by status: ok, failed, no_label, other_size, bad_label
    unused_labels: int  # label files that belong to no image
    means: dict[str, float | None]  # over the images
    group_means: dict[str, float | None]  # over the groups' means
    groups: dict[str, dict[str, float | None]]  # per group: images, failed, and the means
    examples: dict[str, list[str]] = field(default_factory=dict)  # keys of images without a measure, by status

    def text(self) -> str:
        """The table of means and what was left out."""
        names = list(self.means)
        width = max([len("mean over images"), *map(len, self.groups)])
        lines = [f"{'':<{width}}  images  failed  " + "  ".join(f"{name.replace('_', ' '):>10}" for name in names)]
        if len(self.groups) > 1:
            lines += [_line(group, measured, names, width) for group, measured in list(self.groups.items())[:GROUPS]]
            lines += [f"... and {len(self.groups) - GROUPS:,} more groups"] if len(self.groups) > GROUPS else []
            lines.append(_line("mean over groups", self.group_means, names, width))
        total = {"images": self.counts["ok"], "failed": self.counts["failed"]} | self.means
        lines.append(_line("mean over images", total, names, width))
        return "\n".join([*lines, *self.remarks(), f"per image: {self.table}"])

    def remarks(self) -> list[str]:
        """What could not be measured, a line per reason."""
        lines = []
        for status, keys in self.examples.items():
            more = ", ..." if self.counts[status] > len(keys) else ""
            lines.append(f"{self.counts[status]:,} {WHY[status]}: {', '.join(keys)}{more}")
        if self.unused_labels:
            lines.append(f"{self.unused_labels:,} labels belong to no image of the run")
        return lines


@dataclass(frozen=True)
class Comparison:
    """Several runs against the same labels."""

    runs: dict[str, Evaluation]  # by a short name

    def text(self) -> str:
        """A table per measure, a column per run; then what was left out, run by run."""
        names = list(self.runs)
        groups = sorted({group for found in self.runs.values() for group in found.groups})
        width = max([len("mean over images"), *map(len, groups)])
        columns = [max(8, len(name)) for name in names]
        lines = []
        for measure in next(iter(self.runs.values())).means:
            heads = "  ".join(f"{name:>{size}}" for name, size in zip(names, columns, strict=True))
            lines.append(f"{measure.replace('_', ' '):<{width}}  {heads}")
            for title, found in self._lines(groups[:GROUPS] if len(groups) > 1 else []):
                cells = (_cell(values.get(measure), size) for values, size in zip(found, columns, strict=True))
                lines.append(f"{title:<{width}}  {'  '.join(cells)}")
            lines.append("")
        for name, found in self.runs.items():
            lines += [f"{name}: {remark}" for remark in found.remarks()]
        return "\n".join([*lines, *(f"per image: {found.table}" for found in self.runs.values())])

    def _lines(self, groups: list[str]) -> Iterator[tuple[str, list[dict]]]:
        found = self.runs.values()
        yield from ((group, [each.groups.get(group, {}) for each in found]) for group in groups)
        if groups:
            yield "mean over groups", [each.group_means for each in found]
        yield "mean over images", [each.means for each in found]


def evaluate(options: Evaluate) -> Evaluation | Comparison:
    """Measure every image of the runs that has a label; earlier tables for the same labels are replaced at once.

    Reads a run part by part; its table is held compressed, about 100 MB for a million images. Raises ValueError or
    FileNotFoundError for an unknown task, a folder that is no run, and labels of which none belongs to an image.
    """
    names = rows.run_names(options.runs)
    if not names:
        raise ValueError("evaluate needs a run, or several to compare")
    found = {name: evaluate_run(place, options) for name, place in zip(names, options.runs, strict=True)}
    return found[names[0]] if len(names) == 1 else Comparison(found)


def evaluate_run(place: str, options: Evaluate) -> Evaluation:
    """Measure one run. place: its folder."""
    task, run = tasks.find(options.task), Run(place)
    matches = maskfiles.match(options.labels, _keys(run))
    if not matches.location:
        raise ValueError(_nothing_matches(run, options.labels, matches.unused))
    tally, buffer = Tally(task.MEANS), io.BytesIO()
    with pq.ParquetWriter(buffer, task.SCHEMA, compression="zstd") as writer:
        measured = map(tally.counted, _measured(options, task, run, matches.location))
        while batch := list(itertools.islice(measured, BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=task.SCHEMA))
    target = (f"metrics/task={options.task}", f"{_name(options.labels)}.parquet")
    run.folder.write(buffer.getvalue(), *target)
    table = storage.redact(run.folder.location(*target))
    return Evaluation(str(run), storage.redact(options.labels), table, **tally.summary(len(matches.unused)))


class Tally:
    """Sums over images, in all and by group, from which the means are made."""

    def __init__(self, means: tuple[str, ...]):
        self._means, self._sums = means, {}
        self._statuses: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def counted(self, row: dict) -> dict:
        """Count one row of the task's table and return it."""
        status = row["status"]
        self._statuses[status] += 1
        sums = self._sums.setdefault(row["group"], Counter())
        sums["images"] += status == "ok"
        sums["failed"] += status == "failed"
        if status == "ok":
            sums.update({name: row[name] for name in self._means})
        elif len(self._examples.setdefault(status, [])) < EXAMPLES:
            self._examples[status].append(row["key"])
        return row

    def summary(self, unused_labels: int) -> dict:
        """The fields of an Evaluation that are counted. Groups without any measure have no part in the groups' mean."""
        total = sum(self._sums.values(), Counter())
        groups = {
            group: {"images": sums["images"], "failed": sums["failed"]} | self._divided(sums)
            for group, sums in sorted(self._sums.items())
            if sums["images"] or sums["failed"]
        }
        measured = [values for values in groups.values() if values["images"]]
        return {
            "images": self._statuses.total(),
            "counts": {status: self._statuses[status] for status in ("ok", *WHY)},
            "unused_labels": unused_labels,
            "means": self._divided(total),
            "group_means": {
                name: float(np.mean([v[name] for v in measured])) if measured else None for name in self._means
            },
            "groups": groups,
            "examples": {status: self._examples[status] for status in WHY if status in self._examples},
        }

    def _divided(self, sums: Counter) -> dict[str, float | None]:
        return {name: sums[name] / sums["images"] if sums["images"] else None for name in self._means}


def _measured(options: Evaluate, task: ModuleType, run: Run, location: dict[str, str]) -> Iterator[dict]:
    """Rows of the task's table; labels are read ahead in threads."""

    def measure(row: dict) -> dict:
        known = {name: row[name] for name in ("image_id", "key", "height", "width", "method")}
        known |= {"group": group(row["key"], options.group), "reference": storage.redact(options.labels)}
        if row["error"]:
            return known | {"status": "failed"}
        if row["key"] not in location:
            return known | {"status": "no_label"}
        try:
            place = location[row["key"]]
            label = maskfiles.read(place, max_bytes=options.max_bytes, max_pixels=options.max_pixels)
        except BadImage:
            return known | {"status": "bad_label"}
        if label.shape != (row["height"], row["width"]):
            return known | {"status": "other_size"}
        return known | task.score(row, label) | {"status": "ok"}

    found = (row for table in rows.batches(run, leaves=task.LEAVES) for row in table.to_pylist())
    yield from map_ahead(measure, found, depth=min(16, 2 * (os.cpu_count() or 1)))


def _keys(run: Run) -> Iterator[str]:
    """The keys of all rows; one that was tried again may stand twice."""
    fs, paths = run.dataset()
    for path in paths:
        yield from pq.read_table(path, filesystem=fs, columns=["key"], partitioning=None)["key"].to_pylist()


def group(key: str, by: str) -> str:
    """The group of an image: its folder, its file name up to the last `_` (by = "prefix"), or one for all ("none")."""
    path = PurePosixPath(key)
    if by == "prefix":
        return path.stem.rpartition("_")[0] or path.stem
    return str(path.parent) if by == "folder" else "all"


def _name(labels: str) -> str:
    """A file name for the measures against one folder of labels."""
    place = storage.normalise(labels).rstrip("/")
    return f"labels-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def _line(group: str, measured: dict, names: list[str], width: int) -> str:
    counts = "  ".join(f"{measured[name]:>6,}" if name in measured else f"{'':>6}" for name in ("images", "failed"))
    means = "  ".join(_cell(measured[name], 10) for name in names)
    return f"{group:<{width}}  {counts}  {means}"


def _cell(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.3f}"


def _nothing_matches(run: Run, labels: str, unused: list[str]) -> str:
    key = next(_keys(run), None)
    if key is None:
        return f"{run} has no rows"
    example = f"; images are named as {key!r}, labels as {unused[0]!r}" if unused else ""
    return f"no label in {storage.redact(labels)} has the path or the stem of an image of {run}{example}"
