"""The page of a training: curves of its loss and of its validation, the fixed images' masks over the epochs.

It can be written at any time, also while the training runs: all it shows is in the folder.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.pages import html
from raypipe.pages.axes import levels
from raypipe.run import attempts, provenance
from raypipe.storage import Folder, open_table
from raypipe.training import record
from raypipe.training.crops import Cropped
from raypipe.training.recipe import Recipe

PLOT = (520, 220)  # width and height of a curve's plane
POINTS = 240  # of a curve; thousands of steps would make the page large
WINDOW = 40  # the strong line is the mean of the last 1 / WINDOW of the steps
USUAL = (1, 99)  # percentiles of single steps that lie in the plane; few that are far away leave the rest its height
COMPARED = 50  # steps at the beginning and at the end whose means stand above a curve
RECENT = 500  # steps whose speed is shown
EPOCHS = 8  # columns of masks
NAMED = 200  # images, and steps, that are named where they were skipped


class Curve(NamedTuple):
    """Values over steps or epochs, in pixels of the plane: lines from left to right, y downwards."""

    name: str
    remark: str
    lines: dict[str, str]  # points, as SVG takes them, by name
    faint: str  # the same of what the one line is a mean of; "" without
    heights: list[tuple[float, str]]  # where a round number lies, and the number
    ticks: list[tuple[float, str]]


def write_page(folder: Folder, *, method: str, settings: Mapping[str, object], steps: int) -> str:
    """Write training.html from what is in the folder. settings: shown by name. steps: of the whole training.

    Returns where the page is.
    """
    log, skipped = record.read(folder), _table(folder, "skipped.parquet")
    validation = _table(folder, "metrics", "epochs.parquet")
    columns, starts = _evenly(record.kept_epochs(folder), EPOCHS), attempts.of(folder)
    page = html.render(
        "training.html.j2",
        "sweep.js",
        title=f"{method}: training",
        method=method,
        folder=str(folder),
        plot=PLOT,
        steps=steps,
        last=log.slice(len(log) - 1).to_pylist()[0] if len(log) else None,
        curves=loss_curves(log),
        validation=validation_curves(validation) if validation else [],
        measured=newest(validation) if validation else [],
        columns=[moment(epoch, settings) if steps else "support" for epoch in columns],
        is_counted=not settings.get("iterations"),
        sample=sample(folder, columns),
        settings=settings,
        attempts=starts,
        packages=next((has for each in reversed(starts) if (has := _packages(each))), {}),
        speed=_speed(log),
        skipped_images=skipped.to_pylist() if skipped else [],
        skipped_steps=log.filter(log["skipped"])["step"].to_pylist(),
        named_at_most=NAMED,
        shown=shown,
        made=provenance.now(),
        version=version("raypipe"),
    )
    folder.write(page.encode("utf-8", "replace"), "training.html")
    return str(folder.location("training.html"))


def moment(epoch: int, settings: Mapping[str, object]) -> str:
    """After which epoch, or where images are drawn with replacement after which step, masks were kept."""
    if iterations := epoch and settings.get("iterations"):
        return f"step {min(epoch * Recipe.round_steps, iterations):,}"
    return f"epoch {epoch}" if epoch else "before"


def shown(value: object) -> str:
    """A number for people, four digits; anything else as text."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def loss_curves(log: pa.Table) -> list[Curve]:
    """Every term of the loss over the steps, the total first; the learning rate too where it changes.

    log: of `record.read`. Steps that were skipped are left out, and terms without any finite value.
    """
    log = log.filter(pc.invert(log["skipped"]))
    steps, found = log["step"].to_numpy(), []
    for name in record.in_order([name for name in log.schema.names if name not in record.COLUMNS.names]):
        values = log[name].to_numpy()
        if (there := np.isfinite(values)).any():
            found.append(_smoothed(name.replace("_", " "), steps[there], values[there]))
    rates = log["lr"].to_numpy()
    if len(rates) and rates.min() < rates.max():
        kept = _evenly(list(range(len(rates))), POINTS)
        found.append(_plane("learning rate", {"": (steps[kept], rates[kept])}))
    return found


def validation_curves(table: pa.Table) -> list[Curve]:
    """Every value over the epochs, a line for each variant; [] where one epoch was measured only.

    table: of `validate.Validator.keep`.
    """
    if len(table["epoch"].unique()) < 2:
        return []
    table, found = table.sort_by("epoch"), []
    for name in _measures(table):
        lines = {}
        for variant in table["variant"].unique().to_pylist():
            rows = table.filter((pc.field("variant") == variant) & pc.field(name).is_valid())
            if len(rows):
                lines[variant] = rows["epoch"].to_numpy(), rows[name].to_numpy()
        found += [_plane(title(name), lines)] if lines else []
    return found


def newest(table: pa.Table) -> list[dict]:
    """What was measured last, a row for each variant: `epoch`, `variant`, `images`, and the values by their titles."""
    rows = table.filter(pc.field("epoch") == pc.max(table["epoch"])).to_pylist()
    known, names = ("epoch", "variant", "images"), _measures(table)
    return [{name: row[name] for name in known} | {title(name): row[name] for name in names} for row in rows]


def title(name: str) -> str:
    """What a value of a validation is called."""
    return Cropped.SHOWN[name].title if name in Cropped.SHOWN else name.replace("_", " ")


def sample(folder: Folder, epochs: list[int]) -> list[dict]:
    """The fixed images, each with the mask after each of the epochs, as data URIs; None where there is none."""
    masks = [record.kept_masks(folder, epoch) for epoch in epochs]
    return [
        {
            "key": key,
            "picture": _data_uri("jpeg", file),
            "masks": [_data_uri("png", each[key]) if key in each else None for each in masks],
        }
        for key, file in record.kept_pictures(folder).items()
    ]


def _smoothed(name: str, steps: np.ndarray, values: np.ndarray) -> Curve:
    """The running mean of values, and faint the least and the greatest of each few of them."""
    window, compared = max(10, len(values) // WINDOW), min(COMPARED, max(1, len(values) // 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.unique(np.linspace(1, len(values), min(POINTS, len(values))).round().astype(int))
    begins = np.maximum(0, ends - window)
    means = (sums[ends] - sums[begins]) / (ends - begins)
    first, last = values[:compared].mean(), values[-compared:].mean()
    remark = f"first {compared} steps {shown(first)}, last {compared} {shown(last)}"
    parts = [values[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    extremes = np.array([(part.min(), part.max()) for part in parts])
    return _plane(name, {"": (steps[ends - 1], means)}, remark=remark, faint=extremes)


def _plane(
    name: str, lines: dict[str, tuple[np.ndarray, np.ndarray]], *, remark: str = "", faint: np.ndarray | None = None
) -> Curve:
    """A curve of numbers. lines: where on the horizontal axis, and values. faint: (n, 2), where the one line's are."""
    width, height = PLOT
    wheres, values = (np.concatenate(each) for each in zip(*lines.values(), strict=True))
    usual = values if faint is None else np.percentile(faint, USUAL)
    marks = levels(usual.min(), usual.max(), least=1e-9 + 0.02 * np.abs(usual).max())
    left, right = min(1, wheres.min()), max(wheres.max(), wheres.min() + 1)

    def across(where):
        return np.round((where - left) / (right - left) * width, 1)

    def down(value):  # what lies outside the plane is not drawn, however far away it is
        return np.round(height * np.clip((marks[-1] - value) / (marks[-1] - marks[0]), -1, 2), 1)

    def points(where: np.ndarray, value: np.ndarray) -> str:
        return " ".join(f"{x:g},{y:g}" for x, y in zip(across(where), down(value), strict=True))

    first = next(iter(lines.values()))[0]
    return Curve(
        name,
        remark,
        {each: points(*line) for each, line in lines.items()},
        "" if faint is None else points(first.repeat(2), faint.ravel()),
        [(float(down(mark)), shown(mark)) for mark in marks],
        [(float(across(x)), f"{x:,.0f}") for x in levels(left, right) if x == int(x) and left <= x <= right],
    )


def _measures(table: pa.Table) -> list[str]:
    """The values that any row has."""
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    return [name for name in floats if table[name].null_count < len(table)]


def _packages(start: attempts.Attempt) -> dict[str, str]:
    """Versions by package, as far as the record of a start has them."""
    return (start.record.get("environment") or {}).get("packages") or {}


def _speed(log: pa.Table) -> float | None:
    """Steps per second, the median of the newest ones; None where it is not known."""
    seconds = log["seconds"].to_numpy()[-RECENT:]
    seconds = seconds[seconds > 0]
    return float(1 / np.median(seconds)) if len(seconds) else None


def _evenly(items: list, count: int) -> list:
    """At most `count` of the items, evenly chosen, the first and the last among them."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in chosen]


def _table(folder: Folder, *names: str) -> pa.Table | None:
    stored = folder.read(*names)
    return open_table(stored).read() if stored else None


def _data_uri(kind: str, file: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode('ascii')}"
