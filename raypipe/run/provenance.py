"""What a run was made with: the record of code, packages and machine."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

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


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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
