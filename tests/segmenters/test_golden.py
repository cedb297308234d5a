"""Parity with stored arrays: small ones in `golden/`, larger ones in the shared folder where that is at hand."""

from pathlib import Path

import numpy as np
import pytest
from support.golden import arrays

from raypipe.refiners.guided import filter_by_guide, guide_channels
from raypipe.segmenters._clusters import lloyd, means
from raypipe.segmenters.grabcut import Grabcut
from raypipe.segmenters.kmeans import Kmeans, pack, unpack
from raypipe.segmenters.watershed import Watershed, blurred_grey, dark_regions, flood, markers, sure_regions

OWN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["coffee", "zebra", "turtle_k3"])
def kmeans_case(request):
    return arrays(find(request, "kmeans"))


@pytest.fixture(params=["chelsea", "zebra", "tiger", "cow"])
def watershed_case(request):
    return arrays(find(request, "watershed"))


def find(request, method: str) -> Path:
    """The own case `method_name.npz`, or else the shared `method/name.npz`."""
    own = OWN / f"{method}_{request.param}.npz"
    return own if own.exists() else request.getfixturevalue("shared") / "golden" / method / f"{request.param}.npz"


def test_kmeans_from_initial_labels_follows_opencv(kmeans_case):
    case = kmeans_case
    pixels = case["image"][case["foreground"].astype(bool)]
    colours = pixels.astype(np.float64)  # every pixel once: initial labels differ between equal colours
    weighted = np.column_stack([colours, np.ones(len(colours))])
    start = means(colours, weighted, case["initial_labels"][None], int(case["k"]))
    labels, centres, compactness = lloyd(colours, np.ones(len(colours)), start, max_iter=100, eps=1.0)
    assert (labels[0] == case["labels"]).mean() >= 0.999
    np.testing.assert_allclose(centres[0], case["centers"], atol=0.05)
    np.testing.assert_allclose(compactness[0], case["compactness"], rtol=1e-4)


def test_kmeans_reaches_the_objective_of_twenty_opencv_attempts(kmeans_case):
    case = kmeans_case
    codes = pack(case["image"])[case["foreground"].astype(bool)]
    distinct, counts = np.unique(codes, return_counts=True)
    _, _, compactness = Kmeans(k=int(case["k"])).fit(unpack(distinct), counts)
    assert compactness <= case["random_compactness"] * 1.001


@pytest.mark.parametrize("name", ["zebra", "turtle_k3"])
def test_kmeans_masks_agree_with_those_of_twenty_opencv_attempts(shared, name):
    case = arrays(shared / "golden" / "kmeans" / f"{name}.npz")
    foreground = case["foreground"].astype(bool)
    stored = np.unpackbits(case["random_masks"], axis=1, count=foreground.size).astype(bool)
    stored = stored[np.argsort(case["random_centers"].sum(1))]  # dark to light
    (found,) = Kmeans(k=int(case["k"])).segment([case["image"]], [foreground])
    same = (found.masks.reshape(stored.shape) == stored)[:, foreground.ravel()].all(0)
    assert same.mean() >= 0.985


def test_watershed_follows_opencv_step_by_step(watershed_case):
    case = watershed_case
    image, foreground = case["image"], case["foreground"].astype(bool)
    grey = blurred_grey(image, 5)
    np.testing.assert_array_equal(grey, case["blurred"])
    dark = dark_regions(grey, 2)
    np.testing.assert_array_equal(dark, case["opening"] > 0)
    limit, core = sure_regions(dark, 3, 0.1)
    np.testing.assert_array_equal(limit, case["sure_background"] > 0)
    np.testing.assert_array_equal(core & foreground, case["sure_foreground"] > 0)
    seeds = markers(limit, core & foreground)
    np.testing.assert_array_equal(seeds, case["markers_before"])
    np.testing.assert_array_equal(flood(image, seeds), case["markers_after"])
    (found,) = Watershed().segment([image], [foreground])
    np.testing.assert_array_equal(found.masks[0], case["pattern"] > 0)


def test_grabcut_follows_opencv():
    case = arrays(OWN / "grabcut_astronaut.npz")
    (found,) = Grabcut().segment([case["image"]])
    assert (found.masks[0] & case["mask"]).sum() >= 0.99 * (found.masks[0] | case["mask"]).sum()


@pytest.mark.parametrize("name", ["pandas_1", "seal_2"])
def test_grabcut_gives_the_foregrounds_stored_beside_the_photographs(shared, name):
    import cv2

    folder = shared / "data" / "gloper_examples"
    image = next((folder / "images").glob(f"{name}.*"))
    stored = cv2.imread(str(folder / "foreground_grabcut" / f"{name}.png"), cv2.IMREAD_GRAYSCALE) > 0
    (found,) = Grabcut().segment([cv2.imread(str(image), cv2.IMREAD_COLOR_RGB)])
    assert (found.masks[0] & stored).sum() >= 0.99 * (found.masks[0] | stored).sum()


@pytest.mark.parametrize("guide", ["mean", "luma", "rgb"])
@pytest.mark.parametrize("setting", [0, 1])
def test_guided_filter_follows_its_definition(guide, setting):
    case = arrays(OWN / "guided_astronaut.npz")
    radius, eps = int(case["radius"][setting]), float(case["eps"][setting])
    (out,) = filter_by_guide(case["mask"][None], guide_channels(case["image"], guide), radius=radius, eps=eps)
    np.testing.assert_allclose(out, case[f"{guide}_{setting}"], rtol=0, atol=1e-5 if eps >= 1e-3 else 1e-4)


@pytest.mark.parametrize("picture", [0, 1])
@pytest.mark.parametrize("setting", range(5))
def test_guided_filter_with_a_grey_guide(shared, setting, picture):
    case = arrays(shared / "golden" / "mask_refinement" / "guided_gray.npz")
    radius, eps = int(case["radius"][setting]), float(case["eps"][setting])
    (out,) = filter_by_guide(case["mask"][picture], case["guide"][picture], radius=radius, eps=eps)
    atol = 2e-5 if eps >= 1e-3 else 2e-4 if eps >= 1e-4 else 5e-4
    np.testing.assert_allclose(out, case[f"out_{setting}"][picture, 0], rtol=0, atol=atol)


@pytest.mark.parametrize("picture", [0, 1])
def test_guided_filter_gives_what_sempart_gets_from_a_normalised_image(shared, picture):
    case = arrays(shared / "golden" / "mask_refinement" / "guided_gray.npz")
    guide = guide_channels(case["image"][picture], "mean")
    (out,) = filter_by_guide(case["mask"][picture], guide, radius=9, eps=1e-3)
    np.testing.assert_allclose(out, case["wrapper_out"][picture, 0], rtol=0, atol=2e-5)


def test_guided_filter_on_an_image_smaller_than_its_window(shared):
    case = arrays(shared / "golden" / "mask_refinement" / "guided_small.npz")
    (out,) = filter_by_guide(case["mask"][None], case["guide"][None], radius=9, eps=1e-3)
    np.testing.assert_allclose(out, case["out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", [0, 1])
def test_guided_filter_with_a_colour_guide(shared, setting):
    case = arrays(shared / "golden" / "mask_refinement" / "guided_color.npz")
    radius, eps = int(case["radius"][setting]), float(case["eps"][setting])
    (out,) = filter_by_guide(case["mask"][0], case["guide"][0], radius=radius, eps=eps)
    np.testing.assert_allclose(out, case[f"out_{setting}"][0, 0], rtol=0, atol=5e-5)


@pytest.mark.parametrize(("subsample", "stored"), [(4, "out"), (1, "out_full")])
def test_guided_filter_on_a_reduced_image(shared, subsample, stored):
    case = arrays(shared / "golden" / "mask_refinement" / "guided_fast.npz")
    (out,) = filter_by_guide(case["mask"][0], case["guide"][0], radius=8, eps=1e-3, subsample=subsample)
    np.testing.assert_allclose(out, case[stored][0, 0], rtol=0, atol=1e-4)
