"""Images and weights of every bad kind, with every method on dense features: a row each, never a dead job."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny

from raypipe.features import grid
from raypipe.pipeline.job import Label, plan_work
from raypipe.pipeline.stages import Segment
from raypipe.segmenters import find, names
from raypipe.segmenters._discovery import COLOR, Discovery

pytestmark = pytest.mark.usefixtures("one_thread")
# methods that name each place say something of any image: see test_reco
METHODS = [name for name in names() if issubclass(find(name), Discovery) and not find(name).exclusive]
ON_DINO = [name for name in METHODS if name != "selfmask"]  # whose network is trained as a whole
ON_COLOR = [name for name in ON_DINO if len(find(name).networks) == 1]
SIZES = [(1, 1), (7, 5), (1, 2000), (2000, 1), (60, 60), (40, 90)]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A function that gives the options with which a method runs on tiny made-up weights."""
    made = {}

    def get(name: str) -> dict:
        if name not in made:
            made[name] = tiny.options(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def rows(method, images) -> list[dict]:
    """What a job makes of images in one batch."""
    work = replace(plan_work(Label("photos", "run"), method, None), device="cpu")
    given = [{"image": each, "error": "", "height": len(each), "width": each.shape[1]} for each in images]
    return list(Segment(work)(given))


def picture(height: int, width: int) -> np.ndarray:
    """Noise with a bright square, or what there is room for."""
    image = np.random.default_rng(0).integers(0, 90, (height, width, 3)).astype(np.uint8)
    image[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = (230, 180, 40)
    return image


@pytest.mark.parametrize("name", METHODS)
def test_images_of_any_shape_and_grey_ones_are_answered_in_one_batch(name, options):
    images = [picture(*size) for size in SIZES]
    images.append(np.repeat(picture(60, 80)[..., :1], 3, 2))  # grey
    found = rows(find(name)(**options(name)), images)
    for image, row in zip(images, found, strict=True):
        assert row["error"] == "" and row["found"].masks.shape[1:] == image.shape[:2]
    for row in found[:2]:
        assert row["found"].note == "too_small" and row["found"].masks.shape[0] == 1
        assert not row["found"].masks.any()


@pytest.mark.parametrize("name", ON_COLOR)
def test_images_of_any_shape_are_answered_without_a_network(name, caplog):
    grid.say_reduced.cache_clear()
    images = [picture(*size) for size in SIZES] + [np.full((50, 70, 3), 90, np.uint8)]
    with caplog.at_level(logging.INFO, "raypipe"):
        found = rows(find(name)(weights=COLOR), images)
    for image, row in zip(images, found, strict=True):
        assert row["error"] == "" and row["found"].masks.shape[1:] == image.shape[:2]
    assert sum(record.message.startswith(f"{name}: images with a side of more") for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "extra", "share"),
    [
        *((name, {}, name == "lost") for name in METHODS),  # with LOST every patch is like the seed
        *((name, {"result": "box"}, 1) for name in METHODS if hasattr(find(name), "result")),
        ("deep_spectral", {"color_lambda": 10.0}, 0),
        ("deep_spectral", {"result": "segments"}, 0),
        ("found", {"variant": "background", "components": "single"}, 0),
    ],
)
def test_in_an_image_of_one_colour_no_object_is_found_even_where_features_differ_by_place(name, extra, share, options):
    flat = np.full((60, 83, 3), (90, 90, 200), np.uint8)
    found = [row["found"] for row in rows(find(name)(**options(name) | extra), [flat, picture(60, 80), flat[:, :1]])]
    assert [each.note == "degenerate" for each in found] == [True, False, True]
    for each in found[::2]:
        assert len(each.masks) == 1 and each.masks.mean() == share


@pytest.mark.parametrize("name", METHODS)
def test_a_panorama_is_reduced_which_the_log_says_once(name, options, caplog):
    grid.say_reduced.cache_clear()
    shape = {"resize": "keep_ratio", "image_size": 32} if name == "sempart" else {}  # which makes squares else
    method = find(name)(**options(name) | {"max_side": 64} | shape)
    with caplog.at_level(logging.INFO, "raypipe"):
        found = rows(method, [picture(20, 300), picture(300, 20), picture(50, 60)])[:2]
    assert [row["found"].masks.shape[1:] for row in found] == [(20, 300), (300, 20)]
    assert sum("of more than max_side = 64 px" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("name", [name for name in ON_DINO if name not in ON_COLOR])
@pytest.mark.parametrize("field", ["weights", "backbone"])
def test_what_was_trained_on_a_network_refuses_hand_made_features(name, field, options):
    with pytest.raises(ValueError, match=f"^{name}: {field} 'color' is no network"):
        find(name)(**options(name) | {field: COLOR})


@pytest.mark.parametrize("name", METHODS)
def test_features_that_are_not_finite_are_an_error_of_their_image_alone(name, options, monkeypatch):
    from raypipe.features.dino import Dino

    embed = Dino._embed

    def spoilt(self, pixels):
        is_black = pixels.amax((1, 2, 3)) <= 0  # 0 is padding, and black is below
        return torch.where(is_black[:, None, None], torch.nan, embed(self, pixels))

    monkeypatch.setattr(Dino, "_embed", spoilt)
    images = [picture(40, 48), np.zeros((48, 48, 3), np.uint8), picture(48, 40)]
    found = rows(find(name)(**options(name)), images)
    assert [bool(row["error"]) for row in found] == [False, True, False]
    assert found[1]["error"].startswith("segment: non_finite: ")


@pytest.mark.parametrize("name", ON_DINO)
def test_a_network_without_some_tensors_is_refused(name, options, tmp_path):
    given = options(name)
    field = "backbone" if "backbone" in find(name).networks else "weights"
    folder = getattr(find(name)(**given), field)
    tensors = load_file(f"{folder}/model.safetensors")
    del tensors["encoder.layer.1.attention.attention.key.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(f"{folder}/config.json", tmp_path)
    with pytest.raises(ValueError, match=rf"^{name}: .* holds no ViTModel: 1 of its tensors are absent"):
        find(name)(**given | {field: str(tmp_path)}).load("cpu")
