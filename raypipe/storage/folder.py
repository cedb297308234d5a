"""One folder on any file system: a run's small files by name, read and written whole."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from functools import cached_property

from pyarrow import fs as pafs

from raypipe.storage.files import resolve
from raypipe.storage.uri import local_uri, redact, split

ADVICE = {
    errno.ENOSPC: "free some space or choose another --output, then run the same command again: it resumes",
    errno.EDQUOT: "the quota is used up: free some space, then run the same command again: it resumes",
    errno.EROFS: "the file system is read-only: choose another --output",
    errno.ENOTDIR: "a file is in the way: choose another --output",
    errno.EEXIST: "a file is in the way: choose another --output",
    errno.EACCES: "no permission: change the folder's owner or mode, or choose another --output",
}


class Folder:
    """A folder by its URI. Cheap to pickle: the file system is opened where it is used. Names are parts of a path."""

    def __init__(self, uri: str):
        self.uri = uri

    def __getstate__(self) -> dict:
        return {"uri": self.uri}

    def __str__(self) -> str:
        return redact(self.uri)

    @cached_property
    def _place(self) -> tuple[pafs.FileSystem, str]:
        return resolve(self.uri)

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
        """The URI, as `resolve` reads it."""
        if self.is_local:
            return local_uri(self.path(*names))
        parts = split(self.uri)
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
        put(self.fs, path, content)

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
            raise cannot_write(error, path) from error

    def _list(self, *names: str) -> list[pafs.FileInfo]:
        return self.fs.get_file_info(pafs.FileSelector(self.path(*names), allow_not_found=True))


def put(filesystem: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write a whole file so that readers see all of it or nothing. Replaces; its folder must exist.

    Local disk and NFS: a temporary `_tmp.<uuid>` in the same folder, synchronised and renamed. Object store: a plain
    write, which appears when it is closed. Raises OSError of the same errno with the folder's name and what to do.
    """
    local = _beneath(filesystem, path)
    if local is None:
        with filesystem.open_output_stream(path, compression=None) as stream:  # else `.gz` in a name compresses
            stream.write(data)
        return
    folder = os.path.dirname(local) or "."
    temporary = os.path.join(folder, f"_tmp.{uuid.uuid4().hex}")
    try:
        _write(temporary, data)
        _rename(temporary, local, data)
        _synchronise(folder)
    except OSError as error:
        raise cannot_write(error, local) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def cannot_write(error: OSError, path: str) -> OSError:
    """The same error with the place and what to do. path: the local file or folder that was to be written."""
    folder, name = os.path.split(path)
    message = f"cannot write {name!r} in {folder!r}: {error.strerror or error}"
    advice = ADVICE.get(error.errno)
    return OSError(error.errno, f"{message}; {advice}" if advice else message)


def is_local(filesystem: pafs.FileSystem) -> bool:
    """Whether files there are renamed atomically and can be locked: local disks and NFS."""
    return _beneath(filesystem, "") is not None


def _beneath(filesystem: pafs.FileSystem, path: str) -> str | None:
    """The local path under any SubTreeFileSystem; None when the file system is not local."""
    while isinstance(filesystem, pafs.SubTreeFileSystem):
        path = f"{filesystem.base_path.rstrip('/')}/{path.lstrip('/')}"
        filesystem = filesystem.base_fs
    return path if filesystem.type_name == "local" else None


def _write(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
