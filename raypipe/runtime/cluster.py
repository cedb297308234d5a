"""The Ray that a job runs on: join or start it, decide what runs where, and turn its errors into plain ones."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from logging.handlers import BufferingHandler

import ray.data

from raypipe.runtime import address, cores, loss
from raypipe.runtime.interruption import restored_handlers
from raypipe.storage import Locked, local_path

log = logging.getLogger("raypipe")
# What Ray prints at every start on a healthy machine and would hide what matters; its files keep all of it.
QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # "has constructor arguments in the object store": true of every actor pool
    "RAY_worker_maximum_startup_concurrency": "8",  # the default, cores, calls two actors per core too many
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an announcement about tasks without GPU
}


@dataclass(frozen=True)
class Resources:
    """What the actors of a job get."""

    device: str  # cpu or cuda
    gpus: float  # per actor
    min_actors: int
    max_actors: int | None  # None: as many as the cluster, also an autoscaled one, has room for

    @property
    def expected_actors(self) -> int:
        """How many actors to cut the work for, so that each gets some of it."""
        return self.max_actors or max(self.min_actors, int(ray.cluster_resources().get("CPU", 1)))


@contextlib.contextmanager
def connected(*, stall: float) -> Iterator[None]:
    """Use the Ray this process has, join the cluster of RAY_ADDRESS, or start a local one that ends with the block.

    stall: seconds without any finished task after which Ray Data gives a job up. Raises ValueError where no cluster
    answers at RAY_ADDRESS, and in the block RuntimeError when Ray's own processes have gone.
    """
    if ray.is_initialized():
        with loss.watched():
            yield _configure(stall)
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address.check()
    options = {"logging_level": "error", "log_to_driver": False}
    if not address.joins_cluster():
        options |= {"address": "local", "num_cpus": cores.for_local_ray(), "include_dashboard": False}
    # Alarms such as that a worker died, without saying on which image: our ledger does. Ray's own log has them too.
    ray._private.worker.print_to_stdstream = lambda alarm, **_: log.debug("Ray: %s", "\n".join(alarm["lines"]))
    with restored_handlers(), _stderr_only_if_it_fails():
        ray.init(**options)
    try:
        with loss.watched():
            yield _configure(stall)
    finally:
        if not loss.gone():  # else leaving takes up to a minute, in which Ray may end the process: first what to say
            with restored_handlers():  # Ray replaces them by its own
                ray.shutdown()


def resources(*, gpus: float, device: str, actors: int | None, option: str = "--actors") -> Resources:
    """Choose device and number of actors.

    gpus: per actor where the device is cuda; 0 for work that can use none. device: auto, cpu or cuda. actors: None =
    one per core, or as many as the GPUs hold. option: where the user says how many.
    Raises ValueError when the actors would leave no CPU for the other stages, and for a network on a cluster that
    shows no GPU: it may have just not started one.
    """
    found, joined = ray.cluster_resources(), address.joins_cluster()
    cpus, all_gpus = int(found.get("CPU", 0)), found.get("GPU", 0.0)
    device = _device(device, gpus, all_gpus, joined)
    per_actor = gpus if device == "cuda" else 0.0
    if joined:
        return Resources(device, per_actor, 1, actors)
    if actors is None:
        if per_actor > all_gpus:
            text = f"--device cuda: an actor needs {per_actor:g} GPUs, Ray has {all_gpus:g}; --device cpu does without"
            raise ValueError(text)
        actors = cores.actors(cpus, gpus=all_gpus, per_actor=per_actor)
    if actors + 1 > cpus:
        raise ValueError(f"{option} {actors} leaves no CPU for reading and writing: Ray has {cpus}, at most {cpus - 1}")
    if per_actor * actors > all_gpus:
        raise ValueError(f"{option} {actors} need {per_actor * actors:g} GPUs, Ray has {all_gpus:g}")
    return Resources(device, per_actor, actors, actors)


def warn_of_local_paths(**folders: str) -> None:
    """Say that paths of this machine must be the same folders on all others, where there are others."""
    if sum(node["Alive"] for node in ray.nodes()) > 1:
        for option, folder in folders.items():
            if local_path(folder):
                text = "--%s %s is a local path: all machines of the cluster must see it, as on a shared disk"
                log.warning(text, option, folder)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn Ray's nested task errors into RuntimeError with the cause's own message; a lost lock stays Locked."""
    try:
        yield
    except Exception as error:
        first = cause(error)
        if isinstance(first, Locked):
            raise first from error
        text, _, _ = f"{type(first).__name__}: {first}".partition("\nFailed to apply UDF")  # before Ray Data's advice
        if isinstance(first, OSError) and first.strerror:
            text = first.strerror  # Ray Data's advice stands where an error of the system names its file
        raise RuntimeError(f"the job stopped: {text}") from error


def cause(error: BaseException) -> BaseException:
    """The exception that user code raised, beneath Ray's wrappers."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    return error


def _configure(stall: float) -> None:
    """Settings of Ray Data for this process, sealed into each dataset when it is made."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = 600
    context.execution_no_progress_timeout_s = stall
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__module__ == "ray._private.log":  # its terminal; its file keeps all, we say errors shorter
            handler.setLevel("CRITICAL")


@contextlib.contextmanager
def _stderr_only_if_it_fails() -> Iterator[None]:
    """Hold back what the block's C++ code prints on stderr, such as that the log level was set; show it if it fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, contextlib.closing(os.fdopen(os.dup(2), "wb")) as stderr:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            stderr.write(held.read())
            raise
        finally:
            os.dup2(stderr.fileno(), 2)


def _device(device: str, gpus: float, all_gpus: float, joined: bool) -> str:
    if device == "cuda" or not gpus:
        return device if gpus else "cpu"
    if device == "auto" and joined and not all_gpus:
        text = "the cluster shows no GPU; --device cuda waits until it has started one, --device cpu does without"
        raise ValueError(text)
    return "cuda" if device == "auto" and all_gpus else "cpu"


def overheard(function: Callable, *given) -> tuple[object, list[str]]:
    """What a function returns, and what it warns of: nobody sees the log of a worker."""
    heard = BufferingHandler(1_000)
    heard.setLevel(logging.WARNING)
    log.addHandler(heard)
    try:
        return function(*given), [record.getMessage() for record in heard.buffer]
    finally:
        log.removeHandler(heard)


def told(task: ray.ObjectRef) -> object:
    """The result of a task of `overheard`, whose warnings are logged here."""
    found, warnings = ray.get(task)
    for text in warnings:
        log.warning("%s", text)
    return found
