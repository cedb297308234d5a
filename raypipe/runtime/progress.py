"""Progress of a run: a bar with the time left on a terminal, a quiet line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

log = logging.getLogger("raypipe")
LINE_SECONDS = 30.0  # between lines in a log file


class Progress:
    """Context that shows committed images while the block runs. count: returns (rows, error rows) committed so far."""

    def __init__(self, total: int, count: Callable[[], tuple[int, int]]):
        self._total, self._count = total, count
        self._stop, self._start = threading.Event(), time.monotonic()
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
                rows, errors = self._count()
                rate = rows / (time.monotonic() - self._start)
                left = f", {speed(rate)}, {duration((self._total - rows) / rate)} left" if rows else ""
                log.info("%s of %s images, %s errors%s", f"{rows:,}", f"{self._total:,}", errors, left)
            return
        from tqdm import tqdm

        with tqdm(total=self._total, unit="image", file=sys.stderr, dynamic_ncols=True) as bar:
            is_over = False
            while not is_over:
                is_over = self._stop.wait(0.5)
                rows, errors = self._count()
                bar.set_postfix_str(f"{errors} errors" if errors else "")
                bar.update(rows - bar.n)


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
