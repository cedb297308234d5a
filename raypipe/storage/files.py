"""Any place where files are: local paths, pyarrow.fs URIs (s3, gs, hdfs, abfs, file), others through fsspec."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import pyarrow as pa
from pyarrow import fs as pafs
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

from raypipe.storage.uri import ARROW_SCHEMES, WEB_SCHEMES, Location, local_path, split
from raypipe.storage.web import Private, web_files
from raypipe.types import BadImage

READ_TRIES = 3
MISSING_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
CHUNK_BYTES = 1 << 20  # per read from a stream of unknown length
READS_AHEAD = 16  # remote files read at the same time


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a location and the path on it. Object keys are taken raw, never percent-decoded.

    uri: a Location, a local path (relative ones and `~` become absolute), file:///path (percent-decoded),
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
    other, path = _fsspec(Location(uri))
    return pafs.PyFileSystem(pafs.FSSpecHandler(other)), path


@lru_cache(maxsize=64)
def _arrow(root: str, options: str) -> tuple[pafs.FileSystem, str]:
    try:
        return pafs.FileSystem.from_uri(root + (f"?{options}" if options else ""))
    except (pa.ArrowException, OSError) as error:
        shown = Location(root)
        text = re.sub(r"\S+://\S+@\S+", shown, str(error)).replace(root, shown)  # errors repeat the URI with its secret
        raise ValueError(f"{shown} cannot be reached: {text}; are name, network and credentials right?") from None


def _fsspec(location: Location, *, public: bool = False):
    from fsspec.core import url_to_fs

    try:
        if split(location).is_web:  # as it is: fsspec would take a `::` in it for two addresses
            return web_files(public=public), location.uri
        return url_to_fs(location.uri)
    except ImportError as error:
        raise ValueError(f"{location}: {error}") from None
    except ValueError as error:
        known = ", ".join(sorted(ARROW_SCHEMES.keys() | WEB_SCHEMES | {"file", "hf"}))
        raise ValueError(f"{location}: {error}; known are {known} and those that fsspec has installed") from None


def check_reader(location: str) -> None:
    """Raise ValueError when what reads the scheme of a location is not installed."""
    if parts := split(location):
        _check_scheme(parts.scheme)


@lru_cache
def _check_scheme(scheme: str) -> None:
    from fsspec import get_filesystem_class

    try:
        if scheme in ARROW_SCHEMES:
            getattr(pafs, ARROW_SCHEMES[scheme])  # raises where pyarrow was built without it
        else:
            get_filesystem_class(scheme)
    except ImportError as error:
        raise ValueError(f"{scheme}:// cannot be read here: {error}") from None
    except ValueError:  # unknown: who wants to read it is told
        pass


def read_bytes(
    location: str, *, start: int | None = None, length: int | None = None, max_bytes: int, public: bool = False
) -> bytes:
    """The bytes of a file, or `length` of them from `start`. At most max_bytes, which is checked before reading.

    public: a web address may lead, by its name or by a redirect, to no private, loopback or link-local address.
    Transient errors are tried 3 times. Raises BadImage("fetch", kind, message): missing, permission, not_a_file,
    too_large, refused (not public), truncated (the file ends inside the range), io and network (retryable).
    """
    location = Location(location)
    if length is not None:
        check_size(length, max_bytes)
    try:
        read = partial(_read_remote, public=public) if split(location) else _read_local
        data = patiently(read)(location, start or 0, length, max_bytes)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # fsspec's file systems raise the types of their libraries
        raise fetch_error(error, location) from error
    if length is not None and len(data) < length:
        message = f"{location} ends {length - len(data)} bytes before the end of this part"
        raise BadImage("fetch", "truncated", message)
    return data


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, BadImage | MemoryError) and _kind(error) == ""


patiently = retry(
    retry=retry_if_exception(_is_transient),
    stop=stop_after_attempt(READ_TRIES),
    wait=wait_random_exponential(multiplier=0.2, max=2),  # seconds
    reraise=True,
)


def _read_local(location: str, start: int, length: int | None, max_bytes: int) -> bytes:
    path = local_path(location)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # before opening: a FIFO would wait for ever
        raise BadImage("fetch", "not_a_file", f"{Location(path)} is not a regular file")
    if length is None:
        check_size(status.st_size - start, max_bytes)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(-1 if length is None else length)


def _read_remote(location: str, start: int, length: int | None, max_bytes: int, *, public: bool) -> bytes:
    if split(location).scheme not in ARROW_SCHEMES:
        return _read_fsspec(location, start, length, max_bytes, public)
    filesystem, path = resolve(location)
    with filesystem.open_input_file(path) as file:
        size = file.size() - start
        if length is None:
            check_size(size, max_bytes)
        return file.read_at(max(0, min(size, size if length is None else length)), start)


def _read_fsspec(location: str, start: int, length: int | None, max_bytes: int, public: bool) -> bytes:
    filesystem, path = _fsspec(Location(location), public=public)
    if length is not None:
        return filesystem.cat_file(path, start=start, end=start + length)
    if not split(location).is_web:
        check_size(filesystem.size(path) - start, max_bytes)
        return filesystem.cat_file(path, start=start)
    data = bytearray()
    # A stream of the size 1: fsspec then does not ask for the size first, which many servers refuse or answer wrongly.
    with filesystem.open(path, "rb", block_size=0, size=1) as stream:
        stream.r.raise_for_status()
        while chunk := stream.read(CHUNK_BYTES):
            data += chunk
            check_size(len(data), max_bytes)
    return bytes(data)


def check_size(size: int, max_bytes: int) -> None:
    """Raise BadImage("fetch", "too_large", message) for more bytes than may be."""
    if size > max_bytes:
        raise BadImage("fetch", "too_large", f"{size} bytes or more, the limit is {max_bytes}")


def _kind(error: BaseException) -> str:
    """What an error of a file system means; "" when it may pass."""
    text, status = str(error), getattr(error, "status", None)  # status: that of an http answer
    is_missing = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in MISSING_ERRNOS
    if is_missing or status in (404, 410) or "NO_SUCH_BUCKET" in text:
        return "missing"
    if isinstance(getattr(error, "os_error", None), Private):
        return "refused"
    denied = r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN"
    if isinstance(error, PermissionError) or status in (401, 403, 407) or re.search(denied, text):
        return "permission"
    if isinstance(error, ValueError):  # an unknown scheme, a null character in a path, a damaged table
        return "invalid"
    return "not_a_file" if isinstance(error, IsADirectoryError) else ""


def fetch_error(error: Exception, location: str) -> BadImage:
    """The error row's text for an exception of a file system; without secrets."""
    location = Location(location)
    kind, transient = _kind(error), "network" if split(location) else "io"
    if kind == "missing":
        return BadImage("fetch", kind, missing(location))
    if kind == "refused":
        text = f"{location} leads into a private network, where a list may lead only with --allow-private"
        return BadImage("fetch", kind, text)
    status = getattr(error, "status", None)
    reason = f"http status {status}" if status else getattr(error, "strerror", None) or f"{error}"
    message = f"{location}: {type(error).__name__}: {reason.replace(location.uri, location)}"
    return BadImage("fetch", kind or transient, message)


def missing(location: str) -> str:
    """The sentence for a file that is not there; it says so where the name is a path of Windows."""
    windows = re.search(r"(?:^|/)((?:[A-Za-z]:[\\/]|\\\\).*)", location)
    if windows and split(location) is None:
        return f"{windows[1]} is a path of Windows: write it as this machine has it, such as /mnt/c/photos"
    return f"{Location(location)} does not exist"


def map_ahead(function: Callable, arguments: Iterable, *, depth: int = READS_AHEAD) -> Iterator:
    """function(argument) for all, in order, up to `depth` of them running ahead in threads."""
    pool, running = ThreadPoolExecutor(depth), deque()
    try:
        for argument in arguments:
            running.append(pool.submit(function, argument))
            if len(running) >= depth:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
