"""Any place where files are: local paths, pyarrow.fs URIs (s3, gs, hdfs, abfs, file), others through fsspec."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import re
import stat
import uuid
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pyarrow as pa
from pyarrow import fs as pafs
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

from raypipe.types import BadImage

ARROW_SCHEMES = {"s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss"}
WEB_SCHEMES = {"http", "https"}
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)  # two letters or more: C:\ is a Windows drive
# What pyarrow takes behind a `?`. Any other `?` belongs to the object's key.
OPTION = (
    r"(?:endpoint_override|region|scheme|allow_bucket_creation|allow_bucket_deletion|tls_ca_file_path|"
    r"tls_verify_certificates|force_virtual_addressing|project_id|retry_limit_seconds|user|replication|buffer_size|"
    r"kerb_ticket|blob_storage_authority|dfs_storage_authority|blob_storage_scheme|dfs_storage_scheme|"
    r"enable_tls|credential_kind|tenant_id|client_id|client_secret)=[^&?]*"
)
OPTIONS = re.compile(rf"{OPTION}(?:&{OPTION})*")
TRIES = 3
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
CHUNK = 1 << 20  # bytes per read from a stream of unknown length
ADVICE = {
    errno.ENOSPC: "free some space or choose another --output, then run the same command again: it resumes",
    errno.EDQUOT: "the quota is used up: free some space, then run the same command again: it resumes",
    errno.EROFS: "the file system is read-only: choose another --output",
    errno.ENOTDIR: "a file is in the way: choose another --output",
    errno.EEXIST: "a file is in the way: choose another --output",
    errno.EACCES: "no permission: change the folder's owner or mode, or choose another --output",
}


class Parts(NamedTuple):
    """A remote URI taken apart without decoding anything: keys from a listing are raw."""

    scheme: str
    user: str  # before the @: credentials; for abfs the container
    host: str  # host or bucket
    key: str
    options: str  # for pyarrow, without the `?`

    @property
    def root(self) -> str:
        return f"{self.scheme}://{self.user}@{self.host}" if self.user else f"{self.scheme}://{self.host}"

    def at(self, key: str) -> str:
        """The URI of another key at the same place."""
        return f"{self.root}/{key}" + (f"?{self.options}" if self.options else "")


def split(uri: str) -> Parts | None:
    """The parts of a remote URI; None for a local path or file:// URI."""
    match = SCHEME.match(uri)
    if not match or match[1].lower() == "file":
        return None
    scheme, rest, options = match[1].lower(), match[2], ""
    head, _, tail = rest.rpartition("?")
    if scheme in ARROW_SCHEMES and head and OPTIONS.fullmatch(tail):
        rest, options = head, tail
    authority, _, key = rest.partition("/")
    user, _, host = authority.rpartition("@")
    return Parts(scheme, user, host, key, options)


def local_path(uri: str) -> str | None:
    """The absolute path of a local file (links are not resolved); None for a remote URI."""
    if split(uri) is not None:
        return None
    match = SCHEME.match(uri)
    if match:
        path = os.fsdecode(unquote_to_bytes("/" + match[2].partition("/")[2]))
        return os.path.abspath(path)
    return os.path.abspath(os.path.expanduser(uri) if uri.startswith("~") else uri)


def absolute(uri: str) -> str:
    """The same location for processes with another current folder: plain local paths become absolute."""
    return uri if SCHEME.match(uri) else local_path(uri)


def local_uri(path: str) -> str:
    """An absolute path as text that a table can hold: a name that is not valid UTF-8 becomes a quoted file:// URI."""
    return path if is_text(path) else "file://" + quote_from_bytes(os.fsencode(path))


def is_text(name: str) -> bool:
    """False for names with surrogates: undecodable bytes of a file name, which Arrow strings cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(name: str) -> str:
    """A name as a table can hold it: percent-quoted when it is not valid UTF-8."""
    return name if is_text(name) else quote_from_bytes(os.fsencode(name))


def normalise(uri: str) -> str:
    """The canonical form of a location, whose hash is the id of an image.

    Local: the absolute plain path (see `local_uri`). Remote: scheme://host/key without user info and options; the
    query of an http(s) URL stays, since it may say which image is meant, its fragment goes.
    """
    parts = split(uri)
    if parts is None:
        return local_uri(local_path(uri))
    key = parts.key.partition("#")[0] if parts.scheme in WEB_SCHEMES else parts.key
    container = parts.user.partition(":")[0] + "@" if parts.scheme.startswith("abfs") and parts.user else ""
    return f"{parts.scheme}://{container}{parts.host}/{key}"


def redact(uri: str) -> str:
    """A location for tables and logs: normalised and without anything that may be a secret (queries too)."""
    parts = split(uri)
    if parts is None or parts.scheme in ARROW_SCHEMES:
        return normalise(uri)
    return normalise(uri).partition("?")[0]


def as_path(location: str) -> str:
    """What is shown of a location as a path: local names raw, web addresses without their query."""
    return local_path(location) or redact(location)


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a location and the path on it. Object keys are taken raw, never percent-decoded.

    uri: a local path (relative ones and `~` become absolute), file:///path (percent-decoded),
    `s3://key:secret@bucket/path?endpoint_override=http://127.0.0.1:5000&region=us-east-1&scheme=http` (credentials in
    the URI percent-encoded; better from the environment), gs://, hdfs://, abfs://, or any scheme of fsspec.
    File systems are kept per process. Raises ValueError for an unknown scheme or options that do not work.
    """
    path = local_path(uri)
    if path is not None:
        return pafs.LocalFileSystem(), path
    parts = split(uri)
    if parts.scheme in ARROW_SCHEMES:
        filesystem, base = _arrow(parts.root, parts.options)
        return filesystem, f"{base.rstrip('/')}/{parts.key}".rstrip("/")
    other, path = _fsspec(uri)
    return pafs.PyFileSystem(pafs.FSSpecHandler(other)), path


@lru_cache(maxsize=64)
def _arrow(root: str, options: str) -> tuple[pafs.FileSystem, str]:
    try:
        return pafs.FileSystem.from_uri(root + (f"?{options}" if options else ""))
    except (pa.ArrowException, OSError) as error:
        place = redact(root)
        text = re.sub(r"\S+://\S+@\S+", place, str(error)).replace(root, place)  # errors repeat the URI with its secret
        raise ValueError(f"{place} cannot be reached: {text}") from None


def _fsspec(uri: str):
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(uri)
    except ImportError as error:
        raise ValueError(f"{redact(uri)}: {error}") from None
    except ValueError as error:
        known = ", ".join(sorted(ARROW_SCHEMES | WEB_SCHEMES | {"file", "hf"}))
        raise ValueError(f"{redact(uri)}: {error}; known are {known} and those that fsspec has installed") from None


def join(uri: str, name: str) -> str:
    """The location of a file beneath a folder's URI; `name` is relative, raw and may contain `..`."""
    parts = split(uri)
    if parts is None:
        return local_uri(os.path.abspath(os.path.join(local_path(uri), name)))
    key = f"{parts.key.rstrip('/')}/{name}".lstrip("/")
    return parts.at(posixpath.normpath(key) if name.startswith(("./", "../")) else key)


def locate(source: str, entry: str) -> str:
    """The location that an entry of a list or table means; relative ones start at the folder of `source`.

    An entry on the same kind of store takes over credentials and endpoint of the source.
    """
    home, there = split(source), split(entry)
    if there is not None:
        same = home is not None and home.scheme == there.scheme and not (there.user or there.options)
        return there._replace(user=home.user, options=home.options).at(there.key) if same and home.options else entry
    if SCHEME.match(entry) or entry.startswith("/"):
        return local_uri(local_path(entry))
    if home is None:
        return join(os.path.dirname(local_path(source)), entry)
    key = home.key.partition("?")[0] if home.scheme in WEB_SCHEMES else home.key
    return join(home.at(posixpath.dirname(key)), entry)


def read_bytes(location: str, *, start: int | None = None, length: int | None = None, max_bytes: int) -> bytes:
    """The bytes of a file, or `length` of them from `start`. At most max_bytes, which is checked before reading.

    Transient errors are tried 3 times. Raises BadImage("fetch", kind, message): missing, permission, not_a_file,
    too_large, truncated (the file ends inside the range), io and network (retryable).
    """
    if length is not None:
        _check_size(length, max_bytes)
    try:
        read = _read_remote if split(location) else _read_local
        data = read(location, start or 0, length, max_bytes)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # fsspec's file systems raise the types of their libraries
        raise fetch_error(error, location) from error
    if length is not None and len(data) < length:
        message = f"{redact(location)} ends {length - len(data)} bytes before the end of this part"
        raise BadImage("fetch", "truncated", message)
    return data


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, BadImage | MemoryError) and _kind(error) == ""


patiently = retry(
    retry=retry_if_exception(_is_transient),
    stop=stop_after_attempt(TRIES),
    wait=wait_random_exponential(multiplier=0.2, max=2),  # seconds
    reraise=True,
)


@patiently
def _read_local(location: str, start: int, length: int | None, max_bytes: int) -> bytes:
    path = local_path(location)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # before opening: a FIFO would wait for ever
        raise BadImage("fetch", "not_a_file", f"{local_uri(path)} is not a regular file")
    if length is None:
        _check_size(status.st_size - start, max_bytes)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(-1 if length is None else length)


@patiently
def _read_remote(location: str, start: int, length: int | None, max_bytes: int) -> bytes:
    if split(location).scheme not in ARROW_SCHEMES:
        return _read_fsspec(location, start, length, max_bytes)
    filesystem, path = resolve(location)
    with filesystem.open_input_file(path) as file:
        size = file.size() - start
        if length is None:
            _check_size(size, max_bytes)
        return file.read_at(max(0, min(size, size if length is None else length)), start)


def _read_fsspec(location: str, start: int, length: int | None, max_bytes: int) -> bytes:
    filesystem, path = _fsspec(location)
    if split(location).scheme not in WEB_SCHEMES:
        if length is None:
            _check_size(filesystem.size(path) - start, max_bytes)
        return filesystem.cat_file(path, start=start, end=None if length is None else start + length)
    if length is not None:
        return filesystem.cat_file(path, start=start, end=start + length)
    data = bytearray()
    # A stream of the size 1: fsspec then does not ask for the size first, which many servers refuse or answer wrongly.
    with filesystem.open(path, "rb", block_size=0, size=1) as stream:
        stream.r.raise_for_status()
        while chunk := stream.read(CHUNK):
            data += chunk
            _check_size(len(data), max_bytes)
    return bytes(data)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BadImage("fetch", "too_large", f"{size} bytes or more, the limit is {max_bytes}")


def _kind(error: BaseException) -> str:
    """What an error of a file system means; "" when it may pass."""
    text, status = str(error), getattr(error, "status", None)  # status: that of an http answer
    if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in GONE or status in (404, 410):
        return "missing"
    if "NO_SUCH_BUCKET" in text:
        return "missing"
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        return "permission"
    if re.search(r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN", text):
        return "permission"
    if isinstance(error, ValueError):  # an unknown scheme, a null character in a path, a damaged table
        return "invalid"
    return "not_a_file" if isinstance(error, IsADirectoryError) else ""


def fetch_error(error: Exception, location: str) -> BadImage:
    """The error row's text for an exception of a file system; without secrets."""
    kind, transient = _kind(error), "network" if split(location) else "io"
    if kind == "missing":
        return BadImage("fetch", kind, f"{redact(location)} does not exist")
    status = getattr(error, "status", None)
    reason = f"http status {status}" if status else getattr(error, "strerror", None) or f"{error}"
    message = f"{redact(location)}: {type(error).__name__}: {reason.replace(location, redact(location))}"
    return BadImage("fetch", kind or transient, message)


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
