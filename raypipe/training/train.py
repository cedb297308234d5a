"""`raypipe train`: images -> weights that `label METHOD --weights` takes. The course of a training, on Ray Train.

    <output>/training.json                    the frozen settings, what was trained on, provenance
    <output>/checkpoints/step-00000500.pt     the newest two and the best (see `checkpoints`)
    <output>/log/  samples/  training.html    the terms of the loss at each step, masks over the epochs, a page
    <output>/skipped.parquet                  images that could not be used
    <output>/_runs/<attempt>.json             one record per attempt; LOCK; `finished.json` at the end
    <output>/...                              what the method exports, such as head.safetensors and config.json

A training may be killed at any moment: the same command goes on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from raypipe import networks
from raypipe.run import OtherConfiguration, new_attempt, provenance, refuse_other
from raypipe.runtime import address, cores
from raypipe.runtime.interruption import Interrupted, held, postponed
from raypipe.runtime.progress import count_of, count_of_images, duration
from raypipe.storage import Folder, Location, local_path, open_table
from raypipe.training import checkpoints, data, loop, page, record
from raypipe.training.job import (
    PLACES,
    Train,
    check_enough,
    check_train,
    default_settings,
    frozen_settings,
    list_images,
    per_worker,
    validation_settings,
)
from raypipe.training.recipe import Recipe
from raypipe.training.validate import Validator, exported_epoch
from raypipe.training.work import LOOK_SECONDS, STOP, Place, Work

log = logging.getLogger("raypipe")
FINISHED = ("_runs", "finished.json")
FROZEN = "training.json"
EXPERTS = "experts"  # a folder of trainings that come before
EPOCHS = ("metrics", "epochs.parquet")
SKIPPED = pa.schema([("key", pa.string()), ("uri", pa.string()), ("error", pa.string())])
QUIET = {"RAY_TRAIN_METRICS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}  # the default is two seconds
STALL_SECONDS = 1800.0  # as of labelling; Ray Data has no part in a training
NAMED = 10  # skipped images that the terminal names
LAST = 50  # steps whose mean loss is told


@dataclass(frozen=True)
class Trained:
    """How a call of `train` ended."""

    output: str
    method: str
    images: int
    skipped: dict[str, str]  # images that could not be used: key -> why
    steps: int  # of the training, all done
    skipped_steps: int  # their gradient was not finite
    epochs: int | None  # 0 where images are drawn with replacement, None where nothing is learned step by step
    loss: float | None  # mean of the last steps
    exported: int | None  # the epoch that --select has chosen; None without, where it is the last one
    seconds: float  # of this call
    is_new: bool = True  # False: it had been trained before, and nothing was done
    validation: dict | None = None  # its options
    measures: dict[str, dict] = field(default_factory=dict)  # means by variant
    measured: str = ""  # the same as a table
    page: str = ""
    exit_code: int = 0

    def text(self) -> str:
        """What was trained, what was left out, and how to use it."""
        if not self.is_new:
            lines = [f"nothing to train: {self.output} holds this training, finished"]
        elif self.epochs is None:
            lines = [f"{self.method}: made of {count_of_images(self.images)} in {duration(self.seconds)}"]
        elif not self.steps:
            lines = [f"{self.method}: exported without any training (epochs 0)"]
        else:
            epochs = f"{count_of(self.epochs, 'epoch')}, " if self.epochs else ""
            lines = [f"{self.method}: {epochs}{count_of(self.steps, 'step')} on"]
            lines[0] += f" {count_of_images(self.images)} in {duration(self.seconds)}"
        if self.loss is not None:
            lines.append(f"mean loss of the last {min(LAST, self.steps)} steps: {self.loss:.4g}")
        if self.exported:
            lines.append(f"exported: epoch {self.exported:,}, the best one on the images of --select")
        if self.skipped_steps:
            lines.append(f"{count_of(self.skipped_steps, 'step')} skipped: the loss was not finite")
        if self.skipped:
            lines.append(f"{count_of_images(len(self.skipped))} could not be used, see {self.output}/skipped.parquet")
            lines += [f"  {key}: {why}" for key, why in list(self.skipped.items())[:NAMED]]
        lines += [self.measured] if self.measured else []
        is_here = local_path(self.output) is not None
        use = f"raypipe label {self.method} --weights {shlex.quote(self.output) if is_here else 'COPY'}"
        copy = "" if is_here else "copy config.json and the weights beside it to a folder on a disk, then "
        return "\n".join([*lines, f"page: {self.page}", f"to use it: {copy}{use}"])


class Plan(NamedTuple):
    """What one call of `train` is to do."""

    job: Train
    recipe: Recipe
    folder: Folder
    attempt: str
    settings: dict  # frozen
    rows: pa.Table | None  # images to train on; None where nothing is trained
    validator: Validator | None
    known: Trained | None  # the training that is finished; then only the validation is left to do


def train(job: Train, recipe: Recipe) -> Trained:
    """Train from the newest checkpoint in the output, or from the start, to the end; then validate where asked for.

    A training that is finished stays as it is, and is only measured where that is new. Raises ValueError or
    FileNotFoundError for wrong options, missing input and checkpoints that do not fit, run.OtherConfiguration and
    storage.Locked when the output belongs to another training, interruption.Interrupted after a signal and RuntimeError
    when the training failed; after the last two the same call goes on.
    """
    start, folder = time.monotonic(), Folder(job.output)
    check_train(job, recipe)
    settings = frozen_settings(job, recipe)
    check_frozen(folder, settings, defaults=default_settings(recipe))
    known = _finished(folder, start)
    if known and validation_settings(job) in (None, known.validation):
        return known
    limits = {"max_bytes": job.max_bytes, "max_pixels": job.max_pixels}
    validator = Validator(job, recipe, **limits) if job.validate else None
    rows = None if known else list_images(job, recipe)
    if job.local or not address.is_elsewhere():
        networks.look_for_each(recipe)
    plan = Plan(job, recipe, folder, new_attempt(), settings, rows, validator, known)
    with held(folder, plan.attempt):
        clean(folder)
        options = {name: value and Location(value) if name in PLACES else value for name, value in asdict(job).items()}
        facts = {"options": options, "settings": settings, "images": len(rows) if rows else 0}
        with provenance.recorded(folder, plan.attempt, facts) as facts:
            if rows is not None:
                plan = plan._replace(rows=recipe.precede(rows, job, folder))
            work = (train_here if job.local else train_on_ray)(plan)
            trained = _ended(plan, work, start)
            facts |= asdict(trained)
    return trained


def has_begun(job: Train) -> bool:
    """Whether there is a training in the output that the same command would go on with."""
    with contextlib.suppress(Exception):  # an output that cannot be read: the error at hand says why
        folder = Folder(job.output)
        return folder.read(FROZEN) is not None or bool(folder.folders(EXPERTS))
    return False


def check_frozen(folder: Folder, settings: dict, *, defaults: dict) -> None:
    """Raise OtherConfiguration where the folder holds a training of other settings, or something else."""
    if (there := folder.read_json(FROZEN)) is not None:
        refuse_other(f"{folder} holds a training of other settings", defaults | there["settings"], settings)
        return
    for name in ("run.json", "config.json", "checkpoints"):
        if name in folder.files() or name in folder.folders():
            raise OtherConfiguration(f"{folder} holds {name} of something else; choose another --output")


def clean(folder: Folder) -> None:
    """Delete what a killed attempt left."""
    folder.delete(*STOP)
    for name in folder.folders("_runs"):
        folder.delete_folder("_runs", name)  # of Ray
    for room in ("", "checkpoints", "log", "samples", "_runs"):
        names = [room] if room else []
        for name in folder.dead_files(*names):
            folder.delete(*names, name)


def train_here(plan: Plan) -> Work:
    """Train in this process. Returns the work that was done."""
    job, came = plan.job, []
    work = begin(plan, _samples(plan, data.gather))

    def is_stopped() -> bool:
        try:
            handle()
        except Interrupted as error:
            came.append(error)
        return bool(came)

    with told(work), postponed() as handle:
        loop.run(work, Place(device=cores.device_here(job.device, gpus=1.0), is_stopped=is_stopped))
    if came:
        raise came[0]
    return work


def _samples(plan: Plan, gather: Callable) -> data.Samples | None:
    """The samples of all images but those that the training has begun without: one may be there again by now."""
    if plan.rows is None:
        return None
    left_out = _left_out(plan.folder)
    keys = pa.array([each["key"] for each in left_out], pa.string())
    rows = plan.rows.filter(pc.invert(pc.is_in(plan.rows["key"], keys)))
    samples = gather(plan.recipe, rows, max_bytes=plan.job.max_bytes, max_pixels=plan.job.max_pixels)
    samples.skipped = [*left_out, *samples.skipped]
    return samples


def _left_out(folder: Folder) -> list[dict]:
    """The rows of skipped.parquet of a training that has begun."""
    if folder.read(FROZEN) is None or not (stored := folder.read("skipped.parquet")):
        return []
    return open_table(stored).read().to_pylist()


def begin(plan: Plan, samples: data.Samples | None) -> Work:
    """The work of all workers, after the settings and what is trained on are frozen and skipped images are named.

    Raises OtherConfiguration where the images are not those that the folder's training has seen.
    """
    job, recipe, folder = plan.job, plan.recipe, plan.folder
    images = {"images": len(samples) if samples else 0, "digest": samples.digest if samples else None}
    if (there := folder.read_json(FROZEN)) is not None and not plan.known:
        what = f"{folder} holds a training on other images{_new_ones(samples, folder)}"
        refuse_other(what, {name: there[name] for name in images}, images)
    if samples is not None:
        folder.write_table(pa.Table.from_pylist(samples.skipped, SKIPPED), "skipped.parquet")
        _warn_of_skipped(samples, folder)
        check_enough(len(samples), job, recipe, skipped=len(samples.skipped))
    if there is None:
        folder.write_json({"settings": plan.settings} | images | {"provenance": provenance.environment()}, FROZEN)
    batch, lr = per_worker(job, recipe)
    return Work(
        recipe=recipe,
        samples=samples,
        folder=folder,
        attempt=plan.attempt,
        settings=plan.settings,
        workers=job.workers,
        batch=batch,
        lr=lr,
        tail=job.tail,
        synchronised=job.sync_statistics,
        checkpoint_steps=job.checkpoint_steps,
        log_steps=job.log_steps,
        is_trained=plan.known is not None,
        validator=plan.validator,
        validate_every=job.validate_every,
        selects=job.select is not None,
    )


def prepare_ray() -> None:
    """Say that Ray will be joined or started, where it was not before, and have it say less."""
    if "ray" not in sys.modules:
        address = os.environ.get("RAY_ADDRESS")
        log.info("joining Ray at %s" if address else "starting Ray", *filter(None, [address]))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def train_on_ray(plan: Plan) -> Work:
    """Train on Ray Train's workers. Returns the work that was done."""
    prepare_ray()
    from raypipe.runtime import cluster
    from raypipe.training import workers

    job = plan.job
    with cluster.connected(stall=STALL_SECONDS):
        places = {"input": job.input} if job.input else {}
        cluster.warn_of_local_paths(**places, output=job.output)
        found = cluster.resources(gpus=1.0, device=job.device, actors=job.workers, option="--workers")
        with cluster.plain_errors():
            samples = _samples(plan, data.gather_on_ray)
        work = begin(plan, samples)
        log.info("%s on %s", count_of(job.workers, "worker"), found.device)
        with told(work):
            workers.fit(work, device=found.device, max_failures=job.max_failures)
    return work


def _new_ones(samples: data.Samples | None, folder: Folder) -> str:
    """In words, which images a training that has begun can no longer use."""
    new = samples.skipped[len(_left_out(folder)) :] if samples else []
    if not new:
        return ""
    return f": {count_of_images(len(new))} cannot be used any more, such as {new[0]['key']}: {new[0]['error']}"


def _warn_of_skipped(samples: data.Samples, folder: Folder) -> None:
    if samples.skipped:
        where = folder.location("skipped.parquet")
        log.warning("%s cannot be used and will be left out, see %s", count_of_images(len(samples.skipped)), where)


@contextlib.contextmanager
def told(work: Work) -> Iterator[None]:
    """Log a line for every `log_steps` steps while the block runs, as far as the log of the training has come."""
    news, over, last = record.follow(work.folder), threading.Event(), 0

    def tell() -> None:
        nonlocal last
        if rows := news():
            if rows[0]["step"] <= last:
                log.warning("a worker died: all went on from the checkpoint of step %s", f"{rows[0]['step'] - 1:,}")
            last = rows[-1]["step"]
            log.info(record.line(rows, steps=work.steps, per_epoch=work.per_epoch, epochs=work.recipe.epochs))

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            tell()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        tell()


def _finished(folder: Folder, start: float) -> Trained | None:
    """How the training in the folder ended, if it has, for a call that began at `start` and finds nothing to train."""
    if (known := folder.read_json(*FINISHED)) is None:
        return None
    seconds = round(time.monotonic() - start, 3)
    return replace(Trained(**known), output=str(folder), is_new=False, seconds=seconds)


def _ended(plan: Plan, work: Work, start: float) -> Trained:
    """Write the tables of the validation, the page and, last, that the training is finished. Tells how it ended."""
    folder, found = plan.folder, plan.known or _trained(work)
    if checkpoints.FINISHED not in folder.files(checkpoints.ROOM):  # somebody else has written the file
        raise RuntimeError(f"{folder}: stopped by the file {'/'.join(STOP)}; the same command goes on")
    if plan.validator:
        validated = plan.validator.write(folder, open_table(folder.read(*loop.MEASURED)).read())
        folder.delete(*loop.MEASURED)
        measures = {name: each.means for name, each in validated.runs.items()}
        found = replace(found, validation=validation_settings(plan.job), measures=measures, measured=validated.text())
    shown = page.write_page(folder, method=plan.recipe.name, settings=plan.settings, steps=found.steps)
    found = replace(found, page=shown, seconds=round(time.monotonic() - start, 3))
    folder.write_json(asdict(found), *FINISHED)
    return found


def _trained(work: Work) -> Trained:
    table, samples = record.read(work.folder), work.samples
    last = [row["total"] for row in table.slice(max(0, len(table) - LAST)).to_pylist() if not row["skipped"]]
    return Trained(
        output=str(work.folder),
        method=work.recipe.name,
        images=len(samples) if samples else 0,
        skipped={each["key"]: each["error"] for each in samples.skipped} if samples else {},
        steps=work.steps,
        skipped_steps=sum(table["skipped"].to_pylist()),
        epochs=work.recipe.epochs if work.recipe.has_steps else None,
        loss=sum(last) / len(last) if last else None,
        exported=exported_epoch(open_table(work.folder.read(*EPOCHS)).read().to_pylist()) if work.selects else None,
        seconds=0.0,
    )
