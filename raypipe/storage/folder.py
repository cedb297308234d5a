"""One folder on any file system: a run's small files by name, read and written whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from datetime import UTC, datetime, timedelta
from functools import cached_property

import pyarrow as pa
from pyarrow import fs as pafs

from raypipe.storage.files import resolve
from raypipe.storage.parquet import parquet_bytes
from raypipe.storage.uri import Location, absolute, join

ADVICE = {
    errno.ENOSPC: "free some space or choose another --output, then run the same command again: it resumes",
    errno.EDQUOT: "the quota is used up: free some space, then run the same command again: it resumes",
    errno.EROFS: "the file system is read-only: choose another --output",
    errno.ENOTDIR: "a file is in the way: choose another --output",
    errno.EEXIST: "a file is in the way: choose another --output",
    errno.EACCES: "no permission: change the folder's owner or mode, or choose another --output",
}
TEMPORARY = "_tmp."  # how the name of a file begins that is being written
DEAD_AFTER = 3600.0  # seconds after which a temporary file belongs to no live writer


class Folder:
    """A folder by its URI. Cheap to pickle: the file system is opened where it is used. Names are parts of a path.

    It is the same folder in processes with another current folder: a relative path becomes absolute.
    """

    def __init__(self, uri: str):
        self.uri = absolute(uri)

    def __getstate__(self) -> dict:
        return {"uri": self.uri}

    def __str__(self) -> str:
        return str(Location(self.uri))

    @cached_property
    def _resolved(self) -> tuple[pafs.FileSystem, str]:
        return resolve(self.uri)

    @property
    def fs(self) -> pafs.FileSystem:
        """The file system that the folder is on."""
        return self._resolved[0]

    @property
    def is_local(self) -> bool:
        """Whether it is on a local disk or NFS (`is_local`)."""
        return is_local(self.fs)

    def path(self, *names: str) -> str:
        """The path on `fs`."""
        return "/".join((self._resolved[1].rstrip("/"), *names))

    def location(self, *names: str) -> Location:
        """Where a file or folder in it is."""
        return join(self.uri, "/".join(names))

    def files(self, *names: str) -> dict[str, pafs.FileInfo]:
        """Files directly in a folder, by name, but for those that are being written; {} when there is none."""
        files = (info for info in self._list(*names) if info.type == pafs.FileType.File)
        return {info.base_name: info for info in files if not info.base_name.startswith(TEMPORARY)}

    def folders(self, *names: str) -> list[str]:
        """Names of the folders directly in a folder."""
        return [info.base_name for info in self._list(*names) if info.type == pafs.FileType.Directory]

    def dead_files(self, *names: str) -> list[str]:
        """Names of temporary files directly in a folder that no live process writes any more."""
        dead = datetime.now(UTC) - timedelta(seconds=DEAD_AFTER)
        files = (info for info in self._list(*names) if info.type == pafs.FileType.File)
        return [info.base_name for info in files if info.base_name.startswith(TEMPORARY) and info.mtime < dead]

    def open(self, *names: str) -> pa.NativeFile:
        """A file to read at any place. Raises FileNotFoundError."""
        return self.fs.open_input_file(self.path(*names))

    def size(self, *names: str) -> int | None:
        """A file's bytes, or None when it does not exist. Asks for the file itself: listings may lag behind."""
        info = self.fs.get_file_info(self.path(*names))
        return info.size if info.type == pafs.FileType.File else None

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
            folder = os.path.dirname(path)
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as error:
                raise cannot_write(error, folder) from error
        put(self.fs, path, content)

    def read_json(self, *names: str) -> object | None:
        """The content of a JSON file, or None when it does not exist. Raises ValueError when it is no JSON."""
        content = self.read(*names)
        return None if content is None else json.loads(content)

    def write_json(self, content: object, *names: str) -> None:
        """Put JSON for people and machines atomically; what JSON does not know is written as its text."""
        self.write((json.dumps(content, indent=2, default=str) + "\n").encode(), *names)

    def write_table(self, table: pa.Table, *names: str) -> None:
        """Put a table as one Parquet file atomically."""
        self.write(parquet_bytes(table), *names)

    def delete(self, *names: str) -> None:
        """Remove a file; one that is already gone is fine."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.path(*names))

    def delete_folder(self, *names: str) -> None:
        """Remove a folder with its files; one that is already gone is fine."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(self.path(*names))

    def _list(self, *names: str) -> list[pafs.FileInfo]:
        return self.fs.get_file_info(pafs.FileSelector(self.path(*names), allow_not_found=True))


def put_at(place: str, data: bytes, *, option: str) -> str:
    """Write a file at a path or URI, its folder made where it can be; returns where. option: what names the place.

    Raises ValueError for a folder, and what `put` and `resolve` raise.
    """
    filesystem, path = resolve(place)
    if is_local(filesystem):
        if os.path.isdir(path):
            raise ValueError(f"{option} {str(Location(place))!r} is a folder; name a file in it")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    put(filesystem, path, data)
    return str(Location(place))


def put(filesystem: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write a whole file so that readers see all of it or nothing. Replaces; its folder must exist.

    Local disk and NFS: a temporary `_tmp.<uuid>` in the same folder, synchronised and renamed. Object store: a plain
    write, which appears when it is closed. Raises OSError of the same errno with the folder's name and what to do.
    """
    if not is_local(filesystem):
        with filesystem.open_output_stream(path, compression=None) as stream:  # else `.gz` in a name compresses
            stream.write(data)
        return
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path, data)
        _synchronise(folder)
    except OSError as error:
        raise cannot_write(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def cannot_write(error: OSError, path: str) -> OSError:
    """The same error with the path and what to do. path: the local file or folder that was to be written."""
    folder, name = os.path.split(path)
    message = f"cannot write {name!r} in {folder!r}: {error.strerror or error}"
    advice = ADVICE.get(error.errno)
    return OSError(error.errno, f"{message}; {advice}" if advice else message)


def is_local(filesystem: pafs.FileSystem) -> bool:
    """Whether files there are renamed atomically and can be locked: local disks and NFS."""
    return isinstance(filesystem, pafs.LocalFileSystem)


def _rename(temporary: str, path: str, data: bytes) -> None:
    try:
        os.replace(temporary, path)
    except OSError:
        # NFS sends a rename again when the answer was lost, and the second one fails: then the file is there
        if os.path.lexists(temporary) or not os.path.exists(path):
            raise
        with open(path, "rb") as file:
            if file.read() != data:
                raise


def _synchronise(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)
