"""What a run's measures come to, as a table of one row: its values, what they stand on, and what papers print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import pyarrow as pa
import yaml

from raypipe.evaluation.datasets import DataSet
from raypipe.evaluation.task import Task, Value
from raypipe.schema import VERSION

# One printed value of a paper for the same data set.
PUBLISHED = pa.struct(
    [
        ("paper", pa.string()),
        ("table", pa.string()),
        ("row", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),  # in the unit of our own value
        ("note", pa.string()),  # how it was measured or read, where that differs
    ]
)
# The task is in the folder's name, as a partition. Then come the task's values and details, then `published`.
SUMMARY = (
    ("run", pa.string()),
    ("method", pa.string()),
    ("options", pa.string()),  # of the task, as JSON
    ("dataset", pa.string()),  # null for labels of one's own
    ("split", pa.string()),
    ("reference", pa.string()),  # where the labels are
    *((name, pa.int64()) for name in ("images", "ok", "failed", "no_label", "other_size", "bad_label")),
    ("outside", pa.int64()),  # images of the run that are none of the data set's, or of another split
    ("unused_labels", pa.int64()),
    ("empty_labels", pa.int64()),
    ("lacking", pa.map_(pa.string(), pa.int64())),  # measured images without a column of the task, by column
)


def table(task: Task, found: Mapping, *, method: str, dataset: DataSet | None) -> pa.Table:
    """The summary of a run. found: the fields of its Evaluation."""
    known = {name: found[name] for name in ("run", "images", "outside", "unused_labels", "empty_labels", "published")}
    known |= {"method": method, "reference": found["labels"], "lacking": [*found["lacking"].items()]}
    known |= {"dataset": dataset and dataset.name, "split": dataset and dataset.split}
    known |= {"options": json.dumps(task.options(), sort_keys=True)}
    values = [(name, pa.float64()) for name in task.SHOWN]
    columns = [*SUMMARY, *values, *task.DETAILS, ("published", pa.list_(PUBLISHED))]
    schema = pa.schema(columns, metadata={"raypipe.schema": str(VERSION)})
    return pa.Table.from_pylist([known | found["counts"] | found["means"] | found["details"]], schema=schema)


def of_run(rows: pa.Table, summary: pa.Table) -> pa.Table:
    """A further table of a task with the columns that say whose it is. summary: of the same run."""
    for i, name in enumerate(("run", "method", "dataset", "split", "reference")):
        value = pa.repeat(summary[name][0], len(rows))
        rows = rows.add_column(i, name, value)
    return rows.replace_schema_metadata({"raypipe.schema": str(VERSION)})


def published(dataset: DataSet | None, metrics: Mapping[str, Value], *, method: str | None = None) -> list[dict]:
    """What papers print for a data set, as PUBLISHED, in their order; nothing for a split that they do not use.

    metrics: those of a task (`Task.SHOWN`), of which their tables have some. method: whose rows alone are wanted; None
    = all. Each also says `at` which options, where its table has several.
    """
    if dataset is None:
        return []
    return [
        {name: each[name] for name in ("paper", "table", "row", "metric")}
        | {"value": _in_our_unit(each, metrics[each["metric"]]), "note": _note(each), "at": each.get("at")}
        for each in _record()["values"]
        if each.get("dataset", "").replace("-", "_") == dataset.name.replace("-", "_") and each.get("metric") in metrics
        if (each["split"] == dataset.split if "split" in each else dataset.is_usual)
        if method in (None, _method(each))
    ]


def at_options(printed: list[dict], options: Mapping) -> list[dict]:
    """Of what papers print, that with these options of a task, as PUBLISHED. printed: of `published`."""
    kept = [
        each for each in printed if all(options.get(name, value) == value for name, value in (each["at"] or {}).items())
    ]
    return [{name: value for name, value in each.items() if name != "at"} for each in kept]


def beside(ours: Mapping[str, Mapping], printed: list[dict]) -> list[str]:
    """Lines for the terminal: our values, then the papers' rows of the same data set. ours: values by run."""
    if not printed:
        return []
    metrics = list(dict.fromkeys(each["metric"] for each in printed))
    lines: dict[str, dict] = {}
    for each in printed:
        lines.setdefault(f"{each['row']} ({each['paper']}, table {each['table']})", {})[each["metric"]] = each["value"]
    cells = [(line, [values.get(name) for name in metrics]) for line, values in [*ours.items(), *lines.items()]]
    papers, notes = _record()["papers"], dict.fromkeys(f"table {e['table']}: {e['note']}" for e in printed if e["note"])
    named = dict.fromkeys(each["paper"] for each in printed)
    named = [f"{name}: {papers[name]['title']}, {papers[name]['authors']}" for name in named]
    return [*lines_of("published", [name.replace("_", " ") for name in metrics], cells), *named, *notes, ""]


def lines_of(corner: str, heads: list[str], lines: list[tuple[str, list]]) -> list[str]:
    """Lines of a table for the terminal, with names on the left."""
    first, *others = zip([corner, *heads], *([name, *map(cell, cells)] for name, cells in lines), strict=True)
    columns = [[name.ljust(max(map(len, first))) for name in first]]
    columns += [[text.rjust(max(map(len, column))) for text in column] for column in others]
    return list(map("  ".join, zip(*columns, strict=True)))


def cell(value: float | str | None) -> str:
    """A value in a table for the terminal."""
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else value


@cache
def _record() -> dict:
    return yaml.safe_load(files("raypipe.evaluation").joinpath("published.yaml").read_text())


def _method(value: dict) -> str | None:
    """Which of our methods a printed value stands for; None where it is none of ours."""
    paper = _record()["papers"][value["paper"]]
    return paper["ours"].get(value["row"], paper["tables"][value["table"]]).get("method")


def _in_our_unit(printed: dict, ours: Value) -> float:
    """A printed value: many papers print percent of what we have as a share."""
    is_percent = _record()["papers"][printed["paper"]]["tables"][printed["table"]]["unit"] == "percent"
    return round(printed["value"] / 100, 6) if is_percent and not ours.unit.startswith("%") else printed["value"]


def _note(value: dict) -> str | None:
    """What to know of a printed value."""
    if value.get("variant_inferred"):
        return "which trick a row stands for is inferred from the rows' order"
    if variant := value.get("variant"):
        return f"{value['metric']} of {value['row']} is another F, to be compared with {variant} (--f-variants)"
    if "note" in value:
        return value["note"]
    protocol = _record()["papers"][value["paper"]]["tables"][value["table"]].get("protocol")
    return protocol and f"protocol {protocol}"
