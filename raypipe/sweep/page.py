"""The page of a sweep: curves over each swept parameter, a table of all settings, and images across the values."""

from __future__ import annotations

import itertools
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raypipe import masks
from raypipe.evaluation.sums import Sums
from raypipe.evaluation.task import Task, Value
from raypipe.pages import html
from raypipe.pages.axes import levels
from raypipe.pictures.overlay import jpeg, overlay, resized, scaled, shrunk
from raypipe.run import provenance, rows
from raypipe.storage import Folder
from raypipe.sweep.plan import trial_of
from raypipe.sweep.ranking import Setting, best, rows_of, shown
from raypipe.sweep.scoring import Scorer, leaves_of
from raypipe.sweep.search import canonical
from raypipe.sweep.trials import Trial
from raypipe.types import BadImage

STRIP_IMAGES = 6  # images in a strip
STRIP_VALUES = 13  # values across, evenly chosen where there are more
SIDE = 400  # pixels of a picture's longer side
QUALITY = 75  # of its JPEG
OUTLINE = (((0, 0, 0), 3), ((255, 255, 255), 1))  # of the label, colour and width: white on dark and dark on white show
TABLE_ROWS = 500  # settings in the page's table; trials.parquet has all
GRID_CELLS = 400  # of a table of two parameters
DECADES = 30  # largest over smallest value from which an axis is logarithmic
NAME_SHARE = 0.09  # of a curve's width that the name of a value takes
MOST_LINES = 4  # in a plane of curves
ALIKE = 6  # most by which the highest points of two lines in a plane may differ, as a factor
PLOT = (520, 220)  # width and height of a curve's plane


class Curve(NamedTuple):
    """How some of the task's values follow one parameter, all others being fixed."""

    name: str
    values: list  # along the curve, ascending where they are numbers
    ticks: list[float]  # where each value lies, 0..1
    named: list[int]  # indices of the values that have room for their name below the axis
    lines: dict[str, list[float | None]]  # the task's values by name, each at each of `values`
    others: list[tuple[float, float]]  # all other settings: where they lie, 0..1, and the metric
    levels: list[float]  # round numbers from the bottom of the vertical axis to its top


def write_page(common: Trial, every: list[Setting], per_image: pa.Table, swept: list[str]) -> str:
    """Write sweep.html into the sweep's folder. every: all settings, best first. Returns where the page is."""
    metric, goal, task, method = common.sweep.metric, common.sweep.goal, common.task, common.segmenter.name
    folder, stored = Folder(common.sweep.output), {}
    chosen = best(every, metric, goal, task.SHOWN[metric].tie)
    lines = {name: along(name, chosen, every, swept) for name in swept}

    def sample(setting: Setting) -> dict[str, dict]:
        trial = trial_of(common, setting)
        if setting.trial not in stored:
            stored[setting.trial] = sampled_rows(trial)
        return draw_sample(trial, stored[setting.trial], metric)

    content = of_settings(every, chosen, swept, task.SHOWN, metric, goal)
    return write(
        folder,
        content,
        method=method,
        images=len(common.images),
        verb="label",
        caution=caution(chosen, every, swept, task, metric),
        groups=groups(per_image, swept, task, metric, goal),
        strips=[strip(name, lines[name], chosen, sample) for name in swept],
    )


def of_settings(
    every: list[Setting], chosen: Setting, swept: list[str], values: Mapping[str, Value], metric: str, goal: str
) -> dict:
    """What the page shows of the settings: curves, planes and tables. values: all that are measured, by name."""
    found = [curves(name, along(name, chosen, every, swept), every, metric) for name in swept]
    return {
        "best": chosen,
        "swept": swept,
        "metric": metric,
        "tie": values[metric].tie,
        "first": first_values(chosen.means, metric),
        "titles": {name: title(value) for name, value in values.items()},
        "settings": every,
        "table": every[:TABLE_ROWS],
        "curves": [first for first, *_ in found],
        "more": [each for _, *rest in found for each in rest],
        "planes": planes(every, swept, metric, goal),
    }


def write(folder: Folder, content: dict, *, method: str, **more) -> str:
    """Write sweep.html. content: of `of_settings`. more: `images`, how many, and `verb`, which uses the best setting.

    And, where there are any, `caution`, `groups`, `strips` and `published`. Returns where the page is.
    """
    facts = {"title": f"{method}: {', '.join(content['swept'])}", "folder": str(folder), "method": method}
    facts |= {"made": provenance.now(), "version": version("raypipe"), "caution": ""}
    facts |= dict.fromkeys(("groups", "strips", "published"), [])
    folder.write(render(**facts | content | more).encode("utf-8", "replace"), "sweep.html")
    return str(folder.location("sweep.html"))


def render(**content) -> str:
    """The page's HTML."""
    return html.render("sweep.html.j2", "sweep.js", shown=shown, named=named, quoted=shlex.quote, plot=PLOT, **content)


def along(name: str, chosen: Setting, every: list[Setting], swept: list[str]) -> list[Setting]:
    """The full settings that differ in one parameter only, in the order of its values.

    The others are as in the best setting, unless more values were tried elsewhere, as along the lines through another.
    Settings that failed on every image are left out.
    """

    def rest(setting: Setting) -> str:
        return canonical({key: setting.values.get(key) for key in swept if key != name})

    found: dict[str, dict[str, Setting]] = {rest(chosen): {}}
    for each in reversed(every):  # the best of several comes last
        if each.status == "done" and any(value is not None for value in each.means.values()):
            found.setdefault(rest(each), {})[_key(each.values.get(name))] = each
    return sorted(max(found.values(), key=len).values(), key=lambda each: _place(each.values.get(name)))


def curves(name: str, line: list[Setting], every: list[Setting], metric: str) -> list[Curve]:
    """The curves of one parameter: all values, those of one size in one plane, the metric's first. line: of `along`."""
    measured = [each for each in every if each.status == "done" and each.means[metric] is not None]
    values = [each.values.get(name) for each in line]
    tick_of = _scale([each.values.get(name) for each in [*line, *measured]])
    ticks, apart, found = [tick_of(value) for value in values], [], []
    for i, tick in enumerate(ticks):
        if not apart or tick - ticks[apart[-1]] >= NAME_SHARE:
            apart.append(i)
    means = {mean: [each.means[mean] for each in line] for mean in dict.fromkeys([metric, *line[0].means])}
    for lines in of_one_size(means):
        dots = [each for each in measured if metric in lines and each not in line]
        others = [(tick_of(each.values.get(name)), each.means[metric]) for each in dots]
        heights = [value for mean in lines.values() for value in mean if value is not None] + [y for _, y in others]
        found.append(Curve(name, values, ticks, apart, lines, others, levels(min(heights), max(heights))))
    return found


def of_one_size(lines: dict[str, list[float | None]]) -> list[dict[str, list[float | None]]]:
    """Lines by planes of at most MOST_LINES, so that none is flat only because another is ALIKE times as high.

    Those without any value are left out.
    """
    planes: list[tuple[float, dict]] = []
    for name, heights in lines.items():
        if not any(height is not None for height in heights):
            continue
        size = max(abs(height) for height in heights if height is not None)
        fits = (has for top, has in planes if len(has) < MOST_LINES and size <= ALIKE * top and top <= ALIKE * size)
        if (plane := next(fits, None)) is None:
            planes.append((size, plane := {}))
        plane[name] = heights
    return [plane for _, plane in planes]


def first_values(means: Iterable[str], metric: str) -> list[str]:
    """The values that the page shows at first sight: the metric and the first of the others."""
    return list(dict.fromkeys([metric, *means]))[:MOST_LINES]


def caution(chosen: Setting, every: list[Setting], swept: list[str], task: Task, metric: str) -> str:
    """What to know of a metric that looks at the labels: another setting may be better without them. "" of others."""
    value = task.SHOWN[metric]
    there = chosen.means.get(value.tie)
    if not value.peeks or there is None:
        return ""
    tie, sign = task.SHOWN[value.tie], "max" if task.SHOWN[value.tie].better == "high" else "min"
    highest = best(every, value.tie, sign)
    setting = ", ".join(f"{name} {named(highest.values.get(name))}" for name in swept)
    best_is = f"the best is {shown(highest.means[value.tie])} with {setting} (--metric {value.tie})"
    return (
        f"{title(value)} takes for each image what meets its label best, so more masks have better chances. Of a new "
        "photograph nobody knows that choice, and best.yaml does not hold it. Without it, "
        f"{title(tie)} is {shown(there)} here; "
        f"{'no setting is better' if highest.means[value.tie] == there else best_is}."
    )


def title(value: Value) -> str:
    """What a value is called, in words."""
    return f"{value.title}, {value.unit}" if value.unit else value.title


def named(value) -> str:
    """A parameter's value, as `--over` takes it."""
    return "None" if value is None else shown(value)


def planes(every: list[Setting], swept: list[str], metric: str, goal: str) -> list[dict]:
    """For each pair of swept parameters with few values, the best metric of each pair of values."""
    tables, measured = [], [each for each in every if each.status == "done" and each.means[metric] is not None]
    for pair in itertools.combinations(swept, 2):
        worst_first = ((tuple(_key(each.values.get(name)) for name in pair), each) for each in reversed(measured))
        cells = {cell: each.means[metric] for cell, each in worst_first}
        rows_, columns = (_ordered(measured, name) for name in pair)
        if len(cells) < 4 or len(rows_) * len(columns) > min(GRID_CELLS, 2 * len(cells)):  # mostly empty
            continue
        values = [[cells.get((_key(row), _key(column))) for column in columns] for row in rows_]
        worst, top = sorted((min(cells.values()), max(cells.values())), reverse=goal == "min")
        shade = [[None if v is None else (v - worst) / ((top - worst) or 1.0) for v in line] for line in values]
        table = {"rows": rows_, "columns": columns, "values": values, "shade": shade}
        tables.append({"down": pair[0], "across": pair[1]} | table)
    return tables


def groups(per_image: pa.Table, swept: list[str], task: Task, metric: str, goal: str) -> list[dict]:
    """The best setting of each group of images; [] where there is one group only."""
    names = [name for name in (metric, task.SHOWN[metric].tie) if name]
    sums: dict[str, dict[str, Sums]] = defaultdict(lambda: defaultdict(task.sums))
    values = {}
    for row in rows_of(per_image.select([*swept, "group", "status", *dict(task.COLUMNS)])):
        setting = canonical({name: row[name] for name in swept})
        values[setting] = {name: row[name] for name in swept}
        if row["status"] == "ok":
            sums[row["group"]][setting].add(row)
    if len(sums) < 2:
        return []
    tables = []
    for group, settings in sorted(sums.items()):
        most = max(each.images for each in settings.values())  # a stopped trial has seen fewer images
        full = {setting: task.values(each) for setting, each in settings.items() if each.images == most}
        found = [Setting("", values[key], "done", means, most, 0, 0.0, "") for key, means in full.items()]
        if chosen := best(found, *names[:1], goal, *names[1:]):
            means = {name: chosen.means[name] for name in names}
            tables.append({"group": group, "images": most, "values": chosen.values, "means": means})
    return tables


def strip(name: str, line: list[Setting], chosen: Setting, sample: Callable[[Setting], dict[str, dict]]) -> dict:
    """Images in lines, the values of one parameter across. line: as `along` finds it. sample: draws one column."""
    columns = {*np.linspace(0, len(line) - 1, STRIP_VALUES).round().astype(int).tolist()}
    columns |= {line.index(chosen)} if chosen in line else {*()}
    across, lines = [line[i] for i in sorted(columns)], defaultdict(list)
    for setting in across:
        for key, cell in sample(setting).items():
            lines[key].append(cell)
    return {"name": name, "values": [each.values.get(name) for each in across], "lines": lines}


def sampled_rows(trial: Trial) -> list[dict]:
    """The stored rows of the images in a strip, in the order of their ids. Reads only the parts that hold them."""
    return rows.take(trial.run, trial.images["image_id"].slice(0, STRIP_IMAGES).to_pylist(), leaves=leaves_of(trial))


def draw_sample(trial: Trial, stored: list[dict], metric: str) -> dict[str, dict]:
    """Some images with the masks of one setting, by key: `picture` (a data URI) and `value` (the metric or None).

    trial: with one post-processing setting. stored: its `sampled_rows`. The cell of an image that failed or has changed
    since holds two Nones.
    """
    scorer, task, (post,), cells = Scorer(trial), trial.task, trial.posts, {}
    for row in stored:
        cells[row["key"]] = {"picture": None, "value": None}
        label, status = scorer.label(row)
        if status != "ok":
            continue
        ((_, labelled),) = scorer.labelled(row, {canonical(post)})
        try:
            image = scorer.image(row)
        except BadImage:
            continue
        measured = {} if labelled["error"] else task.cells(labelled, label)
        foreground = labelled["foreground"] and masks.decode_rle(labelled["foreground"])
        picture = draw(image, task.counted(labelled, measured, metric), foreground, task.outline(labelled, label))
        values = task.values(task.sums([measured] if measured else []))
        cells[row["key"]] = {"picture": picture, "value": values[metric]}
    return cells


def draw(image: np.ndarray, found: np.ndarray, foreground: np.ndarray | None, outline: np.ndarray) -> str:
    """A picture as a data URI: masks in colour, what lies outside the foreground dark, the outline white and black.

    image: RGB uint8 (H, W, 3). found: masks, bool (N, H, W). foreground: bool (H, W), None = all. outline: bool (H, W).
    """
    import cv2

    size = scaled(outline.shape, SIDE)
    picture = overlay(resized(image, size), found, foreground)
    contours = cv2.findContours(shrunk(outline, size).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    for colour, width in OUTLINE:
        cv2.drawContours(picture, contours, -1, colour, width)
    return jpeg(picture, QUALITY)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place(value) -> tuple[bool, object]:
    """What values of a parameter are sorted by: numbers ascending, then all others by their text."""
    return (False, value) if _is_number(value) else (True, str(value))


def _key(value) -> str:
    return canonical({"": value})


def _ordered(settings: list[Setting], name: str) -> list:
    """The different values of a parameter in their order."""
    return sorted({_key(value): value for value in (each.values.get(name) for each in settings)}.values(), key=_place)


def _scale(values: list) -> Callable[[object], float]:
    """Where a value lies on the axis, 0..1: numbers by size (or their logarithm, over a wide span), others in a row."""
    if all(map(_is_number, values)):
        low, high = min(values), max(values)
        change = math.log if low > 0 and high / low > DECADES else float
        span = (change(high) - change(low)) or 1.0
        return lambda value: (change(value) - change(low)) / span
    keys = [*dict.fromkeys(map(_key, sorted(values, key=_place)))]
    return lambda value: keys.index(_key(value)) / max(1, len(keys) - 1)
