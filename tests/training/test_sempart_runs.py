"""Whole trainings of Sempart: two workers as one, stopped and gone on, on photographs."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support.sempart import ATTEMPT, photographs, small, work_beside, work_of
from support.tiny.dino import write_model
from support.tiny.sempart import write_head
from torch import multiprocessing

from raypipe import segmenters
from raypipe.run import OtherConfiguration
from raypipe.storage import Folder, hold
from raypipe.training import loop, record
from raypipe.training.sempart import Sempart
from raypipe.training.train import Train, train

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ["gloper_examples", "saliency_examples"]  # folders of photographs


@pytest.fixture(scope="module")
def recipe(backbone) -> Sempart:
    """Four epochs of three steps."""
    return small(backbone, epochs=4, lr=1e-3)


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory) -> Folder:
    """A training on one worker that nothing disturbs."""
    folder = Folder(str(tmp_path_factory.mktemp("straight")))
    with hold(folder, ATTEMPT):
        assert loop.run(work_of(recipe, str(folder), workers=1), loop.Place())
    return folder


def terms_of(folder: Folder) -> np.ndarray:
    """(steps, terms) of a training's log."""
    table = record.read(folder)
    names = [name for name in table.column_names if name in ("total", "ncut", "gtv_fine", "crop_zoom", "ncut_crop")]
    assert len(names) == 5
    return np.stack([table[name].to_numpy() for name in names], axis=1)


def weights_of(folder: Folder) -> dict[str, np.ndarray]:
    return load_file(folder.path("head.safetensors"))


@pytest.mark.slow
def test_two_workers_find_the_losses_of_one(recipe, straight, tmp_path):
    folder = Folder(str(tmp_path / "two"))
    with hold(folder, ATTEMPT):
        multiprocessing.spawn(work_beside, (recipe, str(folder), 2), nprocs=2)
    found, expected = terms_of(folder), terms_of(straight)
    assert len(expected) == 12
    np.testing.assert_allclose(found[:10], expected[:10], atol=1e-5)


def test_a_training_that_is_stopped_goes_on_to_the_same_weights(recipe, straight, tmp_path):
    folder = Folder(str(tmp_path / "out"))
    asked = iter([False] * 6 + [True])  # in the middle of the third epoch
    with hold(folder, ATTEMPT):
        assert not loop.run(work_of(recipe, str(folder), workers=1), loop.Place(is_stopped=lambda: next(asked)))
        assert loop.run(work_of(recipe, str(folder), workers=1), loop.Place())
    found, expected = weights_of(folder), weights_of(straight)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert np.array_equal(terms_of(folder), terms_of(straight))


def test_a_head_is_not_measured_on_another_backbone_than_its_own(recipe, straight, tmp_path):
    other = dataclasses.replace(recipe, backbone=str(write_model(tmp_path / "other", seed=1)))
    work = dataclasses.replace(work_of(other, str(straight), workers=1), is_trained=True)
    with pytest.raises(OtherConfiguration, match=r"trained with other networks(.|\n)*backbone/model.safetensors: "):
        loop.run(work, loop.Place())


def test_a_head_can_be_exported_without_any_training(backbone, tmp_path):
    start = write_head(tmp_path / "start", polarity=-1, backbone=backbone)
    recipe = Sempart(backbone=backbone, image_size=64, resize=70, start_from=str(start), epochs=0)
    train(Train(output=str(tmp_path / "out"), local=True), recipe)
    assert (tmp_path / "out/head.safetensors").read_bytes() == (start / "head.safetensors").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["polarity"] == -1
    with pytest.raises(ValueError, match="--input is needed"):  # for new averages
        train(Train(output=str(tmp_path / "again"), local=True), replace(recipe, precise_bn=True))
    assert not (tmp_path / "again").exists()


def test_wrong_sizes_are_said_before_anything_is_written(backbone, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(photographs(2)):
        Image.fromarray(image).save(photos / f"{i}.png")
    with pytest.raises(ValueError, match="image_size must be a multiple of the 8 px"):
        train(Train(input=str(photos), output=str(tmp_path / "out"), local=True), small(backbone, image_size=60))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # 40 s
def test_a_training_on_photographs_lowers_the_loss_and_finds_masks(shared, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for folder in BOTH:
        for file in (shared / "data" / folder / "images").iterdir():
            (photos / file.name).symlink_to(file)
    options = {"hidden": 16, "image_size": 80, "resize": 84, "epochs": 17, "lr": 1e-3}
    recipe = Sempart(backbone=str(shared / "golden/models/dino-vits8-tiny"), **options)
    done = train(Train(input=str(photos), output=str(tmp_path / "out"), local=True), recipe)
    totals = record.read(Folder(done.output))["total"].to_numpy()
    assert len(totals) == done.steps and done.steps >= 100 and not done.skipped_steps
    assert totals[-50:].mean() < 0.9 * totals[:50].mean()
    method = segmenters.find("sempart")(weights=done.output, image_size=80)
    method.load("cpu")
    images = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(photos.iterdir())]
    areas = np.array([(segments.masks[0] > 0.5).mean() for segments in method.segment(images)])
    is_parted = (areas > 0.02) & (areas < 0.98)  # three in four; a network of random weights sees one thing in others
    assert is_parted.mean() > 0.6 and 0.2 < areas[is_parted].mean() < 0.6, areas
