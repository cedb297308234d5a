"""Files from the web: whether their host can be reached, whether they came whole, why not."""

from __future__ import annotations

import errno
import logging
import os
import queue
import shutil
import socket
import threading
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, proxy_bypass, urlopen

from raypipe.lookup import one_line

log = logging.getLogger("raypipe")

PATIENCE = 4.0  # seconds for a connection to where weights are fetched from
SILENCE = 60.0  # seconds without a byte after which a connection is given up


def fetch_file(address: str, folder: Path, *, method: str) -> Path:
    """The file of an address in a folder, fetched if it is not there. Raises OSError where that fails."""
    file = folder / name_of(address)
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file.name}.{os.getpid()}.part"
    try:
        with _opened(address) as answer, part.open("wb") as content:
            log.info("%s: fetching %s, once", method, address)
            shutil.copyfileobj(answer, content)
            if answer.length:  # what is left of the length that it told
                raise ConnectionError("the connection broke")
        return part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def size_of(address: str) -> dict[str, int]:
    """The name of a file on the web with its bytes, 0 where its server does not say. Raises OSError without it."""
    with _opened(address, "HEAD") as answer:
        return {name_of(address): int(answer.headers.get("Content-Length") or 0)}


def _opened(address: str, verb: str = "GET"):
    """A server's answer. Raises OSError at once where it cannot be reached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    check_reachable(address)
    return urlopen(Request(address, method=verb), timeout=SILENCE)


def name_of(address: str) -> str:
    """The name of the file at an address."""
    return PurePosixPath(urlsplit(address).path).name


def check_reachable(url: str) -> None:
    """Raise ConnectionError at once where the host of a URL, or the proxy to it, cannot be reached.

    Libraries that download would try again, for minutes. Where names are not answered at all that takes PATIENCE.
    """
    place = urlsplit(url)
    proxy = getproxies().get(place.scheme)
    if proxy and not proxy_bypass(place.hostname):
        place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    ends: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

    def connect() -> None:
        try:
            port = place.port or {"https": 443}.get(place.scheme, 80)
            socket.create_connection((place.hostname, port), PATIENCE).close()
        except OSError as error:
            ends.put(error)
        else:
            ends.put(None)

    threading.Thread(target=connect, daemon=True).start()  # looking up a name has no time limit of its own
    try:
        error = ends.get(timeout=PATIENCE)
    except queue.Empty:
        error = TimeoutError(f"no answer within {PATIENCE:.0f} s")
    if error:
        raise ConnectionError(f"{place.hostname} cannot be reached: {one_line(error)}")


def reason(error: BaseException) -> str:
    """Why something could not be fetched, on one line and with what helps where that is known."""
    from huggingface_hub import errors

    known = {
        errors.GatedRepoError: "it is gated: accept its terms on its page and set HF_TOKEN",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private: then set HF_TOKEN",
        errors.RevisionNotFoundError: "there is no such revision",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
    }
    while True:  # huggingface_hub wraps what happened into "not found in the cache"
        for kind, text in known.items():
            if isinstance(error, kind):
                return text
        if getattr(error, "errno", None) == errno.ENOSPC:
            return "no space left on the disk"
        if error.__cause__ is None:
            break
        error = error.__cause__
    if any(word in type(error).__name__ for word in ("Connect", "Proxy", "Timeout")):  # those of each HTTP library
        return f"no connection: {one_line(error)}"
    return one_line(error)
