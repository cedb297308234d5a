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
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from raypipe import networks
from raypipe.lookup import one_line
from raypipe.run import OtherConfiguration, new_attempt, provenance, refuse_other
from raypipe.runtime import address, cores
from raypipe.runtime.interruption import Interrupted, held, postponed
from raypipe.runtime.progress import count_of, count_of_images, duration
from raypipe.storage import Folder, Location, Locked
from raypipe.training import data, loop, record
from raypipe.training.job import (
    Train,
    check_enough,
    check_train,
    default_settings,
    frozen_settings,
    list_images,
    per_worker,
)
from raypipe.training.loop import Diverged
from raypipe.training.recipe import Recipe

log = logging.getLogger("raypipe")
FINISHED = ("_runs", "finished.json")
PLACES = ("input", "output")  # options that are paths or URIs
FROZEN = "training.json"
SKIPPED = pa.schema([("key", pa.string()), ("uri", pa.string()), ("error", pa.string())])
OWN_ERRORS = {each.__name__: each for each in (ValueError, FileNotFoundError, Locked, OtherConfiguration, Diverged)}
QUIET = {"RAY_TRAIN_METRICS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}  # the default is two seconds
NAMED = 10  # skipped images that the terminal names
LAST = 50  # steps whose mean loss is told
SAVING_SECONDS = 7.0  # for the workers' checkpoint after a signal; `interruption` ends the process after ten


@dataclass(frozen=True)
class Trained:
    """How a call of `train` ended."""

    output: str
    method: str
    images: int
    skipped: dict[str, str]  # images that could not be used: key -> why
    steps: int  # of the training, all done
    skipped_steps: int  # their gradient was not finite
    epochs: int
    loss: float | None  # mean of the last steps
    seconds: float  # of this call
    is_new: bool = True  # False: it had been trained before, and nothing was done
    exit_code: int = field(default=0)

    def text(self) -> str:
        """What was trained, what was left out, and how to use it."""
        if not self.is_new:
            lines = [f"nothing to do: {self.output} holds this training, finished"]
        else:
            lines = [f"{self.method}: {count_of(self.epochs, 'epoch')}, {count_of(self.steps, 'step')} on"]
            lines[0] += f" {count_of_images(self.images)} in {duration(self.seconds)}"
        if self.loss is not None:
            lines.append(f"mean loss of the last {min(LAST, self.steps)} steps: {self.loss:.4g}")
        if self.skipped_steps:
            lines.append(f"{count_of(self.skipped_steps, 'step')} skipped: the loss was not finite")
        if self.skipped:
            lines.append(f"{count_of_images(len(self.skipped))} could not be used, see {self.output}/skipped.parquet")
            lines += [f"  {key}: {why}" for key, why in list(self.skipped.items())[:NAMED]]
        return "\n".join([*lines, f"to use it: raypipe label {self.method} --weights {self.output}"])


def train(job: Train, recipe: Recipe) -> Trained:
    """Train from the newest checkpoint in the output, or from the start, to the end. One that is finished stays.

    Raises ValueError or FileNotFoundError for wrong options, missing input and checkpoints that do not fit,
    run.OtherConfiguration and storage.Locked when the output belongs to another training, interruption.Interrupted
    after a signal and RuntimeError when the training failed; after the last two the same call goes on.
    """
    start, folder = time.monotonic(), Folder(job.output)
    check_train(job, recipe)
    settings = frozen_settings(job, recipe)
    check_frozen(folder, settings, defaults=default_settings(recipe))
    if known := folder.read_json(*FINISHED):
        return Trained(**known | {"output": str(folder), "is_new": False, "seconds": time.monotonic() - start})
    rows = list_images(job, recipe)
    if job.local or not address.is_elsewhere():
        networks.look_for_each(recipe)
    attempt = new_attempt()
    with held(folder, attempt):
        clean(folder)
        options = {name: value and Location(value) if name in PLACES else value for name, value in asdict(job).items()}
        facts = {"options": options, "settings": settings, "images": len(rows) if rows else 0}
        with provenance.recorded(folder, attempt, facts) as facts:
            work = (train_here if job.local else train_on_ray)(job, recipe, rows, folder, attempt, settings)
            trained = _trained(work, start)
            folder.write_json(asdict(trained), *FINISHED)
            facts |= asdict(trained)
    return trained


def has_begun(job: Train) -> bool:
    """Whether there is a training in the output that the same command would go on with."""
    with contextlib.suppress(Exception):  # an output that cannot be read: the error at hand says why
        return Folder(job.output).read(FROZEN) is not None
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
    folder.delete(*loop.STOP)
    for name in folder.folders("_runs"):
        folder.delete_folder("_runs", name)  # of Ray
    for room in ("", "checkpoints", "log", "samples", "_runs"):
        names = [room] if room else []
        for name in folder.dead_files(*names):
            folder.delete(*names, name)


def train_here(job: Train, recipe: Recipe, rows: pa.Table | None, folder: Folder, attempt: str, settings: dict):
    """Train in this process. Returns the work that was done."""
    limits = {"max_bytes": job.max_bytes, "max_pixels": job.max_pixels}
    samples = None if rows is None else data.gather(recipe, rows, **limits)
    work = begin(job, recipe, samples, folder, attempt, settings)
    came = []

    def is_stopped() -> bool:
        try:
            handle()
        except Interrupted as error:
            came.append(error)
        return bool(came)

    with told(work), postponed() as handle:
        loop.run(work, loop.Place(device=cores.device_here(job.device, gpus=1.0), is_stopped=is_stopped))
    if came:
        raise came[0]
    return work


def begin(job: Train, recipe: Recipe, samples: data.Samples | None, folder: Folder, attempt: str, settings: dict):
    """The work of all workers, after the settings and what is trained on are frozen and skipped images are named.

    Raises OtherConfiguration where the images are not those that the folder's training has seen.
    """
    if samples is not None:
        folder.write_table(pa.Table.from_pylist(samples.skipped, SKIPPED), "skipped.parquet")
        _warn_of_skipped(samples, folder)
        check_enough(len(samples), job, recipe, skipped=len(samples.skipped))
    images = {"images": len(samples) if samples else 0, "digest": samples.digest if samples else None}
    if (there := folder.read_json(FROZEN)) is None:
        folder.write_json({"settings": settings} | images | {"provenance": provenance.environment()}, FROZEN)
    else:
        known = {name: there[name] for name in images}
        refuse_other(f"{folder} holds a training on other images", known, images)
    batch, lr = per_worker(job, recipe)
    return loop.Work(
        recipe=recipe,
        samples=samples,
        folder=folder,
        attempt=attempt,
        settings=settings,
        workers=job.workers,
        batch=batch,
        lr=lr,
        tail=job.tail,
        synchronised=job.sync_statistics,
        checkpoint_steps=job.checkpoint_steps,
        log_steps=job.log_steps,
    )


def train_on_ray(job: Train, recipe: Recipe, rows: pa.Table | None, folder: Folder, attempt: str, settings: dict):
    """Train on Ray Train's workers. Returns the work that was done."""
    if "ray" not in sys.modules:
        address = os.environ.get("RAY_ADDRESS")
        log.info("joining Ray at %s" if address else "starting Ray", *filter(None, [address]))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from raypipe.runtime import cluster

    with cluster.connected(stall=1800.0):
        places = {"input": job.input} if job.input else {}
        cluster.warn_of_local_paths(**places, output=job.output)
        found = cluster.resources(gpus=1.0, device=job.device, actors=job.workers, option="--workers")
        limits = {"max_bytes": job.max_bytes, "max_pixels": job.max_pixels}
        with cluster.plain_errors():
            samples = None if rows is None else data.gather(recipe, rows, **limits)
        work = begin(job, recipe, samples, folder, attempt, settings)
        log.info("%s on %s", count_of(job.workers, "worker"), found.device)
        with told(work):
            _fit(work, found.device, job)
    return work


def _fit(work: loop.Work, device: str, job: Train) -> None:
    """Run the workers to their end. After a signal they are asked to save first.

    In a thread: Ray would set a handler of its own for Ctrl-C, and the main thread can be interrupted while it waits.
    Raises what a worker said is wrong, and RuntimeError when workers died too often.
    """
    folder, errors = work.folder, []
    trainer = _trainer(work, device, job)

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    fitted = threading.Thread(target=fit, daemon=True)
    fitted.start()
    try:
        fitted.join()
    except Interrupted:
        folder.write(b"", *loop.STOP)
        fitted.join(SAVING_SECONDS)
        raise
    finally:
        with contextlib.suppress(OSError):
            folder.delete_folder(*_scratch(work))
    if said := folder.read(*_failure(work)):
        kind, text = json.loads(said)
        raise OWN_ERRORS[kind](text)
    if errors:
        raise RuntimeError(_why(errors[0], job)) from errors[0]


def _trainer(work: loop.Work, device: str, job: Train):
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = device == "cuda"
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores.count() // job.workers))
    return TorchTrainer(
        _worker,
        train_loop_config={"work": work, "threads": threads},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.workers, use_gpu=on_gpu, resources_per_worker={"CPU": 1} | ({"GPU": 1} if on_gpu else {})
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=work.folder.path(*_scratch(work)),  # Ray keeps notes there; all machines must see it
            storage_filesystem=work.folder.fs,
            failure_config=ray.train.FailureConfig(max_failures=job.max_failures),
        ),
    )


def _worker(config: dict) -> None:
    """What runs in each worker of Ray Train.

    An error that says what is wrong would come again after a restart: it is left in a file, and a restarted worker ends
    at once where there is one.
    """
    import ray.train
    import ray.train.torch
    import torch

    work, context = config["work"], ray.train.get_context()
    if work.folder.read(*_failure(work)):
        return
    torch.set_num_threads(config["threads"])
    rank, device = context.get_world_rank(), ray.train.torch.get_device().type
    more = {"is_stopped": loop.StopFile(work.folder)} if rank == 0 else {}
    try:
        loop.run(work, loop.Place(rank=rank, device=device, report=ray.train.report, **more))
    except tuple(OWN_ERRORS.values()) as error:
        kind = next(name for name, each in OWN_ERRORS.items() if isinstance(error, each))
        work.folder.write_json([kind, str(error)], *_failure(work))
        raise


def _scratch(work: loop.Work) -> tuple[str, str]:
    return "_runs", f"ray-{work.attempt}"


def _failure(work: loop.Work) -> tuple[str, str]:
    return "_runs", f"failed-{work.attempt}.json"


def _why(error: Exception, job: Train) -> str:
    """Why the training failed, in one line: what the first worker with an error of its own said, or that it died."""
    from ray.exceptions import RayActorError

    from raypipe.runtime.cluster import cause

    failures = getattr(error, "worker_failures", {}) or {0: error}
    causes = sorted(map(cause, failures.values()), key=lambda each: isinstance(each, RayActorError))
    text = one_line(causes[0], limit=500)
    if isinstance(causes[0], RayActorError):
        text = f"a worker's process died ({text})"
    again = f" {job.max_failures + 1} times, last" if job.max_failures else ""
    return f"the training stopped{again}: {text}"


def _warn_of_skipped(samples: data.Samples, folder: Folder) -> None:
    if samples.skipped:
        where = folder.location("skipped.parquet")
        log.warning("%s cannot be used and will be left out, see %s", count_of_images(len(samples.skipped)), where)


@contextlib.contextmanager
def told(work: loop.Work) -> Iterator[None]:
    """Log a line for every `log_steps` steps while the block runs, as far as the log of the training has come."""
    news, over, rows = record.follow(work.folder), threading.Event(), []

    def tell() -> None:
        rows.extend(news())
        if rows:
            log.info(record.line(rows, steps=work.steps, per_epoch=work.per_epoch, epochs=work.recipe.epochs))
            rows.clear()

    def watch() -> None:
        while not over.wait(loop.LOOK_SECONDS):
            tell()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        tell()


def _trained(work: loop.Work, start: float) -> Trained:
    table = record.read(work.folder, after=max(0, work.steps - LAST))
    rows = [row["total"] for row in table.to_pylist() if not row["skipped"]] if len(table) else []
    skipped = record.read(work.folder)["skipped"].to_pylist() if work.steps else []
    return Trained(
        output=str(work.folder),
        method=work.recipe.name,
        images=len(work.samples) if work.samples else 0,
        skipped={each["key"]: each["error"] for each in work.samples.skipped} if work.samples else {},
        steps=work.steps,
        skipped_steps=sum(skipped),
        epochs=work.recipe.epochs,
        loss=sum(rows) / len(rows) if rows else None,
        seconds=round(time.monotonic() - start, 3),
    )
