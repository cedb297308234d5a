"""The page of an evaluation whose task has charts: its values, the charts and the tables beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple

import pyarrow as pa

from raypipe.evaluation.summary import cell
from raypipe.evaluation.task import Chart, Task
from raypipe.pages import html
from raypipe.pages.axes import levels
from raypipe.run import provenance

PLANE = (520, 220)  # width and height of a chart
NAMED = 12  # places of which each is named; more are named by round numbers
DOTS = 30  # places of a line at most that are dots too
ROWS = 40  # of a table of names


class Plane(NamedTuple):
    """A chart in pixels, y downwards."""

    chart: Chart
    lines: dict[str, str]  # points by name, as SVG takes them
    dots: dict[str, list[tuple[float, float, str]]]  # the same, with what each is
    bars: list[tuple[float, float, float, str]]  # left, width, height, what it is
    heights: list[tuple[float, str]]  # where a round number lies, and the number
    ticks: list[tuple[float, str]]
    marked: float | None


def render(
    task: Task, found: Mapping, summary: Mapping, tables: Mapping[str, pa.Table], charts: Sequence[Chart]
) -> str:
    """The page's HTML. found: the fields of its Evaluation. summary: the row of its table. tables: those besides."""
    heads, lines = found["of_details"]
    return html.render(
        "evaluation.html.j2",
        "sweep.js",
        title=f"{task.name}: {summary['dataset'] or 'labels of one’s own'} {summary['split'] or ''}".strip(),
        folder=found["run"],
        method=summary["method"],
        labels=found["labels"],
        values=[(found["titles"][name], value) for name, value in found["means"].items() if value is not None],
        counts=found["counts"],
        notes=found["notes"],
        planes=[plane(chart) for chart in charts],
        size=PLANE,
        heads=heads,
        lines=lines,
        names=tables["names"].to_pylist() if "names" in tables else [],
        titles={name: value.title for name, value in task.SHOWN.items()},
        most=ROWS,
        options=task.options(),
        shown=cell,
        made=provenance.now(),
        version=version("raypipe"),
    )


def plane(chart: Chart) -> Plane:
    """A chart in pixels. Lines and bars begin at 0 or below."""
    width, height = PLANE
    values = [value for line in chart.lines.values() for value in line if value is not None]
    steps = levels(min([0, *values]), max([0, *values]))
    low, high, first, last = steps[0], steps[-1], chart.places[0], chart.places[-1]

    def across(place: float) -> float:
        return round(width * (place - first) / ((last - first) or 1), 2)

    def down(value: float) -> float:
        return round(height * (high - value) / (high - low), 2)

    lines, dots, bars = {}, {}, []
    for name, line in chart.lines.items():
        if chart.are_bars:
            for left, right, value in zip(chart.places, chart.places[1:], line, strict=False):
                what = f"{left:g} to {right:g}: {value:g}"
                bars.append((across(left), across(right) - across(left), height - down(value), what))
            continue
        known = [
            (across(x), down(y), f"{name}, {x:g}: {y:.4f}")
            for x, y in zip(chart.places, line, strict=True)
            if y is not None
        ]
        lines[name], dots[name] = " ".join(f"{x},{y}" for x, y, _ in known), known
    named = chart.places if len(chart.places) <= NAMED else [x for x in levels(first, last) if first <= x <= last]
    ticks = [(across(place), f"{place:g}") for place in named]
    marked = None if chart.marked is None else across(chart.marked)
    dots = dots if len(chart.places) <= DOTS else dict.fromkeys(dots, ())
    return Plane(chart, lines, dots, bars, [(down(step), f"{step:g}") for step in steps], ticks, marked)
