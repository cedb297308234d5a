"""The options of a training, whether they can work, and what of them decides the weights."""

from __future__ import annotations

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Literal

import pyarrow as pa

from raypipe.inputs.manifest import list_inputs
from raypipe.pipeline.job import check_folders
from raypipe.runtime import address, cores
from raypipe.storage import Location
from raypipe.training.recipe import Recipe
from raypipe.training.validate import Validation

PLACES = ("input", "output", "root", "labels", "select")  # options that are paths or URIs
OF_STEPS = ("workers", "batch_mode", "tail", "sync_statistics", "checkpoint_steps", "log_steps")
FREE = ("keep_files",)  # options of recipes that decide nothing about the weights
POSITIVE = ("workers", "checkpoint_steps", "log_steps", "max_pixels", "max_bytes")


@dataclass(frozen=True, kw_only=True)
class Course:
    """What to train on and how the training runs."""

    # folder, made or continued: a path or a URI; in the end `label METHOD --weights` takes it (of a bucket, a copy)
    output: str
    input: str | None = None  # images, as for `label`: folder, glob, list, Parquet or tar; labels are not needed
    column: str | None = None  # column of a list or table with URIs or images, or ending in tars (jpg); None finds it
    allow_private: bool = False  # what a list or table names may lie in a private network
    workers: int = 1  # processes that train together, on GPUs one each
    # exact: --batch-size is that of all workers; throughput: of each, with a larger lr
    batch_mode: Literal["exact", "throughput"] = "exact"
    tail: Literal["pad", "drop"] = "pad"  # an epoch's last batch is filled from the epoch's start, or left out
    sync_statistics: bool = True  # batch normalisation over all workers; only throughput can do without
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the network is trained
    checkpoint_steps: int = 500  # steps between checkpoints; each epoch ends with one too
    log_steps: int = 50  # steps of one line of progress
    local: bool = False  # in this process, without Ray: one worker
    max_failures: int = 3  # deaths of workers, after each of which all go on from the newest checkpoint
    max_pixels: int = 100_000_000  # images with more pixels are skipped, before they are decoded
    max_bytes: int = 500_000_000  # files with more bytes are skipped, before they are read

    @property
    def is_exact(self) -> bool:
        """Whether the weights do not depend on the number of workers."""
        return self.batch_mode == "exact"


@dataclass(frozen=True, kw_only=True)
class Train(Validation, Course):  # the fields of Course come first
    """What to train on, how the training runs, and on what it is measured."""


def check_train(job: Train, recipe: Recipe) -> None:
    """Raise ValueError for options that cannot work or have no effect, before anything starts."""
    for option in POSITIVE:
        if getattr(job, option) <= 0:
            raise ValueError(f"--{option.replace('_', '-')} must be positive, got {getattr(job, option)}")
    if job.max_failures < 0:
        raise ValueError(f"--max-failures must not be negative, got {job.max_failures}")
    _check_recipe(recipe)
    for option in OF_STEPS if not recipe.has_steps else ():
        if (value := getattr(job, option)) != getattr(Train, option):
            text = f"--{option.replace('_', '-')} {value} has no effect: nothing is learned step by step"
            raise ValueError(f"{recipe.name}: {text}")
    if job.is_exact and recipe.batch_size % job.workers:
        text = f"--batch-size {recipe.batch_size} cannot be shared out evenly to --workers {job.workers}"
        raise ValueError(f"{text}; choose a multiple of {job.workers}, or --batch-mode throughput")
    if job.validate_every > recipe.rounds:
        raise ValueError(f"--validate-every {job.validate_every} has no effect on {recipe.rounds} epochs; leave it out")
    if recipe.iterations and job.tail != Train.tail:
        raise ValueError(f"--tail {job.tail} has no effect on {recipe.name}, which draws images with replacement")
    _check_effects(job)
    check_folders(job.input or os.devnull, job.output)  # without an input the output lies inside none
    if job.local or not address.is_elsewhere():
        cores.device_here(job.device, gpus=1.0)  # refuses cuda where there is none


def _check_recipe(recipe: Recipe) -> None:
    if recipe.epochs < 0 or recipe.batch_size < 1:
        text = f"got epochs {recipe.epochs}, batch_size {recipe.batch_size}"
        raise ValueError(f"{recipe.name}: epochs must be at least 0 and batch_size at least 1, {text}")
    if not (math.isfinite(recipe.lr) and recipe.lr > 0):
        raise ValueError(f"{recipe.name}: lr must be a positive number, got {recipe.lr!r}")
    if not 0 <= recipe.seed < 2**31:
        raise ValueError(f"{recipe.name}: seed must be in 0..{2**31 - 1}, got {recipe.seed}")


def _check_effects(job: Train) -> None:
    if job.local and job.workers > 1:
        raise ValueError(f"--workers {job.workers} has no effect with --local, which is one worker")
    if job.local and job.max_failures != Train.max_failures:
        raise ValueError(f"--max-failures {job.max_failures} has no effect with --local, which has no other process")
    if job.is_exact and not job.sync_statistics:
        raise ValueError("--no-sync-statistics is against --batch-mode exact; add --batch-mode throughput")
    if not job.is_exact and job.workers == 1:
        raise ValueError("--batch-mode throughput has no effect with one worker; add --workers")
    if not job.input:
        for option in ("column", "allow_private"):
            if getattr(job, option):
                raise ValueError(f"--{option.replace('_', '-')} has no effect without --input")


def frozen_settings(job: Train, recipe: Recipe) -> dict:
    """The settings that decide the weights, flat, by the names of their options: what training.json freezes."""
    options = {name: value for name, value in asdict(recipe).items() if name not in FREE}
    settings = {"method": recipe.name} | options | {"batch_mode": job.batch_mode, "tail": job.tail}
    if not job.is_exact:
        settings |= {"workers": job.workers, "sync_statistics": job.sync_statistics}
    if job.select:  # then the validation says which epoch is exported
        settings |= validation_settings(job)
    return settings


def validation_settings(job: Train) -> dict | None:
    """The options of the validation, places without credentials; None where there is none."""
    if not job.validate:
        return None
    values = {each.name: getattr(job, each.name) for each in fields(Validation)}
    values = {name: value and str(Location(value)) if name in PLACES else value for name, value in values.items()}
    return json.loads(json.dumps(values))  # as it comes back from a file


def default_settings(recipe: Recipe) -> dict:
    """The same at its defaults, for settings that an older version of raypipe did not have."""
    defaults = {
        each.name: each.default for each in fields(recipe) if each.default is not MISSING and each.name not in FREE
    }
    return defaults | {"batch_mode": Train.batch_mode, "tail": Train.tail}


def per_worker(job: Train, recipe: Recipe) -> tuple[int, float]:
    """Images per worker and step, and the learning rate at rate 1, which grows with the batch as `lr_power` says."""
    if job.is_exact:
        return recipe.batch_size // job.workers, recipe.lr
    return recipe.batch_size, recipe.lr * job.workers**recipe.lr_power


def list_images(job: Train, recipe: Recipe) -> pa.Table | None:
    """The images to train on; None where nothing is trained and none are named.

    Raises ValueError or FileNotFoundError for a missing or empty input, and for fewer images than a batch.
    """
    listed = list_inputs(job.input, column=job.column, allow_private=job.allow_private) if job.input else None
    rows = recipe.rows(listed)
    if not (recipe.rounds or rows):
        return None
    check_enough(len(rows), job, recipe)
    return rows


def check_enough(images: int, job: Train, recipe: Recipe, *, skipped: int = 0) -> None:
    """Raise ValueError for fewer images than a batch of all workers."""
    size = 1 if recipe.iterations else per_worker(job, recipe)[0] * job.workers
    if recipe.rounds and images < size:
        bad = f" ({skipped:,} more cannot be used: see skipped.parquet)" if skipped else ""
        text = f"{images:,} images{bad} are fewer than the {size:,} of one batch"
        raise ValueError(f"{recipe.name}: {text}; give more images or a smaller --batch-size")
