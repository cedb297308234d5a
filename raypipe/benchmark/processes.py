"""Child processes that call one function on one thread, and what processes use: CPU time and memory (from /proc)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# One thread per process, as in Ray's workers; to be set before numpy is imported, hence for a new process.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
CALL = (
    "import pickle, sys; from pathlib import Path; folder = Path(sys.argv[1]);"
    "function, arguments = pickle.loads((folder / 'call').read_bytes());"
    "(folder / 'result').write_bytes(pickle.dumps(function(*arguments)))"
)
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


class Child:
    """A function called in a new Python process. A context: a child that still runs at its end is ended."""

    def __init__(self, function: Callable, *arguments):
        self._kept = tempfile.TemporaryDirectory(prefix="raypipe-benchmark-")
        self._folder = Path(self._kept.name)
        (self._folder / "call").write_bytes(pickle.dumps((function, arguments)))
        with open(self._folder / "log", "wb") as log:
            command = [sys.executable, "-c", CALL, str(self._folder)]
            self.process = subprocess.Popen(command, env=child_environment(), stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self._kept.cleanup()

    def result(self):
        """What the function returned. Raises RuntimeError with the child's last words when it failed."""
        self.process.wait()
        file = self._folder / "result"
        if not file.exists():
            words = (self._folder / "log").read_text(errors="replace").strip().splitlines()[-5:]
            raise RuntimeError(f"the measuring process ended with {self.process.returncode}: {' / '.join(words)}")
        return pickle.loads(file.read_bytes())

    def watched(self) -> list[Sample]:
        """Samples of the child and all processes below it, until it ends; [] where there is no /proc."""
        samples = []
        while self.process.poll() is None:
            if os.path.isdir("/proc/self"):
                samples.append(Sample(time.time(), used_below(self.process.pid)))
            time.sleep(SAMPLE_EVERY)
        return samples


def child_environment() -> dict[str, str]:
    """One thread, and a Ray of its own: a cluster's other machines would not see the images."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | ONE_THREAD


def call(function: Callable, *arguments):
    """The function's result, computed in a child."""
    with Child(function, *arguments) as child:
        return child.result()


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
