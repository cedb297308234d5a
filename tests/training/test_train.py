"""A training from the options to the exported network, in this process: order, checkpoints, resume, what goes wrong."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from support.jobs import wait_until
from support.toy import Drawn, Toy

from raypipe import training
from raypipe.cli.verbs import main
from raypipe.run import OtherConfiguration
from raypipe.runtime.interruption import Interrupted
from raypipe.storage import Folder, Locked, hold
from raypipe.training import checkpoints, loop, record, validate
from raypipe.training.job import Train, frozen_settings, per_worker
from raypipe.training.train import told, train
from raypipe.training.work import Work

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


def trained(photos, output, recipe=None, **options):
    return train(Train(input=str(photos), output=str(output), local=True, **options), recipe or Toy())


def weights(output) -> bytes:
    return (output / "head.safetensors").read_bytes()


def log_of(output) -> list[dict]:
    rows = record.read(Folder(str(output))).to_pylist()
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def newest(output) -> tuple[checkpoints.State, dict]:
    folder = Folder(str(output))
    return checkpoints.read(folder, checkpoints.newest_step(folder))


class Stop(Exception):
    """What a test raises in the middle of a training."""


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight") / "out"
    trained(photos, output)
    return output


def stopped_after(monkeypatch, steps: int) -> None:
    """Let the next training end with Stop at once after some steps, as a killed process does."""
    step, taken = loop.step, itertools.count(1)

    def counted(*given):
        if next(taken) > steps:
            raise Stop
        return step(*given)

    monkeypatch.setattr(loop, "step", counted)


def test_a_training_leaves_what_label_takes_and_what_shows_how_it_went(straight):
    frozen = json.loads((straight / "training.json").read_text())
    assert frozen["settings"]["method"] == "toy" and frozen["images"] == 12 and len(frozen["digest"]) == 64
    config = json.loads((straight / "config.json").read_text())
    assert config["model_type"] == "toy" and config["sign"] == 12  # `finish` came before the export, with all images
    assert sorted(file.name for file in (straight / "checkpoints").iterdir()) == [
        "finished.pt",
        "step-00000003.pt",
        "step-00000006.pt",
    ]
    rows = log_of(straight)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert all(row["total"] == pytest.approx(row["bright"] + 0.1 * row["flat"], abs=1e-6) for row in rows)
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * (1 - 0.5 * step / 6) for step in range(6)])
    assert record.kept_epochs(Folder(str(straight))) == [0, 1, 2]
    assert len(record.kept_pictures(Folder(str(straight)))) == 8
    assert pq.read_table(straight / "skipped.parquet").num_rows == 0
    assert "toy" in (straight / "training.html").read_text()
    (attempt,) = (straight / "_runs").glob("2*.json")
    facts = json.loads(attempt.read_text())
    assert facts["exit_code"] == 0 and facts["steps"] == 6 and facts["settings"]["lr"] == 0.01
    assert not (straight / "_runs/LOCK").exists()


def test_images_drawn_with_replacement_are_the_same_ones_after_a_kill(photos, tmp_path, monkeypatch):
    found = trained(photos, tmp_path / "straight", Drawn())
    assert (found.steps, found.epochs) == (6, 0) and "toy: 6 steps on 12 images in" in found.text()
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        with pytest.raises(Stop):
            trained(photos, tmp_path / "killed", Drawn(), checkpoint_steps=1)
    trained(photos, tmp_path / "killed", Drawn())
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")
    rows = log_of(tmp_path / "straight")
    assert rows == log_of(tmp_path / "killed") and [row["epoch"] for row in rows] == [1, 1, 1, 1, 2, 2]
    assert [row["lr"] for row in rows] == pytest.approx([max(0.01 * (1 - step / 12), 0.008) for step in range(6)])


def test_any_number_of_workers_draws_the_same_samples():
    for workers in (1, 2, 4):
        known = dict(folder=None, attempt="", settings={}, lr=1.0, tail="pad", synchronised=True, checkpoint_steps=1)
        work = Work(recipe=Drawn(), samples=None, workers=workers, batch=4 // workers, log_steps=1, **known)
        numbers = [work.shares(number).swapaxes(1, 2).reshape(-1, 4) for number in range(work.recipe.rounds)]
        assert np.array_equal(np.concatenate(numbers)[:6], np.arange(24).reshape(6, 4)) and work.steps == 6


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_three_steps_and_three_after_a_kill_are_six(steps, photos, straight, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_after(patch, steps)
        with pytest.raises(Stop):
            trained(photos, output, checkpoint_steps=1)
    assert max(file.name for file in (output / "checkpoints").iterdir()) == f"step-{steps:08}.pt"
    assert trained(photos, output, checkpoint_steps=1).is_new
    assert weights(output) == weights(straight)
    assert log_of(output) == log_of(straight)


def test_steps_behind_the_last_checkpoint_are_done_again(photos, straight, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_after(patch, 5)
        with pytest.raises(Stop):
            trained(photos, output, log_steps=1)
    trained(photos, output)
    assert weights(output) == weights(straight) and log_of(output) == log_of(straight)


def test_an_epoch_that_is_resumed_decodes_and_draws_no_image_twice(photos, tmp_path, monkeypatch):
    drawn = []
    draw = Toy.draw
    monkeypatch.setattr(Toy, "draw", lambda self, *given: drawn.append(1) or draw(self, *given))
    with monkeypatch.context() as patch:
        stopped_after(patch, 4)
        with pytest.raises(Stop):
            trained(photos, tmp_path / "out", checkpoint_steps=1)
    drawn.clear()
    trained(photos, tmp_path / "out")
    assert len(drawn) == 2 * 4  # of two steps


def test_a_checkpoint_holds_all_that_decides_what_comes_next(straight):
    state, content = newest(straight)
    assert dataclasses.asdict(state) == {
        "epoch": 1,
        "step_in_epoch": 3,
        "step": 6,
        "samples": 24,
        "skipped": 0,
        "in_a_row": 0,
        "best": None,
    }
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= content["student"].keys()
    assert content["student"]["norm.num_batches_tracked"] == 6 and content["optimizer"]["state"]
    assert content["rate"] == 0.5 and content["settings"]["seed"] == 0 and content["networks"] == {}
    (random,) = content["random"]
    assert random.keys() == {"python", "numpy", "torch", "cuda"}
    assert content["images"] == json.loads((straight / "training.json").read_text())["digest"]
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0] or content["versions"]["torch"]


def test_random_states_come_back():
    state = checkpoints.random_state()
    first = np.random.rand(3), torch.rand(3)
    checkpoints.set_random_state(state)
    second = np.random.rand(3), torch.rand(3)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_finished_training_says_so_and_starts_nothing(photos, tmp_path):
    first = trained(photos, tmp_path / "out")
    again = trained(photos, tmp_path / "out")
    assert first.is_new and not again.is_new and again.loss == first.loss
    assert again.text().startswith("nothing to train: ") and "to use it: raypipe label toy --weights" in again.text()
    assert len(list((tmp_path / "out/_runs").glob("2*.json"))) == 1


def test_other_settings_are_refused_with_a_diff_but_not_those_that_leave_the_weights_alone(photos, tmp_path):
    trained(photos, tmp_path / "out")
    with pytest.raises(OtherConfiguration, match=r"lr: 0\.01 there, 0\.02 now"):
        trained(photos, tmp_path / "out", Toy(lr=0.02))
    with pytest.raises(OtherConfiguration, match=r"tail: 'pad' there, 'drop' now"):
        trained(photos, tmp_path / "out", tail="drop")
    assert not trained(photos, tmp_path / "out", log_steps=7, checkpoint_steps=9, device="cpu").is_new


def test_other_images_are_refused(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(Stop):
            trained(photos, tmp_path / "out")
    more = tmp_path / "more"
    more.mkdir()
    for file in photos.iterdir():
        (more / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (8, 8)).save(more / "12.png")
    with pytest.raises(OtherConfiguration, match="on other images"):
        trained(more, tmp_path / "out")


def test_an_image_that_can_be_read_again_or_no_more_changes_no_training_that_has_begun(
    photos, straight, tmp_path, monkeypatch
):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in photos.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    (mixed / "late.png").write_bytes(b"")
    with monkeypatch.context() as patch:
        stopped_after(patch, 4)
        with pytest.raises(Stop):
            trained(mixed, tmp_path / "out", checkpoint_steps=1)
    good = (mixed / "03.png").read_bytes()
    (mixed / "03.png").write_bytes(good[:60])
    with pytest.raises(OtherConfiguration, match=r"1 image cannot be used any more, such as 03.png: decode"):
        trained(mixed, tmp_path / "out")
    (mixed / "03.png").write_bytes(good)
    (mixed / "late.png").write_bytes(good)
    assert list(trained(mixed, tmp_path / "out").skipped) == ["late.png"]
    assert weights(tmp_path / "out") == weights(straight)


@pytest.mark.parametrize("name", ["run.json", "config.json"])
def test_a_folder_of_something_else_is_refused(name, photos, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(OtherConfiguration, match=f"{name} of something else"):
        trained(photos, tmp_path)


def test_a_folder_that_another_process_writes_to_is_locked(photos, tmp_path):
    with hold(Folder(str(tmp_path)), "other"), pytest.raises(Locked, match="attempt other"):
        trained(photos, tmp_path)


def test_a_worker_whose_attempt_has_lost_the_folder_writes_no_checkpoint(photos, tmp_path, monkeypatch):
    step = loop.step

    def robbed(it, views):
        it.work.folder.write_json({"attempt": "other"}, "_runs", "LOCK")
        return step(it, views)

    monkeypatch.setattr(loop, "step", robbed)
    with pytest.raises(Locked, match="no longer held"):
        trained(photos, tmp_path / "out", checkpoint_steps=1)
    assert not (tmp_path / "out/checkpoints").exists()


@pytest.mark.parametrize("spoilt", ["cut", "empty", "text", "foreign", "pickle"])
def test_a_checkpoint_that_cannot_be_read_is_named_with_what_helps(spoilt, photos, straight, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_after(patch, 4)
        with pytest.raises(Stop):
            trained(photos, output, checkpoint_steps=1)
    file = output / "checkpoints/step-00000004.pt"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.get(spoilt, b""))
    if spoilt == "foreign":
        torch.save({"weights": torch.zeros(2)}, file)
    if spoilt == "pickle":
        torch.save({"format": np.random.default_rng(0)}, file)
    with pytest.raises(ValueError, match=r"checkpoint .*step-00000004.pt .*; delete it, and the same command goes on"):
        trained(photos, output)
    file.unlink()
    trained(photos, output)
    assert weights(output) == weights(straight)


def test_a_checkpoint_of_another_training_is_refused(photos, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(Stop):
            trained(photos, tmp_path / "out", Toy(lr=0.5), checkpoint_steps=1)
    for file in (straight / "checkpoints").iterdir():
        (tmp_path / "out/checkpoints" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OtherConfiguration, match=r"step-00000006.pt .*of another training(.|\n)*lr: 0.01 there, 0.5"):
        trained(photos, tmp_path / "out", Toy(lr=0.5))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(photos, tmp_path):
    found = trained(photos, tmp_path / "out", Toy(nan_from=2, nan_to=4))
    rows = log_of(tmp_path / "out")
    assert [row["skipped"] for row in rows] == [False, False, True, True, False, False]
    assert found.skipped_steps == 2 and "2 steps skipped: the loss was not finite" in found.text()
    _, content = newest(tmp_path / "out")
    assert all(value.isfinite().all() for value in content["student"].values())
    assert content["student"]["norm.num_batches_tracked"] == 4  # the network never saw them


def test_ten_steps_in_a_row_that_are_not_finite_end_the_training(photos, tmp_path):
    with pytest.raises(loop.Diverged, match=r"in 10 steps in a row, up to step 14; train with a smaller --lr"):
        trained(photos, tmp_path / "out", Toy(epochs=6, nan_from=4, nan_to=99))
    assert len(log_of(tmp_path / "out")) == 14
    with pytest.raises(loop.Diverged):  # the same again, from the last checkpoint
        trained(photos, tmp_path / "out", Toy(epochs=6, nan_from=4, nan_to=99))


def test_bad_images_are_left_out_counted_and_named(photos, tmp_path, caplog):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in photos.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    (mixed / "cut.png").write_bytes((photos / "00.png").read_bytes()[:60])
    (mixed / "text.jpg").write_text("no image")
    Image.new("RGB", (50, 2)).save(mixed / "flat.png")
    found = trained(mixed, tmp_path / "out")
    assert found.images == 12 and sorted(found.skipped) == ["cut.png", "flat.png", "text.jpg"]
    assert "3 images could not be used" in found.text() and "flat.png: decode: too_small" in found.text()
    assert sorted(pq.read_table(tmp_path / "out/skipped.parquet")["key"].to_pylist()) == sorted(found.skipped)
    assert "3 images cannot be used" in caplog.text


def test_the_order_is_another_in_each_epoch_and_holds_every_image(photos, tmp_path, monkeypatch):
    seen, views = [], loop.step

    def noted(it, given):
        seen.append(given[1].flatten().tolist())  # each image's own random number
        return views(it, given)

    monkeypatch.setattr(loop, "step", noted)
    trained(photos, tmp_path / "out")
    gains = [number for each in seen for number in each]
    assert len(set(gains)) == 24  # other numbers for each image and epoch


def test_a_signal_saves_first(photos, straight, tmp_path, monkeypatch):
    import os
    import signal

    step, taken = loop.step, itertools.count(1)

    def signalled(*given):
        if next(taken) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", signalled)
        with pytest.raises(Interrupted) as stopped:
            trained(photos, tmp_path / "out")
    stopped.value.deadline.cancel()
    assert stopped.value.exit_code == 143
    assert [file.name for file in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000002.pt"]
    trained(photos, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(straight)


def test_a_validation_measures_what_was_exported(photos, straight, labelled, tmp_path, capsys):
    found = trained(photos, tmp_path / "out", **labelled)
    assert weights(tmp_path / "out") == weights(straight)  # looking changes nothing
    (measures,) = found.measures.values()
    assert 0 <= measures["iou"] <= 1 and "iou" in found.text()
    table = pq.read_table(tmp_path / "out/metrics/epochs.parquet")
    assert table["epoch"].to_pylist() == [2] and table["iou"].to_pylist() == [pytest.approx(measures["iou"])]
    assert "iou" in (tmp_path / "out/training.html").read_text().lower()
    assert not (tmp_path / "out/_runs/measured.parquet").exists()


def test_a_finished_training_is_measured_on_something_new_without_any_step(photos, labelled, tmp_path, monkeypatch):
    first = trained(photos, tmp_path / "out")
    assert not first.measures
    before = weights(tmp_path / "out")
    stopped_after(monkeypatch, 0)
    found = trained(tmp_path / "gone", tmp_path / "out", **labelled)  # the images to train on are not looked for
    assert not found.is_new and found.measures and "nothing to train" in found.text()
    assert weights(tmp_path / "out") == before and found.loss == first.loss
    again = trained(photos, tmp_path / "out", **labelled)
    assert again.measures == found.measures and len(list((tmp_path / "out/_runs").glob("2*.json"))) == 2


def test_what_was_exported_is_made_anew_where_it_is_gone(photos, labelled, straight, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(straight, output)
    (output / "checkpoints/finished.pt").unlink()
    with pytest.raises(ValueError, match=r"finished.pt cannot be read.*; delete _runs/finished.json, and the same"):
        trained(photos, output, **labelled)
    (output / "_runs/finished.json").unlink()
    assert trained(photos, output, **labelled).measures
    assert weights(output) == weights(straight) and log_of(output) == log_of(straight)


def test_each_epoch_is_measured_on_request(photos, labelled, tmp_path):
    trained(photos, tmp_path / "out", Toy(epochs=4), **labelled, validate_every=2)
    table = pq.read_table(tmp_path / "out/metrics/epochs.parquet")
    assert table["epoch"].to_pylist() == [2, 4]


def test_the_best_epoch_by_the_named_images_is_exported_and_kept(photos, labelled, tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("0\n3\n")
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.2])
    keep = validate.Validator.keep
    monkeypatch.setattr(validate.Validator, "keep", lambda *given, **more: keep(*given, **more) and 0 or next(scores))
    options = labelled | {"validate_every": 1, "select": str(tmp_path / "names.txt")}
    found = trained(photos, tmp_path / "out", Toy(epochs=4), **options)
    assert "exported: epoch " in found.text()
    trained(photos, tmp_path / "two", Toy(epochs=4, lr=0.01), checkpoint_steps=1)
    assert weights(tmp_path / "out") != weights(tmp_path / "two")
    kept = sorted(file.name for file in (tmp_path / "out/checkpoints").iterdir())
    assert kept == ["finished.pt", "step-00000006.pt", "step-00000009.pt", "step-00000012.pt"]
    state, best = checkpoints.read(Folder(str(tmp_path / "out")), 6)
    exported = safetensors.torch.load(weights(tmp_path / "out"))
    assert all(torch.equal(exported[name], value) for name, value in best["student"].items() if name != "sign")
    (tmp_path / "out/checkpoints/step-00000006.pt").write_bytes(b"")
    (tmp_path / "out/_runs/finished.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000006.pt cannot be read.*; delete checkpoints/, and the same"):
        trained(photos, tmp_path / "out", Toy(epochs=4), **options)
    state, _ = newest(tmp_path / "out")
    assert state.best == {"value": 0.9, "epoch": 2, "step": 6}
    with pytest.raises(OtherConfiguration, match="select: .*names.txt' there, None now"):
        trained(photos, tmp_path / "out", Toy(epochs=4), **labelled)


def test_named_images_that_cannot_be_measured_are_an_error_after_the_first_epoch(
    photos, labelled, tmp_path, monkeypatch
):
    (tmp_path / "names.txt").write_text("0\n")
    image = validate.Validator._image
    bad = (None, "decode: no image")
    monkeypatch.setattr(validate.Validator, "_image", lambda self, row: bad if "0." in row["key"] else image(self, row))
    options = labelled | {"validate_every": 1, "select": str(tmp_path / "names.txt")}
    with pytest.raises(ValueError, match="--select: none of its images could be measured after epoch 1"):
        trained(photos, tmp_path / "out", **options)


def test_labels_that_are_not_there_are_an_error_before_anything_starts(photos, labelled, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)):
        trained(photos, tmp_path / "out", validate=labelled["validate"], labels=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_training_that_was_stopped_by_a_file_is_not_finished(photos, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run", lambda work, place: False)
        with pytest.raises(RuntimeError, match="stopped by the file _runs/STOP"):
            trained(photos, tmp_path / "out")
    assert trained(photos, tmp_path / "out").is_new and weights(tmp_path / "out") == weights(straight)


WRONG = {
    "workers": (dict(workers=2, local=True), {}, "--workers 2 has no effect with --local"),
    "share": (dict(workers=3, local=False), {}, "--batch-size 4 cannot be shared out evenly to --workers 3"),
    "none": (dict(workers=0), {}, "--workers must be positive, got 0"),
    "steps": (dict(checkpoint_steps=0), {}, "--checkpoint-steps must be positive"),
    "failures": (dict(max_failures=-1), {}, "--max-failures must not be negative"),
    "here": (dict(max_failures=1), {}, "--max-failures 1 has no effect with --local"),
    "mode": (dict(batch_mode="throughput"), {}, "--batch-mode throughput has no effect with one worker"),
    "statistics": (dict(sync_statistics=False), {}, "--no-sync-statistics is against --batch-mode exact"),
    "seldom": (dict(validate=".", labels=".", validate_every=3), {}, "--validate-every 3 has no effect on 2 epochs"),
    "epochs": ({}, dict(epochs=-1), "toy: epochs must be at least 0"),
    "batch": ({}, dict(batch_size=0), "toy: epochs must be at least 0 and batch_size at least 1"),
    "lr": ({}, dict(lr=float("nan")), "toy: lr must be a positive number, got nan"),
    "seed": ({}, dict(seed=-1), "toy: seed must be in"),
    "few": ({}, dict(batch_size=13), "toy: 12 images are fewer than the 13 of one batch"),
    "column": (dict(column="url", input=None), {}, "--column has no effect without --input"),
    "input": (dict(input=None), {}, "toy: --input is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_cannot_work_are_refused_before_anything_starts(case, photos, tmp_path):
    options, fields, message = WRONG[case]
    job = Train(**{"input": str(photos), "output": str(tmp_path / "out"), "local": True} | options)
    with pytest.raises(ValueError, match=message):
        train(job, Toy(**fields))
    assert not (tmp_path / "out").exists()


def test_an_input_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        trained(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        trained(tmp_path / "nowhere", tmp_path / "out")


def test_too_few_good_images_are_refused_with_where_the_bad_ones_are_named(tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(4):
        (few / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0 images \(4 more cannot be used: see skipped.parquet\) are fewer than"):
        trained(few, tmp_path / "out")


def test_an_output_inside_the_input_is_refused(photos):
    with pytest.raises(ValueError, match="lies inside the input"):
        trained(photos, photos / "out")


def test_no_epochs_export_what_there_is_without_an_input(tmp_path):
    found = train(Train(output=str(tmp_path), local=True), Toy(epochs=0))
    assert found.steps == found.images == 0 and (tmp_path / "head.safetensors").exists()


def test_throughput_gives_each_worker_a_whole_batch_and_a_larger_step():
    job, recipe = Train(output="out", workers=4, batch_mode="throughput"), Toy(batch_size=8, lr=0.1)
    assert per_worker(job, recipe) == (8, 0.2)
    assert per_worker(dataclasses.replace(job, batch_mode="exact"), recipe) == (2, 0.1)
    recipe.lr_power = 1.0  # linear, as of NamedMask
    assert per_worker(job, recipe) == (8, 0.4)
    assert frozen_settings(job, recipe).items() >= {"workers": 4, "sync_statistics": True}.items()
    exact = frozen_settings(dataclasses.replace(job, batch_mode="exact"), recipe)
    assert exact == frozen_settings(dataclasses.replace(job, batch_mode="exact", workers=2), recipe)


def test_an_output_in_a_bucket(photos, straight, bucket):
    filesystem, location = bucket
    text = trained(photos, location("runs/one")).text()
    assert "copy config.json and the weights beside it to a folder on a disk, then raypipe label toy" in text
    with filesystem.open_input_file("photos/runs/one/head.safetensors") as file:
        assert file.read() == weights(straight)
    assert not trained(photos, location("runs/one")).is_new


def test_the_command_line(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "names", lambda: ["toy"])
    monkeypatch.setattr(training, "find", lambda name: Toy)
    assert main(["train"]) == 2 and "usage: raypipe train METHOD --output" in capsys.readouterr().out
    words = ["--input", str(photos), "--output", str(tmp_path / "out"), "--local"]
    assert (
        main(["train", *words, "toy"]) == 2 and "the method comes first: raypipe train toy" in capsys.readouterr().err
    )
    assert main(["train", "toy", *words, "--lr", "0.5", "--print-config"]) == 0
    (tmp_path / "config.yaml").write_text(printed := capsys.readouterr().out)
    assert "lr: 0.5" in printed and "checkpoint_steps: 500" in printed
    assert main(["train", "toy", "--config", str(tmp_path / "config.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["steps"] == 6 and found["is_new"] and found["output"] == str(tmp_path / "out")
    assert main(["train", "toy", *words, "--lr", "0.25"]) == 4
    assert "lr: 0.5 there, 0.25 now" in capsys.readouterr().err
    assert main(["train", "toy", *words[2:], "--epochs", "-1"]) == 2
    with pytest.raises(SystemExit):
        main(["train", "toy", "--help"])
    assert "--nan-from" in (text := capsys.readouterr().out) and text.index("--output") < text.index("--validate")


def test_the_terminal_is_told_of_steps_that_are_done_again(tmp_path, caplog, monkeypatch):
    looks, follow = [], record.follow

    def followed(folder):
        news = follow(folder)
        return lambda: looks.append(1) or news()

    monkeypatch.setattr(record, "follow", followed)
    caplog.set_level("INFO", "raypipe")
    facts = {"attempt": "a", "settings": {}, "workers": 1, "batch": 4, "lr": 1.0, "tail": "pad", "synchronised": True}
    facts |= {"checkpoint_steps": 2, "log_steps": 1, "samples": range(12)}
    work = Work(recipe=Toy(), folder=Folder(str(tmp_path)), **facts)

    def logged(after, until):
        log, before = record.Log(work.folder, after=after), len(looks)
        wait_until(lambda: len(looks) >= before + 2, "look")
        for step in range(after + 1, until + 1):
            log.add(step=step, epoch=1, lr=1.0, seconds=0.5, terms={"total": 0.25})
        log.flush()

    with told(work):
        logged(0, 3)
        wait_until(lambda: "step 3 of 6: total 0.25" in caplog.text, "line")
        logged(2, 4)  # a worker that has started anew
    assert "a worker died: all went on from the checkpoint of step 2" in caplog.text
    assert "step 4 of 6" in caplog.text


def test_a_command_that_failed_says_how_to_go_on(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "find", lambda name: Toy)
    words = ["train", "toy", "--input", str(photos), "--output", str(tmp_path / "out"), "--local", "--epochs", "9"]
    assert main([*words, "--nan-from", "2", "--nan-to", "99"]) == 1
    text = capsys.readouterr().err
    assert "not finite in 10 steps in a row" in text and "this command goes on:\n  raypipe train toy --input" in text


def test_every_option_that_decides_the_weights_is_frozen(straight):
    frozen = json.loads((straight / "training.json").read_text())["settings"]
    assert frozen.keys() == {"method", "batch_mode", "tail", *(each.name for each in dataclasses.fields(Toy))}
