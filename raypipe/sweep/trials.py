"""A sweep and its trials: runs over the labelled images, on whose stored masks post-processing settings are scored.

trials/<hash of the settings>/            a run like any other: every command reads it
trials/<hash of the settings>/trial.json  its settings, how it ended
trials/<hash of the settings>/scores.parquet  one row per image and post-processing setting: the task's measures
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.evaluation import labels
from raypipe.evaluation.datasets import DataSet
from raypipe.evaluation.labels import Labels
from raypipe.evaluation.task import Task
from raypipe.images import decode
from raypipe.inputs.manifest import fetch, list_inputs
from raypipe.inputs.maskkinds import LIGHT, chosen
from raypipe.pipeline.foregrounds import Foreground, attach
from raypipe.pipeline.job import Label, frozen_settings, plan_work
from raypipe.pipeline.stages import Work
from raypipe.run import Run
from raypipe.storage import Folder, map_ahead
from raypipe.sweep.search import canonical
from raypipe.types import BadImage, Segmenter

BATCHES = 16  # of a trial at least, where it has the images: its parts then hold about a quarter of them
LABEL_CHECKSUM = "label_sha256"  # column of images and scores, with the kind; "" for a label that cannot be read
# settings that are not inside the method
POSTERIOR = {"threshold", "refine", "keep_soft", "keep_embeddings", "jitter", "tiles"}
STORED_POST = "later"  # what scores.parquet and trial.json call post-processing settings


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to try, and on which labelled images. Options of a training are tried by `raypipe sweep METHOD --train`."""

    # folder, glob, list, table or tar of images, as of `label`; those that have a label are used. None = the data set's
    input: str | None = None
    labels: str | None = None  # folder of label images, matched by relative path, then by a name that is unique
    dataset: str | None = None  # instead of labels, as of `evaluate`: ecssd, voc07, voc2012, ...
    root: str | None = None  # folder in which data sets lie, as their authors pack them; a path or a URI
    split: str | None = None  # of a data set that has several: train, val, test of VOC; None = the papers' (trainval)
    output: str  # the sweep's folder, made or resumed: a path or a URI
    # fields of the method or of the refiner: threshold=0.2:0.8:0.1,0.55 (values, start:stop:step), sizes=4+8+16 (a
    # list), or to draw from: eps=0.1..2, refine_eps=log:1e-5..1e-2
    over: tuple[str, ...]
    # lines: one field after the other, the rest as given; asha: random draws, the worse ones stopped early
    search: Literal["grid", "lines", "random", "asha"] = "grid"
    trials: int | None = None  # random, asha: how many draws; None = 16
    task: str | None = None  # what the labels show, as of `evaluate`; None = semantic where masks have classes
    # of labels of one's own for tasks semantic and naming, as `--classes` of `evaluate`; None = the method's classes
    label_classes: str | None = None
    label_kind: Literal["light", "ink", "alpha", "nonzero"] | None = None  # what is set in labels, as of `evaluate`
    label_value: int | str | None = None  # 1 or 1,2: the values, as stored, that are set in labels of classes
    metric: str | None = None  # the task's value that decides which setting is best; None = its own choice (dice_best)
    goal: Literal["max", "min"] | None = None  # whether high or low is good; None = as the task has it
    limit: int | None = None  # only so many of the labelled images, at random but always the same ones; None = all
    group: Literal["folder", "prefix", "none"] = "folder"  # how per_image.parquet groups images, as of `evaluate`
    refine: str | None = None  # a refiner, such as guided: sharpen the masks along the image's edges
    column: str | None = None  # column of a list or table with URIs or images, or ending in tars (jpg); None finds it
    allow_private: bool = False  # what a list or table names may lie in a private network
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks run
    # trials at a time, where those that share a stage count as one; None = one per core, or as many as the GPUs hold
    actors: int | None = None


@dataclass(frozen=True)
class Trial:
    """A setting inside the model, and the post-processing settings to score on its masks. Cheap to pickle.

    What the trials of a sweep have in common is one too, without folder, images and post-processing settings.
    """

    sweep: Sweep
    segmenter: Segmenter  # with the trial's setting and no threshold
    refiner: Callable | None  # the post-processing settings replace its fields
    task: Task
    source: str | DataSet  # of the labels
    output: str = ""  # the trial's folder
    foreground: Foreground | None = None  # where the foreground comes from; None for a method that takes none
    posts: tuple[dict, ...] = ()  # post-processing settings, each with `threshold` and all fields of the refiner
    images: pa.Table | None = None  # those that have a label: see `labelled`
    labels: Labels | None = None  # theirs

    @property
    def run(self) -> Run:
        """The trial's run."""
        return Run(self.output, self.segmenter.name)

    @cached_property
    def job(self) -> Label:
        """The options of the trial's run."""
        size = min(self.segmenter.batch_size, max(1, len(self.images) // BATCHES))
        given = {name: getattr(self.sweep, name) for name in ("input", "column", "allow_private", "device")}
        given |= {"keep_soft": self.segmenter.soft, "keep_embeddings": self.segmenter.embeds}
        return Label(**given, output=self.output, batch_size=size, max_bad_fraction=1.0)

    @property
    def frozen(self) -> dict:
        """What its run.json freezes."""
        kept = {name: getattr(self.job, name) for name in ("keep_soft", "keep_embeddings")}
        return frozen_settings(self.segmenter, None, refine=None, **kept)

    @property
    def work(self) -> Work:
        """What workers need to know of it."""
        return replace(plan_work(self.job, self.segmenter, None), foreground=self.foreground)


def settings(segmenter: Segmenter) -> dict:
    """All parameters of a method but the threshold, which acts on its masks, as they are recorded: paths absolute."""
    frozen = frozen_settings(segmenter, None, refine=None, keep_soft=segmenter.soft)
    return {name: value for name, value in frozen.items() if name not in POSTERIOR}


def trial_name(segmenter: Segmenter) -> str:
    """The name of a trial's folder: equal for equal parameters inside the model."""
    return hashlib.sha256(canonical(settings(segmenter)).encode()).hexdigest()[:12]


def has_labelled(folder: Folder) -> bool:
    """Whether any trial of a sweep's folder has a committed row or, where it is a training, a checkpoint."""
    rooms = [(name, room) for name in folder.folders("trials") for room in ("_commits", "checkpoints")]
    return any(folder.files("trials", *each) for each in rooms)


def labelled(common: Trial) -> Trial:
    """What all trials have in common with the images that have a label, LABEL_CHECKSUM among their columns.

    They come in the order of their ids, which are hashes: a random one, and always the same. Raises ValueError when no
    label belongs to an image, or none can be measured against.
    """
    job, task = common.sweep, common.task
    images = list_inputs(job.input, column=job.column, allow_private=job.allow_private)
    keys, limits = images["key"].to_pylist(), {"max_bytes": Label.max_bytes, "max_pixels": Label.max_pixels}
    found = labels.match(task, common.source, keys, kind=chosen(job.label_kind, job.label_value), **limits)
    has_label = pc.is_in(images["key"], value_set=pa.array([*found.location], pa.string()))
    images = images.filter(has_label).sort_by("image_id").slice(0, job.limit)
    common = replace(common, images=images, labels=found)
    refuse_unusable(common)
    checksum = partial(task.checksum, max_bytes=Label.max_bytes)
    checksums = list(map_ahead(checksum, map(found.location.get, images["key"].to_pylist())))
    if found.kind not in (None, LIGHT):  # as all labels were read at first: scores of that time still hold
        checksums = [each and f"{each} {found.kind}" for each in checksums]
    return replace(common, images=images.append_column(LABEL_CHECKSUM, pa.array(checksums, pa.string())))


def refuse_unusable(common: Trial) -> None:
    """Raise ValueError when no label can be measured against, before anything is labelled. Stops at the first that can.

    Images that cannot be read say nothing: their trials do.
    """
    examples = defaultdict(list)
    for row in common.images.to_pylist():
        (content,) = fetch([row], max_bytes=Label.max_bytes)
        try:
            if isinstance(content, BadImage):
                raise content
            height, width = decode(content, max_pixels=Label.max_pixels).shape[:2]
        except BadImage:
            continue
        _, status = common.labels.read({"key": row["key"], "error": "", "height": height, "width": width})
        if status == "ok":
            return
        examples[status].append(row["key"])
    if examples:
        counts = Counter({name: len(keys) for name, keys in examples.items()})
        raise labels.nothing("a setting", common.source, counts, examples)


def with_images(trials: list[Trial], common: Trial) -> list[Trial]:
    """The trials with the images of `labelled`; masks of a foreground that several have are looked for once."""
    found = {str(trial.foreground): trial.foreground for trial in trials}
    images, limits = common.images, {"max_bytes": Label.max_bytes, "max_pixels": Label.max_pixels}
    tables = {name: attach(images, each, **limits) if each and each.is_read else images for name, each in found.items()}
    return [replace(trial, images=tables[str(trial.foreground)], labels=common.labels) for trial in trials]


def read_state(output: str) -> dict:
    """The content of trial.json: `settings`, `later` (STORED_POST), `status`, `seconds`, `error`."""
    return Run(output).folder.read_json("trial.json") or {}


def write_state(trial: Trial, *, status: str, seconds: float | None = None, error: str = "") -> None:
    """Write trial.json; the post-processing settings of earlier sweeps and, with None, the seconds are kept."""
    before = read_state(trial.output)
    seconds = before.get("seconds", 0.0) if seconds is None else round(seconds, 3)
    state = {"settings": settings(trial.segmenter), STORED_POST: list(all_posts(trial, before).values())}
    state |= {"status": status, "seconds": seconds, "error": error}
    trial.run.folder.write_json(state, "trial.json")


def all_posts(trial: Trial, state: dict) -> dict[str, dict]:
    """The post-processing settings of earlier sweeps, from trial.json, and of this one, by their text."""
    return {canonical(post): post for post in (*state.get(STORED_POST, []), *trial.posts)}
