"""One trial of a sweep: a run over the labelled images, on whose stored masks all post-processing settings are scored.

trials/<hash of the settings>/            a run like any other: every command reads it
trials/<hash of the settings>/trial.json  its settings, how it ended
trials/<hash of the settings>/scores.parquet  one row per image and post-processing setting: the task's measures
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import pyarrow as pa

from raypipe.evaluation import labels
from raypipe.evaluation.task import Task
from raypipe.pipeline import foregrounds
from raypipe.pipeline.foregrounds import Foreground
from raypipe.pipeline.job import Label, frozen_settings
from raypipe.run import Run
from raypipe.storage import Folder, map_ahead
from raypipe.sweep.search import canonical
from raypipe.types import Segmenter

BATCHES = 16  # of a trial at least, where it has the images: its parts then hold about a quarter of them
LABEL_CHECKSUM = "label_sha256"  # column of the images and of their scores; "" for a label that cannot be read
STORED_POST = "later"  # what scores.parquet and trial.json call post-processing settings


@dataclass(frozen=True)
class Trial:
    """A setting inside the model, and the post-processing settings to score on its masks. Cheap to pickle."""

    input: str
    column: str | None
    output: str  # the trial's folder
    device: Literal["auto", "cpu", "cuda"]
    segmenter: Segmenter  # with the trial's setting and no threshold
    refiner: Callable | None  # the post-processing settings replace its fields
    posts: tuple[dict, ...]  # post-processing settings, each with `threshold` and all fields of the refiner
    task: Task
    labels: str
    images: pa.Table  # the manifest of the labelled images in a fixed random order, with `label_location`
    foreground: Foreground | None  # where the foreground comes from; None for a method that takes none

    @property
    def run(self) -> Run:
        """The trial's run."""
        return Run(self.output, self.segmenter.name)

    @property
    def settings(self) -> dict:
        """What names the trial: all parameters of the method, paths absolute."""
        return settings(self.segmenter)

    @cached_property
    def job(self) -> Label:
        """The options of the trial's run."""
        size = min(self.segmenter.batch_size, max(1, len(self.images) // BATCHES))
        return Label(
            self.input,
            self.output,
            column=self.column,
            keep_soft=self.segmenter.soft,
            device=self.device,
            batch_size=size,
            max_bad_fraction=1.0,
        )


def settings(segmenter: Segmenter) -> dict:
    """All parameters of a method but the threshold, which acts on its masks, as they are recorded."""
    frozen = frozen_settings(segmenter, None, refine=None, keep_soft=segmenter.soft)
    return {name: value for name, value in frozen.items() if name not in ("threshold", "refine", "keep_soft")}


def trial_name(segmenter: Segmenter) -> str:
    """The name of a trial's folder: equal for equal parameters inside the model."""
    return hashlib.sha256(canonical(settings(segmenter)).encode()).hexdigest()[:12]


def has_labelled(folder: Folder) -> bool:
    """Whether any trial of a sweep's folder has a committed row."""
    return any(folder.files("trials", name, "_commits") for name in folder.folders("trials"))


def with_labels(manifest: pa.Table, folder: str, task: Task) -> pa.Table:
    """The images that have a label, in the order of their ids, with the columns `label_location` and LABEL_CHECKSUM.

    Ids are hashes: their order is random and always the same. Raises ValueError when no label belongs to an image.
    """
    keys = manifest["key"].to_pylist()
    limits = {"max_bytes": Label.max_bytes, "max_pixels": Label.max_pixels}
    location = labels.match(task, folder, keys, **limits).location
    column = pa.array([location.get(key) for key in keys], pa.string())
    images = manifest.append_column("label_location", column).filter(column.is_valid()).sort_by("image_id")
    checksum = partial(task.checksum, max_bytes=Label.max_bytes)
    checksums = list(map_ahead(checksum, images["label_location"].to_pylist()))
    return images.append_column(LABEL_CHECKSUM, pa.array(checksums, pa.string()))


def with_images(trial: Trial, images: pa.Table, foreground: Foreground | None = None) -> Trial:
    """The trial with its images (`with_labels`), and maybe another place to take the foreground from."""
    foreground = foreground or trial.foreground
    if foreground and foreground.is_read:
        images = foregrounds.attach(images, foreground)
    return replace(trial, images=images, foreground=foreground)


def read_state(output: str) -> dict:
    """The content of trial.json: `settings`, `later` (STORED_POST), `status`, `seconds`, `error`."""
    return Run(output).folder.read_json("trial.json") or {}


def write_state(trial: Trial, *, status: str, seconds: float | None = None, error: str = "") -> None:
    """Write trial.json; the post-processing settings of earlier sweeps and, with None, the seconds are kept."""
    before = read_state(trial.output)
    seconds = before.get("seconds", 0.0) if seconds is None else round(seconds, 3)
    state = {"settings": trial.settings, STORED_POST: list(all_posts(trial, before).values())}
    state |= {"status": status, "seconds": seconds, "error": error}
    trial.run.folder.write_json(state, "trial.json")


def all_posts(trial: Trial, state: dict) -> dict[str, dict]:
    """The post-processing settings of earlier sweeps, from trial.json, and of this one, by their text."""
    return {canonical(post): post for post in (*state.get(STORED_POST, []), *trial.posts)}
