"""What a sweep tries: its options, the settings they come to, and the trials that these make."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import pyarrow as pa

from raypipe.evaluation import tasks
from raypipe.evaluation.task import Task
from raypipe.inputs.manifest import list_inputs
from raypipe.pipeline import foregrounds
from raypipe.pipeline.job import Label, check_folders, check_job
from raypipe.storage import Folder, absolute
from raypipe.sweep import ranking, search
from raypipe.sweep.trials import Trial, settings, trial_name, with_labels
from raypipe.types import PatternSegmenter, Segmenter

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
    metric: str | None = None  # the task's value that decides which setting is best; None = its own choice (dice_best)
    goal: Literal["max", "min"] | None = None  # whether high or low is good; None = as the task has it
    group: Literal["folder", "prefix", "none"] = "folder"  # how per_image.parquet groups images, as of `evaluate`
    refine: str | None = None  # a refiner, such as guided: sharpen the masks along the image's edges
    column: str | None = None  # column of a list or table that holds URIs or images; None finds it
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks run
    actors: int | None = None  # trials at a time; None = one per core, or as many as the GPUs hold


def settled(job: Sweep, task: Task | None) -> tuple[Sweep, Task]:
    """The job with its task's name and, where it leaves them open, metric and goal; and the task, by its name if None.

    Paths become absolute: Ray Tune's workers each have a current folder of their own. Raises ValueError for an unknown
    task or metric.
    """
    task = task or tasks.find(job.task)()
    metric = job.metric or task.METRIC
    if metric not in task.SHOWN:
        raise ValueError(f"--metric {metric!r}: task {task.name!r} has {', '.join(task.SHOWN)}")
    goal = job.goal or ("max" if task.SHOWN[metric].better == "high" else "min")
    paths = {name: absolute(getattr(job, name)) for name in ("input", "labels", "output")}
    return replace(job, task=task.name, metric=metric, goal=goal, **paths), task


def check(job: Sweep, segmenter: Segmenter, refiner: Callable | None) -> search.Space:
    """The swept fields and their values. Raises ValueError or TypeError for options that cannot work."""
    space = search.parse(job.over, [type(part) for part in (segmenter, refiner) if part])
    if job.trials is not None and job.search == "grid":
        raise ValueError("--trials has no effect on a grid, which tries everything; add --search random")
    if job.trials is not None and job.trials < 1:
        raise ValueError(f"--trials must be positive, got {job.trials}")
    if job.search == "asha" and not space.keys() - post_fields(refiner):
        raise ValueError("--search asha has nothing to stop: every swept field acts after the model; use --search grid")
    check_folders(job.labels, job.output)
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
    return search.draw(space, free=post_fields(refiner), trials=job.trials or DRAWS, seed=segmenter.seed)


def post_fields(refiner: Callable | None) -> set[str]:
    """The fields that act on the masks a model has given."""
    return {"threshold", *(field.name for field in (fields(refiner) if refiner else ()))}


def plan(
    job: Sweep, segmenter: Segmenter, refiner: Callable | None, task: Task, drawn: list[dict], given: Iterable[str] = ()
) -> list[Trial]:
    """One trial per setting inside the model, without images yet. Raises ValueError for values that are refused."""
    outer, given = post_fields(refiner), {name.replace("-", "_") for name in given}
    options = Label(job.input, job.output, column=job.column, refine=job.refine, device=job.device, actors=job.actors)
    trials: dict[str, Trial] = {}  # by the part of a setting inside the model
    posts: dict[str, dict] = {}  # by the rest of it
    wanted: dict[str, dict[str, dict]] = defaultdict(dict)  # the post-processing settings of each trial, by its folder
    for setting in drawn:
        inside = {name: value for name, value in setting.items() if name not in outer}
        after = {name: value for name, value in setting.items() if name in outer}
        model, post = search.canonical(inside), search.canonical(after)
        is_new = model not in trials or post not in posts
        if model not in trials:
            trials[model] = _trial(job, _method(segmenter, inside, given), refiner, task)
        if post not in posts:
            filter_ = refiner and replace(refiner, **{k: v for k, v in after.items() if k != "threshold"})
            threshold = after.get("threshold", segmenter.threshold)
            posts[post] = {"threshold": threshold, **(asdict(filter_) if filter_ else {})}
        if is_new:  # each part is checked once, not each of their pairs
            check_job(options, replace(trials[model].segmenter, threshold=posts[post]["threshold"]), refiner)
        wanted[trials[model].output][post] = posts[post]
    by_folder = {trial.output: trial for trial in trials.values()}
    return [replace(trial, posts=tuple(wanted[output].values())) for output, trial in by_folder.items()]


def trial_of(job: Sweep, segmenter: Segmenter, refiner: Callable | None, task: Task, setting: ranking.Setting) -> Trial:
    """The trial of one setting of the folder, without images yet. segmenter: of any parameters, the setting's count."""
    inside = {key: setting.values[key] for key in settings(segmenter) if key in setting.values}
    trial = _trial(job, type(segmenter)(**inside), refiner, task)
    output = Folder(job.output).location("trials", setting.trial).uri
    return replace(trial, output=output, posts=(ranking.post_of(setting.values),))


def labelled_images(job: Sweep, task: Task) -> pa.Table:
    """The manifest of the images that have a label, in a fixed random order."""
    return with_labels(list_inputs(job.input, column=job.column), job.labels, task)


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


def _trial(job: Sweep, segmenter: Segmenter, refiner: Callable | None, task: Task) -> Trial:
    foreground = foregrounds.parse(segmenter.foreground) if isinstance(segmenter, PatternSegmenter) else None
    if foreground and foreground.is_read:  # absolute, as the job's paths
        segmenter = replace(segmenter, foreground=f"{foreground.kind}:{foreground.argument}")
    return Trial(
        input=job.input,
        column=job.column,
        output=Folder(job.output).location("trials", trial_name(segmenter)).uri,
        device=job.device,
        segmenter=segmenter,
        refiner=refiner,
        posts=(),
        task=task,
        labels=job.labels,
        images=pa.table({}),
        foreground=foreground,
    )
