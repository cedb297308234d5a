"""Attempts that end at any moment, sleep through a take-over, or live under a clock that jumps."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.attempts import attempt_all, finished, manifest

from raypipe.maintenance.verify import Verify, verify
from raypipe.run import Run, new_attempt
from raypipe.run import run as run_module
from raypipe.run.rows import load
from raypipe.storage import Locked, hold

IMAGES = 6
CHILDREN = """
import builtins, os, sys
from support.attempts import attempt_all, manifest
from raypipe.run import Run
from raypipe.storage import Folder

folder, moment = sys.argv[1:]
left = [0]  # operations until the end

def dies(original, middle=None):
    def operation(*args, **kwargs):
        left[0] -= 1
        is_last = left[0] == 0
        if is_last and moment == "before":
            os._exit(9)
        if is_last and moment == "middle" and middle:
            middle(*args)
            os._exit(9)
        try:
            return original(*args, **kwargs)
        finally:
            if is_last:
                os._exit(9)
    return operation

class Written:
    '''A file whose writes are operations; all else is the file's.'''
    def __init__(self, file):
        self.write = dies(file.write, middle=lambda content: (file.write(content[: len(content) // 2]), file.flush()))
        self.flush, self.fileno, self._file = file.flush, file.fileno, file
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self._file.close()

opened = builtins.open
def opens(path, mode="r", *args, **kwargs):
    file = opened(path, mode, *args, **kwargs)
    return Written(file) if mode == "xb" and str(path).startswith(folder) else file

def attempt(place, step):
    left[0], builtins.open = step, opens
    for name in ("replace", "fsync", "unlink", "link", "makedirs"):
        setattr(os, name, dies(getattr(os, name)))
    Folder.delete, Folder.delete_folder = dies(Folder.delete), dies(Folder.delete_folder)
    run = Run(place, "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, manifest(6))
    run.mark_complete({"images": 6})
    os._exit(0)

step, code = 0, 9
while code == 9:
    step += 1
    if not (child := os.fork()):
        attempt(f"{folder}/{step}", step)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
"""


def assert_exact(place: Path) -> None:
    """The next attempt makes up for whatever the dead one left: each image once, for plain readers too."""
    run = Run(str(place), "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, manifest(IMAGES))
    files = (place / "masks/method=kmeans").glob("*.parquet")
    tables = [pq.read_table(file, columns=["image_id"], partitioning=None) for file in files]
    assert sorted(pa.concat_tables(tables)["image_id"].to_pylist()) == manifest(IMAGES)["image_id"].to_pylist()
    assert len(load(run)) == IMAGES and verify(Verify(str(place))).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "middle", "after"])
def test_a_crash_at_every_operation_on_files_loses_and_doubles_nothing(tmp_path, moment):
    """One attempt per operation: process `i` dies at its `i`-th, until one lives to the end."""
    words = [sys.executable, "-c", CHILDREN, str(tmp_path), moment]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    *died, last = done.stdout.split()
    assert set(died) == {"9"} and last == "0" and len(died) > 30, done.stderr
    for step in range(1, len(died) + 1):
        assert_exact(tmp_path / f"{step}")


SLEEPER = """
import sys, time
from support.attempts import finished, manifest
from raypipe.run import Run, new_attempt
from raypipe.storage import hold, lock

lock.HEARTBEAT = 0.1
run, attempt, images = Run(sys.argv[1], "kmeans"), new_attempt(), manifest(6)
run.freeze({"k": 2}, {"weights": {}})
with hold(run.folder, attempt):
    run.clean()
    run.commit(attempt, 0, finished(images.slice(0, 2), attempt))
    print("sleeps", flush=True)
    sys.stdin.readline()
    run.commit(attempt, 1, finished(images.slice(2, 2), attempt))
"""


def test_an_attempt_that_wakes_up_after_another_took_over_commits_nothing(tmp_path):
    words = [sys.executable, "-c", SLEEPER, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    sleeper = subprocess.Popen(words, **pipes)
    try:
        assert sleeper.stdout.readline() == "sleeps\n"
        os.kill(sleeper.pid, signal.SIGSTOP)
        run = Run(str(tmp_path / "run"), "kmeans")
        with pytest.raises(Locked), hold(run.folder, new_attempt()):
            raise AssertionError("it sleeps, but it lives on this machine")
        lock = run.folder.path("_runs", "LOCK")  # as of another container, whose processes are not seen here
        claim = json.loads(Path(lock).read_text()) | {"machine": "another"}
        Path(lock).write_text(json.dumps(claim))
        os.utime(lock, (0, 0))
        with hold(run.folder, attempt := new_attempt()):
            run.clean()
            os.kill(sleeper.pid, signal.SIGCONT)
            _, error = sleeper.communicate("go on\n", timeout=60)
            assert sleeper.returncode == 1 and "is no longer held by attempt" in error
            assert json.loads(Path(lock).read_text())["attempt"] == attempt
            pending = run.plan(manifest(IMAGES))
            assert len(pending) == 4
            run.commit(attempt, 0, finished(pending, attempt))
            run.finish(attempt)
        assert sorted(load(run)["image_id"].to_pylist()) == manifest(IMAGES)["image_id"].to_pylist()
    finally:
        with contextlib.suppress(ProcessLookupError):
            sleeper.kill()


@pytest.mark.parametrize("jump", [timedelta(days=-400), timedelta(days=400)], ids=["back", "forth"])
def test_a_clock_that_jumps_between_attempts_loses_and_doubles_nothing(tmp_path, monkeypatch, jump):
    run = Run(str(tmp_path / "run"), "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, manifest(4), error="fetch: network: gone")

    class Jumped(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + jump

    monkeypatch.setattr(run_module, "datetime", Jumped)
    assert new_attempt()[:4] == f"{datetime.now(UTC) + jump:%Y}"
    attempt_all(run, manifest(IMAGES), retry_errors=True)
    rows = load(run)
    assert sorted(rows["image_id"].to_pylist()) == manifest(IMAGES)["image_id"].to_pylist()
    assert set(rows["error"].to_pylist()) == {""}
    assert verify(Verify(str(tmp_path / "run"))).exit_code == 0
    monkeypatch.undo()
    attempt_all(run, manifest(IMAGES + 2))
    assert len(load(run)) == IMAGES + 2


@pytest.mark.parametrize("mtime", [0, time.time() + 1e8], ids=["long ago", "to come"])
def test_a_clock_that_jumps_frees_no_lock_of_a_living_process_and_keeps_none_of_a_dead_one(tmp_path, mtime):
    run = Run(str(tmp_path), "kmeans")
    with hold(run.folder, "first"):
        os.utime(run.folder.path("_runs", "LOCK"), (mtime, mtime))
        with pytest.raises(Locked), hold(run.folder, "second"):
            raise AssertionError("two holders")
    claim = {"attempt": "dead", "pid": 1 << 22, "born": "then"}
    with hold(run.folder, "third"):
        held = json.loads(run.folder.read("_runs", "LOCK"))
    run.folder.write(json.dumps(held | claim).encode(), "_runs", "LOCK")
    os.utime(run.folder.path("_runs", "LOCK"), (mtime, mtime))
    with hold(run.folder, "fourth"):
        pass
