"""One folder on any file system: a run's small files by name, read and written whole."""

from __future__ import annotations

import os
from functools import cached_property

from pyarrow import fs as pafs

from raypipe import storage


class Folder:
    """A folder by its URI. Cheap to pickle: the file system is opened where it is used. Names are parts of a path."""

    def __init__(self, uri: str):
        self.uri = uri

    def __getstate__(self) -> dict:
        return {"uri": self.uri}

    def __str__(self) -> str:
        return storage.redact(self.uri)

    @cached_property
    def _place(self) -> tuple[pafs.FileSystem, str]:
        return storage.resolve(self.uri)

    @property
    def fs(self) -> pafs.FileSystem:
        return self._place[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def path(self, *names: str) -> str:
        """The path on `fs`."""
        return "/".join((self._place[1].rstrip("/"), *names))

    def location(self, *names: str) -> str:
        """The URI, as `storage.resolve` reads it."""
        if self.is_local:
            return storage.local_uri(self.path(*names))
        parts = storage.split(self.uri)
        return parts.at("/".join((parts.key.rstrip("/"), *names)))

    def files(self, *names: str) -> dict[str, pafs.FileInfo]:
        """Files directly in a folder, by name; {} when there is no such folder."""
        return {info.base_name: info for info in self._list(*names) if info.type == pafs.FileType.File}

    def folders(self, *names: str) -> list[str]:
        """Names of the folders directly in a folder."""
        return [info.base_name for info in self._list(*names) if info.type == pafs.FileType.Directory]

    def read(self, *names: str) -> bytes | None:
        """A file's bytes, or None when it does not exist."""
        try:
            with self.fs.open_input_stream(self.path(*names), compression=None) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def write(self, content: bytes, *names: str) -> None:
        """Put a file atomically: readers see the old one or the whole new one."""
        path = self.path(*names)
        if self.is_local:
            self._make(os.path.dirname(path))
        storage.put(self.fs, path, content)

    def delete(self, *names: str) -> None:
        """Remove a file; one that is already gone is fine."""
        try:
            self.fs.delete_file(self.path(*names))
        except FileNotFoundError:
            return

    def delete_folder(self, *names: str) -> None:
        """Remove a folder with its files."""
        self.fs.delete_dir(self.path(*names))

    def _make(self, path: str) -> None:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise storage.cannot_write(error, path) from error

    def _list(self, *names: str) -> list[pafs.FileInfo]:
        return self.fs.get_file_info(pafs.FileSelector(self.path(*names), allow_not_found=True))
