"""`raypipe sweep`: a method's parameters against labels, on Ray Tune -> a table of trials, a page, the best setting.

What acts inside the model makes trials, each a labelling run of its own; what acts after it (the threshold, the
refiner) is scored on the masks that a trial has stored.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import pyarrow as pa

from raypipe import storage
from raypipe.evaluation import tasks as evaluation
from raypipe.inputs import manifest as inputs
from raypipe.pipeline import foregrounds
from raypipe.pipeline import label as pipeline
from raypipe.pipeline.label import Label
from raypipe.run.run import OtherConfiguration, new_attempt, parquet_bytes
from raypipe.runtime.interruption import on_signals
from raypipe.runtime.progress import images as count_of_images
from raypipe.storage.folder import Folder
from raypipe.storage.lock import hold
from raypipe.sweep import ranking, search
from raypipe.sweep.trials import Trial, has_labelled, settings, trial_name, with_images, with_labels
from raypipe.sweep.tuning import run_trials
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")
DRAWS = 16  # of a random search, unless told otherwise
SHOWN = 15  # settings in the terminal


@dataclass(frozen=True)
class Sweep:
    """What to try, and on which labelled images."""

    input: str  # folder, glob, list, table or tar of images, as of `label`; those that have a label are used
    labels: str  # folder of label images, matched by relative path, then by a stem that is unique
    output: str  # the sweep's folder, made or resumed: a path or a URI
    # fields of the method or of the refiner: threshold=0.2:0.8:0.1,0.55 (values, start:stop:step), sizes=4+8+16 (a
    # list), or to draw from: eps=0.1..2, refine_eps=log:1e-5..1e-2
    over: tuple[str, ...]
    search: Literal["grid", "random", "asha"] = "grid"  # asha: random draws, the worse ones stopped early
    trials: int | None = None  # random, asha: how many draws; None = 16
    task: str = "pattern"  # what the labels show, as of `evaluate`
    metric: str = "dice_best"  # the task's mean that decides which setting is best
    goal: Literal["max", "min"] = "max"  # whether high or low is good
    group: Literal["folder", "prefix", "none"] = "folder"  # how per_image.parquet groups images, as of `evaluate`
    refine: Literal["guided"] | None = None  # sharpen the masks along the image's edges
    column: str | None = None  # column of a list or table that holds URIs or images; None finds it
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks run
    actors: int | None = None  # trials at a time; None = one per core, or as many as the GPUs hold


@dataclass(frozen=True)
class Swept:
    """How a sweep ended."""

    output: str
    method: str
    images: int  # labelled ones
    trials: dict[str, int]  # by status
    settings: int  # rows of the table
    metric: str
    value: float | None  # of the best setting; None when no trial succeeded
    fixed: dict[str, float]  # of the best setting the metric's fixed twin (dice_fixed of dice_best), where it has one
    best: dict  # its swept parameters
    rows: list[dict]  # the best settings: swept parameters, status, the metric, images
    errors: list[str]  # of the failed trials
    table: str
    config: str | None  # the best setting as a file for `label --config`
    page: str | None
    seconds: float
    exit_code: int  # 1 when no trial succeeded

    def text(self) -> str:
        """The best settings and where all of them are."""
        counts = ", ".join(f"{count:,} {status}" for status, count in self.trials.items() if count)
        lines = [f"{self.settings:,} settings of {self.method} on {count_of_images(self.images)}: trials {counts}"]
        lines += _columns(self.rows)
        if self.settings > len(self.rows):
            lines.append(f"and {self.settings - len(self.rows):,} more")
        lines += [f"failed: {error}" for error in self.errors]
        if self.config:
            chosen = ", ".join(f"{name} {value}" for name, value in self.best.items())
            values = {self.metric: self.value} | self.fixed
            lines.append(f"best: {chosen} ({', '.join(f'{name} {value:.4f}' for name, value in values.items())})")
            lines += [f"all trials: {self.table}", f"page: {self.page}"]
            lines.append(f"to use it: --config {shlex.quote(self.config)}")
        return "\n".join(lines)


def sweep(job: Sweep, segmenter: Segmenter, refiner: Callable | None = None, *, given: Iterable[str] = ()) -> Swept:
    """Try all settings, as far as that was not done before, and write the tables, best.yaml and the page.

    given: fields of the method that a swept preset leaves alone, besides those that differ from the method's preset.
    Raises ValueError, TypeError or FileNotFoundError for wrong options and missing input before anything starts and for
    a method that cannot load, runs.OtherConfiguration and lock.Locked when the output belongs to another sweep, and
    interruption.Interrupted after a signal; then the same call goes on. A trial that fails is listed and stops nothing.
    """
    start = time.monotonic()
    # Ray Tune's workers each have a current folder of their own.
    job = replace(job, **{name: storage.absolute(getattr(job, name)) for name in ("input", "labels", "output")})
    space = check(job, segmenter, refiner)
    folder, attempt = Folder(job.output), new_attempt()
    planned = plan(job, segmenter, refiner, draw(job, space, segmenter, refiner), given)
    images = labelled_images(job)
    planned = [with_images(trial, images) for trial in planned]
    with on_signals(), hold(folder, attempt):
        known = merge(folder, configuration(job, segmenter, refiner, space))
        folder.write((json.dumps(known, indent=2) + "\n").encode(), "sweep.json")
        run_trials(job, planned)
        return report(job, segmenter, refiner, images, known["swept"], start)


# What to try


def check(job: Sweep, segmenter: Segmenter, refiner: Callable | None) -> search.Space:
    """The swept fields and their values. Raises ValueError or TypeError for options that cannot work."""
    space = search.parse(job.over, [type(part) for part in (segmenter, refiner) if part])
    means = evaluation.find(job.task).MEANS
    if job.metric not in means:
        raise ValueError(f"--metric {job.metric!r}: task {job.task!r} has {', '.join(means)}")
    if job.trials is not None and job.search == "grid":
        raise ValueError("--trials has no effect on a grid, which tries everything; add --search random")
    if job.trials is not None and job.trials < 1:
        raise ValueError(f"--trials must be positive, got {job.trials}")
    if job.search == "asha" and not space.keys() - later_fields(refiner):
        raise ValueError("--search asha has nothing to stop: every swept field acts after the model; use --search grid")
    pipeline.check_places(job.labels, job.output)
    return space


def refuse_given(job: Sweep, given: Iterable[str]) -> None:
    """Raise ValueError for an option that is given one value and swept. given: names of options, with - or _."""
    swept = {entry.partition("=")[0].strip().replace("-", "_") for entry in job.over}
    for name in sorted(swept & {name.replace("-", "_") for name in given}):
        raise ValueError(
            f"{name} is both given and swept; leave out one of --{name.replace('_', '-')} and --over {name}"
        )


def draw(job: Sweep, space: search.Space, segmenter: Segmenter, refiner: Callable | None) -> list[dict]:
    """The settings of the swept fields: all of a grid, or random ones, which depend on the method's seed."""
    if job.search == "grid":
        return search.grid(space)
    return search.draw(space, free=later_fields(refiner), trials=job.trials or DRAWS, seed=segmenter.seed)


def later_fields(refiner: Callable | None) -> set[str]:
    """The fields that act on the masks a model has given."""
    return {"threshold", *(field.name for field in (fields(refiner) if refiner else ()))}


def plan(
    job: Sweep, segmenter: Segmenter, refiner: Callable | None, drawn: list[dict], given: Iterable[str] = ()
) -> list[Trial]:
    """One trial per setting inside the model, without images yet. Raises ValueError for values that are refused."""
    outer, given = later_fields(refiner), {name.replace("-", "_") for name in given}
    options = Label(job.input, job.output, column=job.column, refine=job.refine, device=job.device, actors=job.actors)
    trials: dict[str, Trial] = {}  # by the part of a setting inside the model
    laters: dict[str, dict] = {}  # by the rest of it
    wanted: dict[str, dict[str, dict]] = defaultdict(dict)  # the later settings of each trial, by its folder
    for setting in drawn:
        inside = {name: value for name, value in setting.items() if name not in outer}
        after = {name: value for name, value in setting.items() if name in outer}
        place, later = search.canonical(inside), search.canonical(after)
        is_new = place not in trials or later not in laters
        if place not in trials:
            trials[place] = _trial(job, _method(segmenter, inside, given), refiner)
        if later not in laters:
            filter_ = refiner and replace(refiner, **{k: v for k, v in after.items() if k != "threshold"})
            threshold = after.get("threshold", segmenter.threshold)
            laters[later] = {"threshold": threshold, **(asdict(filter_) if filter_ else {})}
        if is_new:  # each part is checked once, not each of their pairs
            pipeline.check(options, replace(trials[place].segmenter, threshold=laters[later]["threshold"]), refiner)
        wanted[trials[place].output][later] = laters[later]
    found = {trial.output: trial for trial in trials.values()}
    return [replace(trial, later=tuple(wanted[output].values())) for output, trial in found.items()]


def _method(segmenter: Segmenter, setting: dict, given: set[str]) -> Segmenter:
    """The method with a setting's fields and no threshold.

    What its preset filled in is filled in anew, by the setting's preset. Fields that are named in `given` or that
    differ from the method's preset were chosen, and stay.
    """
    preset = {"preset": segmenter.preset} if hasattr(segmenter, "preset") else {}
    default = type(segmenter)(**preset)
    values = {f.name: getattr(segmenter, f.name) for f in fields(segmenter)}
    chosen = preset | {key: value for key, value in values.items() if key in given or value != getattr(default, key)}
    chosen |= {key: value for key, value in setting.items() if key in values}
    return type(segmenter)(**chosen | {"threshold": None})


def trial_of(job: Sweep, segmenter: Segmenter, refiner: Callable | None, setting: ranking.Setting) -> Trial:
    """The trial of one setting of the folder, without images yet. segmenter: of any parameters, the setting's count."""
    inside = {key: setting.values[key] for key in settings(segmenter) if key in setting.values}
    trial = _trial(job, type(segmenter)(**inside), refiner)
    output = Folder(job.output).location("trials", setting.trial)
    return replace(trial, output=output, later=(ranking.later_of(setting.values),))


def _trial(job: Sweep, segmenter: Segmenter, refiner: Callable | None) -> Trial:
    spec = getattr(segmenter, "foreground", None)
    foreground = None if spec is None else foregrounds.parse(spec)
    if foreground and foreground.is_read:  # absolute, as the job's places
        segmenter = replace(segmenter, foreground=f"{foreground.kind}:{foreground.argument}")
    return Trial(
        input=job.input,
        column=job.column,
        output=Folder(job.output).location("trials", trial_name(segmenter)),
        device=job.device,
        segmenter=segmenter,
        refiner=refiner,
        later=(),
        task=job.task,
        labels=job.labels,
        images=pa.table({}),
        foreground=foreground,
    )


def labelled_images(job: Sweep) -> pa.Table:
    """The manifest of the images that have a label, in a fixed random order."""
    listing = inputs.list_inputs(job.input, column=job.column)
    manifest = pa.concat_tables(listing.chunks)
    for remark in listing.remarks():
        log.warning("%s", remark)
    return with_labels(manifest, job.labels)


# The folder


def configuration(job: Sweep, segmenter: Segmenter, refiner: Callable | None, space: search.Space) -> dict:
    """What all trials of a sweep's folder have in common, and the names of the swept fields."""
    fixed = settings(segmenter) | {"threshold": segmenter.threshold} | (asdict(refiner) if refiner else {})
    fixed = {key: value for key, value in fixed.items() if key not in space}
    places = {"input": storage.redact(job.input), "labels": storage.redact(job.labels)}
    common = {"method": segmenter.name, **places, "column": job.column, "task": job.task, "refine": job.refine}
    return json.loads(json.dumps({"common": common, "fixed": fixed, "swept": list(space)}))


def has_begun(job: Sweep) -> bool:
    """Whether there is a sweep in the output that the same command would go on with."""
    try:
        return Folder(job.output).read("sweep.json") is not None
    except Exception:  # an output that cannot be read: the error at hand says why
        return False


def merge(folder: Folder, now: dict) -> dict:
    """The configuration with that of the folder. Raises OtherConfiguration with a diff where they disagree.

    A sweep may grow: other values, and fields that were fixed before or are now. One that disagrees with attempts of
    which none has labelled an image takes their place: deletes their folders.
    """
    content = folder.read("sweep.json")
    if content is None:
        return now
    there = json.loads(content)
    old, new = (each["common"] | each["fixed"] for each in (there, now))
    changed = [key for key in sorted(old.keys() & new.keys()) if old[key] != new[key]]
    if changed and not has_labelled(folder):
        for name in {"trials", "foreground"}.intersection(folder.folders()):
            folder.delete_folder(name)
        return now
    if changed:
        lines = [f"  {key}: {old[key]!r} there, {new[key]!r} now" for key in changed]
        text = f"{folder} holds another sweep; use the same settings or another --output\n"
        raise OtherConfiguration(text + "\n".join(lines))
    swept = list(dict.fromkeys([*there["swept"], *now["swept"]]))
    fixed = {key: value for key, value in (there["fixed"] | now["fixed"]).items() if key not in swept}
    return now | {"fixed": fixed, "swept": swept}


# The result


def report(
    job: Sweep, segmenter: Segmenter, refiner: Callable | None, images: pa.Table, swept: list[str], start: float
) -> Swept:
    """Write trials.parquet, per_image.parquet, best.yaml and the page; tell how the sweep ended."""
    folder = Folder(job.output)
    found, measures = ranking.read(job.output, task=job.task, images=images, by=job.group)
    found, chosen = ranking.order(found, job.metric, job.goal), ranking.best(found, job.metric, job.goal)
    folder.write(parquet_bytes(ranking.table(found, swept, job.output)), "trials.parquet")
    per_image = ranking.per_image(measures, found, swept)
    folder.write(parquet_bytes(per_image), "per_image.parquet")
    config = page = None
    if chosen:
        from raypipe.sweep.page import write_page

        text = ranking.config(chosen, method=segmenter.name, refine=job.refine, metric=job.metric)
        folder.write(text.encode(), "best.yaml")
        config = storage.redact(folder.location("best.yaml"))
        page = write_page(job, segmenter, refiner, found, per_image, images, swept)
    states = {each.trial: each for each in found}
    twin = ranking.fixed_twin(job.metric, evaluation.find(job.task).MEANS)
    return Swept(
        output=storage.redact(job.output),
        method=segmenter.name,
        images=len(images),
        trials={status: sum(s.status == status for s in states.values()) for status in ranking.STATUSES},
        settings=len(found),
        metric=job.metric,
        value=chosen.means[job.metric] if chosen else None,
        fixed={twin: chosen.means[twin]} if chosen and twin else {},
        best={key: chosen.values[key] for key in swept} if chosen else {},
        rows=[_row(each, swept, job.metric) for each in found[:SHOWN]],
        errors=sorted({each.error for each in states.values() if each.status == "failed"}),
        table=storage.redact(folder.location("trials.parquet")),
        config=config,
        page=page,
        seconds=round(time.monotonic() - start, 3),
        exit_code=0 if chosen else 1,
    )


def _row(setting: ranking.Setting, swept: list[str], metric: str) -> dict:
    values = {key: setting.values.get(key) for key in swept}
    measured = {name: setting.means[name] for name in (metric, ranking.fixed_twin(metric, setting.means)) if name}
    return values | measured | {"images": setting.images, "status": setting.status}


def _columns(rows: list[dict]) -> list[str]:
    """Rows of one shape as lines of a table."""
    cells = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]


def shown(value) -> str:
    """A parameter's value or a measure for people: four digits, and lists as `--over` takes them."""
    if isinstance(value, list | tuple):
        return "+".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
