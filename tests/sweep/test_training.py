"""Sweeps over trainings: each setting trained once and measured as `raypipe train` does, whatever dies in between."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support.sweepable import Gamma, sweep_of, write_labelled
from support.tiny import dino
from support.trainable import Trainable

import raypipe
from raypipe import training as recipes
from raypipe.cli.verbs import main
from raypipe.run import OtherConfiguration
from raypipe.storage import Folder
from raypipe.sweep.sweep import sweep
from raypipe.sweep.training import Training, training
from raypipe.training import record
from raypipe.training.selfmask import SelfMask

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).parents[1]
SMALL = {"epochs": 2, "batch_size": 4}  # four steps of eight photographs


@pytest.fixture
def folder(tmp_path):
    write_labelled(tmp_path, 8)
    return tmp_path


def job(folder: Path, *over: str, **options) -> Training:
    given = {"local": True, "filters": ("none",)} | options
    places = {"input": "photos", "validate": "photos", "labels": "labels", "output": "sweep"}
    return Training(**{name: str(folder / place) for name, place in places.items()} | given, over=over)


def table(folder: Path) -> list[dict]:
    return pq.read_table(folder / "sweep/trials.parquet").to_pylist()


def test_each_setting_is_trained_and_measured_as_train_does_it(folder, monkeypatch):
    found = training(job(folder, "level=0.3,0.45", "lr=0.01,0.02", filters=("none", "guided")), Trainable(**SMALL))
    rows = table(folder)
    assert (found.exit_code, found.settings, found.trials["done"], found.images) == (0, 8, 4, 8)
    assert [row["iou"] for row in rows] == sorted((row["iou"] for row in rows), reverse=True)
    assert {(row["level"], row["lr"], row["filter"]) for row in rows} == {
        (level, lr, name) for level in (0.3, 0.45) for lr in (0.01, 0.02) for name in ("none", "guided")
    }
    chosen = yaml.safe_load((folder / "sweep/best.yaml").read_text())
    assert {"level": rows[0]["level"], "lr": rows[0]["lr"]}.items() <= chosen.items()
    monkeypatch.setattr(recipes, "find", lambda name: Trainable)
    monkeypatch.chdir(folder)
    words = ["--config", "sweep/best.yaml", *"--input photos --validate photos --labels labels --output alone".split()]
    assert main(["train", "trainable", *words, "--local"]) == 0
    (alone,) = (
        row
        for row in pq.read_table(folder / "alone/metrics/epochs.parquet").to_pylist()
        if row["filter"] == rows[0]["filter"]
    )
    assert alone["iou"] == rows[0]["iou"] == found.value
    weights = Path(found.weights) / "head.safetensors"
    assert weights.read_bytes() == (folder / "alone/head.safetensors").read_bytes()
    page = (folder / "sweep/sweep.html").read_text()
    assert "raypipe train trainable --config" in page and "level" in page and "Images across" not in page
    assert f"best: level {rows[0]['level']}" in found.text() and f"--weights {found.weights}" in found.text()


def marks(folder: Path) -> dict[str, int]:
    """When each trial was finished."""
    return {
        file.parent.parent.name: file.stat().st_mtime_ns for file in folder.glob("sweep/trials/*/_runs/finished.json")
    }


def test_the_same_command_trains_nothing_again_and_more_values_are_added(folder):
    training(job(folder, "level=0.3"), Trainable(**SMALL))
    before = marks(folder)
    found = training(job(folder, "level=0.3,0.45"), Trainable(**SMALL))
    assert found.trials["done"] == 2 and before.items() <= marks(folder).items() and len(before) == 1
    other = job(folder, "seed=0,1")
    assert training(other, Trainable(**SMALL, level=0.3)).trials["done"] == 3
    assert len(marks(folder)) == 3 and {row["seed"] for row in table(folder)} == {0, 1}


def test_a_failed_training_is_listed_and_tried_again(folder):
    found = training(job(folder, "raises_at=-1,2"), Trainable(**SMALL))
    assert found.exit_code == 0 and (found.trials["done"], found.trials["failed"]) == (1, 1)
    assert found.errors == ["ValueError: toy: this step is not liked"] and "failed: ValueError" in found.text()
    assert [(row["status"], row["raises_at"], row["iou"] is None) for row in table(folder)] == [
        ("done", -1, False),
        ("failed", 2, True),
    ]
    before = marks(folder)
    assert training(job(folder, "raises_at=-1,2"), Trainable(**SMALL)).trials["failed"] == 1 and marks(folder) == before
    (folder / "other").mkdir()
    found = training(job(folder, "raises_at=1", output=str(folder / "other")), Trainable(**SMALL))
    assert found.exit_code == 1 and "no setting has a value" in found.text()


def test_a_sweep_of_other_options_or_kind_is_refused_and_nothing_is_lost(folder):
    training(job(folder, "level=0.3"), Trainable(**SMALL))
    before = marks(folder)
    with pytest.raises(OtherConfiguration, match="polarity"):
        training(job(folder, "level=0.3", polarity="image"), Trainable(**SMALL))
    with pytest.raises(OtherConfiguration, match="lr"):
        training(job(folder, "level=0.3"), Trainable(**SMALL, lr=0.5))
    with pytest.raises(OtherConfiguration, match="another sweep"):
        sweep(sweep_of(folder, "gamma=1,2"), Gamma())
    assert marks(folder) == before


def test_settings_without_sense_are_left_out_but_not_a_value_without_any(folder, caplog):
    caplog.set_level(logging.INFO, "raypipe")
    found = training(job(folder, "is_soft=true,false", "width=0,0.5"), Trainable(**SMALL))
    assert found.trials["done"] == 3
    assert "left out: is_soft False, width 0.5: trainable: width has no effect without is_soft" in caplog.text
    with pytest.raises(ValueError, match="level must be above 0 and below 1, got 1.5"):
        training(job(folder, "level=0.3,1.5", output=str(folder / "other")), Trainable(**SMALL))
    assert not (folder / "other").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validate": None, "labels": None, "filters": ("none", "guided")}, "add --validate"),
        ({"metric": "dice"}, "--metric 'dice': a validation has acc, iou"),
        ({"trials": 3}, "--trials has no effect on a grid"),
        ({"actors": 2}, "--actors has no effect with --local"),
        ({"over": ("threshold=0.5",)}, "threshold"),
        ({"over": ("epochs=0,2",)}, "--epochs 0"),
        ({"input": "nowhere"}, "nowhere"),
        ({"labels": "photos/wild/cat_0.png"}, "labels"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(folder, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    over = options.pop("over", ("level=0.3",))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        training(job(folder, *over, **options), Trainable(**SMALL))
    assert not (folder / "sweep/trials").exists()


def test_a_recipe_that_no_validation_knows_is_compared_by_its_masks(folder, monkeypatch):
    monkeypatch.chdir(folder)
    masks = str(folder / "run")
    raypipe.label("grabcut", str(folder / "photos"), masks, local=True)
    recipe = SelfMask(masks=masks, backbone=str(dino.write_model(folder / "backbone")), image_size=32, **SMALL)
    with pytest.raises(ValueError, match="--validate has no effect: selfmask is not given crops of photographs"):
        training(job(folder, "lr=0.001,0.01", input=None), recipe)
    found = training(job(folder, "lr=0.001,0.01", validate=None, filters=Training.filters), recipe)
    assert (found.trials["done"], found.images, found.metric) == (2, 8, "dice_best")
    assert [row["dice_best"] for row in table(folder)][0] == found.value


def words(folder: Path, *more: str) -> list[str]:
    """The command line of a sweep over two levels, in steps that take a while."""
    places = ["--input", "photos", "--validate", "photos", "--labels", "labels", "--output", "sweep"]
    program = [sys.executable, str(TESTS / "support/trainable.py")]
    options = ["--over", "level=0.3,0.45", "--epochs", "3", "--batch-size", "4", "--marks", str(folder)]
    return [*program, *places, *options, *more]


def run(folder: Path, *more: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words(folder, *more), cwd=folder, start_new_session=True, env=environment, **streams)


def steps(folder: Path) -> dict[str, list[int]]:
    """The logged steps of each trial."""
    logs = {place.name: record.read(Folder(str(place))) for place in folder.glob("sweep/trials/*")}
    return {name: log["step"].to_pylist() for name, log in logs.items()}


def test_a_training_that_was_begun_goes_on_from_its_checkpoint(folder):
    """The process dies in the first training, behind the checkpoint of its first epoch."""
    job = run(folder, "--local", "--dies-at", "3")
    assert job.communicate(timeout=100) and job.returncode == -signal.SIGKILL
    (begun,) = folder.glob("sweep/trials/*/samples/epoch-00000.parquet")  # of untrained weights
    was_written = begun.stat().st_mtime_ns
    again = run(folder, "--local", "--dies-at", "3")
    text = again.communicate(timeout=100)[0]
    assert again.returncode == 0 and "2 done" in text, text
    assert begun.stat().st_mtime_ns == was_written and [*steps(folder).values()] == [[1, 2, 3, 4, 5, 6]] * 2
    assert all(row["status"] == "done" for row in table(folder))


@pytest.mark.slow
def test_two_trainings_on_two_workers_finish_though_the_sweep_was_killed(folder):
    job = run(folder, "--workers", "2")
    deadline = time.monotonic() + 300
    try:
        while not marks(folder):
            assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
        before = marks(folder)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
    assert len(before) == 1
    again = run(folder, "--workers", "2")
    try:
        text = again.communicate(timeout=300)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(again.pid, signal.SIGKILL)
    assert again.returncode == 0 and "1 of 2 trials to train" in text and "2 done" in text, text
    assert before.items() <= marks(folder).items() and len(marks(folder)) == 2
    assert [*steps(folder).values()] == [[1, 2, 3, 4, 5, 6]] * 2
    assert {row["level"] for row in table(folder) if row["status"] == "done"} == {0.3, 0.45}
