"""The guided filter against its definition, written out window by window, and its behaviour as a refiner."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from skimage import data

from raypipe.refiners import find, names
from raypipe.refiners.guided import Guided, filter_by_guide, guide_channels, guided_filter
from raypipe.types import BadImage

CHANNELS = {"mean": np.full((3, 1), 1 / 3), "luma": np.array([[0.299], [0.587], [0.114]]), "rgb": np.eye(3)}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def photo() -> np.ndarray:
    return data.astronaut()[::16, ::12][:30, :36]


def window(y: int, x: int, radius: int) -> tuple[slice, slice]:
    """Cut off at the border: slices end at the array's end by themselves."""
    return slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1)


def slow_guided_filter(mask, image, *, radius, eps, guide):
    """He et al., eq. 5, 6 and 8 in float64: a linear fit in each window, then the mean of the fits over each pixel."""
    channels = image / 255.0 @ CHANNELS[guide]
    height, width, number = channels.shape
    slopes, offsets = np.zeros((height, width, number)), np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        g, p = channels[window(y, x, radius)].reshape(-1, number), mask[window(y, x, radius)].ravel()
        centred = g - g.mean(0)
        sigma = centred.T @ centred / len(g) + eps * np.eye(number)
        slopes[y, x] = np.linalg.solve(sigma, centred.T @ (p - p.mean()) / len(g))
        offsets[y, x] = p.mean() - slopes[y, x] @ g.mean(0)
    out = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        mean_slope = slopes[window(y, x, radius)].reshape(-1, number).mean(0)
        out[y, x] = mean_slope @ channels[y, x] + offsets[window(y, x, radius)].mean()
    return out


@pytest.mark.parametrize("guide", ["mean", "luma", "rgb"])
@pytest.mark.parametrize(("radius", "eps"), [(2, 1e-3), (9, 1e-2), (30, 1e-4)])
def test_the_filter_agrees_with_its_definition(guide, radius, eps, rng):
    image = rng.integers(0, 256, (11, 14, 3)).astype(np.uint8)
    masks = rng.random((2, 11, 14)).astype(np.float32)
    channels = guide_channels(image, guide)
    for mask, out in zip(masks, filter_by_guide(masks, channels, radius=radius, eps=eps), strict=True):
        expected = slow_guided_filter(mask, image, radius=radius, eps=eps, guide=guide)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    clipped = guided_filter(masks, image, radius=radius, eps=eps, guide=guide)
    np.testing.assert_allclose(clipped[1], np.clip(expected, 0, 1), rtol=0, atol=1e-5)


def test_a_constant_mask_stays_as_it_is(photo):
    for value in (0.0, 0.3, 1.0):
        masks = np.full((1, *photo.shape[:2]), value, np.float32)
        np.testing.assert_allclose(guided_filter(masks, photo), masks, atol=1e-5)


def test_inversion_may_come_before_or_after(photo, rng):
    masks = rng.random((1, *photo.shape[:2])).astype(np.float32)
    channels = guide_channels(photo, "mean")
    (out,) = filter_by_guide(masks, channels, radius=9, eps=1e-3)
    (inverse,) = filter_by_guide(1 - masks, channels, radius=9, eps=1e-3)
    np.testing.assert_allclose(inverse, 1 - out, atol=1e-5)


@pytest.mark.parametrize("guide", ["mean", "rgb"])
def test_a_one_colour_image_blurs_twice(guide, rng):
    image, masks = np.full((12, 15, 3), 77, np.uint8), rng.random((1, 12, 15)).astype(np.float32)

    def blur(plane):
        return np.array([[plane[window(y, x, 3)].mean() for x in range(15)] for y in range(12)])

    out = guided_filter(masks, image, radius=3, guide=guide)
    np.testing.assert_allclose(out[0], blur(blur(masks[0])), atol=1e-5)


def test_a_colour_guide_on_a_grey_image_is_the_grey_guide_with_a_third_of_eps(photo, rng):
    grey = photo[..., :1].repeat(3, 2)
    masks = rng.random((1, *photo.shape[:2])) > 0.5
    colour, plain = guided_filter(masks, grey, eps=3e-4, guide="rgb"), guided_filter(masks, grey, eps=1e-4)
    np.testing.assert_allclose(colour, plain, atol=1e-4)


@pytest.mark.parametrize("guide", ["mean", "luma", "rgb"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2)])
def test_tiny_images_work(size, guide):
    masks = np.ones((1, *size), bool)
    np.testing.assert_allclose(guided_filter(masks, np.full((*size, 3), 9, np.uint8), guide=guide), 1, atol=1e-6)


def test_no_masks_give_no_masks(photo):
    refined, note = Guided()(np.zeros((0, *photo.shape[:2]), bool), photo)
    assert refined.shape == (0, *photo.shape[:2]) and refined.dtype == np.float32 and note == ""


def test_a_coarse_mask_gets_the_edges_of_the_image():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 30:] = 200
    masks = np.zeros((1, 64, 64), bool)
    masks[:, :, 33:] = True  # three pixels off
    refined, note = Guided(refine_working_size=None, refine_radius=8)(masks, image)
    assert note == "" and refined.dtype == np.float32
    np.testing.assert_array_equal(refined[0] > 0.5, image[..., 0] > 100)


def test_the_radius_grows_with_the_short_side():
    image, masks = np.random.default_rng(0).integers(0, 256, (40, 80, 3)).astype(np.uint8), np.zeros((1, 40, 80), bool)
    masks[:, 10:30, 20:60] = True
    scaled, _ = Guided(refine_radius=8, refine_working_size=80)(masks, image)
    np.testing.assert_array_equal(scaled, guided_filter(masks, image, radius=4))
    fixed, _ = Guided(refine_radius=8, refine_working_size=None)(masks, image)
    np.testing.assert_array_equal(fixed, guided_filter(masks, image, radius=8))


def test_a_mask_that_would_vanish_is_kept_and_noted():
    image, masks = np.full((40, 40, 3), 128, np.uint8), np.zeros((2, 40, 40), bool)
    masks[0, 20, 20] = True  # a speck: blurred away
    masks[1, :, :20] = True
    refined, note = Guided(refine_working_size=None)(masks, image)
    assert note == "refine_rejected"
    np.testing.assert_array_equal(refined[0], masks[0])
    assert 0 < refined[1, 20, 20] < 1


def test_an_empty_mask_is_nothing_to_reject(photo):
    refined, note = Guided()(np.zeros((1, *photo.shape[:2]), np.float32), photo)
    assert not refined.any() and note == ""


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_masks_that_are_not_finite_make_a_bad_image(value, photo):
    masks = np.zeros((1, *photo.shape[:2]), np.float32)
    masks[0, 3, 3] = value
    with pytest.raises(BadImage, match="refine: non_finite"):
        Guided()(masks, photo)


def test_sizes_that_differ_are_refused(photo):
    with pytest.raises(ValueError, match=r"guided: masks of size \(5, 5\) for an image of size \(30, 36\)"):
        guided_filter(np.zeros((1, 5, 5), bool), photo)


@pytest.mark.parametrize(
    "options",
    [
        {"refine_radius": 0},
        {"refine_eps": 0.0},
        {"refine_working_size": 0},
        {"refine_guide": "grey"},
        {"refine_subsample": 0},
    ],
)
def test_impossible_parameters_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"guided: {next(iter(options))} must"):
        Guided(**options)


def test_refiners_are_found_by_name():
    assert "guided" in names() and find("guided") is Guided
    assert pickle.loads(pickle.dumps(Guided(refine_radius=3))) == Guided(refine_radius=3)
    with pytest.raises(ValueError, match="unknown refiner 'guide'; did you mean 'guided'"):
        find("guide")


def test_importing_the_refiners_imports_no_heavy_library():
    code = (
        "import sys; from raypipe.refiners import find, names; [find(name) for name in names()];"
        "print({'torch', 'ray', 'cv2', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
