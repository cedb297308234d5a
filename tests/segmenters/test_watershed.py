"""The watershed baseline on drawn pictures whose answer is known, and at the edges."""

import cv2
import numpy as np
import pytest
from skimage import data

from raypipe.segmenters.watershed import Watershed, markers, sure_regions


def pattern(image: np.ndarray, foreground: np.ndarray | None = None, **options):
    foreground = np.ones(image.shape[:2], bool) if foreground is None else foreground
    (found,) = Watershed(**options).segment([image], [foreground])
    return found


@pytest.fixture
def spots() -> np.ndarray:
    """Two dark squares on a light ground."""
    image = np.full((60, 80, 3), 220, np.uint8)
    image[10:30, 10:30] = image[30:52, 45:70] = 40
    return image


def test_dark_spots_on_a_light_coat_are_found(spots):
    dark = spots[..., 0] < 100
    found = pattern(spots)
    assert found.masks.shape == (1, 60, 80) and found.note == ""
    overlap = (found.masks[0] & dark).sum() / (found.masks[0] | dark).sum()
    assert overlap > 0.8  # the watershed's line runs inside the darker square


def test_spots_outside_the_foreground_are_left_out(spots):
    left = np.broadcast_to(np.arange(80) < 40, (60, 80))
    mask = pattern(spots, left).masks[0]
    assert mask[:, :40].any() and not mask[:, 40:].any()


def test_swapping_colour_channels_changes_little_but_the_grey():
    image = cv2.resize(data.chelsea(), (90, 60), interpolation=cv2.INTER_AREA)
    grey = np.repeat(image[..., 1:2], 3, 2)
    np.testing.assert_array_equal(pattern(grey).masks, pattern(grey[..., ::-1].copy()).masks)


def test_a_higher_fraction_leaves_less_to_start_from(spots):
    dark = spots[..., 0] < 100
    cores = [sure_regions(dark, 3, fraction)[1].sum() for fraction in (0.0, 0.1, 0.5, 0.9)]
    assert cores == sorted(cores, reverse=True) and cores[-1] > 0
    assert cores[0] == dark.sum()


def test_markers_number_the_cores_from_two():
    limit, core = np.zeros((2, 5, 9), bool)
    limit[1:4, :4] = limit[1:4, 5:] = True
    core[2, 1:3] = core[2, 6:8] = True
    seeds = markers(limit, core)
    assert seeds[2].tolist() == [0, 2, 2, 0, 1, 0, 3, 3, 0]
    assert (seeds[0] == 1).all()


def test_a_working_size_returns_the_mask_at_the_images_own_size(spots):
    native, resized = pattern(spots).masks, pattern(spots, size=128).masks
    assert resized.shape == native.shape
    assert (native == resized).mean() > 0.9


@pytest.mark.parametrize(
    ("image", "note"),
    [
        (np.zeros((4, 50, 3), np.uint8), "too_small"),
        (np.zeros((50, 4, 3), np.uint8), "too_small"),
        (np.zeros((20, 20, 3), np.uint8), "no_contrast"),
        (np.full((20, 20, 3), 255, np.uint8), "no_contrast"),
        (np.full((20, 20, 3), 255, np.uint8) * (np.arange(20) != 7)[:, None].astype(np.uint8), "no_dark_region"),
    ],
)
def test_pictures_without_a_pattern_give_an_empty_mask_that_says_why(image, note):
    found = pattern(image)
    assert found.masks.shape == (1, *image.shape[:2]) and not found.masks.any()
    assert found.note == note


@pytest.mark.parametrize(
    "options",
    [
        {"blur": 4},
        {"open_iterations": -1},
        {"dilate_iterations": -1},
        {"foreground_fraction": 1.0},
        {"fg_alpha_min": -1},
        {"size": 4},
    ],
)
def test_impossible_parameters_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"watershed: {next(iter(options))} must"):
        Watershed(**options)
