"""`raypipe evaluate`: runs against labels -> measures per image in Parquet, and their means, side by side."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import tyro

from raypipe.evaluation import datasets, page, tasks
from raypipe.evaluation.datasets import DataSet
from raypipe.evaluation.labels import WHY, Labels, empty, match, nothing, place_of
from raypipe.evaluation.summary import at_options, beside, cell, lines_of, of_run, published
from raypipe.evaluation.summary import table as summary_table
from raypipe.evaluation.sums import Sums
from raypipe.evaluation.task import Task, written
from raypipe.inputs.maskkinds import Kind, chosen, parse
from raypipe.run import Run, rows
from raypipe.storage import Folder, map_ahead, normalise, open_table

TERMINAL_GROUPS = 40
TERMINAL_VALUES = 4  # side by side
TERMINAL_COLUMNS = 10  # values of runs that are compared, a line per run
COUNTED = (("images", "ok"), ("failed", "failed"))  # what stands before the values, and the status it counts
EXAMPLES = 10  # images of one status that are named; the table has all


@dataclass(frozen=True)
class Evaluate:
    """Measure runs' masks against labels; several runs are compared."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs: paths or URIs
    # folder of label images, matched by relative path, then by a name that is unique; or what people drew in Label
    # Studio (its JSON) or CVAT (its COCO 1.0, JSON or zip), or a folder of several; for boxes a folder of VOC's XML
    # files or a JSON file of COCO
    labels: str | None = None
    # instead of labels: duts-tr, duts-te, dut-omron, ecssd (masks), voc07, voc12, coco20k (boxes), voc2012, coco2017,
    # coca, cityscapes_object, imagenet_s50, imagenet_s300, imagenet_s919, pascal_context_59,
    # pascal_context_459 (classes)
    dataset: str | None = None
    root: str | None = None  # folder in which data sets lie, as their authors pack them; a path or a URI
    split: str | None = None  # of a data set that has several: train, val, test of VOC; None = the papers'
    # of labels of one's own for tasks semantic and naming, whose values are 1, 2, ... in the order of the classes, or
    # whose folders bear their names: a data set's list, a file of names, or names separated by commas
    classes: str | None = None
    # what the labels show; pattern: parts of an animal's coat, Dice and IoU with either polarity; saliency: objects,
    # as masks; boxes: objects, as boxes; semantic: classes, by name; naming: classes, by names in free text; rating:
    # what people answered on the pages of `export --format rating`. None = what the data set is for, semantic for
    # labels of one's own with classes, and pattern for other labels
    task: str | None = None
    group: Literal["folder", "prefix", "none"] = "folder"  # means per folder, or per file name up to its last `_`
    # what is set in labels: light on dark, dark ink on a white or transparent sheet, what is opaque in cut-outs, any
    # value but 0; None finds it
    label_kind: Literal["light", "ink", "alpha", "nonzero"] | None = None
    label_value: int | str | None = None  # 1 or 1,2: the values, as stored, that are set in labels of classes
    max_pixels: int = 100_000_000  # labels with more pixels are listed as unreadable
    max_bytes: int = 500_000_000  # label files with more bytes are listed as unreadable


@dataclass(frozen=True)
class Evaluation:
    """What a run's measures come to. Images without a measure are left out and counted; None without any."""

    run: str
    labels: str
    label_kind: str | None  # how labels of one's own were read: a kind or values; None where they are no mask files
    table: str  # where the rows per image are
    images: int  # in the run, without those outside the data set
    counts: dict[str, int]  # images by status: ok, failed, no_label, other_size, bad_label
    unused_labels: int  # that belong to no image
    empty_labels: int  # of the measured images; nothing is set in them
    means: dict[str, float | None]  # the task's values over the images
    group_means: dict[str, float | None]  # the means of the groups' values
    titles: dict[str, str]  # the values in words
    groups: dict[str, dict[str, float | None]]  # per group: images, failed, and the values
    details: dict  # further results of the task
    of_details: list  # of these, a table for people: its heads, and lines of names and cells
    published: list[dict]  # what papers print for the same data set (`summary.PUBLISHED`)
    outside: int = 0  # images of the run that are none of the data set's, or of another split of it
    unused_examples: list[str] = field(default_factory=list)  # names of labels that belong to no image
    lacking: dict[str, int] = field(default_factory=dict)  # measured images that lack a column of the task, by column
    examples: dict[str, list[str]] = field(default_factory=dict)  # keys of images without a measure, by status
    reasons: dict[str, str] = field(default_factory=dict)  # why the labels of such images cannot be read, by key
    notes: list[str] = field(default_factory=list)  # what to know of the values
    page: str = ""  # where the page with the task's charts is; "" for a task without any
    turned: int = 0  # labels of a data set that were turned like their photographs

    def text(self) -> str:
        """The table of means and what was left out."""
        names, lines = ["images", "failed", *list(self.means)[:TERMINAL_VALUES]], []
        if (count := len(self.groups)) > 1:
            lines += list(self.groups.items())[:TERMINAL_GROUPS]
            lines += [(f"... and {count - TERMINAL_GROUPS:,} more groups", {})] * (count > TERMINAL_GROUPS)
            lines.append(("mean over groups", self.group_means))
        lines.append(("mean over images", self.counts | {"images": self.counts["ok"]} | self.means))
        table = lines_of(
            "",
            [name.replace("_", " ") for name in names],
            [(line, [values.get(name, "") for name in names]) for line, values in lines],
        )
        means = [f"{cell(self.means[name]):>9}  {name}: {title}" for name, title in self.titles.items()]
        heads, its = self.of_details
        if its := [(name, cells) for name, cells in its if cells[0] is not None]:
            more = [(f"... and {len(its) - TERMINAL_GROUPS:,} more", [""] * len(heads))]
            means += ["", *lines_of("", heads, [*its[:TERMINAL_GROUPS], *more[: len(its) > TERMINAL_GROUPS]])]
        papers = beside({rows.run_names((self.run,))[0]: self.means}, self.published)
        papers = ["", *papers] if papers else []
        return "\n".join([*table, "", *means, *papers, *self.remarks(), *self.places()])

    def places(self) -> list[str]:
        """Where the table per image is, and the page."""
        return [f"per image: {self.table}", *([f"page: {self.page}"] if self.page else [])]

    def remarks(self) -> list[str]:
        """What could not be measured, a line per reason, and what else to know."""
        lines = list(self.notes)
        for status, keys in self.examples.items():
            more = ", ..." if self.counts[status] > len(keys) else ""
            lines.append(f"{self.counts[status]:,} {WHY[status]}: {', '.join(keys)}{more}")
            lines += [f"{key}: {reason}" for key, reason in self.reasons.items() if status == "bad_label"]
        lines += [f"no {name} in {count:,} of {self.counts['ok']:,} images" for name, count in self.lacking.items()]
        if self.empty_labels:
            lines.append(f"{self.empty_labels:,} of {self.counts['ok']:,} labels are empty: no pixel is set")
        if self.unused_labels:
            more = ", ..." if self.unused_labels > len(self.unused_examples) else ""
            text = f"labels belong to no image: {', '.join(self.unused_examples)}{more}"
            lines.append(f"{self.unused_labels:,} {text}")
        if self.turned:
            lines.append(f"{self.turned:,} labels were turned, as their photographs' EXIF says")
        if self.outside:
            lines.append(f"{self.outside:,} images are none of the data set's, or of another split of it")
        return lines


@dataclass(frozen=True)
class Comparison:
    """Several runs against the same labels."""

    runs: dict[str, Evaluation]  # by a short name

    def text(self) -> str:
        """A line per run or, where there are groups, a table per measure; then what was left out, and in which runs."""
        groups = sorted({group for each in self.runs.values() for group in each.groups})
        lines = self._by_measure(groups) if len(groups) > 1 else self._by_run()
        runs = list(self.runs.values())
        lines += self._by_detail()
        lines += beside({name: each.means for name, each in self.runs.items()}, runs[0].published)
        remarks: dict[str, list[str]] = defaultdict(list)  # the runs of each: what labels lack is the same for most
        for name, each in self.runs.items():
            for remark in each.remarks():
                remarks[remark].append(name)
        lines += [f"{', '.join(its) if len(its) < len(runs) else 'all runs'}: {each}" for each, its in remarks.items()]
        return "\n".join([*lines, *(place for each in runs for place in each.places())])

    def _by_run(self) -> list[str]:
        """One table, a column per measure, and what these are; of many measures a line for each."""
        titles = next(iter(self.runs.values())).titles
        if len(titles) > TERMINAL_COLUMNS:
            lines = [(name, [each.counts[key] for each in self.runs.values()]) for name, key in COUNTED]
            means = ((name, [each.means[name] for each in self.runs.values()]) for name in titles)
            lines += [(f"{name}: {titles[name]}", values) for name, values in means]
            return [*lines_of("", list(self.runs), lines), ""]
        cells = [
            (name, [each.counts["ok"], each.counts["failed"], *each.means.values()]) for name, each in self.runs.items()
        ]
        table = lines_of("", [*dict(COUNTED), *(name.replace("_", " ") for name in titles)], cells)
        return [*table, "", *(f"{name}: {title}" for name, title in titles.items()), ""]

    def _by_detail(self) -> list[str]:
        """The first column of the tables of details, a column per run."""
        tables = [{name: cells[0] for name, cells in each.of_details[1]} for each in self.runs.values()]
        names = [name for name in tables[0] if any(table.get(name) is not None for table in tables)]
        if not names:
            return []
        lines = [(name, [table.get(name) for table in tables]) for name in names[:TERMINAL_GROUPS]]
        more = [f"... and {len(names) - TERMINAL_GROUPS:,} more"] * (len(names) > TERMINAL_GROUPS)
        head = next(iter(self.runs.values())).of_details[0][0]
        return [*lines_of(head, list(self.runs), lines), *more, ""]

    def _by_measure(self, groups: list[str]) -> list[str]:
        """A table per measure, a line per group and a column per run."""
        runs, lines = list(self.runs.values()), []
        values_of = [(group, [each.groups.get(group, {}) for each in runs]) for group in groups[:TERMINAL_GROUPS]]
        values_of.append(("mean over groups", [each.group_means for each in runs]))
        values_of.append(("mean over images", [each.means for each in runs]))
        for i, (name, title) in enumerate(runs[0].titles.items()):
            shown = values_of if i < TERMINAL_VALUES else values_of[-1:]
            cells = [(line, [values.get(name) for values in of_runs]) for line, of_runs in shown]
            lines += [title, *lines_of(name.replace("_", " "), list(self.runs), cells), ""]
        return lines


def evaluate(options: Evaluate, task: Task | None = None) -> Evaluation | Comparison:
    """Measure every image of the runs that has a label; earlier tables for the same labels are replaced at once.

    task: with its options; None = the one that `options` name or mean, with its defaults. Reads a run part by part; its
    table is held compressed, about 100 MB for a million images. Raises ValueError or FileNotFoundError for an unknown
    task, a folder that is no run, labels of which none belongs to an image or can be measured against, and labels of
    several kinds.
    """
    names = rows.run_names(options.runs)
    if not names:
        raise ValueError("evaluate needs a run, or several to compare")
    task = task or tasks.find(options.task or datasets.task_of(options.dataset, bool(options.classes)))()
    source = datasets.chosen(options)
    task = datasets.bound(task, source, options.classes)
    task.load()
    runs: dict[str, Evaluation] = {}
    for name, folder in zip(names, options.runs, strict=True):
        known = next((parse(each.label_kind or "") for each in runs.values()), None)
        runs[name] = evaluate_run(folder, options, task, source, known=known)
    return runs[names[0]] if len(names) == 1 else Comparison(runs)


def evaluate_run(
    folder: str, options: Evaluate, task: Task, source: str | DataSet, *, known: Kind | None = None
) -> Evaluation:
    """Measure one run. folder: the run's. source: of labels. known: how they are read, where that was found before."""
    run = Run(folder)
    if not run.parts():
        raise ValueError(f"{run} has no rows")
    by = task.MATCHED_BY
    keys = [key for table in rows.columns(run, [by]) for key in table[by].to_pylist()]
    limits = {"max_bytes": options.max_bytes, "max_pixels": options.max_pixels}
    kind = chosen(options.label_kind, options.label_value)
    labels = match(task, source, keys, of=f"an image of {run}", kind=kind, known=known, **limits)
    measured = _measured(run, labels, options.group, str(place_of(source)))
    printed = published(labels.dataset, task.SHOWN)
    return recorded(run.folder, measured, labels, source, method=run.method, printed=printed)


def recorded(
    folder: Folder,
    measured: Iterable[dict],
    labels: Labels,
    source: str | DataSet,
    *,
    method: str,
    printed: list[dict],
) -> Evaluation:
    """Write the tables of what was measured into `metrics/` of a folder, and say what it comes to.

    measured: rows of the task's table in its order, with `is_empty` of the label. labels: of `source`, with the task.
    printed: what papers print for it (`summary.PUBLISHED`). Raises ValueError when nothing could be measured.
    """
    task, kind = labels.task, labels.kind and str(labels.kind)
    tally, schema = Tally(task), task.schema()
    if kind:
        schema = schema.with_metadata(schema.metadata | {b"raypipe.label_kind": kind.encode()})
    content = written(map(tally.counted, measured), schema)
    found = tally.summary(labels, printed)
    if not found["counts"]["ok"]:
        reason = next(iter(found["reasons"].values()), "")
        raise nothing(str(folder), source, found["counts"], found["examples"], reason)
    if (labels.dataset or task.HOLDS == "classes") and found["empty_labels"] == found["counts"]["ok"]:
        raise empty(source)
    target = (f"task={task.name}", _file_name(source, task))
    folder.write(content, "metrics", *target)
    table = str(folder.location("metrics", *target))
    known = at_options(printed, task.options())
    found |= {"run": str(folder), "labels": str(place_of(source)), "published": known}
    of_images = open_table(content).read([each.name for each in schema if not pa.types.is_nested(each.type)])
    summary = summary_table(task, found, method=method, dataset=labels.dataset)
    more = {name: of_run(each, summary) for name, each in task.tables(of_images, found["details"], printed).items()}
    for name, each in {"summary": summary, **more}.items():
        folder.write_table(each, "metrics", name, *target)
    if charts := task.charts(found["details"], printed):
        place = ("metrics", "pages", f"{task.name}-{target[1].removesuffix('.parquet')}.html")
        content = page.render(task, found, summary.to_pylist()[0], more, charts)
        folder.write(content.encode("utf-8", "replace"), *place)
        found["page"] = str(folder.location(*place))
    return Evaluation(**found, label_kind=kind, table=table)


class Tally:
    """What is counted over images, in all and by group, and what the task makes of it."""

    def __init__(self, task: Task):
        self._task, self._sums = task, task.sums()
        self._group_sums: dict[str, Sums] = defaultdict(task.sums)
        self._statuses: dict[str, Counter[str]] = defaultdict(Counter)  # by group
        self._examples: dict[str, list[str]] = defaultdict(list)
        self._empty = 0

    def counted(self, row: dict) -> dict:
        """Count one row of `_measured` and return it as one of the task's table."""
        group, status = row["group"], row["status"]
        self._statuses[group][status] += 1
        self._empty += row.pop("is_empty", False)
        if status == "ok":
            self._sums.add(row)
            self._group_sums[group].add(row)
        elif len(self._examples[status]) < EXAMPLES:
            self._examples[status].append(row["key"])
        return row

    def summary(self, labels: Labels, printed: list[dict]) -> dict:
        """The fields of an Evaluation that are counted. Groups without a value have no part in the groups' mean.

        printed: what papers print (`summary.published`).
        """
        statuses, shown = sum(self._statuses.values(), Counter()), self._task.SHOWN
        groups = {
            group: {"images": counts["ok"], "failed": counts["failed"]} | self._task.values(self._group_sums[group])
            for group, counts in sorted(self._statuses.items())
            if counts["ok"] or counts["failed"]
        }
        return {
            "images": statuses.total(),
            "counts": {status: statuses[status] for status in ("ok", *WHY)},
            "outside": len(labels.outside),
            "unused_labels": len(labels.unused),
            "unused_examples": list(labels.unused[:EXAMPLES]),
            "empty_labels": self._empty,
            "means": self._task.values(self._sums),
            "details": (details := self._task.details(self._sums)),
            "of_details": self._task.lines(details, printed),
            "notes": self._task.remarks(details, printed),
            "group_means": {name: _mean(values[name] for values in groups.values()) for name in shown},
            "titles": {name: f"{each.title}, {each.unit}" if each.unit else each.title for name, each in shown.items()},
            "groups": groups,
            "lacking": {name: n for name, n in self._sums.lacking.items() if n and name not in self._task.QUIET},
            "reasons": {key: why for key in self._examples.get("bad_label", ()) if (why := labels.reasons.get(key))},
            "turned": len(labels.turned),
            "examples": {status: self._examples[status] for status in WHY if status in self._examples},
        }


def group(key: str, by: str) -> str:
    """The group of an image: its folder, its file name up to the last `_` (by = "prefix"), or one for all ("none")."""
    path = PurePosixPath(key)
    if by == "prefix":
        return path.stem.rpartition("_")[0] or path.stem
    return str(path.parent) if by == "folder" else "all"


def _measured(run: Run, labels: Labels, by: str, reference: str) -> Iterator[dict]:
    """Rows of the task's table with `is_empty`, of the label; labels are read ahead in threads."""
    is_hard = {"is_hard": run.configuration()["provenance"].get("soft") is False}  # older runs do not say

    def measure(row: dict) -> dict:
        known = {name: row[name] for name in ("image_id", "key", "method", "height", "width")}
        known |= {"group": group(row["key"], by), "reference": reference}
        label, status = labels.read(row)
        if status != "ok":
            return known | {"status": status}
        is_empty = isinstance(label, np.ndarray) and not (label > 0).any()
        return known | labels.task.cells(row | is_hard, label) | {"status": status, "is_empty": is_empty}

    every = rows.batches(run, leaves=labels.task.LEAVES)
    every = (row for table in every for row in labels.task.ahead(table.to_pylist()))
    every = (row for row in every if row["key"] not in labels.outside)
    yield from map_ahead(measure, every, depth=min(16, 2 * (os.cpu_count() or 1)))


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _file_name(source: str | DataSet, task: Task) -> str:
    """Of the tables against one folder of labels or one data set, with a task's options where it has any."""
    options, text = task.options(), normalise(place_of(source)).rstrip("/")
    text += "" if isinstance(source, str) else f"/{source.split}"
    text += json.dumps(options, sort_keys=True) if options else ""
    name = "labels" if isinstance(source, str) else source.name
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.parquet"
