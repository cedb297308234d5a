"""Real processes that are killed, stopped, locked out or run out of disk: nothing is lost, nothing is doubled."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.faulty import GOOD, write_images
from support.malformed import malformed
from support.written import rows_of

import raypipe
from raypipe import storage

TESTS = Path(__file__).parents[1]
IMAGES = 48  # a tenth of a second each: long enough to be interrupted, short enough for a test


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "photos"
    write_images(folder, [GOOD] * IMAGES)
    return folder


def command(photos: Path, output: Path, *options: str, sleep: float = 0.1) -> list[str]:
    return [
        sys.executable,
        str(TESTS / "support/drive.py"),
        str(sleep),
        "--input",
        str(photos),
        "--output",
        str(output),
        *options,
    ]


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


def finish(job: subprocess.Popen, timeout: float = 240) -> str:
    text, _ = job.communicate(timeout=timeout)
    return text


def wait_for(output: Path, files: str, count: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while len(list(output.glob(files))) < count:
        assert time.monotonic() < deadline, f"no {files} in time"
        time.sleep(0.005)


def wait_for_commits(output: Path, count: int) -> None:
    wait_for(output, "_commits/part-*", count)


def assert_complete(output: Path, photos: Path) -> None:
    """Every image once, for plain readers too, and equal to an undisturbed loop."""
    keys = [
        key
        for file in output.glob("masks/*/*.parquet")
        for key in pq.read_table(file, partitioning=None)["key"].to_pylist()
    ]
    assert sorted(keys) == sorted(file.name for file in photos.iterdir())
    alone = output.with_name(output.name + "-alone")
    if not alone.exists():
        subprocess.run(command(photos, alone, "--local", sleep=0), check=True, capture_output=True)
    assert rows_of(output) == rows_of(alone)


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


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
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
    workers = worker_processes(job.pid)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    text = finish(job)
    assert job.returncode == 0, text
    assert len(list(output.glob("_runs/2*.json"))) == 1
    assert_complete(output, photos)


def worker_processes(driver: int) -> list[int]:
    """Processes of Ray actors below a driver."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    rows = [line.split(None, 2) for line in lines]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def is_below(pid):
        while pid in parents:
            if pid == driver:
                return True
            pid = parents[pid]
        return False

    return [int(pid) for pid, _, name in rows if re.match(r"ray::.*MapBatches", name) and is_below(int(pid))]


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


def test_ray_job_submit_runs_the_script_on_a_real_head(photos, tmp_path):
    """A head of its own in a process group of its own, with token authentication, as the README says."""
    ports = [free_port() for _ in range(3)]
    session = tempfile.mkdtemp(prefix="ray")  # not tmp_path: its sockets' names may have 107 characters at most
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--num-cpus=4"]
        + ["--dashboard-host=127.0.0.1", f"--ray-client-server-port={ports[2]}", f"--temp-dir={session}"],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(ports[1])
        output = tmp_path / "run"
        options = ["--input", str(photos), "--output", str(output), "--foreground", "whole", "--json"]
        submit = [
            ray,
            "job",
            "submit",
            "--address",
            f"http://127.0.0.1:{ports[1]}",
            "--working-dir",
            str(TESTS.parent / "jobs"),
        ]
        job = subprocess.run(
            [*submit, "--", sys.executable, "label.py", "kmeans", *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert job.returncode == 0, job.stdout + job.stderr
        assert f"{IMAGES} of {IMAGES} images labelled" in job.stdout and "succeeded" in job.stdout
        assert raypipe.load(str(output))["error"].to_pylist() == [""] * IMAGES
        record = json.loads(next(output.glob("_runs/2*.json")).read_text())
        assert record["exit_code"] == 0 and record["labelled"] == IMAGES
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(session, ignore_errors=True)


def free_port() -> int:
    """A free port below the range that Ray gives its workers (10002 to 19999)."""
    while True:
        port = random.randint(5000, 9999)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def wait_for_port(port: int, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        assert time.monotonic() < deadline, f"nothing listens on port {port}"
        time.sleep(0.2)
