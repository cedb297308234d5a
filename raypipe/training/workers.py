"""The workers of a training as Ray Train's: started, asked to stop, started anew where one has died.

Ray's own checkpoints are not used: one counts only after the controller has looked at the workers again, and the newest
file in the output counts at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading

import ray.train
import ray.train.torch
import torch

from raypipe.lookup import one_line
from raypipe.run import OtherConfiguration
from raypipe.runtime import cores
from raypipe.runtime.cluster import cause
from raypipe.runtime.interruption import Interrupted
from raypipe.storage import Locked
from raypipe.training import loop
from raypipe.training.work import STOP, Place, StopFile, Work

log = logging.getLogger("raypipe")
OWN_ERRORS = (ValueError, FileNotFoundError, Locked, OtherConfiguration, loop.Diverged)  # would come again
DIED = "a worker's process died; was it killed, or is there too little memory (fewer --workers, smaller --batch-size)?"
WAIT_SECONDS = {"nccl": 1800, "gloo": 6 * 3600}  # for the first one, who ends a training alone: long on a CPU
SAVING_SECONDS = 7.0  # for a checkpoint after a signal; `interruption` ends the process after ten


def fit(work: Work, *, device: str, max_failures: int) -> None:
    """Run the workers to their end. After a signal they are asked to save first.

    In a thread: Ray would set a handler of its own for Ctrl-C, and the main thread can be interrupted while it waits.
    Raises what a worker said is wrong, and RuntimeError when workers died too often.
    """
    folder, errors, over, is_stopped = work.folder, [], threading.Event(), False
    trainer = _trainer(work, device, max_failures)

    def wait() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    try:
        over.wait()  # not `join`: Python takes a thread for ended whose join a signal has interrupted
    except Interrupted:
        log.info("stopping; the workers save first")
        with contextlib.suppress(OSError):  # a full disk: they cannot save either
            folder.write(b"", *STOP)
            over.wait(SAVING_SECONDS)
        raise
    finally:
        with contextlib.suppress(OSError):
            is_stopped = folder.read(*STOP) is not None
            folder.delete(*STOP)
            folder.delete_folder(*_scratch(work))
    if said := folder.read(*_failure(work)):
        folder.delete(*_failure(work))
        kind, text = json.loads(said)
        raise {each.__name__: each for each in OWN_ERRORS}[kind](text)
    if errors:
        raise RuntimeError(_why(errors[0], max_failures)) from errors[0]
    if is_stopped:  # by another process: the workers have left off
        raise RuntimeError(f"the training was asked to stop by the file {folder.location(*STOP)}, and saved")


def _trainer(work: Work, device: str, max_failures: int) -> ray.train.torch.TorchTrainer:
    on_gpu, backend = device == "cuda", "nccl" if device == "cuda" else "gloo"
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores.count() // work.workers))
    return ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"work": work, "threads": threads},
        torch_config=ray.train.torch.TorchConfig(backend=backend, timeout_s=WAIT_SECONDS[backend]),
        scaling_config=ray.train.ScalingConfig(
            num_workers=work.workers, use_gpu=on_gpu, resources_per_worker={"CPU": 1} | ({"GPU": 1} if on_gpu else {})
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=work.folder.path(*_scratch(work)),  # Ray keeps notes there; all machines must see it
            storage_filesystem=work.folder.fs,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )


def _worker(config: dict) -> None:
    """What runs in each worker of Ray Train.

    An error that says what is wrong would come again after a restart: it is left in a file, and a restarted worker ends
    at once where there is one.
    """
    work, context = config["work"], ray.train.get_context()
    if work.folder.read(*_failure(work)):
        return
    torch.set_num_threads(config["threads"])
    rank, device = context.get_world_rank(), ray.train.torch.get_device().type
    more = {"is_stopped": StopFile(work.folder)} if rank == 0 else {}
    try:
        loop.run(work, Place(rank=rank, device=device, report=ray.train.report, **more))
    except OWN_ERRORS as error:
        kind = next(each.__name__ for each in OWN_ERRORS if isinstance(error, each))
        work.folder.write_json([kind, str(error)], *_failure(work))
        raise


def _scratch(work: Work) -> tuple[str, str]:
    return "_runs", f"ray-{work.attempt}"


def _failure(work: Work) -> tuple[str, str]:
    return "_runs", f"failed-{work.attempt}.json"


def _why(error: Exception, max_failures: int) -> str:
    """Why the training failed, in one line: what the first worker with an error of its own said, or that one died."""
    causes = list(map(cause, getattr(error, "worker_failures", {}).values())) or [cause(error)]
    own = [each for each in causes if not type(each).__module__.startswith("ray.")]
    text = one_line(own[0], limit=500) if own else DIED
    if isinstance(error, ray.train.ControllerError):
        text = one_line(causes[0], limit=500)
    again = f" {max_failures + 1} times, last" if max_failures else ""
    return f"the training stopped{again}: {text}"
