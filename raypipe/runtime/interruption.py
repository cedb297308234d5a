"""Ctrl-C and SIGTERM as one exception that leaves the run resumable."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from raypipe.storage import Folder, hold

GRACE = 10.0  # seconds to end workers and release the lock; resume does not need it, so then the process just ends


class Interrupted(BaseException):
    """A signal asked the run to stop. Not an Exception: no error handler on the way may take it for a bad image."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def held(folder: Folder, attempt: str) -> Iterator[None]:
    """Hold a folder for one attempt (`storage.hold`) that a signal interrupts, so that its lock is let go of."""
    with on_signals(), hold(folder, attempt):
        yield


@contextmanager
def on_signals() -> Iterator[None]:
    """Raise Interrupted in the main thread at SIGINT and SIGTERM. To be entered after `ray.init`, which sets its own.

    Does nothing in another thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame) -> None:
        deadline = threading.Timer(GRACE, os._exit, (128 + signum,))
        deadline.daemon = True
        deadline.start()
        raise Interrupted(signum)

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
