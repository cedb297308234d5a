"""GrabCut as a foreground, and what it does when it finds none."""

import cv2
import numpy as np
import pytest
from skimage import data

from raypipe.segmenters.grabcut import Grabcut, shrink


def cut(image: np.ndarray, **options):
    (found,) = Grabcut(**options).segment([image])
    return found


@pytest.fixture
def disc() -> tuple[np.ndarray, np.ndarray]:
    """A noisy orange disc on a noisy blue ground, and the disc."""
    y, x = np.mgrid[:80, :100]
    inside = (y - 40) ** 2 + (x - 50) ** 2 < 25**2
    image = np.where(inside[..., None], (220, 140, 40), (40, 60, 160)) + np.random.default_rng(0).integers(
        0, 30, (80, 100, 3)
    )
    return image.astype(np.uint8), inside


def test_an_object_in_the_middle_is_found(disc):
    image, inside = disc
    found = cut(image)
    assert found.note == "" and found.masks.shape == (1, 80, 100)
    assert (found.masks[0] & inside).sum() / (found.masks[0] | inside).sum() > 0.95


def test_large_images_are_cut_at_working_size_and_enlarged(disc):
    image, inside = disc
    found = cut(image, long_side=50)
    assert found.masks.shape == (1, 80, 100)
    blocks = found.masks[0].reshape(40, 2, 50, 2)
    assert (blocks == blocks[:, :1, :, :1]).all()  # nearest neighbour: every working pixel is a block
    assert (found.masks[0] & inside).sum() / (found.masks[0] | inside).sum() > 0.9


def test_the_same_seed_gives_the_same_mask_whatever_ran_before():
    image = cv2.resize(data.chelsea(), (90, 60), interpolation=cv2.INTER_AREA)
    first = cut(image).masks
    cv2.setRNGSeed(99)
    np.testing.assert_array_equal(cut(image).masks, first)


def test_a_small_foreground_becomes_the_whole_image(disc):
    image, inside = disc
    found = cut(image, min_fraction=0.9)
    assert inside.mean() < 0.9
    assert found.masks.all() and found.note == "whole_image"


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (12, 12), (24, 24), (60, 60), (1, 600), (600, 1), (3, 2000)])
@pytest.mark.parametrize("colour", [0, 90, 255])
def test_one_colour_is_the_whole_image(size, colour):
    found = cut(np.full((*size, 3), colour, np.uint8))
    assert found.masks.shape == (1, *size) and found.masks.all() and found.note == "whole_image"


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3), (26, 26), (2, 900)])
def test_noise_of_any_size_is_answered(size):
    found = cut(np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))
    assert found.masks.shape == (1, *size) and found.masks.any()


def test_shrinking_keeps_the_aspect_and_never_enlarges():
    image = np.zeros((300, 1000, 3), np.uint8)
    assert shrink(image, 512).shape == (154, 512, 3)
    assert shrink(image, 1000) is image
    assert shrink(np.zeros((1, 2000, 3), np.uint8), 512).shape == (1, 512, 3)


@pytest.mark.parametrize("options", [{"long_side": 0}, {"inset": 0.5}, {"iterations": 0}, {"min_fraction": 1.5}])
def test_impossible_parameters_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"grabcut: {next(iter(options))} must"):
        Grabcut(**options)
