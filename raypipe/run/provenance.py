"""What a run was made with: the record of code, packages and machine."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from raypipe.storage import Folder

PACKAGES = "raypipe ray torch transformers rembg onnxruntime opencv-python-headless numpy pyarrow".split()


def environment() -> dict:
    """Time, versions, code and machine, for run.json and the attempt's record."""
    return {
        "time": now(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git_commit": _git_commit(),
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
    }


@contextlib.contextmanager
def recorded(folder: Folder, attempt: str, record: dict) -> Iterator[dict]:
    """Leave an attempt's record `_runs/<attempt>.json`, with what the block adds to the dict that it is given.

    It is written first, and again however the block ends.
    """
    facts = record | {"environment": environment(), "exit_code": None}
    folder.write_json(facts, "_runs", f"{attempt}.json")
    try:
        yield facts
    except BaseException as error:
        facts |= {"exit_code": getattr(error, "exit_code", 1), "reason": f"{type(error).__name__}: {error}"}
        raise
    finally:
        facts["finished"] = now()
        with contextlib.suppress(OSError):  # a full disk: the record must not hide the error that filled it
            folder.write_json(facts, "_runs", f"{attempt}.json")


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


@cache
def _git_commit() -> str | None:
    """The commit of the checkout that this code runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (root / ".git").exists():
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
