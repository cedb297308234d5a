"""What a sweep tries: its options, the settings they come to, and the trials that these make."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import pyarrow as pa

from raypipe.evaluation import tasks
from raypipe.inputs.manifest import list_inputs
from raypipe.pipeline import foregrounds
from raypipe.pipeline.job import Label, check_job, check_places
from raypipe.storage import Folder
from raypipe.sweep import ranking, search
from raypipe.sweep.trials import Trial, settings, trial_name, with_labels
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")

DRAWS = 16  # of a random search, unless told otherwise


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


def check(job: Sweep, segmenter: Segmenter, refiner: Callable | None) -> search.Space:
    """The swept fields and their values. Raises ValueError or TypeError for options that cannot work."""
    space = search.parse(job.over, [type(part) for part in (segmenter, refiner) if part])
    means = tasks.find(job.task).MEANS
    if job.metric not in means:
        raise ValueError(f"--metric {job.metric!r}: task {job.task!r} has {', '.join(means)}")
    if job.trials is not None and job.search == "grid":
        raise ValueError("--trials has no effect on a grid, which tries everything; add --search random")
    if job.trials is not None and job.trials < 1:
        raise ValueError(f"--trials must be positive, got {job.trials}")
    if job.search == "asha" and not space.keys() - later_fields(refiner):
        raise ValueError("--search asha has nothing to stop: every swept field acts after the model; use --search grid")
    check_places(job.labels, job.output)
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
            check_job(options, replace(trials[place].segmenter, threshold=laters[later]["threshold"]), refiner)
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
    return with_labels(list_inputs(job.input, column=job.column), job.labels)
