"""Where an export goes: a new folder on any file system, with file names made of keys that nobody has checked."""

from __future__ import annotations

import os
import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import BinaryIO

from pyarrow import fs as pafs

from raypipe.storage import Folder

RECORD = "_export.json"  # what was exported; the mark of a folder that may be replaced
UNFINISHED = ".part"  # how the name of a large file ends that is being written
WRITES_AHEAD = 16  # remote files written at the same time
NAME_BYTES = 200  # of one part of a path; file systems take 255, and a suffix is added
PATH_BYTES = 900  # of a whole relative path; object stores take 1,024
UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")  # control characters, and what Windows takes for a separator


class Target:
    """An export's folder. Use as a context manager: leaving it waits for the writes that still run."""

    def __init__(self, uri: str):
        self.folder = Folder(uri)
        self.renamed = 0  # files that could not have their image's name, because another has it
        self._files: set[int] = set()  # hashes: smaller than the names; two names of one hash only cost a suffix
        self._folders: set[int] = set()
        self._make = cache(partial(os.makedirs, exist_ok=True))  # a folder, once
        self._pool = ThreadPoolExecutor(WRITES_AHEAD)
        self._running: deque = deque()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, kind, *rest) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        while kind is None and self._running:
            self._running.popleft().result()

    def clear(self, *, overwrite: bool) -> None:
        """Make sure that the folder holds no files. Deletes an earlier export where `overwrite` allows it.

        Raises ValueError when something else is there: mixing two exports would give images to the wrong one.
        """
        path = self.folder.path()
        if not self.folder.fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
            return
        if self.folder.read(RECORD) is None:
            raise ValueError(f"{self.folder} holds other files; choose a new folder with --output")
        if not overwrite:
            raise ValueError(f"{self.folder} holds an export; choose another --output, or replace it with --overwrite")
        self.folder.fs.delete_dir_contents(path)

    def name(self, row: dict, suffix: str, *, folder: str = "", twin: Callable[[str], str] | None = None) -> str:
        """A relative path inside `folder` for an image's file, which no other file has: its key with another suffix.

        row: with `key` and `image_id`. Where two keys differ only in extension or case, the second gets its id behind.
        twin: from this path to that of a second file that goes with it, which no other file has either.
        """
        stem, short = safe_stem(row["key"], row["image_id"]), row["image_id"][:8]
        for i, path in enumerate((stem + suffix, f"{stem}-{short}{suffix}", f"{row['image_id']}{suffix}")):
            path = posixpath.join(folder, path)
            if self._claim([path] if twin is None else [path, twin(path)]):
                self.renamed += i > 0
                return path
        raise AssertionError(f"{row['image_id']} has a file with the suffix {suffix!r} already")

    def put(self, content: bytes, name: str) -> None:
        """Write a small file. Remote ones are written in the background; their errors come with a later call."""
        if self.folder.is_local:
            self._write(content, name)
            return
        self._running.append(self._pool.submit(self._write, content, name))
        if len(self._running) >= WRITES_AHEAD:
            self._running.popleft().result()

    @contextmanager
    def stream(self, name: str) -> Iterator[BinaryIO]:
        """A large file to write piece by piece; on a local disk it gets its name when it is complete."""
        written = name + UNFINISHED * self.folder.is_local
        with self._opened(written, buffer_size=1 << 20) as file:
            yield file
        if written != name:
            os.replace(self.folder.path(written), self.folder.path(name))

    def _write(self, content: bytes, name: str) -> None:
        with self._opened(name) as file:  # not synchronised: an export can be made again
            file.write(content)

    def _opened(self, name: str, **options) -> BinaryIO:
        path = self.folder.path(name)
        if self.folder.is_local:
            self._make(posixpath.dirname(path))
        return self.folder.fs.open_output_stream(path, compression=None, **options)

    def _claim(self, paths: list[str]) -> bool:
        """Take paths unless a file or a folder has one, or a file stands where one needs a folder. Case is ignored."""
        if any(len(path.encode()) > PATH_BYTES for path in paths):
            return False
        parts = [path.casefold().split("/") for path in paths]
        wholes = {hash("/".join(names)) for names in parts}
        parents = {hash("/".join(names[:i])) for names in parts for i in range(1, len(names))}
        if wholes & self._files or wholes & self._folders or parents & self._files:
            return False
        self._files |= wholes
        self._folders |= parents
        return True


def safe_stem(key: str, image_id: str) -> str:
    """A key without extension as a relative path that stays inside its folder on every system."""
    parts = [UNSAFE.sub("_", part) for part in posixpath.splitext(key)[0].split("/") if part not in ("", ".", "..")]
    for i, content in enumerate(map(str.encode, parts)):
        if len(content) > NAME_BYTES:
            parts[i] = f"{content[: NAME_BYTES - 9].decode(errors='ignore')}-{image_id[:8]}"
    if parts and re.match("[A-Za-z]:", parts[0]):
        parts[0] = parts[0].replace(":", "_", 1)  # a drive
    return "/".join(parts) or image_id
