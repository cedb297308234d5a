"""The trials of a sweep as tables, and the best setting among them as a config file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from raypipe.evaluation import tasks
from raypipe.evaluation.evaluate import group
from raypipe.storage import Folder
from raypipe.sweep import trials
from raypipe.sweep.scoring import current, read_scores
from raypipe.sweep.search import canonical

STATUSES = ("done", "stopped", "failed", "running")  # the order in the table; running = left unfinished


@dataclass(frozen=True)
class Setting:
    """One complete setting and how it did."""

    trial: str  # name of the trial's folder
    values: dict  # all parameters of the method and of the refiner
    status: str  # done, stopped (by ASHA, after some of the images), failed, or running
    means: dict[str, float | None]  # the task's means over the images with a measure; None without any
    images: int  # with a measure
    failed_images: int
    seconds: float  # of its trial, which it may share with others
    error: str  # why its trial failed


def read(output: str, *, task: str, images: pa.Table, by: str) -> tuple[list[Setting], pa.Table]:
    """All settings that were ever tried in a sweep's folder, and their measures per image.

    images: the manifest of the labelled images; others do not count. by: how images are grouped (`evaluate.group`).
    Returns the settings, and the task's table with the columns `trial` and `later` (JSON) and the images' groups.
    """
    folder, found, tables = Folder(output), [], [tasks.find(task).SCHEMA.remove_metadata().empty_table()]
    for name in sorted(folder.folders("trials")):
        settings, scores = read_trial(folder.location("trials", name), task=task, images=images)
        found += settings
        tables.append(scores)
    table = pa.concat_tables(tables, promote_options="default")
    groups = pa.array([group(key, by) for key in table["key"].to_pylist()], pa.string())
    return found, table.set_column(table.schema.get_field_index("group"), "group", groups)


def read_trial(output: str, *, task: str, images: pa.Table) -> tuple[list[Setting], pa.Table]:
    """The settings of one trial's folder and their measures per image; none before anything was labelled."""
    name, state, found = Folder(output).path().rpartition("/")[2], trials.read_state(output), tasks.find(task)
    scores = current(read_scores(output, found.SCHEMA), images).drop_columns(trials.LABEL)
    known = pa.array([canonical(later) for later in state.get("later", [])], pa.string())
    scores = scores.filter(pc.is_in(scores["later"], value_set=known))
    scores = scores.append_column("trial", pa.array([name] * len(scores), pa.string()))
    return _settings(name, state, scores, found.MEANS, len(images)) if state else [], scores


def fixed_twin(metric: str, means: Iterable[str]) -> str | None:
    """The mean that reads the masks as they are, for one that reads each image's mask or its inverse: whichever fits.

    A method and its inverse are equal in the latter, as dice_best; dice_fixed tells them apart.
    """
    twin = f"{metric.removesuffix('_best')}_fixed"
    return twin if metric.endswith("_best") and twin in means else None


def order(settings: list[Setting], metric: str, goal: str) -> list[Setting]:
    """Best first: full trials before stopped and failed ones, then those that fail on fewer images, then the metric.

    Equals are told apart by the metric's fixed twin.
    """
    sign = 1 if goal == "min" else -1

    def rank(setting: Setting) -> tuple:
        value, twin = setting.means[metric], setting.means.get(fixed_twin(metric, setting.means)) or 0.0
        return STATUSES.index(setting.status), value is None, setting.failed_images, sign * (value or 0.0), sign * twin

    return sorted(settings, key=rank)


def best(settings: list[Setting], metric: str, goal: str) -> Setting | None:
    """The best setting of a full trial, the first among equals; None when there is none."""
    full = [each for each in settings if each.status == "done" and each.means[metric] is not None]
    return order(full, metric, goal)[0] if full else None


def table(settings: list[Setting], swept: list[str], output: str) -> pa.Table:
    """One row per setting: each swept parameter as a column of its own type, then how it did."""
    columns = {name: pa.array([each.values.get(name) for each in settings]) for name in swept}
    columns["status"] = pa.array([each.status for each in settings], pa.string())
    for name in settings[0].means if settings else ():
        columns[name] = pa.array([each.means[name] for each in settings], pa.float64())
    for name in ("images", "failed_images"):
        columns[name] = pa.array([getattr(each, name) for each in settings], pa.int64())
    columns["seconds"] = pa.array([each.seconds for each in settings], pa.float64())
    columns["trial"] = pa.array([each.trial for each in settings], pa.string())
    place = Folder(output)
    columns["run"] = pa.array([f"{place}/trials/{each.trial}" for each in settings], pa.string())
    columns["error"] = pa.array([each.error for each in settings], pa.string())
    return pa.table(columns)


def per_image(measures: pa.Table, settings: list[Setting], swept: list[str]) -> pa.Table:
    """The measures per image with each swept parameter as a column of its own type, for box plots and the like."""
    values = {(each.trial, canonical(later_of(each.values))): each.values for each in settings}
    pairs = zip(measures["trial"].to_pylist(), measures["later"].to_pylist(), strict=True)
    rows = [values[trial, canonical(later_of(json.loads(later)))] for trial, later in pairs]
    columns = {name: pa.array([row.get(name) for row in rows]) for name in swept}
    rest = {name: measures[name] for name in measures.column_names if name != "later"}
    return pa.table(columns | rest)


def config(setting: Setting, *, method: str, refine: str | None, metric: str) -> str:
    """The setting as a file for `raypipe label METHOD --config`."""
    values = setting.values | {"refine": refine}
    names = filter(None, [metric, fixed_twin(metric, setting.means)])
    measured = ", ".join(f"{name} {setting.means[name]:.4f}" for name in names)
    return (
        f"# {measured}, mean over {setting.images} labelled images\n"
        f"# raypipe label {method} --config THIS_FILE --input PHOTOS --output RUN\n"
    ) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def later_of(values: dict) -> dict:
    """The part of a setting that acts after the model: the threshold and the refiner's fields."""
    return {name: value for name, value in values.items() if name == "threshold" or name.startswith("refine_")}


def _settings(name: str, state: dict, scores: pa.Table, means: tuple[str, ...], images: int) -> list[Setting]:
    """Each later setting of a trial. One that lacks some of the images, as after labels changed, is left unfinished."""
    measured: dict[str, list[dict]] = {canonical(later): [] for later in state["later"]}
    for row in scores.select(["later", "status", *means]).to_pylist():
        measured.setdefault(row["later"], []).append(row)
    found = []
    for later in state["later"]:
        rows = measured[canonical(later)]
        good = [row for row in rows if row["status"] == "ok"]
        # fsum: equal whatever the order of the rows, so that equals are seen as such
        values = {mean: math.fsum(row[mean] for row in good) / len(good) if good else None for mean in means}
        failed = Counter(row["status"] for row in rows)["failed"]
        status = "running" if state["status"] == "done" and len(rows) < images else state["status"]
        seconds, error = state["seconds"], state["error"]
        found.append(Setting(name, state["settings"] | later, status, values, len(good), failed, seconds, error))
    return found


def shown(value) -> str:
    """A parameter's value or a measure for people: four digits, and lists as `--over` takes them."""
    if isinstance(value, list | tuple):
        return "+".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
