"""Jobs as processes of their own, what to wait for before they are disturbed, and what must hold in the end."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from support.written import rows_of

DRIVE = Path(__file__).with_name("drive.py")


def command(photos: Path, output: Path, *options: str, sleep: float = 0.1) -> list[str]:
    return [sys.executable, str(DRIVE), str(sleep), "--input", str(photos), "--output", str(output), *options]


def finish(job: subprocess.Popen, timeout: float = 240) -> str:
    text, _ = job.communicate(timeout=timeout)
    return text


def wait_until(holds: Callable[[], object], what: str, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"no {what} in time"
        time.sleep(0.005)


def wait_for(output: Path, files: str, count: int) -> None:
    wait_until(lambda: len(list(output.glob(files))) >= count, files)


def wait_for_commits(output: Path, count: int) -> None:
    wait_for(output, "_commits/part-*", count)


def processes_below(ancestor: int) -> dict[int, str]:
    """The command lines of a process's children, of their children and so on."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args", "-ww"], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def is_below(pid):
        while pid := parents.get(pid):
            if pid == ancestor:
                return True
        return False

    return {int(pid): words for pid, _, words in rows if is_below(int(pid))}


def actors_below(ancestor: int) -> list[int]:
    """Processes in which actors of Ray Data live."""
    return [pid for pid, words in processes_below(ancestor).items() if re.match(r"ray::.*MapBatches", words)]


def servers_below(ancestor: int) -> list[int]:
    """Raylet and GCS."""
    return [pid for pid, words in processes_below(ancestor).items() if re.match(r"\S*/(raylet|gcs_server) ", words)]


def assert_complete(output: Path, photos: Path) -> None:
    """Every image once, for plain readers too, and equal to an undisturbed loop, which is run once for a folder."""
    keys = [
        key
        for file in output.glob("masks/*/*.parquet")
        for key in pq.read_table(file, partitioning=None)["key"].to_pylist()
    ]
    assert sorted(keys) == sorted(file.name for file in photos.iterdir())
    alone = photos.with_name(f"{photos.name}-alone")
    if not alone.exists():
        subprocess.run(command(photos, alone, "--local", sleep=0), check=True, capture_output=True)
    assert rows_of(output) == rows_of(alone)
