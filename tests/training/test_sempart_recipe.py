"""Sempart's recipe: what is prepared and drawn, and which options are refused."""

from functools import partial

import numpy as np
import pytest
import torch
from support.sempart import SIDE, pixels, samples_of, small
from support.tiny.dino import write_model
from support.tiny.sempart import write_head

from raypipe.training import data

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recipe(backbone):
    """Small trainings: options -> recipe."""
    return partial(small, backbone)


# Views


def test_views_without_chance_are_crops_and_their_enlarged_windows(recipe):
    student = recipe(jitter=0, grey=0, flip=1).student("cpu")
    samples = samples_of(student.recipe, 3)
    draws = [student.recipe.draw(data.generator(0, 0, i), sample) for i, sample in enumerate(samples)]
    images, zoomed, windows = student.views(samples, draws)
    for i, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
        top, left = draw.corner
        crop = sample["image"][top : top + SIDE, left : left + SIDE][:, ::-1]
        torch.testing.assert_close(images[i], pixels(crop[None])[0], atol=1e-5, rtol=0)
        top, left = draw.zoom
        half = images[i : i + 1, :, top : top + SIDE // 2, left : left + SIDE // 2]
        large = torch.nn.functional.interpolate(half, size=(SIDE, SIDE), mode="bilinear")
        torch.testing.assert_close(zoomed[i], large[0])
    assert windows.tolist() == [list(draw.zoom) for draw in draws]
    assert len(recipe(crop_zoom=False).student("cpu").views(samples, draws)) == 1


def test_crops_and_windows_reach_every_place(recipe):
    sample = recipe().prepare({}, np.zeros((150, 210, 3), np.uint8))
    assert sample["image"].shape == (70, 98, 3)
    draws = [recipe().draw(data.generator(0, 0, i), sample) for i in range(2000)]
    for values, last in (
        ([each.corner[0] for each in draws], 6), ([each.corner[1] for each in draws], 34),
        ([each.zoom[0] for each in draws], 32), ([each.zoom[1] for each in draws], 32),
    ):  # fmt: skip
        counts = np.bincount(values, minlength=last + 1)
        assert len(counts) == last + 1 and counts.min() > 0.4 * 2000 / (last + 1)
    for name, share in (("is_grey", 0.2), ("is_flipped", 0.5)):
        assert np.mean([getattr(each, name) for each in draws]) == pytest.approx(share, abs=0.04)


def test_the_published_windows_hardly_move(recipe):
    published = recipe(image_size=320, resize=335, crop_window="reference")
    sample = {"image": np.zeros((335, 400, 3), np.uint8)}
    windows = [published.draw(data.generator(0, 0, i), sample).zoom for i in range(500)]
    assert {top for top, _ in windows} == {80} and {left for _, left in windows} == set(range(10, 30))


def test_long_and_tiny_images_are_prepared_whole_enough(recipe):
    assert recipe().prepare({}, np.zeros((3, 2, 3), np.uint8))["image"].shape == (105, 70, 3)
    wide = np.zeros((20, 1000, 3), np.uint8)
    wide[:, 460:540] = 255  # the middle
    image = recipe().prepare({}, wide)["image"]
    assert image.shape == (70, 280, 3) and image[:, 10:-10].min() == 255


# Mistakes

MISTAKES = {
    "tau must be above 0 and below 1": {"tau": 1.0},
    "tau must be above 0 and below 1, as cosines are, got nan": {"tau": float("nan")},
    "tau must be above 0 and below 1, as cosines are, got 0": {"tau": 0},
    "eps must be above 0 and below 0.5": {"eps": 0},
    "sigma must be a finite number above 0": {"sigma": 0},
    "resize must be at least image_size, 64, got 63": {"resize": 63},
    "w_ncut must be a finite number of at least 0": {"w_ncut": -1},
    "w_ncut must be above 0 where": {"w_ncut": 0, "w_gtv_fine": 0, "w_gtv_coarse": 0, "w_consistency": 0},
    "jitter must be a probability": {"jitter": 1.5},
    "flip must be a probability": {"flip": float("nan")},
    "unknown gtv_coarse 'kernal'; did you mean 'kernel'": {"gtv_coarse": "kernal"},
    "unknown crop_window 'middle'": {"crop_window": "middle"},
    "unknown feature 'keys'; did you mean 'key'": {"feature": "keys"},
    "unknown dtype": {"dtype": "float16"},
    "betas must be two numbers": {"betas": (0.9,)},
    "crop_window reference is known for image_size 320 alone, got 64": {"crop_window": "reference"},
    "w_crop_zoom has no effect without crop_zoom": {"crop_zoom": False, "w_crop_zoom": 0.1},
    "gf_radius has no effect without crop_zoom": {"crop_zoom": False, "gf_radius": 3},
    "crop_zoom has no effect where .* pass --no-crop-zoom": {"w_crop_zoom": 0, "w_ncut_crop": 0},
    "hidden has no effect with start_from": {"start_from": "somewhere"},
    "epochs 0 trains nothing": {"epochs": 0},
    "backbone must be a folder": {"backbone": ""},
}


@pytest.mark.parametrize(("message", "options"), MISTAKES.items(), ids=MISTAKES)
def test_a_wrong_option_is_refused_in_words(message, options, recipe):
    with pytest.raises(ValueError, match=f"^sempart: {message}"):
        recipe(**options)


def test_what_does_not_fit_the_backbone_is_said_before_anything_starts(recipe, tmp_path):
    rows = [{"key": "a", "uri": "a.jpg"}]
    with pytest.raises(ValueError, match="image_size must be a multiple of the 8 px .* got 60; 56 is one"):
        recipe(image_size=60).rows(rows)
    with pytest.raises(ValueError, match="at least two of them, got 8; 16 is one"):
        recipe(image_size=8).rows(rows)
    with pytest.raises(ValueError, match="--input is needed"):
        recipe().rows(None)
    with pytest.raises(ValueError, match="--input is needed"):
        recipe(epochs=0, hidden=64, start_from=str(write_head(tmp_path / "averaged")), precise_bn=True).rows(None)
    assert recipe().rows(rows) is rows
    other = write_model(tmp_path / "other", hidden_size=64)
    head = str(write_head(tmp_path / "head"))
    with pytest.raises(ValueError, match="start_from is a head for 32 channels, the backbone has 64"):
        recipe(backbone=str(other), hidden=64, start_from=head).rows(rows)
    foreign = str(write_head(tmp_path / "foreign", backbone="the other one", backbone_digest="0" * 64))
    with pytest.raises(ValueError, match="start_from was trained on 'the other one'"):
        recipe(hidden=64, start_from=foreign).rows(rows)
    absent = recipe(backbone="/no/such")
    assert absent.rows(rows) is rows  # workers may have it; where they run here, they say so
