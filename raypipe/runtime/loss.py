"""What a job does when the Ray below it goes away. Ray itself ends the process then: in a minute, without a word."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import ray

from raypipe.runtime.interruption import Interrupted

log = logging.getLogger("raypipe")
LOOK_SECONDS = 5.0  # less than Ray takes to notice
PATIENCE = 45.0  # for a head, which may come back; Ray gives it up after 60
GRACE = 5.0  # to leave the block, half of that of `interruption`: what waits inside Ray may wait for ever
RAYLET, HEAD = "Ray's process on this machine (raylet)", "Ray's head (GCS)"
_watching = threading.Lock()  # of nested blocks, as of a sweep and its trials, the outer one watches


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raise RuntimeError in the block soon after a process of Ray that it cannot do without has gone.

    In another thread than the main one nothing can be raised: the same is logged before Ray ends the process.
    """
    if not _watching.acquire(blocking=False):
        yield
        return
    over, lost = threading.Event(), []
    is_main = threading.current_thread() is threading.main_thread()
    threading.Thread(target=_watch, args=(over, lost, is_main), daemon=True).start()
    try:
        yield
    except Interrupted as error:
        if not lost:
            raise
        error.deadline.cancel()
        raise RuntimeError(lost[0]) from None
    finally:
        over.set()
        _watching.release()


def gone() -> str:
    """RAYLET or HEAD where nothing listens any more, else an empty string."""
    node = ray._private.worker._global_node
    if not node:  # a client of a Ray elsewhere
        return ""
    with socket.socket(socket.AF_UNIX) as raylet, contextlib.suppress(OSError):  # busy
        raylet.settimeout(LOOK_SECONDS)
        try:
            raylet.connect(node.raylet_socket_name)
        except (ConnectionRefusedError, FileNotFoundError):
            return RAYLET
    host, _, port = node.gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LOOK_SECONDS).close()
    except OSError:
        return HEAD
    return ""


def _watch(over: threading.Event, lost: list[str], is_main: bool) -> None:
    seen, missing = time.monotonic(), ""
    while missing != RAYLET and (missing != HEAD or time.monotonic() - seen < PATIENCE):
        if over.wait(LOOK_SECONDS):
            return
        missing = gone()
        if not missing:
            seen = time.monotonic()
    lost.append(f"the job stopped: {missing} has gone: killed, stopped by `ray stop`, or its machine failed")
    if not is_main:
        log.error(lost[0])
        return
    os.kill(os.getpid(), signal.SIGTERM)  # `interruption` makes an exception of it
    if not over.wait(GRACE):
        log.error("raypipe: %s; the same command goes on", lost[0])
        os._exit(1)
