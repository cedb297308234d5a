"""Attempts on a run without a method: whole ones, and such that die at a chosen change of the folder."""

from __future__ import annotations

import pyarrow as pa

from raypipe import schema, storage
from raypipe.run import Run, new_attempt
from raypipe.storage import Folder, hold


def manifest(count: int) -> pa.Table:
    rows = [{"image_id": f"{i:032x}", "uri": f"/photos/{i}.png", "key": f"{i}.png"} for i in range(count)]
    return pa.Table.from_pylist(rows, schema=schema.MANIFEST)


def finished(pending: pa.Table, attempt: str, error: str = "") -> pa.Table:
    rows = [
        {
            "image_id": row["image_id"],
            "uri": row["uri"],
            "key": row["key"],
            "segments": [],
            "attempt": attempt,
            "error": error,
        }
        for row in pending.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=schema.MASKS)


def attempt_all(run: Run, images: pa.Table, *, per_part: int = 3, error: str = "", **plan) -> None:
    """One whole attempt, as the pipeline makes it."""
    attempt = new_attempt()
    with hold(run.folder, attempt):
        run.clean()
        pending = run.plan(images, **plan)
        for task, start in enumerate(range(0, len(pending), per_part)):
            run.commit(attempt, task, finished(pending.slice(start, per_part), attempt, error))
        run.finish(attempt)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but what the operating system does."""


def end_before(count: int, monkeypatch) -> None:
    """End the job before its write or deletion number `count`, those of the lock aside."""
    left = iter(range(count))

    def guarded(change):
        def guard(folder, *given):
            if not any("LOCK" in str(each) or ".lock" in str(each) for each in given) and next(left, None) is None:
                raise Killed
            return change(folder, *given)

        return guard

    for name in ("write", "delete"):
        monkeypatch.setattr(Folder, name, guarded(getattr(Folder, name)))


def kill_at(step: int, monkeypatch) -> None:
    """Let the process die before the `step`-th change of the file system."""
    remaining = [step]

    def counted(original):
        def change(*args, **kwargs):
            if remaining[0] == 0:
                raise Killed
            remaining[0] -= 1
            return original(*args, **kwargs)

        return change

    monkeypatch.setattr("raypipe.storage.folder.put", counted(storage.put))
    for name in ("delete", "delete_folder"):
        monkeypatch.setattr(Folder, name, counted(getattr(Folder, name)))
