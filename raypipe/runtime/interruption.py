"""Ctrl-C and SIGTERM as one exception that leaves the run resumable."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raypipe.storage import Folder, hold

GRACE = 10.0  # seconds to end workers and release the lock; resume does not need it, so then the process just ends


class Interrupted(BaseException):
    """A signal asked the run to stop. Not an Exception: no error handler on the way may take it for a bad image."""

    def __init__(self, signum: int, deadline: threading.Timer | None = None):
        super().__init__(signal.Signals(signum).name)
        self.exit_code, self.deadline = 128 + signum, deadline


@contextmanager
def held(folder: Folder, attempt: str) -> Iterator[None]:
    """Hold a folder for one attempt (`storage.hold`) that a signal interrupts, so that its lock is let go of."""
    with on_signals(), hold(folder, attempt):
        yield


@contextmanager
def on_signals() -> Iterator[None]:
    """Raise Interrupted in the main thread at SIGINT and SIGTERM."""

    def interrupt(signum: int, frame) -> None:
        deadline = threading.Timer(GRACE, os._exit, (128 + signum,))
        deadline.daemon = True
        deadline.start()
        raise Interrupted(signum, deadline)

    with restored_handlers() as before:
        for signum in before:
            signal.signal(signum, interrupt)
        yield


@contextmanager
def postponed() -> Iterator[Callable[[], None]]:
    """Hold signals back in a block of `on_signals`. Gives what handles one that came, for where it may raise.

    At the end of the block one is handled anyway. For loops of libraries that take what a handler raises in their
    compiled code for an error of theirs.
    """
    came = []
    with restored_handlers() as before:
        for signum in before:
            signal.signal(signum, lambda *arrived: came.append(arrived))

        def handle() -> None:
            if came:
                signum, frame = came.pop()
                before[signum](signum, frame)

        yield handle
        handle()


@contextmanager
def restored_handlers() -> Iterator[dict[int, object]]:
    """Put back the handlers of SIGINT and SIGTERM at the end, whoever replaces them in the block. Gives them by signal.

    Gives and does nothing in another thread than the main one, where Python allows no handlers.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    try:
        yield handlers
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
