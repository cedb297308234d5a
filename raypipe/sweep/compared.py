"""By what the trainings of a sweep are compared: their own validation, or a task on labelled photographs.

trials/<hash of the settings>/measured/   of a task: a run over the photographs, by what the training has learned
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, replace

from raypipe import classes, lookup, segmenters
from raypipe.classes import Classes
from raypipe.evaluation.summary import published
from raypipe.evaluation.task import Value
from raypipe.storage import Folder, local_path, open_table
from raypipe.sweep import ranking, trials
from raypipe.sweep.plan import settled
from raypipe.sweep.ranking import Setting
from raypipe.sweep.trials import Sweep, labelled
from raypipe.sweep.tuning import run_trials
from raypipe.training.crops import Cropped
from raypipe.training.job import Course, Train
from raypipe.training.recipe import Recipe
from raypipe.training.validate import Validation, Validator, exported_epoch

MEASURED = "measured"
OF_PHOTOS = ("input", "column", "allow_private")  # of a task: options that name photographs, not what is trained on
OF_LABELS = ("root", "labels", "label_kind", "label_value")  # options of a validation that a task has too
OF_SETS = ("dataset", "split")  # options that a validation has not


class ByValidation:
    """What a training measures at its end (`training.validate`); how, is a part of the setting."""

    what, metric = "a validation", "iou"
    shown = {name: value._replace(unit="") for name, value in Cropped.SHOWN.items()}  # nothing to tell apart here
    how = ("filter", "statistics")  # how masks are measured: columns of the validation, and settings here

    def __init__(self, job):
        """job: a `sweep.training.Training`. Raises ValueError for one without a validation."""
        if job.validate is None:
            text = "add --validate DATASET --root DIR, or --validate PHOTOS --labels MASKS"
            raise ValueError(f"sweep --train: settings are compared by a validation; {text}")
        for name in OF_SETS:
            if getattr(job, name) is not None:
                raise ValueError(f"--{name} has no effect with --validate, which names the data set")
        self._job = job
        self.options = {each.name: getattr(job, each.name) for each in fields(Train) if each.name != "output"}

    def common(self) -> dict:
        """What all trials have in common."""
        names = ("input", "column", *(each.name for each in fields(Validation)))
        return {name: getattr(self._job, name) for name in names}

    def look(self, recipe: Recipe) -> None:
        """Raise ValueError or FileNotFoundError where images or labels are missing."""
        Validator(self._job, recipe, max_bytes=self._job.max_bytes, max_pixels=self._job.max_pixels)

    def measure(self, outputs: Sequence[str]) -> None:
        """Nothing is left to measure."""

    def read(self, folder: Folder, state: dict) -> list[Setting]:
        """The settings of one finished training: of the epoch that was selected, else the last one."""
        rows = open_table(folder.read("metrics", "epochs.parquet")).read().to_pylist()
        epoch, name = exported_epoch(rows), folder.path().rpartition("/")[2]
        how = "done", state["seconds"], ""
        return [
            setting(name, state["settings"] | {each: row[each] for each in self.how}, row, self.shown, *how)
            for row in rows
            if row["epoch"] == epoch
        ]

    def published(self) -> list[dict]:
        """The trainings themselves tell what papers print."""
        return []


class ByLabels:
    """A task on labelled photographs, which the trained method labels: trials as of `raypipe sweep`, scored alike."""

    how = ()

    def __init__(self, job, recipe: Recipe):
        """job: a `sweep.training.Training`. Raises ValueError for options without effect, and without labels."""
        _refuse_validation(job, recipe)
        if local_path(job.output) is None:
            text = "weights are read from a disk; choose an --output there that all machines see"
            raise ValueError(f"sweep --train {recipe.name}: {text}")
        options = {name: getattr(job, name) for name in (*OF_PHOTOS, *OF_LABELS, *OF_SETS, "output", "over", "device")}
        known = None if job.dataset else getattr(recipe, "classes", None)
        self._sweep, self._task, self._source = settled(Sweep(**options, label_classes=known), None)
        if self._task.HOLDS == "classes":
            _refuse_unknown(getattr(recipe, "names", ()), self._task.known, recipe)
        self.what, self.metric, self.shown = f"task {self._task.name!r}", self._task.METRIC, self._task.SHOWN
        self._name, self._method, self._is_local = recipe.name, segmenters.find(recipe.name), job.local
        mine = {each.name for each in fields(Course)} - {*OF_PHOTOS, "output"}
        self.options = {name: getattr(job, name) for name in mine}

    def common(self) -> dict:
        """What all trials have in common."""
        names = ("input", "column", "dataset", "split", "labels", "label_kind", "label_value", "label_classes")
        return {name: getattr(self._sweep, name) for name in names} | {"measured": self._task.name}

    def look(self, recipe: Recipe) -> None:
        """Find the photographs that have a label. Raises ValueError or FileNotFoundError where there are none."""
        self._all = labelled(trials.Trial(self._sweep, self._method(), None, self._task, self._source))

    def measure(self, outputs: Sequence[str]) -> None:
        """Label and score with what the trainings in some folders have learned, as far as that was not done before."""
        run_trials([self._trial(output) for output in outputs], local=self._is_local)

    def _trial(self, output: str) -> trials.Trial:
        method = self._method(weights=local_path(output))
        post, output = {"threshold": method.threshold}, Folder(output).location(MEASURED).uri
        return replace(self._all, segmenter=method, output=output, posts=(post,))

    def read(self, folder: Folder, state: dict) -> list[Setting]:
        """The setting of one finished training; left unfinished before all photographs are measured."""
        name = folder.path().rpartition("/")[2]
        found, _ = ranking.read_trial(folder.location(MEASURED), task=self._task, images=self._all.images)
        if not found:
            return [setting(name, state["settings"], {}, self.shown, "running", state["seconds"], "")]
        its, *_ = found
        return [replace(its, trial=name, values=state["settings"], seconds=state["seconds"] + its.seconds)]

    def published(self) -> list[dict]:
        """What papers print for the data set (`summary.PUBLISHED`), of the method itself."""
        return published(self._all.labels.dataset, self.shown, method=self._name)


def by(job, recipe: Recipe) -> ByValidation | ByLabels:
    """By what the trainings of a recipe are compared. job: a `sweep.training.Training`."""
    return ByValidation(job) if recipe.has_crops else ByLabels(job, recipe)


def setting(
    name: str, values: dict, measured: dict, shown: dict[str, Value], status: str, seconds: float, error: str
) -> Setting:
    """The setting of a trial. measured: the values by name, and `images`; {} where nothing was."""
    means = {each: measured.get(each) for each in shown}
    return Setting(name, values, status, means, measured.get("images", 0), 0, seconds, error)


def effective(recipe: Recipe, drawn: dict) -> dict:
    """A setting in which what another option turns off has its default, as the recipe asks for."""
    off = [name for name, (other, value) in recipe.depends.items() if other in drawn and drawn[other] == value]
    defaults = {each.name: each.default for each in fields(recipe) if each.default is not MISSING}
    return drawn | {name: defaults[name] for name in off}


def _refuse_unknown(names: Iterable[str], known: Classes, recipe: Recipe) -> None:
    """Raise ValueError for a class that a training learns and no label can be of: else it is told after days."""
    if lacking := [name for name in names if classes.normalised(name) not in known.numbers]:
        text = f"{recipe.name} learns {lacking[0]!r}, which is none of the classes of {known.source or 'the labels'}"
        raise ValueError(f"{text}, by which its trainings would be compared; {lookup.suggest(lacking[0], known.names)}")


def _refuse_validation(job, recipe: Recipe) -> None:
    """Raise ValueError for an option of a validation that is more than where labels are."""
    for each in fields(Validation):
        if each.name not in OF_LABELS and getattr(job, each.name) != each.default:
            text = f"--{each.name.replace('_', '-')} has no effect: {recipe.name} is not given crops of photographs"
            advice = "add --dataset NAME --root DIR, or --input PHOTOS --labels DIR"
            raise ValueError(f"{text}; its trainings are compared by what they label: {advice}")
    if job.dataset is None and job.labels is None:
        text = "add --dataset NAME --root DIR, or --input PHOTOS --labels DIR"
        raise ValueError(f"sweep --train: settings are compared on labelled photographs; {text}")
