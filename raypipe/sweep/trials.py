"""One trial of a sweep: a run over the labelled images, on whose stored masks all later settings are scored.

trials/<hash of the settings>/            a run like any other: every command reads it
trials/<hash of the settings>/trial.json  its settings, how it ended
trials/<hash of the settings>/scores.parquet  one row per image and later setting: the task's measures
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import pyarrow as pa

from raypipe import storage
from raypipe.inputs import maskfiles
from raypipe.pipeline import foregrounds
from raypipe.pipeline.foregrounds import Foreground
from raypipe.pipeline.job import Label, frozen_settings
from raypipe.run import Run
from raypipe.storage import Folder, map_ahead
from raypipe.sweep.search import canonical
from raypipe.types import BadImage, Segmenter

SIXTEENTH = 16  # a trial's parts hold about a quarter of the images: four batches of a sixteenth
LABEL = "label_sha256"  # column of the images and of their scores: the label file, "" for one that cannot be read


@dataclass(frozen=True)
class Trial:
    """One setting of what acts inside the model, and the later settings to score on its masks. Cheap to pickle."""

    input: str
    column: str | None
    output: str  # the trial's folder
    device: Literal["auto", "cpu", "cuda"]
    segmenter: Segmenter  # with the trial's setting and no threshold
    refiner: Callable | None  # the later settings replace its fields
    later: tuple[dict, ...]  # each with `threshold` and all fields of the refiner
    task: str
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
        size = min(self.segmenter.batch_size, max(1, len(self.images) // SIXTEENTH))
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
    found = frozen_settings(segmenter, None, refine=None, keep_soft=segmenter.soft)
    return {name: value for name, value in found.items() if name not in ("threshold", "refine", "keep_soft")}


def trial_name(segmenter: Segmenter) -> str:
    """The name of a trial's folder: equal for equal parameters inside the model."""
    return hashlib.sha256(canonical(settings(segmenter)).encode()).hexdigest()[:12]


def has_labelled(folder: Folder) -> bool:
    """Whether any trial of a sweep's folder has a committed row."""
    return any(folder.files("trials", name, "_commits") for name in folder.folders("trials"))


def read_state(output: str) -> dict:
    """The content of trial.json: `settings`, `later`, `status` (running, done, stopped, failed), `seconds`, `error`."""
    content = Run(output).folder.read("trial.json")
    return json.loads(content) if content else {}


def write_state(trial: Trial, *, status: str, seconds: float | None = None, error: str = "") -> None:
    """Write trial.json; the later settings of earlier sweeps and, with None, the seconds are kept."""
    before = read_state(trial.output)
    seconds = before.get("seconds", 0.0) if seconds is None else round(seconds, 3)
    state = {"settings": trial.settings, "later": list(_all_later(trial, before).values())}
    state |= {"status": status, "seconds": seconds, "error": error}
    trial.run.folder.write((json.dumps(state, indent=2) + "\n").encode(), "trial.json")


def _all_later(trial: Trial, state: dict) -> dict[str, dict]:
    """The later settings of earlier sweeps, from trial.json, and of this one, by their text."""
    return {canonical(setting): setting for setting in (*state.get("later", []), *trial.later)}


# Scores


def with_labels(manifest: pa.Table, labels: str) -> pa.Table:
    """The images that have a label file, in the order of their ids, with the columns `label_location` and LABEL.

    Ids are hashes: their order is random and always the same. Raises ValueError when no label belongs to an image.
    """
    keys = manifest["key"].to_pylist()
    matches = maskfiles.match(labels, keys)
    if not matches.location:
        example = f"; images are named as {keys[0]!r}, labels as {matches.unused[0]!r}" if matches.unused else ""
        raise ValueError(f"no label in {storage.redact(labels)} has the path or the stem of an image{example}")
    location = pa.array([matches.location.get(key) for key in keys], pa.string())
    found = manifest.append_column("label_location", location).filter(location.is_valid()).sort_by("image_id")
    checksums = list(map_ahead(_checksum, found["label_location"].to_pylist()))
    return found.append_column(LABEL, pa.array(checksums, pa.string()))


def _checksum(label: str) -> str:
    try:
        return hashlib.sha256(storage.read_bytes(label, max_bytes=Label.max_bytes)).hexdigest()
    except BadImage:
        return ""


def with_images(trial: Trial, images: pa.Table, foreground: Foreground | None = None) -> Trial:
    """The trial with its images (`with_labels`), and maybe another place to take the foreground from."""
    foreground = foreground or trial.foreground
    if foreground and foreground.is_read:
        images = foregrounds.attach(images, foreground)
    return replace(trial, images=images, foreground=foreground)
