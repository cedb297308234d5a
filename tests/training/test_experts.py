"""NamedMask's experts: trained before it, cleaning its masks; killed and gone on, failing, shared, on Ray."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import jobs
from support.namedmask import small, write_pool

from raypipe import masks
from raypipe.run import OtherConfiguration
from raypipe.segmenters.namedmask import NamedMask as Method
from raypipe.storage import Folder
from raypipe.training import loop, record
from raypipe.training.job import Train
from raypipe.training.namedmask import experts
from raypipe.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = {"experts": True, "iterations": 3, "expert_iterations": 3, "expert_batch_size": 4}


class Stop(BaseException):
    """The end of the process."""


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """Where four discs and four squares are, their masks, and a backbone."""
    return write_pool(tmp_path_factory.mktemp("pool"))


def trained(given, output, recipe=None, **options):
    options = {"local": True, "checkpoint_steps": 2, "log_steps": 1} | options
    return train(Train(output=str(output), **options), recipe or small(given, **STEPS))


@pytest.fixture(scope="module")
def straight(given, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("straight") / "out"
    trained(given, output)
    return output


def weights(output: Path) -> list[bytes]:
    return [(output / name / "model.safetensors").read_bytes() for name in ("experts/0001", "experts/0002", "")]


def refined(output: Path) -> list[dict]:
    return [row for name in ("0001", "0002") for row in read(output, name)]


def read(output: Path, name: str) -> list[dict]:
    return pq.read_table(output / "experts" / name / "refined.parquet").to_pylist()


def test_an_expert_s_masks_are_what_label_finds_with_its_weights(given, straight):
    images = {row["image_id"]: row for row in small(given).rows(None).to_pylist()}
    for name, category in (("0001", "disc"), ("0002", "square")):
        method = Method(weights=str(straight / "experts" / name))
        method.load("cpu")
        assert method._names == (category,)
        assert len(read(straight, name)) == 4
        for row in read(straight, name):
            assert row["category"] == category == images[row["image_id"]]["category"]
            image = np.asarray(Image.open(images[row["image_id"]]["location"]))
            (found,) = method.segment([image])
            mask = masks.decode_rle({"size": row["size"], "counts": row["mask"]})
            np.testing.assert_array_equal(mask, found.index > 0)
            assert row["area"] == mask.sum() and list(mask.shape) == row["size"] == list(image.shape[:2])
    table = pq.read_table(straight / "experts/experts.parquet").to_pylist()
    assert [row["categories"] for row in table] == ["disc", "square"] and {row["error"] for row in table} == {""}
    assert not (straight / "experts/0001/checkpoints").exists()


def test_an_expert_is_a_training_of_its_own_that_pastes_nothing(straight):
    settings = json.loads((straight / "experts/0002/training.json").read_text())["settings"]
    assert settings["only"] == ["square"] and settings["n_max"] == 1 and not settings["experts"]
    assert (settings["iterations"], settings["batch_size"], settings["method"]) == (3, 4, "namedmask")


def test_the_training_learns_from_the_masks_of_experts(given, straight, tmp_path):
    recipe = small(given, **STEPS)
    rows = recipe.rows(None)
    found = experts.refined(recipe, rows, Train(output=str(straight)), Folder(str(straight)))
    known = {(row["category"], row["image_id"]): row for row in refined(straight)}
    kept = [row for row in rows.to_pylist() if known[row["category"], row["image_id"]]["area"] > 0]
    assert found.schema == rows.schema and len(found) == len(kept) > 0
    for row, old in zip(found.to_pylist(), kept, strict=True):
        assert row == old | {"mask": known[row["category"], row["image_id"]]["mask"]}
    assert any(row["mask"] != old["mask"] for row, old in zip(found.to_pylist(), kept, strict=True))
    trained(given, tmp_path / "without", small(given, iterations=3))
    assert not (tmp_path / "without/experts").exists()
    assert (tmp_path / "without/model.safetensors").read_bytes() != weights(straight)[2]


def test_images_in_which_an_expert_finds_nothing_are_left_out_and_others_keep_theirs(given, tmp_path, caplog):
    recipe = small(given, **STEPS)
    rows, folder = recipe.rows(None), Folder(str(tmp_path))
    planned = experts.planned(recipe, rows)
    assert list(planned) == ["0001", "0002"]
    first, second, *_ = planned["0001"].images.to_pylist()
    empty = {"category": "disc", "image_id": first["image_id"], "size": first["size"], "mask": "", "area": 0}
    whole = masks.encode_rle(np.ones(second["size"], bool))["counts"]
    full = empty | {"image_id": second["image_id"], "size": second["size"], "mask": whole, "area": 1000}
    for name, table in (("0001", [empty, full]), ("0002", [])):
        folder.write_table(pa.Table.from_pylist(table, experts.COLUMNS), "experts", name, "refined.parquet")
    found = {row["key"]: row["mask"] for row in experts._joined(recipe, rows, planned, folder).to_pylist()}
    expected = {row["key"]: row["mask"] for row in rows.to_pylist()} | {second["key"]: whole}
    del expected[first["key"]]
    assert found == expected
    assert "1 image left out, in which experts find nothing: 1 of disc" in caplog.text
    none = [[empty | {"image_id": row["image_id"]} for row in each.images.to_pylist()] for each in planned.values()]
    folder.write_table(pa.Table.from_pylist(none[0], experts.COLUMNS), "experts", "0001", "refined.parquet")
    experts._joined(recipe, rows, planned, folder)
    assert "4 images left out, in which experts find nothing: 4 of disc; no image is left of disc" in caplog.text
    squares = [row | {"category": "square"} for row in none[1]]
    folder.write_table(pa.Table.from_pylist(squares, experts.COLUMNS), "experts", "0002", "refined.parquet")
    with pytest.raises(ValueError, match="^namedmask: experts find nothing in any image; train them for longer"):
        experts._joined(recipe, rows, planned, folder)


def stopped_after(monkeypatch, steps: int) -> None:
    """Let all end at once after some steps of all trainings together, as a killed process does."""
    step, taken = loop.step, itertools.count(1)

    def counted(*given):
        if next(taken) > steps:
            raise Stop
        return step(*given)

    monkeypatch.setattr(loop, "step", counted)


def test_what_was_killed_goes_on_to_the_same_weights(given, straight, tmp_path, monkeypatch):
    """Three steps of each expert and three of the training, of which every second is kept, killed again and again."""
    done = []
    for steps in (1, 2, 2, 4, 2):
        with monkeypatch.context() as patch:
            stopped_after(patch, steps)
            with pytest.raises(Stop):
                trained(given, tmp_path)
        done.append(len(list(tmp_path.glob("experts/*/_runs/finished.json"))))
    assert done == [0, 0, 1, 2, 2]
    assert not trained(given, tmp_path).skipped
    assert weights(tmp_path) == weights(straight) and refined(tmp_path) == refined(straight)


def test_an_expert_that_fails_is_listed_and_the_same_call_trains_only_that(tmp_path):
    given = write_pool(tmp_path / "pool")
    squares = [Path(row["location"]) for row in small(given, only=("square",)).rows(None).to_pylist()]
    contents = {file: file.read_bytes() for file in squares}
    for file in squares:
        file.write_bytes(b"no image")
    output = tmp_path / "out"
    with pytest.raises(RuntimeError, match=r"^namedmask: 1 of 2 experts failed \(square: .*4 more cannot be used"):
        trained(given, output)
    table = pq.read_table(output / "experts/experts.parquet").to_pylist()
    assert [bool(row["error"]) for row in table] == [False, True] and not (output / "training.json").exists()
    for file, content in contents.items():
        file.write_bytes(content)
    first = (output / "experts/0001/_runs/finished.json").read_bytes()
    trained(given, output)
    assert (output / "experts/0001/_runs/finished.json").read_bytes() == first
    assert (output / "model.safetensors").exists() and len(list((output / "experts/0001/_runs").glob("2*"))) == 1


def test_experts_of_other_settings_or_other_masks_are_refused(given, straight, tmp_path):
    job, folder, others = Train(output=str(straight)), Folder(str(straight)), write_pool(tmp_path / "pool", count=6)
    longer, recipe = small(given, **STEPS | {"expert_iterations": 4}), small(given, **STEPS)
    with pytest.raises(OtherConfiguration, match="experts/0001 holds a training of other settings.*\n  iterations: 3"):
        experts.refined(longer, longer.rows(None), job, folder)
    with pytest.raises(OtherConfiguration, match="experts/0001 holds a training of other settings.*\n  pool: '"):
        experts.refined(recipe, small(others).rows(None), job, folder)


def test_categories_share_an_expert(given):
    recipe = small(given, classes="square,Disc,otter", experts=True, expert_groups=("disc, otter",))
    assert recipe.groups == [("square",), ("Disc", "otter")]
    planned = experts.planned(recipe, recipe.rows(None))
    assert {name: each.names for name, each in planned.items()} == {"0001": ("square",), "0002": ("Disc or otter",)}
    assert [set(each.images["label"].to_pylist()) for each in planned.values()] == [{1}, {1}]
    assert len(planned["0002"].images) == 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"expert_groups": ("disc,wolf",)}, "expert_groups: 'wolf' must be one of the categories disc, square"),
        ({"expert_groups": ("disc", "square,disc")}, "expert_groups: 'disc' must be .*, and in one group"),
        ({"experts": False, "expert_iterations": 7}, "expert_iterations 7 has no effect without experts"),
        ({"only": ("disc",), "expert_iterations": 7}, "expert_iterations 7 has no effect without experts"),
        ({"expert_iterations": 0}, "expert_iterations must be at least 1, got 0"),
        ({"expert_batch_size": 1}, "expert_batch_size must be at least 2"),
    ],
    ids=str,
)
def test_options_of_experts_that_make_no_sense_are_refused(given, options, text):
    with pytest.raises(ValueError, match=f"^namedmask: {text}"):
        small(given, **{"experts": True} | options)


def test_tasks_of_ray_train_the_same_experts(given, straight, tmp_path):
    ray = pytest.importorskip("ray")
    recipe, folder = small(given, **STEPS), Folder(str(tmp_path))
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        job = Train(output=str(tmp_path), checkpoint_steps=2, log_steps=1)
        experts.refined(recipe, recipe.rows(None), job, folder)
    finally:
        ray.shutdown()
    assert refined(tmp_path) == refined(straight)
    for name in ("0001", "0002"):
        assert weights_of(tmp_path, name) == weights_of(straight, name)


def weights_of(output: Path, name: str) -> bytes:
    return (output / "experts" / name / "model.safetensors").read_bytes()


@pytest.mark.slow  # two minutes
def test_ten_kills_at_any_time_lose_nothing(given, tmp_path):
    options = {"iterations": 12, "expert_iterations": 12, "expert_batch_size": 4, "channels": 16, "crop": 32}
    options |= given | {"batch_size": 4, "checkpoint_steps": 1, "log_steps": 1}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = [sys.executable, "-m", "raypipe", "train", "namedmask", "--local", *words, "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(output: Path) -> subprocess.Popen:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*words, str(output)], start_new_session=True, env=environment, **streams)

    def steps(output: Path) -> int:
        folders = [output, *output.glob("experts/0*")]
        return sum(record.read(Folder(str(folder))).num_rows for folder in folders if (folder / "log").is_dir())

    numbers, output, kills = random.Random(0), tmp_path / "out", 0
    while kills < 10:
        job, before = start(output), steps(output)
        jobs.wait_until(lambda before=before, job=job: job.poll() is not None or steps(output) > before, "a step")
        time.sleep(numbers.random())
        assert job.poll() is None, "it was too fast for ten kills"
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        kills += 1
    for place in (output, tmp_path / "alone"):
        job = start(place)
        text = jobs.finish(job)
        assert job.returncode == 0, text
    assert weights(output) == weights(tmp_path / "alone") and refined(output) == refined(tmp_path / "alone")
