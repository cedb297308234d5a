"""A training on Ray Train's workers: two that are as one, one that dies, what they say, drivers that are stopped."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from PIL import Image
from support import jobs
from support.toy import Toy

from raypipe.run import OtherConfiguration
from raypipe.storage import Folder
from raypipe.training import record
from raypipe.training.job import Train
from raypipe.training.train import train

ray = pytest.importorskip("ray")
DRIVE = Path(jobs.__file__).with_name("train_drive.py")
LONG = ["--epochs", "8", "--sleep", "0.2", "--checkpoint-steps", "1", "--log-steps", "1"]  # 24 steps


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, numbers = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(numbers.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i:02}.png")
    (folder / "text.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def local_ray():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def start(monkeypatch):
    """Starts `raypipe train` in its own process group; what still runs after the test is killed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = []

    def start(photos: Path, output: Path, *options: str) -> subprocess.Popen:
        words = [sys.executable, str(DRIVE), "--input", str(photos), "--output", str(output), *options]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(words, start_new_session=True, **streams))
        return started[-1]

    yield start
    for job in started:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def trained(photos, output, recipe=None, **options):
    return train(Train(input=str(photos), output=str(output), **options), recipe or Toy(epochs=4))


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    """The same training in one process, undisturbed."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("straight") / "out"
    trained(photos, output, local=True)
    torch.set_num_threads(before)
    return output


def weights(output) -> dict[str, np.ndarray]:
    return safetensors.numpy.load((output / "head.safetensors").read_bytes())


def losses(output) -> list[float]:
    return record.read(Folder(str(output)))["total"].to_pylist()


def assert_equal(output, other, tolerance=0.0):
    for name, value in weights(output).items():
        np.testing.assert_allclose(value, weights(other)[name], rtol=0, atol=tolerance, err_msg=name)


def test_two_workers_are_one_with_the_same_batch(photos, straight, labelled, tmp_path, local_ray, monkeypatch, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    caplog.set_level("INFO", "raypipe")
    found = trained(photos, tmp_path / "out", workers=2, log_steps=1, validate_every=3, **labelled)
    np.testing.assert_allclose(losses(tmp_path / "out")[:10], losses(straight)[:10], rtol=0, atol=1e-5)
    assert_equal(tmp_path / "out", straight, 1e-4)
    (measures,) = found.measures.values()
    (alone,) = trained(photos, straight, local=True, **labelled).measures.values()
    assert measures == pytest.approx(alone, abs=1e-4)  # each has measured its batch
    table = pq.read_table(tmp_path / "out/metrics/epochs.parquet")
    assert table["epoch"].to_pylist() == [3, 4] and table["images"].to_pylist() == [10, 10]
    assert found.images == 12 and list(found.skipped) == ["text.jpg"]
    assert {file.name[:2] for file in (tmp_path / "out/_runs").iterdir()} == {"20", "fi"}  # nothing of Ray's
    assert "epoch 4 of 4, step 12 of 12: total" in caplog.text and "2 workers on cpu" in caplog.text


def test_a_worker_that_is_killed_is_replaced_and_only_the_driver_tells(
    photos, straight, tmp_path, local_ray, monkeypatch, caplog
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    marks = tmp_path / "marks"
    marks.mkdir()
    recipe = Toy(epochs=4, dies_at=7, marks=str(marks))
    caplog.set_level("INFO", "raypipe")
    trained(photos, tmp_path / "out", recipe, checkpoint_steps=2, log_steps=1)
    assert (marks / "died").exists()
    assert_equal(tmp_path / "out", straight)  # one worker: to the last bit
    assert losses(tmp_path / "out") == losses(straight)


@pytest.mark.slow
def test_a_worker_that_dies_too_often_ends_the_training_and_the_same_call_goes_on(
    photos, straight, tmp_path, local_ray, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = Toy(epochs=4, dies_at=7, marks=str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^the training stopped: a worker's process died; was it killed"):
        trained(photos, tmp_path / "out", recipe, max_failures=0, checkpoint_steps=1)
    assert len(losses(tmp_path / "out")) == 7
    trained(photos, tmp_path / "out", recipe)
    assert_equal(tmp_path / "out", straight)


def test_an_error_of_the_training_ends_it_at_once_with_its_own_words(photos, tmp_path, local_ray):
    with pytest.raises(ValueError, match=r"^toy: this step is not liked$"):
        trained(photos, tmp_path / "out", Toy(raises_at=2))
    assert not list((tmp_path / "out/_runs").glob("ray-*"))


@pytest.mark.slow
def test_a_stop_that_another_process_asks_for_is_no_end_of_the_training(photos, tmp_path, local_ray):
    output, recipe = tmp_path / "out", Toy(epochs=8, sleep=0.3)

    def ask():
        jobs.wait_until(lambda: record.read(Folder(str(output))).num_rows, "step")
        (output / "_runs/STOP").touch()

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(RuntimeError, match="asked to stop by the file .*STOP, and saved"):
        trained(photos, output, recipe, log_steps=1)
    asking.join()
    assert 0 < len(losses(output)) < 24
    assert not {"STOP", "finished.json"} & {file.name for file in (output / "_runs").iterdir()}


def test_a_signal_saves_first_and_the_same_command_goes_on(photos, tmp_path, start):
    output = tmp_path / "out"
    job = start(photos, output, *LONG[:4], "--workers", "2", "--checkpoint-steps", "1000", "--log-steps", "1")
    jobs.wait_until(lambda: record.read(Folder(str(output))).num_rows >= 4, "steps")
    job.send_signal(signal.SIGTERM)
    text = jobs.finish(job)
    assert job.returncode == 143, text
    assert "interrupted; what is committed is kept, this command goes on:" in text, text
    newest = max(int(file.stem.removeprefix("step-")) for file in (output / "checkpoints").iterdir())
    assert newest == len(losses(output)) < 24  # the step that was under way
    assert not {"LOCK", "finished.json"} & {file.name for file in (output / "_runs").iterdir()}
    alone = start(photos, tmp_path / "alone", *LONG, "--local")
    again = start(photos, output, *LONG, "--local")  # exact: as many workers as one likes
    text = jobs.finish(again)
    assert again.returncode == 0, text
    assert jobs.finish(alone) and alone.returncode == 0
    assert_equal(output, tmp_path / "alone", 1e-4)
    assert len(losses(output)) == 24


@pytest.mark.slow
def test_ten_kills_of_the_driver_at_any_time_lose_nothing(photos, tmp_path, start):
    """Whatever is being written when it dies, the next start goes on from what is whole."""
    numbers, output, kills = random.Random(0), tmp_path / "out", 0
    command = [*LONG, "--local"]
    while kills < 10:
        job = start(photos, output, *command)
        before = len(list(output.glob("log/*"))) and record.read(Folder(str(output))).num_rows
        jobs.wait_until(
            lambda before=before, job=job: (
                job.poll() is not None or record.read(Folder(str(output))).num_rows != before
            ),
            "a step",
        )
        time.sleep(numbers.random() * 0.5)
        if job.poll() is not None:
            break
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        kills += 1
    job = start(photos, output, *command)
    text = jobs.finish(job)
    assert job.returncode == 0, text
    alone = start(photos, tmp_path / "alone", *command)
    assert jobs.finish(alone) and alone.returncode == 0
    assert_equal(output, tmp_path / "alone")
    assert losses(output) == losses(tmp_path / "alone")
    other = start(photos, output, *command, "--lr", "0.5")
    assert "lr: 0.01 there, 0.5 now" in jobs.finish(other) and other.returncode == 4


def test_another_number_of_workers_is_another_training_only_with_throughput(photos, straight, tmp_path):
    with pytest.raises(OtherConfiguration, match="workers: .* there, 2 now"):
        trained(photos, straight, workers=2, batch_mode="throughput")
    assert not trained(photos, straight, workers=2).is_new
