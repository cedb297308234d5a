"""What a sweep tries: the settings that its options come to, and the trials that these make."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, fields, replace

from raypipe.evaluation import datasets, tasks
from raypipe.evaluation.datasets import DataSet
from raypipe.evaluation.task import Task
from raypipe.pipeline import foregrounds
from raypipe.pipeline.job import Label, check_folders, check_job
from raypipe.storage import Folder, absolute
from raypipe.sweep import ranking, search
from raypipe.sweep.trials import Sweep, Trial, settings, trial_name
from raypipe.types import Segmenter

DRAWS = 16  # of a random search, unless told otherwise


def settled(job: Sweep, task: Task | None, segmenter: Segmenter | None = None) -> tuple[Sweep, Task, str | DataSet]:
    """The job with what it leaves open, the task, by its name if None, and where the labels come from.

    What it leaves open: the task's name, metric and goal; of a data set the photographs, labels and split. Paths become
    absolute: Ray Tune's workers each have a current folder of their own. Raises ValueError for an unknown task or
    metric, and for labels or images that are not named or named twice.
    """
    known = job.label_classes or (segmenter.categories() if segmenter else None)
    task = task or tasks.find(job.task or datasets.task_of(job.dataset, bool(known)))()
    if task.HOLDS == "answers":
        raise ValueError(f"--task {task.name}: people answered about one run's masks, which no other setting has")
    paths = {name: absolute(path) for name in ("input", "labels", "root", "output") if (path := getattr(job, name))}
    job = replace(job, task=task.name, **paths)
    source = datasets.chosen(job)
    if job.label_classes is None and (job.dataset or task.HOLDS != "classes"):
        known = None  # the method's are none of the task's business
    task = datasets.bound(task, source, known)
    task.load()
    metric = job.metric or task.METRIC
    if metric not in task.SHOWN:
        raise ValueError(f"--metric {metric!r}: task {task.name!r} has {', '.join(task.SHOWN)}")
    goal = job.goal or ("max" if task.SHOWN[metric].better == "high" else "min")
    job = replace(job, metric=metric, goal=goal)
    if isinstance(source, DataSet):
        job = replace(job, input=job.input or source.images.uri, labels=source.labels.uri, split=source.split)
    if job.input is None:
        raise ValueError("no images: name them with --input, or a data set with --dataset NAME --root DIR")
    return job, task, source


def check(common: Trial) -> search.Space:
    """The swept fields and their values. Raises ValueError or TypeError for options that cannot work.

    common: here and below, what all trials have in common, with the method as it was given.
    """
    job, refiner = common.sweep, common.refiner
    space = search.parse(job.over, [type(part) for part in (common.segmenter, refiner) if part])
    if both := sorted(space.keys() & common.task.__dataclass_fields__.keys()):
        raise ValueError(f"{both[0]} is an option of task {common.task.name} too, which measures all trials alike")
    if job.trials is not None and job.search in ("grid", "lines"):
        raise ValueError("--trials has no effect on a grid, which tries everything; add --search random")
    if job.search == "lines" and len(space) == 1:
        raise ValueError("--search lines has no effect on a single field: its line is the grid")
    if job.trials is not None and job.trials < 1:
        raise ValueError(f"--trials must be positive, got {job.trials}")
    if job.search == "asha" and not space.keys() - post_fields(refiner):
        raise ValueError("--search asha has nothing to stop: every swept field acts after the model; use --search grid")
    check_folders(job.labels, job.output)
    return space


def refuse_given(job: Sweep, given: Iterable[str]) -> None:
    """Raise ValueError for an option that is given one value and swept. given: names of options, with - or _.

    Of lines it is where they meet.
    """
    if job.search == "lines":
        return
    swept = {entry.partition("=")[0].strip().replace("-", "_") for entry in job.over}
    for name in sorted(swept & {name.replace("-", "_") for name in given}):
        options = f"--{name.replace('_', '-')} and --over {name}"
        raise ValueError(f"{name} is both given and swept; leave out one of {options}")


def draw(common: Trial, space: search.Space) -> list[dict]:
    """The settings of the swept fields: of a grid, of lines, or random ones, which depend on the method's seed."""
    if common.sweep.search == "grid":
        return search.grid(space)
    if common.sweep.search == "lines":
        given = vars(common.segmenter) | (vars(common.refiner) if common.refiner else {})
        return search.lines(space, {name: given[name] for name in space})
    trials, seed = common.sweep.trials or DRAWS, common.segmenter.seed
    return search.draw(space, free=post_fields(common.refiner), trials=trials, seed=seed)


def post_fields(refiner: Callable | None) -> set[str]:
    """The fields that act on the masks a model has given."""
    return {"threshold", *(field.name for field in (fields(refiner) if refiner else ()))}


def plan(common: Trial, drawn: list[dict], given: Iterable[str] = ()) -> list[Trial]:
    """One trial per setting inside the model, without images yet. Raises ValueError for values that are refused."""
    segmenter, refiner = common.segmenter, common.refiner
    outer, given = post_fields(refiner), {name.replace("-", "_") for name in given}
    shared = {field.name for field in fields(Label)} & {field.name for field in fields(Sweep)}
    options = Label(**{name: getattr(common.sweep, name) for name in shared})
    trials: dict[str, Trial] = {}  # by the part of a setting inside the model
    posts: dict[str, dict] = {}  # by the rest of it
    wanted: dict[str, dict[str, dict]] = defaultdict(dict)  # the post-processing settings of each trial, by its folder
    for setting in drawn:
        inside = {name: value for name, value in setting.items() if name not in outer}
        after = {name: value for name, value in setting.items() if name in outer}
        model, post = search.canonical(inside), search.canonical(after)
        is_new = model not in trials or post not in posts
        if model not in trials:
            trials[model] = _trial(common, anew(segmenter, inside | {"threshold": None}, given, preset="preset"))
        if post not in posts:
            filter_ = refiner and anew(refiner, after, given, preset="refine_preset")
            threshold = after.get("threshold", segmenter.threshold)
            posts[post] = {"threshold": threshold, **(asdict(filter_) if filter_ else {})}
        if is_new:  # each part is checked once, not each of their pairs
            check_job(options, replace(trials[model].segmenter, threshold=posts[post]["threshold"]), refiner)
        wanted[trials[model].output][post] = posts[post]
    by_folder = {trial.output: trial for trial in trials.values()}
    return [replace(trial, posts=tuple(wanted[output].values())) for output, trial in by_folder.items()]


def trial_of(common: Trial, setting: ranking.Setting) -> Trial:
    """The trial of one setting of the folder. common: with images; of any parameters, for the setting's count."""
    inside = {key: setting.values[key] for key in settings(common.segmenter) if key in setting.values}
    trial = _trial(common, type(common.segmenter)(**inside))
    output = Folder(common.sweep.output).location("trials", setting.trial).uri
    return replace(trial, output=output, posts=(ranking.post_of(setting.values),))


def anew(part, setting: dict, given: set[str], *, preset: str):
    """The dataclass `part`, a method, a refiner or a recipe, with a setting's fields.

    What its preset filled in, which the field `preset` names, is filled in anew, by the setting's preset. Fields that
    are named in `given` or that differ from the present preset were chosen, and stay.
    """
    named = {preset: getattr(part, preset)} if hasattr(part, preset) else {}
    needed = [f.name for f in fields(part) if f.default is MISSING and f.default_factory is MISSING]
    named |= {name: getattr(part, name) for name in needed}
    default = type(part)(**named)
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    chosen = named | {key: value for key, value in values.items() if key in given or value != getattr(default, key)}
    chosen |= {key: value for key, value in setting.items() if key in values}
    return type(part)(**chosen)


def _trial(common: Trial, segmenter: Segmenter) -> Trial:
    foreground = foregrounds.of(segmenter)
    if foreground and foreground.is_read:  # absolute, as the job's paths
        segmenter = replace(segmenter, **{foreground.option: foreground.spec})
    output = Folder(common.sweep.output).location("trials", trial_name(segmenter)).uri
    return replace(common, segmenter=segmenter, foreground=foreground, output=output)
