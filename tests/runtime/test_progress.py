"""What a running job says: how far it is, counted from where it was, and how long it will take."""

import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest

from raypipe.runtime import progress
from raypipe.runtime.progress import Counts, Progress, count_of_images, state


def test_the_time_left_follows_from_the_whole_start_not_from_the_last_burst():
    assert state(Counts(6, 0), 20, before=0, took=499) == "83.2 s per image, 19 min left"
    assert state(Counts(12, 0), 20, before=0, took=799) == "66.6 s per image, 9 min left"


def test_between_two_bursts_the_time_left_counts_down():
    assert state(Counts(6, 0), 20, before=0, took=499, since=300) == "83.2 s per image, 14 min left"
    assert state(Counts(6, 0), 20, before=0, took=499, since=1200) == "83.2 s per image, slower now"


def test_a_resumed_run_counts_from_where_it_was_and_its_speed_from_now_on():
    assert state(Counts(14, 1), 20, before=12, took=150) == "75 s per image, 8 min left, 1 error"
    assert state(Counts(14, 2), 20, before=12, took=1).endswith(", 2 errors")


def test_before_the_first_image_it_says_what_goes_on():
    assert state(Counts(12, 0, False), 20, before=12, took=9) == "workers start"
    assert state(Counts(12, 0, True), 20, before=12, took=9) == "first images in work"


def test_a_log_file_gets_a_line_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    looks = iter([Counts(12, 0, False), Counts(12, 0), Counts(14, 0)])
    with caplog.at_level("INFO", "raypipe"), Progress(20, lambda: next(looks, Counts(15, 0)), before=12):
        while "15 of 20" not in caplog.text:
            time.sleep(0.01)
    assert "12 of 20 images, workers start" in caplog.text and "12 of 20 images, first images in work" in caplog.text
    assert re.search(r"14 of 20 images, .* left", caplog.text)


TERMINAL = """
import time
from raypipe.runtime.progress import Counts, Progress

looks = []

def count():
    looks.append(1)
    return Counts(12 if len(looks) < 3 else 18, 0)

with Progress(20, count, before=12):
    while len(looks) < 6:
        time.sleep(0.01)
"""


def test_a_terminal_gets_a_bar_that_moves_before_the_first_commit_and_in_between():
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    subprocess.run([sys.executable, "-c", TERMINAL], stderr=terminal, check=True, timeout=60)
    os.close(terminal)
    text = b""
    try:
        while chunk := os.read(main, 65536):
            text += chunk
    except OSError:  # how Linux ends it
        pass
    bars = text.decode().split("\r")
    assert any("12/20 [" in bar and "first images in work]" in bar for bar in bars)
    assert sum("18/20 [" in bar and " left]" in bar or "slower now]" in bar for bar in bars) > 2
    assert any(" 90%|" in bar for bar in bars)


@pytest.mark.parametrize(("count", "text"), [(0, "0 images"), (1, "1 image"), (1234, "1,234 images")])
def test_images_are_counted_for_people(count, text):
    assert count_of_images(count) == text
