"""Temporary files, in the folder that TMPDIR names; those without a name are gone with the process, however it ends."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def temporary_space() -> Iterator[None]:
    """Around what writes temporary files: an OSError becomes one of the same errno with their folder and what to do."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        text = f"the folder of temporary files {tempfile.gettempdir()!r}: {why}; name one with more space in TMPDIR"
        raise OSError(error.errno, text) from error


def temporary_file() -> BinaryIO:
    """A new one, empty and without a name."""
    return tempfile.TemporaryFile(prefix="raypipe-")


def append(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write to the end of a temporary file. Raises OSError as `temporary_space` has it."""
    with temporary_space():
        file.write(content)
        file.flush()
