"""Real processes that are killed, stopped, locked out or run out of disk: nothing is lost, nothing is doubled."""

import os
import random
import shutil
import signal
import socket
import subprocess

import pyarrow.parquet as pq
import pytest
from support.faulty import GOOD, write_images
from support.jobs import actors_below, assert_complete, command, finish, wait_for, wait_for_commits
from support.malformed import malformed
from support.written import rows_of

from raypipe import storage


def test_a_driver_killed_again_and_again_loses_and_doubles_nothing(start, photos, tmp_path):
    output, rng = tmp_path / "run", random.Random(0)
    for round_ in range(3):
        job = start(photos, output)
        wait_for_commits(output, len(list(output.glob("_commits/part-*"))) + rng.randint(1, 6))
        os.kill(job.pid, signal.SIGKILL)
        finish(job)
        assert job.returncode == -signal.SIGKILL, f"round {round_}: it ended before the kill"
    job = start(photos, output)
    text = finish(job)
    assert job.returncode == 0, text
    assert_complete(output, photos)


@pytest.mark.parametrize("moments", [["_runs/LOCK", "run.json", "masks/*/part-*"], ["errors.parquet"]])
def test_a_driver_killed_at_the_start_or_at_the_end_loses_and_doubles_nothing(start, photos, tmp_path, moments):
    output = tmp_path / "run"
    for file in moments:
        job = start(photos, output, "--local", sleep=0)
        wait_for(output, file, 1)
        job.kill()
        finish(job)
    job = start(photos, output, "--local", sleep=0)
    text = finish(job)
    assert job.returncode == 0, text
    assert_complete(output, photos)
    assert pq.read_table(output / "errors.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_soon_with_the_command_that_resumes(start, photos, tmp_path, signum, code):
    output = tmp_path / "run"
    job = start(photos, output)
    wait_for_commits(output, 2)
    os.killpg(job.pid, signum) if signum == signal.SIGINT else os.kill(job.pid, signum)
    text = finish(job, timeout=60)
    assert job.returncode == code, text
    assert f"--output {output}" in text.partition("this command goes on")[2], text
    assert not (output / "_runs/LOCK").exists()
    job = start(photos, output)
    assert "nothing to do" not in finish(job) and job.returncode == 0
    assert_complete(output, photos)


def test_a_killed_worker_is_replaced_without_a_new_start(start, photos, tmp_path):
    output = tmp_path / "run"
    job = start(photos, output)
    wait_for_commits(output, 2)
    workers = actors_below(job.pid)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    text = finish(job)
    assert job.returncode == 0, text
    assert len(list(output.glob("_runs/2*.json"))) == 1
    assert_complete(output, photos)


DECODER = """
import os, time
from raypipe import images

decode = images.decode

def faulty(content, **limits):
    if content == b"dies":
        os._exit(7)
    if content == b"hangs":
        time.sleep(3600)
    return decode(content, **limits)

images.decode = faulty
"""


def test_images_that_kill_or_hang_the_decoder_become_error_rows(tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "run"
    write_images(photos, [GOOD] * 6)
    (photos / "dies.jpg").write_bytes(b"dies")
    (photos / "hangs.jpg").write_bytes(b"hangs")
    (tmp_path / "sitecustomize.py").write_text(DECODER)  # Python imports it in every process at the start
    words = command(photos, output, "--timeout", "2", "--actors", "1", "--max-bad-fraction", "1", sleep=0)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    errors = {row["key"]: row["error"] for row in rows_of(output) if row["error"]}
    assert errors.keys() == {"dies.jpg", "hangs.jpg"} and len(rows_of(output)) == 8
    assert errors["dies.jpg"].startswith("decode: crash: ") and errors["hangs.jpg"].startswith("decode: timeout: ")


def test_of_two_runs_on_one_output_one_wins_and_the_other_names_the_holder(start, photos, tmp_path):
    output = tmp_path / "run"
    first = start(photos, output)
    wait_for_commits(output, 1)
    second = start(photos, output)
    text = finish(second)
    assert second.returncode == 4 and f"process {first.pid} on {socket.gethostname()}" in text
    assert first.returncode is None
    finish(first)
    assert first.returncode == 0
    assert_complete(output, photos)


def test_another_configuration_is_refused_with_a_diff(photos, tmp_path):
    output = tmp_path / "run"
    assert subprocess.run(command(photos, output, "--local", "--limit", "1"), capture_output=True).returncode == 0
    done = subprocess.run(command(photos, output, "--seed", "5", "--local"), capture_output=True, text=True)
    assert done.returncode == 4 and "seed: 0 there, 5 now" in done.stderr


def test_hundreds_of_odd_files_each_get_their_row(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    expected = malformed(photos)
    assert len(expected) >= 200
    output = tmp_path / "run"
    job = subprocess.run(
        command(photos, output, "--timeout", "60", sleep=0), capture_output=True, text=True, timeout=300
    )
    assert job.returncode == 3, job.stderr  # most rows are errors
    rows = {row["key"]: row for row in rows_of(output)}
    assert len(rows) == len(expected)
    for name, allowed in expected.items():
        name = storage.as_text(name)
        kind = rows[name]["error"].split(": ")[1] if rows[name]["error"] else "ok"
        assert kind in ({allowed} if isinstance(allowed, str) else allowed), f"{name!r}: {rows[name]['error']}"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that can be filled or made read-only; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("where", [("--local",), ()], ids=["local", "ray"])
def test_a_full_disk_ends_with_a_clear_message_and_resumes_exactly(photos, tmp_path, small_disk, where):
    output = small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (300 if where else 250) * 1024)
    job = subprocess.run(command(photos, output, "--batch-size", "1", *where, sleep=0), capture_output=True, text=True)
    assert job.returncode == 1, job.stderr
    assert "No space left on device; free some space" in job.stderr and "UDF" not in job.stderr
    assert "Traceback" not in job.stderr
    filler.unlink()
    for file in output.glob("masks/*/part-*.parquet"):
        pq.read_table(file, partitioning=None)  # whatever stands there is whole
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    job = subprocess.run(command(photos, output, "--batch-size", "1", *where, sleep=0), capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    kept = tmp_path / "run"
    shutil.copytree(output, kept)
    assert_complete(kept, photos)


def test_a_read_only_output_is_named(photos, small_disk):
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    job = subprocess.run(command(photos, small_disk / "run", "--local"), capture_output=True, text=True)
    assert job.returncode == 1 and "Read-only file system" in job.stderr and "Traceback" not in job.stderr
