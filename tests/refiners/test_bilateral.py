"""The bilateral solver against its definition with dense matrices, stored arrays, and its behaviour as a refiner."""

import pickle
from itertools import product

import numpy as np
import pytest
from skimage import data
from support.golden import arrays

from raypipe.benchmark.plain.bilateral import sparse_bilateral_solver
from raypipe.refiners import find
from raypipe.refiners.bilateral import PRESETS, Bilateral
from raypipe.refiners.bilateral.solver import YUV, Grid, filled_component
from raypipe.types import BadImage

CASES = [("bilateral", 0), ("bilateral", 1), ("bilateral_confidence", 0)]


@pytest.fixture
def photo() -> np.ndarray:
    return data.astronaut()[::16, ::12][:30, :36]


@pytest.fixture
def disc() -> np.ndarray:
    """A soft mask for the photograph."""
    y, x = np.mgrid[:30, :36]
    return np.clip(1.5 - np.hypot(y - 15, x - 16) / 10, 0, 1).astype(np.float32)


def two_halves(size=(64, 64), edge=30) -> np.ndarray:
    image = np.zeros((*size, 3), np.uint8)
    image[:, edge:] = 200
    return image


def slow_grid(image, sigma_space, sigma_luma, sigma_chroma):
    """Every pixel's cell, and the dense blur of the cells: one loop over pixels, one over pairs."""
    cells, places = {}, np.zeros(image.shape[:2], int)
    for y, x in np.ndindex(image.shape[:2]):
        luma, u, v = YUV @ image[y, x].astype(float) + (0, 128, 128)
        steps = (y / sigma_space, x / sigma_space, luma / sigma_luma, u / sigma_chroma, v / sigma_chroma)
        places[y, x] = cells.setdefault(tuple(map(int, steps)), len(cells))
    blur = np.zeros((len(cells), len(cells)))
    for (one, i), (other, j) in product(cells.items(), repeat=2):
        apart = np.abs(np.subtract(one, other)).sum()
        blur[i, j] = 10 if apart == 0 else apart == 1
    return places, blur


def slow_system(image, mask, *sigmas, strength, confidence):
    """Barron and Poole, equations 5 to 8 and algorithm 1, with dense matrices: (places, n, m, A, b, y0)."""
    places, blur = slow_grid(image, *sigmas)
    splat = (places.ravel() == np.arange(len(blur))[:, None]).astype(float)
    pixels = splat.sum(1)
    n = np.ones(len(blur))
    for _ in range(10):
        n = np.sqrt(n * pixels / (blur @ n))
    m = n * (blur @ n)
    weights = splat @ confidence.ravel()
    system = strength * (np.diag(m) - np.diag(n) @ blur @ np.diag(n)) + np.diag(weights)
    right = splat @ (confidence * mask).ravel()
    return places, n, m, system, right, right / weights


def slow_gradients(system, right, start, iterations):
    """Preconditioned conjugate gradients, Shewchuk's B3."""
    inverse, x = 1 / np.maximum(np.diag(system), 1e-5), start
    residual = right - system @ x
    direction = inverse * residual
    for _ in range(iterations):
        if np.linalg.norm(residual) <= 1e-5 * np.linalg.norm(right):
            break
        step = (residual @ (inverse * residual)) / (direction @ system @ direction)
        x, former = x + step * direction, residual
        residual = residual - step * (system @ direction)
        ratio = (residual @ (inverse * residual)) / (former @ (inverse * former))
        direction = inverse * residual + ratio * direction
    return x


@pytest.mark.parametrize("sigmas", [(8, 16, 8), (5, 4, 4)])
def test_the_solver_agrees_with_dense_matrices(sigmas, photo, disc):
    confidence = np.random.default_rng(0).uniform(0.2, 1, disc.shape)
    places, n, m, system, right, start = slow_system(photo, disc, *sigmas, strength=128, confidence=confidence)
    grid = Grid(photo, *sigmas)
    assert len(grid) == len(n)
    np.testing.assert_allclose(grid.n[grid.cell], n[places.ravel()], rtol=1e-9)
    np.testing.assert_allclose(grid.m[grid.cell], m[places.ravel()], rtol=1e-9)
    (capped,) = grid.solve([disc], strength=128, confidence=confidence)
    np.testing.assert_allclose(capped, slow_gradients(system, right, start, 25)[places], atol=1e-8)
    (exact,) = grid.solve([disc], strength=128, confidence=confidence, iterations=1000, tolerance=1e-12)
    np.testing.assert_allclose(exact, np.linalg.solve(system, right)[places], atol=1e-8)
    assert np.abs(exact - capped).max() > 1e-5  # or the cap would say nothing


def test_the_refiner_agrees_with_the_plain_formulation(photo, disc):
    masks = np.stack([disc, 1 - disc])
    refined, _ = Bilateral(refine_accept_iou=0.0)(masks, photo)
    plain = [sparse_bilateral_solver(mask, photo, 16, 16, 8) for mask in masks]
    np.testing.assert_allclose(refined, plain, atol=1e-6)


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_the_solver_gives_the_stored_solutions(shared, name, setting):
    case = arrays(shared / "golden" / "mask_refinement" / f"{name}.npz")
    grid = Grid(case["image"], *(case[f"sigma_{axis}"][setting] for axis in ("spatial", "luma", "chroma")))
    assert len(grid) == case[f"n_vertices_{setting}"]
    for ours, stored in ((grid.n, "bist_n_pixel"), (grid.m, "bist_m_pixel")):
        np.testing.assert_allclose(ours[grid.cell], case[f"{stored}_{setting}"].ravel(), rtol=1e-5)
    (capped,) = grid.solve([case["target"]], confidence=case["confidence"])
    np.testing.assert_allclose(capped, case[f"out_{setting}"], atol=1e-6)
    np.testing.assert_array_equal(filled_component(capped > 0.5), case[f"binary_{setting}"])
    (exact,) = grid.solve([case["target"]], confidence=case["confidence"], iterations=1000, tolerance=1e-11)
    np.testing.assert_allclose(exact, case[f"out_converged_{setting}"], atol=1e-6)


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
def test_the_preset_of_namedmask_gives_its_stored_masks(shared, name):
    case = arrays(shared / "golden" / "namedmask" / f"bilateral_{name}.npz")
    masks, size = case["target"].astype(bool)[None], min(case["image"].shape[:2])
    refined, _ = Bilateral("namedmask", refine_working_size=size)(masks, case["image"])
    np.testing.assert_array_equal(refined[0], case["refined"])
    largest, _ = Bilateral("namedmask", refine_working_size=size, refine_clean="largest")(masks, case["image"])
    np.testing.assert_array_equal(largest[0], case["largest_component"])
    soft, _ = Bilateral(refine_accept_iou=0.0)(masks, case["image"])
    np.testing.assert_allclose(soft[0], np.clip(case["soft"], 0, 1), atol=1e-6)


def test_the_scale_of_a_mask_does_not_matter(photo, disc):
    one, many = Grid(photo, 16, 16, 8).solve([disc, 255 * disc])
    np.testing.assert_allclose(many, 255 * one, atol=1e-9)


def test_cells_of_a_wide_image_are_its_own():
    grid = Grid(np.full((1, 6001, 3), 90, np.uint8), 16, 16, 8)  # 376 cells; published code mixes them up from 255 on
    assert len(grid) == 376 and grid.blur.nnz == 376 + 2 * 375
    assert (np.diff(grid.cell) >= 0).all()


def test_pixels_without_confidence_follow_their_neighbours():
    image, confidence = np.full((1, 64, 3), 90, np.uint8), np.ones((1, 64))
    confidence[:, 32:] = 0
    target = np.zeros((1, 64))
    target[:, 32:] = 1
    target[:, :32] = 0.25
    (solved,) = Grid(image, 16, 16, 8).solve([target], confidence=confidence, iterations=100, tolerance=1e-10)
    np.testing.assert_allclose(solved, 0.25, atol=1e-6)


# As a refiner


def test_a_coarse_mask_gets_the_edges_of_the_image():
    image = two_halves()
    masks = np.zeros((1, 64, 64), bool)
    masks[:, :, 33:] = True  # three pixels off
    refined, note = Bilateral()(masks, image)
    assert note == "" and refined.dtype == np.float32
    np.testing.assert_array_equal(refined[0] > 0.5, image[..., 0] > 100)


def test_masks_of_one_value_stay_as_they_are(photo):
    masks = np.stack([np.full(photo.shape[:2], value, np.float32) for value in (0, 1, 0.25)])
    refined, note = Bilateral()(masks, photo)
    np.testing.assert_array_equal(refined, masks)
    binary, _ = Bilateral("namedmask")(masks, photo)
    np.testing.assert_array_equal(binary.max((1, 2)), [0, 1, 0])
    (solved,) = Grid(photo, 16, 16, 8).solve([masks[2]])
    np.testing.assert_allclose(solved, 0.25, atol=1e-9)
    assert note == ""


def test_masks_of_one_image_do_not_matter_to_each_other(photo, disc):
    masks = np.stack([disc, np.zeros_like(disc), 1 - disc])
    together, _ = Bilateral()(masks, photo)
    alone = [Bilateral()(mask[None], photo)[0][0] for mask in masks]
    np.testing.assert_array_equal(together, alone)


def test_a_solution_that_is_too_far_from_its_mask_is_rejected():
    image, masks = two_halves(), np.zeros((2, 64, 64), np.float32)
    masks[0, 10:12, 10:12] = 0.9  # a speck: smoothed away
    masks[1, :, 33:] = 0.9
    refined, note = Bilateral()(masks, image)
    assert note == "refine_rejected"
    np.testing.assert_array_equal(refined[0], masks[0])
    np.testing.assert_array_equal(refined[1] > 0.5, image[..., 0] > 100)
    for options in ({"refine_binary": True}, {"refine_clean": "largest"}):
        binary, note = Bilateral(**options)(masks, image)
        assert note == "refine_rejected"
        np.testing.assert_array_equal(binary[0], masks[0] > 0.5)
    accepted, note = Bilateral(refine_accept_iou=0.0)(masks, image)
    assert note == "" and not (accepted[0] > 0.5).any()


def test_the_iou_must_be_above_its_limit():
    image, masks = two_halves(edge=32), np.zeros((1, 64, 64), bool)
    masks[:, :, 24:] = True  # 40 columns, of which the solution keeps 32: an IoU of 0.8
    assert Bilateral(refine_accept_iou=0.79)(masks, image)[1] == ""
    assert Bilateral(refine_accept_iou=0.8)(masks, image)[1] == "refine_rejected"


def test_a_soft_mask_below_one_half_is_nothing_to_reject(photo, disc):
    refined, note = Bilateral()(disc[None] * 0.4, photo)
    assert note == "" and (refined[0] != disc * 0.4).any()


def test_binary_results_are_those_above_one_half(photo, disc):
    masks, all_accepted = disc[None], {"refine_accept_iou": 0.0}
    soft, _ = Bilateral(**all_accepted)(masks, photo)
    binary, _ = Bilateral(refine_binary=True, **all_accepted)(masks, photo)
    np.testing.assert_array_equal(binary, soft > 0.5)
    of_binary, _ = Bilateral(refine_binarize=True, **all_accepted)(masks, photo)
    np.testing.assert_array_equal(of_binary, Bilateral(**all_accepted)(masks > 0.5, photo)[0])
    assert 0.1 < (of_binary != soft).mean()


def test_the_largest_part_has_no_holes_and_is_never_the_background():
    mask = np.ones((20, 20), bool)
    mask[:, 15] = False  # a small part on the right
    mask[4:8, 4:8] = False  # a hole
    expected = np.zeros_like(mask)
    expected[:, :15] = True
    np.testing.assert_array_equal(filled_component(mask), expected)
    mask[:, 12:] = True
    mask[:2, :] = False
    covering = filled_component(mask)  # more than half of the image
    assert covering[2:].all() and not covering[:2].any()
    assert not filled_component(np.zeros((5, 6), bool)).any()


@pytest.mark.parametrize("working_size", [30, 120])
def test_at_working_size_soft_results_are_bilinear_and_binary_ones_nearest(working_size):
    image = two_halves((60, 80), edge=40)
    masks = np.zeros((1, 60, 80), np.float32)
    masks[:, :, 43:] = 1
    soft, _ = Bilateral(refine_working_size=working_size)(masks, image)
    binary, _ = Bilateral(refine_working_size=working_size, refine_binary=True)(masks, image)
    assert soft.shape == binary.shape == masks.shape and soft.dtype == binary.dtype == np.float32
    for found in (soft > 0.5, binary):
        wrong = np.flatnonzero((found[0] != (image[..., 0] > 100)).any(0))
        assert np.isin(wrong, [39, 40, 41]).all()  # where an image of half the size has colours between the two
    assert set(np.unique(binary)) == {0, 1} and len(np.unique(soft)) > 2
    if working_size == 30:
        np.testing.assert_array_equal(binary[0, ::2, ::2].repeat(2, 0).repeat(2, 1), binary[0])


def test_the_default_works_on_a_megapixel_at_most():
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (10, 10, 3)), np.ones((125, 125, 1))).astype(np.uint8)
    masks = np.kron(rng.random((1, 5, 5)), np.ones((1, 250, 250))).astype(np.float32)
    reduced, _ = Bilateral(refine_accept_iou=0.0)(masks, image)
    np.testing.assert_array_equal(reduced, Bilateral(refine_accept_iou=0.0, refine_working_size=1000)(masks, image)[0])
    own = Bilateral("sempart", refine_sigma_space=16.0, refine_sigma_luma=16.0, refine_sigma_chroma=8.0)
    assert (own(masks, image)[0] != reduced).mean() > 0.1


def test_a_narrow_strip_is_not_blown_up():
    image, masks = np.random.default_rng(0).integers(0, 256, (1, 2000, 3)).astype(np.uint8), np.zeros((1, 1, 2000))
    masks[..., 700:] = 1
    refined, _ = Bilateral("namedmask")(masks, image)  # 512 x 1,024,000 px otherwise
    assert refined.shape == masks.shape


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_masks_that_are_not_finite_make_a_bad_image(value, photo, disc):
    disc[3, 3] = value
    with pytest.raises(BadImage, match="refine: non_finite"):
        Bilateral()(disc[None], photo)


def test_sizes_that_differ_are_refused(photo):
    with pytest.raises(ValueError, match=r"bilateral: masks of size \(5, 5\) for an image of size \(30, 36\)"):
        Bilateral()(np.zeros((1, 5, 5), bool), photo)


@pytest.mark.parametrize(
    "options",
    [
        {"refine_sigma_space": 0.0},
        {"refine_sigma_luma": float("nan")},
        {"refine_sigma_chroma": float("inf")},
        {"refine_strength": -1.0},
        {"refine_confidence": 0.0},
        {"refine_iterations": 0},
        {"refine_working_size": 0},
        {"refine_accept_iou": 1.0},
        {"refine_clean": "all"},
    ],
)
def test_impossible_parameters_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"bilateral: {next(iter(options))} must"):
        Bilateral(**options)


def test_presets_fill_what_is_not_given():
    assert list(PRESETS) == ["tokencut", "sempart", "namedmask"]
    shown = ("refine_sigma_space", "refine_sigma_luma", "refine_sigma_chroma", "refine_accept_iou")
    values = {name: [getattr(Bilateral(name), option) for option in shown] for name in PRESETS}
    assert values == {"tokencut": [16, 16, 8, 0.5], "sempart": [24, 4, 4, 0], "namedmask": [16, 16, 8, 0]}
    shown = ("refine_binarize", "refine_working_size", "refine_binary")
    values = {name: [getattr(Bilateral(name), option) for option in shown] for name in PRESETS}
    nothing = [False, None, False]
    assert values == {"tokencut": nothing, "sempart": nothing, "namedmask": [True, 512, True]}
    assert Bilateral("sempart", refine_sigma_luma=9.0).refine_sigma_luma == 9
    with pytest.raises(ValueError, match="bilateral: unknown refine_preset 'sempat'; did you mean 'sempart'"):
        Bilateral("sempat")
    assert find("bilateral") is Bilateral
    assert pickle.loads(pickle.dumps(Bilateral("namedmask"))) == Bilateral("namedmask")
