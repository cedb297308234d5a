"""The page of a sweep: curves over each swept parameter, a table of all settings, and images across the values."""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import masks, storage
from raypipe.pictures.overlay import jpeg, overlay
from raypipe.run import provenance
from raypipe.storage import Folder
from raypipe.sweep import trials
from raypipe.sweep.ranking import Setting, best, fixed_twin
from raypipe.sweep.scoring import Scorer
from raypipe.sweep.search import canonical
from raypipe.sweep.trials import Trial
from raypipe.types import BadImage, Segmenter

if TYPE_CHECKING:
    from raypipe.sweep.plan import Sweep

STRIP_IMAGES = 6  # images in a strip
STRIP_VALUES = 13  # values across, evenly chosen where there are more
SIDE = 200  # pixels of a picture's longer side
QUALITY = 80  # of its JPEG
LABEL = (255, 255, 255)  # colour of the label's contour
TABLE_ROWS = 500  # settings in the page's table; trials.parquet has all
GRID_CELLS = 400  # of a table of two parameters
DECADES = 30  # largest over smallest value from which an axis is logarithmic
NAME_SHARE = 0.09  # of a curve's width that the name of a value takes
PLOT = (520, 220)  # width and height of a curve's plane


class Curve(NamedTuple):
    """How the task's means follow one parameter, all others as in the best setting."""

    name: str
    values: list  # along the curve, ascending where they are numbers
    ticks: list[float]  # where each value lies, 0..1
    named: list[int]  # indices of the values that have room for their name below the axis
    lines: dict[str, list[float | None]]  # mean -> its value at each of `values`
    others: list[tuple[float, float]]  # all other settings: place 0..1, metric
    low: float  # limits of the vertical axis
    high: float


def write_page(
    job: Sweep,
    segmenter: Segmenter,
    refiner: Callable | None,
    found: list[Setting],
    per_image: pa.Table,
    images: pa.Table,
    swept: list[str],
) -> str:
    """Write sweep.html into the sweep's folder. found: all settings, best first. Returns the page's place."""
    from raypipe.sweep.plan import trial_of

    chosen, folder, stored = best(found, job.metric, job.goal), Folder(job.output), {}
    lines = {name: along(name, chosen, found, swept) for name in swept}

    def sample(setting: Setting) -> dict[str, dict]:
        trial = trials.with_images(trial_of(job, segmenter, refiner, setting), images)
        if setting.trial not in stored:
            stored[setting.trial] = sampled_rows(trial)
        return draw_sample(trial, stored[setting.trial], job.metric)

    page = render(
        title=f"{segmenter.name}: {', '.join(swept)}",
        job=job,
        method=segmenter.name,
        place=str(folder),
        images=len(images),
        best=chosen,
        swept=swept,
        metric=job.metric,
        twin=fixed_twin(job.metric, chosen.means),
        statuses=sorted({each.status for each in found}),
        settings=found,
        shown=found[:TABLE_ROWS],
        curves=[curve(name, lines[name], found, job.metric) for name in swept],
        planes=planes(found, swept, job.metric, job.goal),
        groups=groups(per_image, swept, job.metric, job.goal),
        strips=[strip(name, lines[name], chosen, sample) for name in swept],
        made=provenance.now(),
        version=version("raypipe"),
    ).encode("utf-8", "replace")
    folder.write(page, "sweep.html")
    return storage.redact(folder.location("sweep.html"))


def along(name: str, chosen: Setting, found: list[Setting], swept: list[str]) -> list[Setting]:
    """The full settings that differ from the best one in one parameter only, in the order of its values."""

    def rest(setting: Setting) -> str:
        return canonical({key: setting.values.get(key) for key in swept if key != name})

    line = {canonical({"": each.values.get(name)}): each for each in reversed(found) if rest(each) == rest(chosen)}
    line = [each for each in line.values() if each.status == "done"]
    numbers = all(_is_number(each.values.get(name)) for each in line)
    return sorted(line, key=lambda each: each.values[name] if numbers else str(each.values.get(name)))


def curve(name: str, line: list[Setting], found: list[Setting], metric: str) -> Curve:
    """The curve of one parameter. line: as `along` finds it."""
    everything = [each for each in found if each.status == "done" and each.means[metric] is not None]
    values = [each.values.get(name) for each in line]
    place = _scale([each.values.get(name) for each in everything])
    means = {mean: [each.means[mean] for each in line] for mean in line[0].means}
    means = {metric: means[metric]} | means
    others = [(place(each.values.get(name)), each.means[metric]) for each in everything if each not in line]
    heights = [value for mean in means.values() for value in mean if value is not None] + [y for _, y in others]
    low, high = min(heights), max(heights)
    margin = max(0.05 * (high - low), 0.005)
    low = max(0.0, low - margin) if low >= 0 else low - margin
    ticks = [place(value) for value in values]
    return Curve(name, values, ticks, _apart(ticks), means, others, low, high + margin)


def planes(found: list[Setting], swept: list[str], metric: str, goal: str) -> list[dict]:
    """For each pair of swept parameters with few values, the best metric of each pair of values."""
    tables = []
    for i, down in enumerate(swept):
        for across in swept[i + 1 :]:
            cells: dict[tuple, float] = {}
            for each in found:  # best first
                value = each.means[metric]
                if each.status == "done" and value is not None:
                    cells.setdefault((_key(each.values.get(down)), _key(each.values.get(across))), value)
            rows_, columns = (_ordered(found, name) for name in (down, across))
            if len(cells) < 4 or len(rows_) * len(columns) > GRID_CELLS:
                continue
            values = [[cells.get((_key(row), _key(column))) for column in columns] for row in rows_]
            low, high = min(cells.values()), max(cells.values())
            span = (high - low) or 1.0
            shade = [[None if v is None else (v - low) / span for v in line] for line in values]
            shade = shade if goal == "max" else [[None if s is None else 1 - s for s in line] for line in shade]
            tables.append(
                {"down": down, "across": across, "rows": rows_, "columns": columns, "values": values, "shade": shade}
            )
    return tables


def groups(per_image: pa.Table, swept: list[str], metric: str, goal: str) -> list[dict]:
    """The best setting of each group of images; [] where there is one group only. Equals as in `ranking.order`."""
    twin = fixed_twin(metric, per_image.column_names) or metric
    sums: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    values = {}
    for row in per_image.select([*swept, "group", "status", *{metric, twin}]).to_pylist():
        setting = canonical({name: row[name] for name in swept})
        values[setting] = {name: row[name] for name in swept}
        if row["status"] == "ok":
            sums[row["group"]][setting].append((row[metric], row[twin]))
    if len(sums) < 2:
        return []
    choose, tables = (max if goal == "max" else min), []
    for group, settings in sorted(sums.items()):
        most = max(map(len, settings.values()))  # a stopped trial has seen fewer images
        full = {setting: zip(*rows, strict=True) for setting, rows in settings.items() if len(rows) == most}
        means = {setting: [math.fsum(values) / most for values in columns] for setting, columns in full.items()}
        chosen = choose(means, key=means.get)
        measured = dict(zip((metric, twin), means[chosen], strict=True))
        tables.append({"group": group, "images": most, "values": values[chosen], "means": measured})
    return tables


def strip(name: str, line: list[Setting], chosen: Setting, sample: Callable[[Setting], dict[str, dict]]) -> dict:
    """Images in lines, the values of one parameter across. line: as `along` finds it. sample: draws one column."""
    places = {*np.linspace(0, len(line) - 1, STRIP_VALUES).round().astype(int).tolist(), line.index(chosen)}
    across, lines = [line[i] for i in sorted(places)], defaultdict(list)
    for setting in across:
        for key, cell in sample(setting).items():
            lines[key].append(cell)
    return {"name": name, "values": [each.values.get(name) for each in across], "lines": lines}


def sampled_rows(trial: Trial) -> list[dict]:
    """The stored rows of the images in a strip, in the order of their ids. Reads only the parts that hold them."""
    sample, run = trial.images.slice(0, STRIP_IMAGES)["image_id"].combine_chunks(), trial.run
    commits = run.commits()
    parts = sorted(set(commits.filter(pc.is_in(commits["image_id"], value_set=sample))["part"].to_pylist()))
    paths, is_sampled = [run.folder.path(run.masks, name) for name in parts], pc.field("image_id").isin(sample)
    tables = [pq.read_table(path, filesystem=run.folder.fs, filters=is_sampled, partitioning=None) for path in paths]
    found = {row["image_id"]: row for table in tables for row in table.to_pylist()}
    return [found[image_id] for image_id in sorted(found)]


def draw_sample(trial: Trial, stored: list[dict], metric: str) -> dict[str, dict]:
    """Some images with the masks of one setting, by key: `picture` (a data URI) and `value` (the metric or None).

    trial: with one later setting. stored: its `sampled_rows`. The cell of an image that failed or has changed since
    holds two Nones.
    """
    scorer, (later,), cells = Scorer(trial), trial.later, {}
    for row in stored:
        cells[row["key"]] = {"picture": None, "value": None}
        label, status = scorer.label(row)
        if status != "ok":
            continue
        ((_, labelled),) = scorer.labelled(row, {canonical(later)})
        try:
            image = scorer.image(row)
        except BadImage:
            continue
        measured = {} if labelled["error"] else scorer.task.score(labelled, label)
        cells[row["key"]] = {
            "picture": draw(image, label, labelled, measured, is_fixed=metric.endswith("_fixed")),
            "value": measured.get(metric),
        }
    return cells


def draw(image: np.ndarray, label: np.ndarray, row: dict, measured: dict, *, is_fixed: bool) -> str:
    """A small picture as a data URI: the mask in colour, the label's contour in white.

    image: RGB uint8 (H, W, 3). label: bool (H, W). row: with `segments` and `foreground`. measured: of the task; where
    it says which segment counts and with which sign, only that is drawn, or with is_fixed the first one as it is.
    """
    import cv2

    foreground = masks.decode_rle(row["foreground"]) if row["foreground"] else np.ones(label.shape, bool)
    found = masks.decode_segments(row["segments"], label.shape)
    if "segment" in measured and len(found):
        segment, sign = (0, 1) if is_fixed else (measured["segment"], measured["sign"])
        found = (found[segment] if sign > 0 else foreground & ~found[segment])[None]
    scale = min(1.0, SIDE / max(label.shape))
    size = [max(1, round(side * scale)) for side in label.shape[::-1]]  # OpenCV: width first

    def small(mask: np.ndarray) -> np.ndarray:
        return cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) > 127

    shrunk = np.array([small(mask) for mask in found], bool).reshape(-1, *size[::-1])
    picture = overlay(cv2.resize(image, size, interpolation=cv2.INTER_AREA), shrunk, small(foreground))
    contours = cv2.findContours(small(label).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    return jpeg(cv2.drawContours(picture, contours, -1, LABEL, 1), QUALITY)


def render(**content) -> str:
    """The page's HTML; jinja2 escapes all texts, and the page's policy allows no script but its own."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from raypipe.sweep.ranking import shown

    loader = PackageLoader("raypipe.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": shown, "quoted": shlex.quote}
    script, style = (loader.get_source(environment, name)[0] for name in ("sweep.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("sweep.html.j2").render(
        content, script=Markup(script), style=Markup(style), digest=digest, plot=PLOT
    )


def _apart(ticks: list[float]) -> list[int]:
    """Indices of places, ascending, that lie far enough from each other for a name."""
    chosen = []
    for i, tick in enumerate(ticks):
        if not chosen or tick - ticks[chosen[-1]] >= NAME_SHARE:
            chosen.append(i)
    return chosen


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _key(value) -> str:
    return canonical({"": value})


def _ordered(settings: list[Setting], name: str) -> list:
    """The different values of a parameter, ascending where they are numbers."""
    values = list({_key(each.values.get(name)): each.values.get(name) for each in settings}.values())
    return sorted(values, key=None if all(map(_is_number, values)) else str)


def _scale(values: list) -> Callable[[object], float]:
    """Where a value lies on the axis, 0..1: numbers by size (or their logarithm, over a wide span), others in a row."""
    if all(map(_is_number, values)):
        low, high = min(values), max(values)
        change = math.log if low > 0 and high / low > DECADES else float
        span = (change(high) - change(low)) or 1.0
        return lambda value: (change(value) - change(low)) / span
    keys = sorted({_key(value) for value in values})
    return lambda value: keys.index(_key(value)) / max(1, len(keys) - 1)
