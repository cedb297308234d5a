"""Progress of a run: a bar with the time left on a terminal, a quiet line now and then elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

log = logging.getLogger("raypipe")
LINE_SECONDS = 30.0  # between lines in a log file


class Counts(NamedTuple):
    """How far a job is."""

    rows: int  # images done, those of earlier starts included
    errors: int  # how many of them failed, as far as that is counted
    has_begun: bool = True  # a worker has taken up images


class Progress:
    """Context that shows how many images are done while the block runs. count: how far the job is now.

    before: how many of `total` were done when this start began; the speed is that of all others since then, since
    images come in bursts where they are committed in blocks.
    """

    def __init__(self, total: int, count: Callable[[], Counts], *, before: int = 0):
        self._total, self._count, self._before, self._rows = total, count, before, before
        self._stop, self._start = threading.Event(), time.monotonic()
        self._changed = self._start
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _show(self) -> None:
        if not sys.stderr.isatty():
            while not self._stop.wait(LINE_SECONDS):
                counts, text = self._look()
                log.info("%s of %s, %s", f"{counts.rows:,}", count_of_images(self._total), text)
            self._count()  # it may have something to say
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        look = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        is_known = all(os.get_terminal_size(sys.stderr.fileno()))  # 0 x 0 under some tools: nothing would be drawn
        size = {"dynamic_ncols": True} if is_known else {"ncols": 80, "nrows": 24}
        bar = tqdm(total=self._total, initial=self._before, file=sys.stderr, bar_format=look, **size)
        with logging_redirect_tqdm(), bar:  # lines of the log stand above the bar
            is_over = False
            while not is_over:
                is_over = self._stop.wait(0.5)
                counts, text = self._look()
                bar.n = counts.rows
                bar.set_postfix_str(text)  # draws the bar

    def _look(self) -> tuple[Counts, str]:
        counts, now = self._count(), time.monotonic()
        if not counts.has_begun:
            self._start = now  # the start of workers says nothing about the speed
        if counts.rows != self._rows:
            self._rows, self._changed = counts.rows, now
        took, since = self._changed - self._start, now - self._changed
        return counts, state(counts, self._total, before=self._before, took=took, since=since)


def state(counts: Counts, total: int, *, before: int, took: float, since: float = 0.0) -> str:
    """Speed, time left and errors in words, or what is going on before the first image is done.

    before: of the `total` images, those done when this start began. took: seconds from the first image's begin to the
    last one that is done. since: seconds after it; they count down the time left, however many images come at once.
    """
    rows = counts.rows - before
    if not rows:
        return "first images in work" if counts.has_begun else "workers start"
    took = max(took, 1e-3)
    left = (total - counts.rows) * took / rows - since
    errors = [count_of(counts.errors, "error")] if counts.errors else []
    return ", ".join([speed(rows / took), f"{duration(left)} left" if left >= 0 else "slower now", *errors])


def count_of(count: int, noun: str) -> str:
    """A number of things for people: 1 part, 1,234 parts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def count_of_images(count: int) -> str:
    """A number of images for people: 1 image, 1,234 images."""
    return count_of(count, "image")


def speed(rate: float) -> str:
    """Images per second for people: 12.3 images/s, or 40 s per image."""
    return f"{rate:.1f} images/s" if rate >= 1 or not rate else f"{1 / rate:.3g} s per image"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 5 min, 3.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
