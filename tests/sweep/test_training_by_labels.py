"""Sweeps over trainings that no validation measures: each is trained, labels photographs, and is scored on them."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.archives import make
from support.namedmask import CATEGORIES, draw_photos, small, write_pool

from raypipe.cli.verbs import main
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.run import OtherConfiguration
from raypipe.sweep import search, tuning
from raypipe.sweep.training import SweptTraining, Training, plan, settled, training
from raypipe.training.job import Train
from raypipe.training.namedmask import NamedMask
from raypipe.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = {"iterations": 2, "lr": 0.05}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder of what to train on, and of VOC with a train split of six photographs of discs and chairs."""
    folder = tmp_path_factory.mktemp("given")
    write_pool(folder / "pool")
    photos = sorted((folder / "pool/photos").iterdir())
    make(folder / "pool/planes", {"aeroplane": photos[::2], "bicycle": photos[1::2]})
    for name in ("VOC2012/SegmentationClass", "VOC2012/ImageSets/Segmentation", "own"):
        (folder / name).mkdir(parents=True)
    photos = draw_photos(folder / "VOC2012/JPEGImages", 8)
    for i, (file, mask) in enumerate(photos.items()):
        Image.fromarray(mask * np.uint8(1 + i % 2)).save(folder / "own" / file.name)
        Image.fromarray(mask * np.uint8(1 + i % 2)).save(folder / "VOC2012/SegmentationClass" / file.name)
    listed = "".join(f"{file.stem}\n" for file in [*photos][:6])
    (folder / "VOC2012/ImageSets/Segmentation/train.txt").write_text(listed)
    return folder


def pool(given: Path) -> dict[str, str]:
    files = {"archive": "archive", "masks": "run", "backbone": "resnet.pth"}
    return {name: str(given / "pool" / file) for name, file in files.items()}


def planes(given: Path) -> dict[str, str]:
    """The same images as other categories, which VOC has."""
    return pool(given) | {"archive": str(given / "pool/planes")}


def job(given: Path, output: Path, *over: str, **options) -> Training:
    places = {"input": str(given / "VOC2012/JPEGImages"), "labels": str(given / "own")}
    return Training(**{"local": True} | places | options, output=str(output), over=over)


def of_voc(given: Path, output: Path, *over: str, **options) -> Training:
    places = {"dataset": "voc2012", "root": str(given), "split": "train", "input": None, "labels": None}
    return job(given, output, *over, **places | options)


def table(output: Path) -> list[dict]:
    return pq.read_table(output / "trials.parquet").to_pylist()


def marks(output: Path) -> dict[str, int]:
    """When each training was finished, and each part of masks was written."""
    kinds = ("trials/*/_runs/finished.json", "trials/*/measured/_commits/*")
    files = [file for kind in kinds for file in output.glob(kind)]
    return {str(file.relative_to(output)): file.stat().st_mtime_ns for file in files}


@pytest.fixture(scope="module")
def swept(given, tmp_path_factory) -> SweptTraining:
    """A sweep in this process."""
    return training(job(given, tmp_path_factory.mktemp("swept"), "n_max=1,2"), small(pool(given), **STEPS))


def test_each_training_is_measured_by_what_it_labels(given, swept, tmp_path, monkeypatch):
    """By what `evaluate` says of a run with the same weights; the best setting trains the same weights."""
    rows = table(Path(swept.output))
    assert (swept.exit_code, swept.settings, swept.trials["done"], swept.images) == (0, 2, 2, 8)
    assert {row["n_max"] for row in rows} == {1, 2} and rows[0]["miou"] == swept.value
    assert [row["miou"] for row in rows] == sorted((row["miou"] for row in rows), reverse=True)
    monkeypatch.chdir(tmp_path)
    for row in rows:
        words = ["--input", str(given / "VOC2012/JPEGImages"), "--output", row["trial"], "--local"]
        assert main(["label", "namedmask", "--weights", row["run"], *words]) == 0
        options = {"labels": str(given / "own"), "classes": ",".join(CATEGORIES)}
        own, alone = (evaluate(Evaluate(runs=(run,), **options)) for run in (f"{row['run']}/measured", row["trial"]))
        assert own.means == alone.means == {name: row[name] for name in alone.means}
    words = ["--config", f"{swept.output}/best.yaml", "--output", "alone", "--local"]
    assert main(["train", "namedmask", *words]) == 0
    weights = [Path(folder) / "model.safetensors" for folder in ("alone", swept.weights)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    text = Path(swept.page).read_text()
    assert "raypipe train namedmask --config" in text and "--input PHOTOS" not in text and "Published" not in text


def test_papers_rows_stand_beside_their_own_split_which_alone_is_labelled(given, tmp_path):
    recipe = small(planes(given), **STEPS)
    found = training(of_voc(given, tmp_path, "n_max=1"), recipe)
    assert found.images == 6 and found.metric == "miou"
    text = (tmp_path / "sweep.html").read_text()
    for row, value in {"without copy-paste": 0.566, "n_max 2": 0.587, "n_max 10": 0.585}.items():
        assert any(line.startswith(f"{row} (namedmask, table 1)") and f"{value:.3f}" in line for line in found.papers)
        assert f"<td>{row}</td>" in text
    assert any(line.startswith("n_max 1 ") for line in found.papers) and "main" not in found.text()
    with pytest.raises(OtherConfiguration, match="dataset"):
        training(job(given, tmp_path, "n_max=1"), recipe)


def test_nothing_is_trained_or_labelled_twice_whatever_ends_a_sweep(given, tmp_path, monkeypatch):
    """It is killed while it labels, goes on with the rest, and more values are added; broken weights are listed."""
    recipe, advance, went = small(pool(given), **STEPS), tuning.advance, []

    class Stop(BaseException):
        pass

    def stop(trial, *rest, **more):
        went.append(trial)
        if len(went) == 2:
            raise Stop
        return advance(trial, *rest, **more)

    monkeypatch.setattr(tuning, "advance", stop)
    with pytest.raises(Stop):
        training(job(given, tmp_path, "n_max=1,2"), recipe)
    monkeypatch.undo()
    before = marks(tmp_path)
    assert sum("finished" in name for name in before) == 2 and not (tmp_path / "trials.parquet").exists()
    assert training(job(given, tmp_path, "n_max=1,2"), recipe).trials["done"] == 2
    both = marks(tmp_path)
    assert before.items() < both.items() and len({name.split("/")[1] for name in both}) == 2
    found = training(job(given, tmp_path, "n_max=1,2,4"), recipe)
    assert found.trials["done"] == 3 and both.items() < marks(tmp_path).items()

    worst = table(tmp_path)[-1]
    weights = Path(worst["run"]) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    shutil.rmtree(f"{worst['run']}/measured")
    again = training(job(given, tmp_path, "n_max=1,2,4"), recipe)
    assert (again.exit_code, again.trials["done"], again.trials["failed"]) == (0, 2, 1) and again.value == found.value
    assert again.errors and table(tmp_path)[-1]["error"] == again.errors[0]
    weights.write_bytes(content)
    assert training(job(given, tmp_path, "n_max=1,2,4"), recipe).trials["done"] == 3
    assert table(tmp_path)[-1]["miou"] == worst["miou"]


def test_experts_and_scales_may_be_swept_with_options_that_experts_alone_have(given, tmp_path):
    """Without experts these have their defaults, and are no settings of their own; a reversed scale is left out."""
    options = {"expert_iterations": 1, "expert_batch_size": 4, "experts": True}
    over = ("experts=true,false", "expert_iterations=1,2", "min_scale=0.4,0.6", "max_scale=0.5,1.0")
    its, recipe = job(given, tmp_path, *over), small(pool(given), **STEPS | options)
    planned = plan(its, recipe, search.parse(over, [NamedMask]), (), settled(its, recipe)[1].options)
    tried = {(e.experts, e.expert_iterations, e.min_scale, e.max_scale) for e in (each.recipe for each in planned)}
    scales = [(0.4, 0.5), (0.4, 1.0), (0.6, 1.0)]
    assert tried == {(*of, *scale) for of in ((True, 1), (True, 2), (False, 5000)) for scale in scales}
    assert {each.recipe.expert_batch_size for each in planned if not each.recipe.experts} == {8}
    assert training(job(given, tmp_path, "experts=true,false"), recipe).trials["done"] == 2
    assert {row["experts"] for row in table(tmp_path)} == {True, False}
    assert len([*tmp_path.glob("trials/*/experts/0001/model.safetensors")]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"validate": "ecssd", "root": "data", "labels": None},
            "--validate has no effect: namedmask",
        ),
        ({"filters": ("none",)}, "--filters has no effect: namedmask"),
        ({"statistics": ("batch",)}, "--statistics has no effect: namedmask"),
        ({"polarity": "none"}, "--polarity has no effect: namedmask"),
        ({"validate_every": 1}, "--validate-every has no effect: namedmask"),
        ({"select": "list.txt"}, "--select has no effect: namedmask"),
        ({"labels": None}, "add --dataset NAME --root DIR, or --input PHOTOS --labels DIR"),
        ({"input": None}, "no images: name them with --input"),
        ({"metric": "iou"}, "--metric 'iou': task 'semantic' has miou, pixel_acc"),
        ({"dataset": "voc2012"}, "--labels has no effect with --dataset voc2012"),
        ({"split": "train"}, "--split has no effect without --dataset"),
        ({"output": "s3://bucket/sweep"}, "weights are read from a disk"),
        ({"over": ("n_max=0,1",)}, "n_max must be at least 1, got 0"),
        ({"over": ("epochs=1,2",)}, "epochs"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(given, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    options = {"over": ("n_max=1,2",), "output": tmp_path / "sweep"} | options
    output, over = options.pop("output"), options.pop("over")
    with pytest.raises((ValueError, TypeError), match=message):
        training(job(given, output, *over, **options), small(pool(given)))
    assert not [*tmp_path.iterdir()]


def test_classes_that_no_label_has_are_refused(given, tmp_path):
    with pytest.raises(ValueError, match="namedmask learns 'disc', which is none of the classes of voc2012"):
        training(of_voc(given, tmp_path, "n_max=1,2"), small(pool(given)))


@pytest.mark.parametrize("option", ["validate", "labels"])
def test_a_plain_training_refuses_what_measures_nothing_of_it(given, tmp_path, option):
    options = {"validate": str(given / "VOC2012/JPEGImages")} if option == "validate" else {}
    with pytest.raises(ValueError, match=f"--{option} has no effect"):
        train(Train(output=str(tmp_path), local=True, labels=str(given / "own"), **options), small(pool(given)))
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_two_trainings_at_a_time_on_ray_are_measured_alike(given, swept, tmp_path):
    found = training(job(given, tmp_path, "n_max=1,2", local=False), small(pool(given), **STEPS))
    assert found.trials["done"] == 2 and found.rows == swept.rows
