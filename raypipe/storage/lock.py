"""Who may write to a run's folder: a lock with a sign of life, and a fence against a dead attempt's workers.

What is asked of a store: who reads a file by its name gets what was written last, as S3, GCS, Azure and NFS promise.
Listings may lag behind. Nothing is asked of clocks: a host whose clock is ahead takes a living holder's lock over, and
the fence then ends that holder's commits; one whose clock is behind waits as much longer for a dead one. A process that
stands still between the fence and the write after it leaves a second row, and `run.superseded` says which one counts.
`tests/run/test_schedules.py` plays all of this.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from raypipe.storage.folder import TEMPORARY, Folder

LOCK = ("_runs", "LOCK")
HEARTBEAT = 10.0  # seconds between signs of life of the holder
STALE_AFTER = 60.0  # seconds without one after which another attempt may take the lock
SETTLE = 1.0  # seconds in which contenders that write at the same time see each other


class Locked(RuntimeError):
    """Another process writes to this output."""


@contextlib.contextmanager
def hold(folder: Folder, attempt: str) -> Iterator[None]:
    """Hold the folder for one attempt. Raises Locked, naming the holder, while another live process has it."""
    _take(folder, attempt)
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(folder, attempt, stop), daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        if (_holder(folder) or {}).get("attempt") == attempt:
            folder.delete(*LOCK)


def fence(folder: Folder, attempt: str) -> None:
    """Raise Locked unless the attempt holds the folder: workers of a killed driver live on for some seconds."""
    if (_holder(folder) or {}).get("attempt") != attempt:
        raise Locked(f"{folder} is no longer held by attempt {attempt}; nothing was committed")


def live_attempt(folder: Folder) -> str | None:
    """The attempt that writes to the folder now; None when no living process does."""
    holder = _holder(folder)
    return holder.get("attempt") if holder and _is_alive(folder, holder) else None


def _take(folder: Folder, attempt: str) -> None:
    pid = os.getpid()
    claim = {"attempt": attempt, "host": socket.gethostname(), "machine": _machine(), "pid": pid, "born": _born(pid)}
    claim = json.dumps(claim).encode()
    if _create(folder, claim, attempt):
        return
    holder = _holder(folder)
    if holder is not None and _is_alive(folder, holder):
        raise Locked(
            f"{folder} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')} "
            f"(attempt {holder.get('attempt', '?')}); wait for it or use another --output"
        )
    # Two attempts may take over a dead lock at once: the last writer wins, and each looks who that was.
    folder.write(claim, *LOCK)
    time.sleep(SETTLE)
    fence(folder, attempt)


def _create(folder: Folder, claim: bytes, attempt: str) -> bool:
    """Create the lock if there is none: exclusively on a local disk, elsewhere compared after the write.

    Some object stores ignore put-if-absent, so it is not relied upon.
    """
    if not folder.is_local:
        if folder.read(*LOCK) is not None:
            return False
        folder.write(claim, *LOCK)
        time.sleep(SETTLE)
        return folder.read(*LOCK) == claim
    whole = (LOCK[0], f"{TEMPORARY}{attempt}.lock")
    folder.write(claim, *whole)
    try:
        os.link(folder.path(*whole), folder.path(*LOCK))  # unlike a rename it fails if the name is taken
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, such as a memory card's
        with contextlib.suppress(FileExistsError), open(folder.path(*LOCK), "xb") as file:
            file.write(claim)
            return True
        return False
    finally:
        folder.delete(*whole)


def _holder(folder: Folder) -> dict | None:
    try:
        return folder.read_json(*LOCK)
    except ValueError:
        return {}  # torn on a store without atomic writes: judged by its age alone


def _is_alive(folder: Folder, holder: dict) -> bool:
    if holder.get("machine") == _machine():
        return _born(holder["pid"]) == holder["born"]
    modified = folder.fs.get_file_info(folder.path(*LOCK)).mtime
    return modified is not None and (datetime.now(UTC) - modified).total_seconds() < STALE_AFTER


def _beat(folder: Folder, attempt: str, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        try:
            if (_holder(folder) or {}).get("attempt") != attempt:
                return  # taken over: the fence keeps this attempt's workers from committing
            if folder.is_local:
                os.utime(folder.path(*LOCK))
            else:
                folder.write(folder.read(*LOCK), *LOCK)
        except OSError:
            continue  # a full disk or a network hiccup: the next beat tries again


def _machine() -> str:
    """This boot of this machine, and the container's process numbers: where a pid means the same process."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()  # no /proc (macOS)


def _born(pid: int) -> str | None:
    """When a process of this machine started, so that a reused pid is not taken for the old one; None if it is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives, as another user
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]  # start time in clock ticks since boot; a zombie is dead
    except OSError:
        return "unknown"  # no /proc (macOS): the pid alone decides
