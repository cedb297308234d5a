"""Images to label and processes that label them, for tests that disturb jobs."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.faulty import GOOD, write_images
from support.jobs import command


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """48 images: with a tenth of a second each long enough to be interrupted, short enough for a test."""
    folder = tmp_path_factory.mktemp("faults") / "photos"
    write_images(folder, [GOOD] * 48)
    return folder


@pytest.fixture
def start():
    """Starts the job in its own process group, as a shell does; what still runs after the test is killed."""
    jobs = []

    def start(photos: Path, output: Path, *options: str, sleep: float = 0.1) -> subprocess.Popen:
        words = command(photos, output, "--batch-size", "1", *options, sleep=sleep)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        jobs.append(subprocess.Popen(words, start_new_session=True, **streams))
        return jobs[-1]

    yield start
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
