"""`raypipe sweep METHOD --train`: a training's options against labels -> a table of trials, a page, the best setting.

trials/<hash of the settings>/            a training like any other: `--weights` takes it
trials/<hash of the settings>/trial.json  its settings, how it ended

Each trial trains on Ray Train, inside Ray Tune. `compared` says by what they are compared: by their validation, where
what varies only in how masks are measured are settings of one trial, or by what they label afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import yaml

from raypipe import networks
from raypipe.evaluation.summary import beside
from raypipe.lookup import one_line
from raypipe.run import new_attempt
from raypipe.runtime import address, cores
from raypipe.runtime.interruption import held, postponed
from raypipe.runtime.progress import LINE_SECONDS
from raypipe.storage import Folder, Location, absolute
from raypipe.sweep import compared, page, ranking, search
from raypipe.sweep.compared import ByLabels, ByValidation
from raypipe.sweep.plan import DRAWS, anew, refuse_given
from raypipe.sweep.ranking import Setting
from raypipe.sweep.sweep import TERMINAL_SETTINGS, Swept, merge
from raypipe.sweep.sweep import has_begun as has_begun
from raypipe.sweep.tuning import patiently, tuner
from raypipe.training import data, record
from raypipe.training.job import Train, check_train, frozen_settings, list_images, per_worker
from raypipe.training.recipe import Recipe
from raypipe.training.train import FROZEN, QUIET, train

log = logging.getLogger("raypipe")
PATHS = ("input", "validate", "root", "labels", "select", "output")


@dataclass(frozen=True, kw_only=True)
class Training(Train):
    """What to try, what to train on and how, and on which labelled images it is measured.

    All options of `raypipe train` but for those of a sweep; `--output` is the folder of all trials.
    """

    # options of the method's training: tau=0.2,0.4 or tau=0.2:0.6:0.1 or crop_zoom=true,false, or to draw from:
    # lr=log:1e-5..1e-3
    over: tuple[str, ...]
    search: Literal["grid", "random"] = "grid"
    trials: int | None = None  # random: how many draws; None = 16
    metric: str | None = None  # the value that decides which setting is best; None = IoU, or the task's own choice
    goal: Literal["max", "min"] | None = None  # whether high or low is good; None = as the value has it
    actors: int | None = None  # trials at a time, each on `workers`; None = as many as there is room for
    # of a training without --validate, such as namedmask's: the labelled photographs on which what it has learned is
    # measured, voc2012, coco2017, ... with --root; or --input names photographs and --labels their labels
    dataset: str | None = None
    split: str | None = None  # of a data set that has several: train, val; None = the papers'

    def __post_init__(self):
        """Raise ValueError for options of a validation that make no sense; without one see `compared`."""
        if self.validate is not None:
            super().__post_init__()


@dataclass(frozen=True)
class SweptTraining(Swept):
    """How a sweep over trainings ended."""

    weights: str | None = None  # what the best trial has trained
    papers: tuple[str, ...] = ()  # lines: the best settings beside what papers print

    def text(self) -> str:
        """As of any sweep, what papers print, and where the weights are."""
        weights = [f"its weights: --weights {self.weights}"] if self.weights else []
        return "\n".join([super().text(), *weights, *self.papers]).rstrip()


@dataclass(frozen=True)
class Trial:
    """One training. Cheap to pickle."""

    job: Train  # its output is the trial's folder
    recipe: Recipe
    swept: dict  # the swept fields

    @property
    def folder(self) -> Folder:
        """The trial's folder."""
        return Folder(self.job.output)

    @property
    def settings(self) -> dict:
        """All that decides what it comes to."""
        return json.loads(json.dumps(frozen_settings(self.job, self.recipe)))

    def line(self, rows: list[dict]) -> str:
        """How far it is, in words. rows: new ones of its log."""
        epochs, per_epoch = self.recipe.epochs, 1
        if epochs:
            images, (batch, _) = self.folder.read_json(FROZEN)["images"], per_worker(self.job, self.recipe)
            per_epoch = len(data.shares(range(images), workers=self.job.workers, batch=batch, tail=self.job.tail))
        steps = self.recipe.iterations or epochs * per_epoch
        return f"{words(self.swept)}: {record.line(rows, steps=steps, per_epoch=per_epoch, epochs=epochs)}"


def training(job: Training, recipe: Recipe, *, given: Iterable[str] = (), flags: Iterable[str] = ()) -> SweptTraining:
    """Train with all settings, as far as that was not done before, and write the table, best.yaml and the page.

    given, flags: as of `sweep.sweep`. Raises ValueError, TypeError or FileNotFoundError for wrong options and missing
    input before anything starts, run.OtherConfiguration and storage.Locked when the output belongs to another sweep,
    and interruption.Interrupted after a signal; then the same call goes on. A trial that fails is listed and stops
    nothing.
    """
    start = time.monotonic()
    refuse_given(job, flags)
    job, by = settled(job, recipe)
    space = search.parse(job.over, [type(recipe)])
    planned, folder = plan(job, recipe, space, given, by.options), Folder(job.output)
    todo = [trial for trial in planned if not is_trained(trial)]
    if todo or isinstance(by, ByLabels):
        by.look(recipe)
    if todo:
        check_data(todo)
    with held(folder, new_attempt()):
        known = merge(folder, configuration(job, recipe, by, space))
        folder.write_json(known, "sweep.json")
        if todo:
            log.info("%s of %s trials to train", len(todo), len(planned))
            (run_here if job.local else run_on_tune)(todo, job)
        by.measure([trial.job.output for trial in planned if is_trained(trial)])
        return report(job, recipe.name, known["swept"], by, start)


def settled(job: Training, recipe: Recipe) -> tuple[Training, ByValidation | ByLabels]:
    """The job with its metric, goal and absolute paths, and by what trainings are compared.

    Raises ValueError for options that cannot work or have no effect.
    """
    job = replace(job, **{name: absolute(path) for name, path in paths(job).items()})
    by = compared.by(job, recipe)
    metric = job.metric or by.metric
    if metric not in by.shown:
        raise ValueError(f"--metric {metric!r}: {by.what} has {', '.join(by.shown)}")
    if job.trials is not None and job.search == "grid":
        raise ValueError("--trials has no effect on a grid, which tries everything; add --search random")
    for option in ("trials", "actors"):
        if (value := getattr(job, option)) is not None and value < 1:
            raise ValueError(f"--{option} must be positive, got {value}")
    if job.local and job.actors:
        raise ValueError("--actors has no effect with --local, which trains one after the other")
    goal = job.goal or ("max" if by.shown[metric].better == "high" else "min")
    return replace(job, metric=metric, goal=goal), by


def paths(job: Training) -> dict[str, str]:
    """The options that are paths or URIs, and their values."""
    named = {name: getattr(job, name) for name in PATHS if name != "validate" or job.labels}
    return {name: path for name, path in named.items() if path}


def plan(job: Training, recipe: Recipe, space: search.Space, given: Iterable[str], options: dict) -> list[Trial]:
    """One trial per setting. Those that the recipe refuses are left out, as a weight of what another option turns off.

    options: of a `Train`, but for its output. Raises ValueError for a listed value that no setting may have.
    """
    draw = {"free": (), "trials": job.trials or DRAWS, "seed": recipe.seed}
    drawn = search.grid(space) if job.search == "grid" else search.draw(space, **draw)
    chosen, trials, refused = {name.replace("-", "_") for name in given}, {}, []
    for setting in drawn:
        try:
            its = anew(recipe, compared.effective(recipe, setting), chosen, preset="preset")
            trial = Trial(Train(**options, output=job.output), its, setting)
            check_train(trial.job, its)
            if its.has_steps and not its.rounds:
                raise ValueError("--epochs 0 trains nothing: `raypipe train --epochs 0 --validate` measures a network")
        except ValueError as error:
            refused.append((setting, error))
            continue
        name = hashlib.sha256(search.canonical(trial.settings).encode()).hexdigest()[:12]
        output = Folder(job.output).location("trials", name).uri
        trials[output] = replace(trial, job=replace(trial.job, output=output))
    _refuse_useless(space, [trial.swept for trial in trials.values()], refused)
    return list(trials.values())


def _refuse_useless(space: search.Space, accepted: list[dict], refused: list[tuple[dict, ValueError]]) -> None:
    """Raise the error of a setting one of whose listed values is in no accepted one; tell of the others."""
    for setting, error in refused:
        listed = [name for name, values in space.items() if isinstance(values, list)]
        if not accepted or any(all(each[name] != setting[name] for each in accepted) for name in listed):
            raise error
    for setting, error in refused:
        log.warning("left out: %s: %s", words(setting), error)


def check_data(todo: list[Trial]) -> None:
    """Raise ValueError or FileNotFoundError where images or networks are missing, before anything starts."""
    job, recipe = todo[0].job, todo[0].recipe
    list_images(job, recipe)
    if job.local or not address.is_elsewhere():
        for trial in todo:
            networks.look_for_each(trial.recipe)


def configuration(job: Training, recipe: Recipe, by: ByValidation | ByLabels, space: search.Space) -> dict:
    """What all trials of a sweep's folder have in common, and the names of the swept fields."""
    common = {"task": "train"} | by.common()
    places = [name for name in PATHS if common.get(name) and (name != "validate" or job.labels)]
    common |= {name: Location(common[name]) for name in places}
    fixed = {name: value for name, value in frozen_settings(job, recipe).items() if name not in space}
    return json.loads(json.dumps({"common": common, "fixed": fixed, "swept": list(space)}))


def run_here(todo: list[Trial], job: Training) -> None:
    """One training after the other in this process."""
    for trial in todo:
        log.info(words(trial.swept))
        with contextlib.suppress(Exception):  # it is in the trial's folder, and told at the end
            run_trial(trial)


def run_on_tune(todo: list[Trial], job: Training) -> None:
    """Several trainings at a time, each in a process of its own, by Ray Tune. How each ended is in its trial.json."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from raypipe.runtime import cluster

    with cluster.connected(stall=1800.0), tempfile.TemporaryDirectory() as scratch, postponed() as handle_signal:
        cluster.warn_of_local_paths(**paths(job))
        device = cluster.resources(gpus=1.0, device=job.device, actors=job.workers, option="--workers").device
        tell = teller(todo)

        def at_step() -> None:
            handle_signal()
            tell()

        at_once = job.actors or room(device) // job.workers or 1
        threads = cores.count() // (job.workers * min(at_once, len(todo))) or 1
        run = partial(run_one, todo=todo, threads=os.environ.get("OMP_NUM_THREADS") or str(threads))
        nothing = {"memory": 1}  # byte: its workers ask for cores themselves, and Ray Tune refuses to be asked for none
        results = tuner(run, len(todo), nothing, at_once=at_once, scratch=scratch, at_step=at_step).fit()
    for result in results:
        trial = todo[result.config["index"]]
        if result.error is not None and state_of(trial.folder).get("status") != "failed":
            text = f"its process died: {type(result.error).__name__}: {one_line(result.error)}"
            write_state(trial, status="failed", error=text)


def room(device: str) -> int:
    """How many workers fit at a time: one per GPU, or per core."""
    import ray

    found = ray.cluster_resources()
    if device == "cuda":
        return int(found.get("GPU", 0))
    return int(found.get("CPU", 0)) if address.joins_cluster() else cores.count()


def run_one(config: dict, todo: list[Trial], threads: str) -> None:
    """One training in a worker of Ray Tune, which is only told that it is over. threads: of each of its workers."""
    from ray import tune

    os.environ["OMP_NUM_THREADS"] = threads  # Ray has set it to that of a process that has asked for no core
    run_trial(todo[config["index"]])
    tune.report({"is_done": True})


def run_trial(trial: Trial) -> None:
    """Train and validate from where it is to the end. Raises what `train` raises; its trial.json says how it ended."""
    start, before = time.monotonic(), state_of(trial.folder).get("seconds", 0.0)
    write_state(trial, status="running", seconds=before)
    try:
        patiently(train)(trial.job, trial.recipe)
    except Exception as error:
        write_state(trial, status="failed", error=f"{type(error).__name__}: {one_line(error)}", seconds=before)
        raise
    write_state(trial, status="done", seconds=before + time.monotonic() - start)


def state_of(folder: Folder) -> dict:
    """The content of trial.json: `settings`, `status`, `seconds`, `error`; {} where there is none."""
    return folder.read_json("trial.json") or {}


def write_state(trial: Trial, *, status: str, seconds: float = 0.0, error: str = "") -> None:
    """Write trial.json."""
    state = {"settings": trial.settings, "status": status, "seconds": round(seconds, 3), "error": error}
    trial.folder.write_json(state, "trial.json")


def teller(todo: list[Trial]) -> Callable[[], None]:
    """A function that logs now and then, however often it is called, how far each training is."""
    news, last = [record.follow(trial.folder) for trial in todo], time.monotonic()

    def tell() -> None:
        nonlocal last
        if time.monotonic() - last < LINE_SECONDS:
            return
        for trial, new in zip(todo, news, strict=True):
            if rows := new():
                log.info(trial.line(rows))
        last = time.monotonic()

    return tell


def is_trained(trial: Trial) -> bool:
    """Whether nothing is left to train of it."""
    return state_of(trial.folder).get("status") == "done"


def read(folder: Folder, by: ByValidation | ByLabels) -> list[Setting]:
    """All settings that were ever tried in a sweep's folder."""
    found = []
    for name in sorted(folder.folders("trials")):
        its = Folder(folder.location("trials", name).uri)
        if not (state := state_of(its)):
            continue
        if state["status"] == "done":
            found += by.read(its, state)
            continue
        values, how = state["settings"] | dict.fromkeys(by.how), (state["status"], state["seconds"], state["error"])
        found.append(compared.setting(name, values, {}, by.shown, *how))
    return found


def report(job: Training, method: str, swept: list[str], by: ByValidation | ByLabels, start: float) -> SweptTraining:
    """Write trials.parquet, best.yaml and the page; tell how the sweep ended."""
    folder = Folder(job.output)
    every = ranking.order(read(folder, by), job.metric, job.goal)
    chosen = ranking.best(every, job.metric, job.goal)
    swept = [*swept, *(name for name in by.how if len({each.values[name] for each in every} - {None}) > 1)]
    folder.write_table(ranking.table(every, swept, job.output), "trials.parquet")
    if chosen:
        folder.write(best_yaml(chosen, method, job.metric, by).encode(), "best.yaml")
    by_trial = {each.trial: each for each in every}
    facts = [each.values | each.means | {"status": each.status} for each in every]
    printed = by.published()
    ours = {words({name: each.values[name] for name in swept}): each.means for each in every if each.status == "done"}
    return SweptTraining(
        output=str(folder),
        method=method,
        images=max((each.images for each in every), default=0),
        trials={status: sum(each.status == status for each in by_trial.values()) for status in ranking.STATUSES},
        settings=len(every),
        metric=job.metric,
        value=chosen.means[job.metric] if chosen else None,
        tie={},
        best={name: chosen.values[name] for name in swept} if chosen else {},
        rows=[{name: fact[name] for name in [*swept, job.metric, "status"]} for fact in facts[:TERMINAL_SETTINGS]],
        errors=sorted({each.error for each in by_trial.values() if each.status == "failed"}),
        table=str(folder.location("trials.parquet")),
        config=str(folder.location("best.yaml")) if chosen else None,
        page=write_page(folder, method, every, chosen, swept, job, by) if chosen else None,
        seconds=round(time.monotonic() - start, 3),
        exit_code=0 if chosen else 1,
        weights=str(folder.location("trials", chosen.trial)) if chosen else None,
        papers=tuple(beside(dict([*ours.items()][:TERMINAL_SETTINGS]), printed)),
    )


def best_yaml(setting: Setting, method: str, metric: str, by: ByValidation | ByLabels) -> str:
    """The setting as a file for `raypipe train METHOD --config`."""
    how = [words({name: setting.values[name] for name in by.how})] if by.how else []
    values = {name: value for name, value in setting.values.items() if name not in ("method", *by.how)}
    photos = "" if "masks" in values else " --input PHOTOS"
    return (
        f"# {', '.join([f'{metric} {setting.means[metric]:.4f} on {setting.images} labelled images', *how])}\n"
        f"# raypipe train {method} --config THIS_FILE{photos} --output WEIGHTS\n"
    ) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def write_page(
    folder: Folder, method: str, every: list[Setting], chosen: Setting, swept: list[str], job: Training, by
) -> str:
    """Write sweep.html. by: what trainings are compared by. Returns where the page is."""
    return page.write(
        folder,
        page.of_settings(every, chosen, swept, by.shown, job.metric, job.goal),
        method=method,
        images=chosen.images,
        verb="train",
        published=by.published(),
    )


def words(setting: dict) -> str:
    """A setting as people say it."""
    return ", ".join(f"{name} {ranking.shown(value)}" for name, value in setting.items())
