"""LOST against stored arrays, and against its plain formulation with all similarities in memory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data
from support.golden import arrays

from raypipe.benchmark.plain.lost import components
from raypipe.features.color import describe
from raypipe.features.grid import Features
from raypipe.segmenters import lost
from raypipe.segmenters.lost import Lost, degrees, expand

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["lost_astronaut", "astronaut_p16", "chelsea_p8_k40"])
def case(request):
    if request.param.startswith("lost"):
        return arrays(OWN / f"{request.param}.npz")
    return arrays(request.getfixturevalue("shared") / f"golden/lost/{request.param}.npz")


def found(patches, grid: tuple[int, int], size: tuple[int, int], *, patch: int = 1, **options):
    """What the method finds in an image of a size whose patches are given."""
    method = Lost(weights="color", **options)
    (segments,) = method.find([np.zeros((*size, 3), np.uint8)], [Features(patches, grid, patch, size, "pad")])
    return segments


def box(mask: np.ndarray) -> list[int]:
    """x0, y0, x1, y1 of a mask, right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_every_step_is_the_stored_one(case):
    patches, count = torch.from_numpy(case["feats"])[None], int(case["k_patches"])
    np.testing.assert_array_equal(degrees(patches)[0], case["degree"])
    low, high, seed, likeness = (each[0].numpy() for each in expand(patches, count, patches.any(2)))
    assert (low, high, seed) == (case["degree"].min(), case["degree"].max(), case["seed"])
    np.testing.assert_allclose(likeness, case["M"], rtol=0, atol=1e-5 * np.abs(case["M"]).max())


@pytest.mark.parametrize("result", ["mask", "box"])
def test_the_mask_encloses_the_stored_box(case, result):
    size, grid, patch = tuple(case["init_image_size"]), tuple(case["dims"]), int(case["patch_size"])
    options = {"k_patches": int(case["k_patches"]), "result": result}
    segments = found(torch.from_numpy(case["feats"]), grid, size, patch=patch, **options)
    expected = np.kron(case["seed_component"], np.ones((patch, patch), bool))[: size[0], : size[1]]
    np.testing.assert_array_equal(segments.masks[0], expected)
    assert box(segments.masks[0]) == case["box"].tolist()
    assert segments.scores == [-case["degree"].min()] and segments.note == ""


@pytest.mark.parametrize("k_patches", [1, 20, 1000])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_a_photograph_gives_the_mask_of_the_plain_formulation(name, k_patches, monkeypatch):
    monkeypatch.setattr(lost, "AT_ONCE", 10_000)  # several blocks
    image = getattr(data, name)()[::2, ::2]
    features = describe(image, 8)
    expected = components(features.patches.numpy(), features.grid, k_patches=k_patches)
    (segments,) = Lost(weights="color", k_patches=k_patches).find([image], [features])
    np.testing.assert_array_equal(segments.masks[0], features.enlarged(expected, image.shape[:2]))
    assert 0 < expected.mean() < 1


def test_images_of_one_grid_together_give_what_each_gives_alone():
    images = [data.astronaut()[:96, :128], data.coffee()[:128, :96], data.chelsea()[100:196, 100:228]]
    features = [describe(image, 8) for image in images]
    method = Lost(weights="color")
    for image, each, segments in zip(images, features, method.find(images, features), strict=True):
        (alone,) = method.find([image], [each])
        np.testing.assert_array_equal(segments.masks, alone.masks)
        assert segments.scores == alone.scores


def test_a_vector_that_is_zero_resembles_not_even_itself():
    assert degrees(torch.tensor([[[0.0, 0], [1, 0], [1, 1]]])).tolist() == [[0, 1, 1]]


def test_equal_degrees_are_taken_in_raster_order():
    patches = torch.tensor([[1.0, 0], [-1, 1], [-1, 1], [-1, 1], [0.5, 0], [-1, 1]])
    degree, _, seed, _ = expand(patches[None], 2, patches[None].any(2))
    assert (degree, seed) == (1, 0)


def test_patches_that_all_resemble_each_other_are_the_whole_image():
    patches = torch.rand(12, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    segments = found(patches, (3, 4), (6, 8), patch=2)
    assert segments.masks.all() and segments.note == "degenerate" and segments.scores == [-11]


def test_where_no_patch_resembles_fewer_others_the_first_is_the_seed_of_its_half():
    halves = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).repeat(3, 1)  # the left half and the right one
    segments = found(halves, (3, 4), (6, 8), patch=2)
    np.testing.assert_array_equal(segments.masks[0], np.arange(8) < np.full((6, 1), 4))
    assert segments.note == "degenerate" and segments.scores == [-5]


@pytest.mark.parametrize(("patches", "share"), [([[1.0, 0]], 1), ([[1.0, 0], [1, 1]], 1), ([[1.0, 0], [0, 1]], 0.6)])
def test_one_or_two_patches_leave_no_choice_of_a_seed(patches, share):
    segments = found(torch.tensor(patches), (1, len(patches)), (3, 5), patch=3)
    assert segments.masks.mean() == pytest.approx(share) and segments.note == "few_patches"


def test_patches_of_padding_can_be_left_out():
    patches = torch.tensor([[1.0, 0], [-0.3, 1], [-0.2, -0.9], [1, 0], [1, 0.1], [-0.1, 1]])
    column = {
        name: found(patches, (2, 3), (8, 9), patch=4, exclude_padding=name == "left out").masks[0].any(0)
        for name in ("kept", "left out")
    }  # of the third column of patches a quarter lies in the image
    assert np.flatnonzero(column["kept"]).tolist() == [8]
    assert np.flatnonzero(column["left out"]).tolist() == [4, 5, 6, 7]


def test_an_image_thinner_than_half_a_patch_keeps_its_patches():
    patches = torch.tensor([[1.0, 0], [0.5, 1], [-1, 0.1]])
    kept, excluded = (found(patches, (1, 3), (1, 12), patch=4, exclude_padding=choice) for choice in (False, True))
    np.testing.assert_array_equal(kept.masks, excluded.masks)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k_patches": 0}, "lost: k_patches must be at least 1, got 0"),
        ({"result": "boxes"}, "lost: unknown result 'boxes'; did you mean 'box'"),
        ({"facet": "value"}, "lost: facet 'value' has no effect: weights 'color' is no network"),
    ],
)
def test_impossible_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Lost(weights="color", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"k_patches": 30, "exclude_padding": True}])
def test_a_gpu_finds_what_the_cpu_finds(options):
    images = [data.astronaut()[:200], data.coffee()[:200, :512], data.chelsea()[:200, :448]]
    features = [describe(image, 8) for image in images]
    there = [replace(each, patches=each.patches.cuda()) for each in features]
    method = Lost(weights="color", **options)
    for one, other in zip(method.find(images, features), method.find(images, there), strict=True):
        assert one.masks.shape == other.masks.shape and (one.masks != other.masks).mean() < 0.01
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-3)
