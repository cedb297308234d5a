"""The trials of a sweep as tables, and the best setting among them as a config file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from raypipe.evaluation.evaluate import group
from raypipe.evaluation.task import Task
from raypipe.storage import Folder
from raypipe.sweep import trials
from raypipe.sweep.scoring import current, read_scores
from raypipe.sweep.search import canonical
from raypipe.sweep.trials import STORED_POST

ROWS = 1000
STATUSES = ("done", "stopped", "failed", "running")  # the order in the table; running = left unfinished


@dataclass(frozen=True)
class Setting:
    """One complete setting and how it did."""

    trial: str  # name of the trial's folder
    values: dict  # all parameters of the method and of the refiner
    status: str  # done, stopped (by ASHA, after some of the images), failed, or running
    means: dict[str, float | None]  # the task's values over the images with a measure; None without any
    images: int  # with a measure
    failed_images: int
    seconds: float  # of its trial, which it may share with others
    error: str  # why its trial failed


def read(output: str, *, task: Task, images: pa.Table, by: str) -> tuple[list[Setting], pa.Table]:
    """All settings that were ever tried in a sweep's folder, and their measures per image.

    images: the manifest of the labelled images; others do not count. by: how images are grouped
    (`evaluation.evaluate.group`).
    Returns the settings, and the task's table with the columns `trial` and STORED_POST and the images' groups.
    """
    folder, every, tables = Folder(output), [], [task.schema().remove_metadata().empty_table()]
    for name in sorted(folder.folders("trials")):
        settings, scores = read_trial(folder.location("trials", name), task=task, images=images)
        every += settings
        tables.append(scores)
    table = pa.concat_tables(tables, promote_options="default")
    groups = pa.array([group(key, by) for key in table["key"].to_pylist()], pa.string())
    return every, table.set_column(table.schema.get_field_index("group"), "group", groups)


def read_trial(output: str, *, task: Task, images: pa.Table) -> tuple[list[Setting], pa.Table]:
    """The settings of one trial's folder and their measures per image; none before anything was labelled.

    A setting that lacks some of the images, as after labels changed, is left unfinished.
    """
    name, state = Folder(output).path().rpartition("/")[2], trials.read_state(output)
    scores = current(read_scores(output, task.schema()), images).drop_columns(trials.LABEL_CHECKSUM)
    sums = {canonical(post): task.sums() for post in state.get(STORED_POST, [])}
    scores = scores.filter(pc.is_in(scores[STORED_POST], value_set=pa.array([*sums], pa.string())))
    statuses: dict[str, Counter[str]] = {post: Counter() for post in sums}
    for row in rows_of(scores.select([STORED_POST, "status", *dict(task.COLUMNS)])):
        statuses[row[STORED_POST]][row["status"]] += 1
        if row["status"] == "ok":
            sums[row[STORED_POST]].add(row)
    settings = []
    for post in state.get(STORED_POST, []):
        found, counts = sums[canonical(post)], statuses[canonical(post)]
        status = "running" if state["status"] == "done" and counts.total() < len(images) else state["status"]
        how = status, task.values(found), found.images, counts["failed"], state["seconds"], state["error"]
        settings.append(Setting(name, state["settings"] | post, *how))
    return settings, scores.append_column("trial", pa.array([name] * len(scores), pa.string()))


def rows_of(table: pa.Table) -> Iterator[dict]:
    """The rows of a table, few of them at a time: a task may have lists of hundreds of numbers."""
    for batch in table.to_batches(max_chunksize=ROWS):
        yield from batch.to_pylist()


def order(settings: list[Setting], metric: str, goal: str, tie: str | None = None) -> list[Setting]:
    """Best first: full trials before stopped and failed ones, then those that fail on fewer images, then the metric.

    tie: the value that tells equals apart.
    """
    sign = 1 if goal == "min" else -1

    def rank(setting: Setting) -> tuple:
        value, second = setting.means[metric], setting.means.get(tie)
        status, missing = STATUSES.index(setting.status), (value is None, second is None)
        return status, missing[0], setting.failed_images, sign * (value or 0.0), missing[1], sign * (second or 0.0)

    return sorted(settings, key=rank)


def best(settings: list[Setting], metric: str, goal: str, tie: str | None = None) -> Setting | None:
    """The best setting of a full trial, the first among equals; None when there is none. Arguments as of `order`."""
    full = [each for each in settings if each.status == "done" and each.means[metric] is not None]
    return order(full, metric, goal, tie)[0] if full else None


def table(settings: list[Setting], swept: list[str], output: str) -> pa.Table:
    """One row per setting: each swept parameter as a column of its own type, then how it did."""
    folder, means = Folder(output), settings[0].means if settings else ()
    kinds = {"status": pa.string()} | dict.fromkeys([*means], pa.float64())
    kinds |= {"images": pa.int64(), "failed_images": pa.int64(), "seconds": pa.float64()}
    kinds |= dict.fromkeys(("trial", "run", "error"), pa.string())
    facts = [vars(each) | each.means | {"run": f"{folder}/trials/{each.trial}"} for each in settings]
    columns = {name: pa.array([each.values.get(name) for each in settings]) for name in swept}
    columns |= {name: pa.array([fact[name] for fact in facts], kind) for name, kind in kinds.items()}
    return pa.table(columns)


def per_image(measures: pa.Table, settings: list[Setting], swept: list[str]) -> pa.Table:
    """The measures per image with each swept parameter as a column of its own type, for box plots and the like."""
    values = {(each.trial, canonical(post_of(each.values))): each.values for each in settings}
    pairs = zip(measures["trial"].to_pylist(), measures[STORED_POST].to_pylist(), strict=True)
    rows = [values[trial, canonical(post_of(json.loads(post)))] for trial, post in pairs]
    columns = {name: pa.array([row.get(name) for row in rows]) for name in swept}
    rest = {name: measures[name] for name in measures.column_names if name != STORED_POST}
    return pa.table(columns | rest)


def config(setting: Setting, *, method: str, refine: str | None, names: list[str]) -> str:
    """The setting as a file for `raypipe label METHOD --config`. names: of the values that its first line tells."""
    values = setting.values | {"refine": refine}
    measured = ", ".join(f"{name} {setting.means[name]:.4f}" for name in names if setting.means[name] is not None)
    return (
        f"# {measured}, mean over {setting.images} labelled images\n"
        f"# raypipe label {method} --config THIS_FILE --input PHOTOS --output RUN\n"
    ) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def post_of(values: dict) -> dict:
    """The part of a setting that acts after the model: the threshold and the refiner's fields."""
    return {name: value for name, value in values.items() if name == "threshold" or name.startswith("refine_")}


def shown(value) -> str:
    """A parameter's value or a measure for people: four digits, and lists as `--over` takes them."""
    if isinstance(value, list | tuple):
        return "+".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
