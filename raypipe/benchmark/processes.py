"""Child processes that call one function on one thread, and what processes use: CPU time and memory (from /proc)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from raypipe.runtime.child import Child

# One thread per process, as in Ray's workers; to be set before numpy is imported, hence for a new process.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SAMPLE_EVERY = 0.2  # seconds


class Used(NamedTuple):
    """What a process has used so far."""

    cpu: float  # seconds, user and system
    memory: float  # MB of its own (anonymous), shared pages not counted
    command: str


class Sample(NamedTuple):
    """All processes at one moment."""

    time: float  # seconds since the epoch
    used: dict[tuple[int, str], Used]  # by pid and start time, since pids come again


class Watched(Child):
    """A child with one thread, and with a Ray of its own: a cluster's other machines would not see the images."""

    def __init__(self, function: Callable, *arguments):
        alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        super().__init__(alone | ONE_THREAD, function, *arguments)

    def watched(self) -> list[Sample]:
        """Samples of the child and all processes below it, until it ends; [] where there is no /proc."""
        return watched(self.process)


class Ran(NamedTuple):
    """What a command took."""

    seconds: float  # from the start of its process to its end
    cpu: float  # seconds of all its processes; not a number where there is no /proc
    memory: float  # MB, the most that all its processes together had of their own


def ran(command: Sequence[str]) -> Ran:
    """Run a command as a user would: with all cores, on no cluster. Raises RuntimeError with its last words."""
    unset = ("RAY_ADDRESS", *ONE_THREAD)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT) as process:
            try:
                samples = watched(process)
                code, seconds = process.wait(), time.perf_counter() - start
            finally:
                process.terminate()  # nothing happens to one that has ended
        said.seek(0)
        *_, words = said.read().decode(errors="replace").strip().split("\n")
    if code:
        raise RuntimeError(f"{' '.join(command)}: ended with {code}: {words}")
    if not samples:
        return Ran(seconds, float("nan"), float("nan"))
    memory = max(sum(used.memory for used in sample.used.values()) for sample in samples)
    return Ran(seconds, cpu_seconds(samples)[-1], memory)


def watched(process: subprocess.Popen) -> list[Sample]:
    """Samples of a process and all below it, until it ends; [] where there is no /proc."""
    samples = []
    while process.poll() is None:
        if os.path.isdir("/proc/self"):
            samples.append(Sample(time.time(), used_below(process.pid)))
        with suppress(subprocess.TimeoutExpired):
            process.wait(SAMPLE_EVERY)
    return samples


def call(function: Callable, *arguments):
    """The function's result, computed in a child."""
    with Watched(function, *arguments) as child:
        return child.result()


def peak(function: Callable, *arguments) -> tuple[float, object]:
    """MB by which a call makes this process larger at most, and its result; NaN where Linux does not tell."""
    before = float("nan")
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what it is now
        before = _highest()
    result = function(*arguments)
    return (_highest() if before == before else before) - before, result


def _highest() -> float:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def used_below(root: int) -> dict[tuple[int, str], Used]:
    """What a process and all that descend from it have used."""
    stats = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has just ended
            stats[int(name)] = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
    ticks, used = os.sysconf("SC_CLK_TCK"), {}
    for pid, fields in stats.items():
        if _descends(pid, root, stats):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
                kilobytes = Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()
                memory = int(kilobytes[0]) / 1024 if kilobytes else 0.0
                used[pid, fields[19]] = Used((int(fields[11]) + int(fields[12])) / ticks, memory, command)
    return used


def cpu_seconds(samples: Sequence[Sample]) -> list[float]:
    """CPU time that all processes together have used, at each sample; what has ended counts with its last sample."""
    last: dict[tuple[int, str], float] = {}
    totals = []
    for sample in samples:
        last |= {key: used.cpu for key, used in sample.used.items()}
        totals.append(sum(last.values()))
    return totals


def _descends(pid: int, root: int, stats: dict[int, list[str]]) -> bool:
    while pid in stats and pid != root:
        pid = int(stats[pid][1])
    return pid == root
