"""The dense CRF and its lattice against slow definitions and stored arrays, and its behaviour as a refiner."""

import pickle
from collections import defaultdict
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from skimage import data
from support.golden import arrays

from raypipe.benchmark.plain.crf import shades, windowed_crf
from raypipe.refiners import find
from raypipe.refiners.crf import PRESETS, Crf
from raypipe.refiners.crf.lattice import Lattice
from raypipe.refiners.crf.meanfield import dense_crf
from raypipe.types import BadImage

CASES = ["refine_64x64", "refine_48x72_alt_weights"]
GENTLE = {
    "gauss_sxy": 2.0,
    "gauss_weight": 3.0,
    "bilateral_sxy": 6.0,
    "bilateral_srgb": 20.0,
    "bilateral_weight": 5.0,
    "iterations": 4,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photo() -> np.ndarray:
    return cv2.resize(data.astronaut()[:256, 96:352], (40, 36), interpolation=cv2.INTER_AREA)


@pytest.fixture
def energies(photo) -> np.ndarray:
    """Of three labels: three of the nine shades."""
    return shades(photo, 9)[::4]


def stored(shared, name: str) -> tuple[dict, dict]:
    """A stored case, and the options that it was made with."""
    case = arrays(shared / "golden" / "dense_crf" / f"{name}.npz")
    of = {"gauss_sxy": "gauss_sxy", "gauss_weight": "gauss_weight", "bilateral_sxy": "bil_sxy"}
    of |= {"bilateral_srgb": "bil_srgb", "bilateral_weight": "bil_weight", "iterations": "iterations"}
    return case, {ours: case[theirs].item() for ours, theirs in of.items()}


def two_halves(size=(40, 60), edge=30) -> np.ndarray:
    image = np.zeros((*size, 3), np.uint8)
    image[:, edge:] = 200
    return image


# The filter


def slow_lattice(points, values):
    """Adams, Baek, Davis 2010, point by point, with a dictionary for the vertices."""
    d = points.shape[1]
    simplex, vertices = [], defaultdict(float)
    for point, value in zip(points, values, strict=True):
        scaled = [x * np.sqrt(2 / 3) * (d + 1) / np.sqrt((j + 1) * (j + 2)) for j, x in enumerate(point)]
        elevated = [sum(scaled[j:]) - (j * scaled[j - 1] if j else 0) for j in range(d + 1)]
        near = [int(np.ceil(x / (d + 1) - 0.5)) * (d + 1) for x in elevated]
        rest = np.subtract(elevated, near)
        order = sorted(range(d + 1), key=lambda j, rest=rest: (-rest[j], j))
        rank = [order.index(j) + sum(near) // (d + 1) for j in range(d + 1)]
        for j in range(d + 1):
            turn = (rank[j] < 0) - (rank[j] > d)
            rank[j], near[j] = rank[j] + turn * (d + 1), near[j] + turn * (d + 1)
        weights = np.zeros(d + 2)
        for j in range(d + 1):
            share = (elevated[j] - near[j]) / (d + 1)
            weights[d - rank[j]] += share
            weights[d + 1 - rank[j]] -= share
        weights[0] += 1 + weights[d + 1]
        keys = [tuple(near[j] + (t if rank[j] <= d - t else t - (d + 1)) for j in range(d + 1)) for t in range(d + 1)]
        assert all(sum(key) == 0 for key in keys) and np.isclose(weights[: d + 1].sum(), 1) and weights.min() > -2
        simplex.append((keys, weights[: d + 1]))
        for key, weight in zip(keys, weights, strict=False):
            vertices[key] += weight * value
    for axis in range(d + 1):
        step = np.full(d + 1, -1)
        step[axis] = d
        old = dict(vertices)
        for key in old:
            both = (old.get(tuple(np.add(key, sign * step)), 0) for sign in (1, -1))
            vertices[key] = old[key] + 0.5 * sum(both)
    return np.array([sum(w * vertices[key] for key, w in zip(*corners, strict=True)) for corners in simplex])


@pytest.mark.parametrize("d", [1, 2, 5])
def test_the_lattice_agrees_with_a_slow_loop(d):
    rng = np.random.default_rng(d)
    points, values = rng.normal(0, 1.5, (60, d)), rng.random((60, 3)).astype(np.float32)
    points[0] = 0  # all coordinates tie
    found = Lattice(torch.from_numpy(points))(torch.from_numpy(values))
    np.testing.assert_allclose(found, slow_lattice(points, values), rtol=1e-5)


def test_the_lattice_comes_near_the_gaussian():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 6, (1500, 2))
    distances = ((points[:, None] - points) ** 2).sum(2)
    exact = np.exp(-distances / 2) @ points
    found = Lattice(torch.from_numpy(points))(torch.from_numpy(points).float()).numpy()
    ratio = found / exact
    assert ratio.std() < 0.06 * ratio.mean()


def test_groups_do_not_mix():
    points = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (50, 2)))
    values = torch.linspace(0, 1, 100).reshape(50, 2)
    both = Lattice(points.repeat(2, 1), torch.arange(2).repeat_interleave(50))(torch.cat([values, 0 * values]))
    np.testing.assert_allclose(both[:50], Lattice(points)(values), rtol=1e-6)
    assert not both[50:].any()


def test_points_too_far_apart_to_count_are_refused():
    with pytest.raises(ValueError, match="crf: kernels are too narrow"):
        Lattice(1e5 * torch.eye(5, dtype=torch.float64))


# Energies


def exact_crf(image, unary, *, iterations, **options):
    """Kraehenbuehl and Koltun 2011, algorithm 1, with whole kernel matrices in float64."""
    k, height, width = unary.shape
    position = np.array(list(product(range(height), range(width))), float)
    colour = image.reshape(-1, 3).astype(float)
    spread = {
        "gauss": position / options["gauss_sxy"],
        "bilateral": np.hstack([position / options["bilateral_sxy"], colour / options["bilateral_srgb"]]),
    }
    kernels = []
    for name, points in spread.items():
        matrix = np.exp(-((points[:, None] - points) ** 2).sum(2) / 2)
        scale = 1 / np.sqrt(matrix.sum(1))
        kernels.append(options[f"{name}_weight"] * scale[:, None] * matrix * scale)
    cost = unary.reshape(k, -1).T.astype(float)
    q = np.exp(-cost) / np.exp(-cost).sum(1, keepdims=True)
    for _ in range(iterations):
        power = np.exp(sum(matrix @ q for matrix in kernels) - cost)
        q = power / power.sum(1, keepdims=True)
    return q.T.reshape(unary.shape)


def test_the_plain_formulation_with_an_endless_window_agrees_with_whole_kernels(photo, energies):
    image, unary = photo[:16, :20], energies[:, :16, :20]
    q, labels = windowed_crf(image, unary, window=np.inf, **GENTLE)
    exact = exact_crf(image, unary, **GENTLE)
    np.testing.assert_allclose(q, exact, atol=1e-4)
    np.testing.assert_array_equal(labels, exact.argmax(0))
    assert 0.02 < (labels != unary.argmin(0)).mean()  # it does something


def test_the_lattice_gives_nearly_the_labels_of_exact_kernels(photo, energies):
    q, labels = dense_crf(photo, energies, **GENTLE)
    _, exact = windowed_crf(photo, energies, **GENTLE)
    assert (labels == exact).mean() > 0.97 and (labels != energies.argmin(0)).mean() > 0.05
    assert q.dtype == np.float32 and labels.dtype == np.int16
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(labels, q.argmax(0))


@pytest.mark.parametrize("name", CASES)
def test_the_lattice_gives_the_stored_labels(shared, name):
    case, options = stored(shared, name)
    q, labels = dense_crf(case["image"], case["unary"], **options)
    assert (labels == case["labels_lattice"]).mean() >= 0.999
    assert (np.abs(q - case["q_lattice"]) <= 2e-3).mean() >= 0.999


@pytest.mark.parametrize("name", CASES)
def test_the_plain_formulation_gives_the_stored_exact_labels(shared, name):
    case, options = stored(shared, name)
    first, _ = windowed_crf(case["image"], case["unary"], **options | {"iterations": 1})
    np.testing.assert_allclose(first, case["q_exact_1"], atol=1e-2)
    _, labels = windowed_crf(case["image"], case["unary"], **options)
    assert (labels == case["labels_exact"]).mean() >= 0.997  # the window changes 0.2 % of them


def test_several_images_are_each_as_if_alone(photo, energies):
    images, unary = np.stack([photo, photo[::-1]]), np.stack([energies, energies[:, ::-1] * 2])
    q, labels = dense_crf(images, unary, **GENTLE)
    assert q.shape == unary.shape and labels.shape == unary[:, 0].shape
    for i in range(2):
        alone, its_labels = dense_crf(images[i], unary[i], **GENTLE)
        np.testing.assert_allclose(q[i], alone, atol=1e-4)
        assert (labels[i] == its_labels).mean() > 0.999


def test_several_problems_on_an_image_are_each_as_if_alone(photo, energies):
    unary = np.stack([energies, energies * 2, 1 - energies])
    q, labels = dense_crf(photo, unary, **GENTLE)
    assert q.shape == unary.shape and labels.shape == unary[:, 0].shape
    for i in range(3):
        np.testing.assert_allclose(q[i], dense_crf(photo, unary[i], **GENTLE)[0], atol=1e-4)


def test_a_constant_for_all_labels_of_a_pixel_changes_nothing(photo, energies):
    shifts = np.random.default_rng(0).normal(0, 3, energies.shape[1:]).astype(np.float32)
    shifted, _ = dense_crf(photo, energies + shifts, **GENTLE)
    np.testing.assert_allclose(shifted, dense_crf(photo, energies, **GENTLE)[0], atol=1e-4)


def test_one_label_is_everywhere(photo):
    q, labels = dense_crf(photo, np.full((1, *photo.shape[:2]), 7.0, np.float32))
    assert (q == 1).all() and not labels.any() and labels.dtype == np.int16


def test_a_tie_goes_to_the_lowest_label(photo):
    _, labels = dense_crf(photo, np.zeros((4, *photo.shape[:2]), np.float32), **GENTLE)
    assert not labels.any()


def test_a_one_colour_image_is_smoothed(energies):
    image = np.full((*energies.shape[1:], 3), 90, np.uint8)
    q, labels = dense_crf(image, energies, **GENTLE)
    assert np.isfinite(q).all()
    assert (labels[1:] != labels[:-1]).sum() < (energies.argmin(0)[1:] != energies.argmin(0)[:-1]).sum()


@pytest.mark.parametrize("size", [(1, 1), (1, 50)])
def test_tiny_images_have_labels(size):
    unary = np.zeros((2, *size), np.float32)
    unary[0] = 3
    q, labels = dense_crf(np.zeros((*size, 3), np.uint8), unary)
    assert (labels == 1).all() and np.isfinite(q).all()


def test_infinite_energy_forbids_a_label(photo, energies):
    energies[0, :, :20] = np.inf
    q, labels = dense_crf(photo, energies, **GENTLE)
    assert not q[0, :, :20].any() and np.isfinite(q).all() and (labels[:, 20:] == 0).any()


def test_images_and_energies_may_be_views_and_tensors(photo, energies):
    expected, _ = dense_crf(photo[::2, ::-1].copy(), energies[:, ::2, ::-1].copy(), **GENTLE)
    found, _ = dense_crf(photo[::2, ::-1], torch.from_numpy(energies[:, ::2, ::-1].astype(np.float64)), **GENTLE)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, unary: (image / 255, unary), r"expected a uint8 RGB image \(H, W, 3\), got float64"),
        (lambda image, unary: (image[..., 0], unary), "expected a uint8 RGB image"),
        (lambda image, unary: (image[1:], unary), r"energies of shape \(3, 36, 40\) for an image of shape \(35,"),
        (lambda image, unary: (image, unary[0]), r"energies of shape \(36, 40\)"),
        (lambda image, unary: (image[None], unary[None].repeat(2, 0)), r"energies of shape \(2, 3, 36, 40\)"),
        (lambda image, unary: (image, unary[:0]), "at least one label"),
        (lambda image, unary: (image, np.where(unary == unary[1, 5, 5], np.nan, unary)), "NaN"),
        (lambda image, unary: (image, np.where(unary == unary[1, 5, 5], -np.inf, unary)), "-inf"),
        (lambda image, unary: (image, np.where(np.eye(36, 40) > 0, np.inf, unary)), "only inf"),
    ],
)
def test_what_cannot_be_labelled_is_refused(change, message, photo, energies):
    with pytest.raises(ValueError, match=f"crf: .*{message}"):
        dense_crf(*change(photo, energies))


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(photo, energies):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images, unary = np.stack([photo, photo[::-1]]), np.stack([energies, energies[:, ::-1]])
    expected, _ = dense_crf(images, unary, **GENTLE)
    found, _ = dense_crf(images, unary, device="cuda", **GENTLE)
    np.testing.assert_allclose(found, expected, atol=1e-4)


# As a refiner


def test_a_coarse_mask_gets_the_edges_of_the_image():
    image, masks = two_halves(), np.zeros((1, 40, 60), bool)
    masks[:, :, 33:] = True  # three pixels off
    refined, note = Crf()(masks, image)
    assert note == "" and refined.dtype == np.float32
    np.testing.assert_array_equal(refined[0] > 0.5, image[..., 0] > 100)


def test_masks_that_share_out_the_image_are_refined_together(photo):
    values = np.random.default_rng(0).dirichlet([1, 1, 1], photo.shape[:2]).astype(np.float32).transpose(2, 0, 1)
    refined, _ = Crf("reco")(values[1:], photo)
    unary = -np.log(np.maximum(np.stack([1 - values[1:].sum(0), *values[1:]]), 1e-5))
    q, _ = dense_crf(photo, unary, gauss_weight=3, bilateral_sxy=67, bilateral_srgb=3, bilateral_weight=4)
    np.testing.assert_allclose(refined, q[1:], atol=1e-6)
    assert (refined.sum(0) <= 1 + 1e-5).all()


def test_masks_that_overlap_are_refined_one_by_one(photo):
    masks = np.random.default_rng(0).random((20, *photo.shape[:2])).astype(np.float32)
    refined, _ = Crf("amir")(masks, photo)
    for i in (0, 15, 16, 19):
        alone, _ = Crf("amir")(masks[i : i + 1], photo)
        np.testing.assert_allclose(refined[i], alone[0], atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 30])
def test_binary_masks_are_almost_sure(count, photo):
    """Also where there are so many that 0.05 for each would leave nothing for the background."""
    labels = np.random.default_rng(0).integers(0, count + 1, photo.shape[:2])
    masks = labels == np.arange(1, count + 1)[:, None, None]
    options = {"refine_gauss_weight": 0.0, "refine_bilateral_weight": 0.0}
    refined, note = Crf(**options)(masks, photo)
    np.testing.assert_allclose(refined, np.where(masks, 0.95, 0.05 / count), atol=1e-5)
    assert note == ""


def test_a_mask_that_would_vanish_is_kept_and_noted():
    image, masks = two_halves(), np.zeros((2, 40, 60), bool)
    masks[0, 20, 10] = True  # a speck
    masks[1, :, 30:] = True
    refined, note = Crf()(masks, image)
    assert note == "refine_rejected"
    np.testing.assert_array_equal(refined[0], masks[0])
    np.testing.assert_array_equal(refined[1] > 0.5, masks[1])


def test_large_images_are_reduced_and_results_enlarged():
    image, masks = two_halves((40, 900), edge=300), np.zeros((1, 40, 900), np.float32)
    masks[:, :, 304:] = 0.8
    reduced, _ = Crf()(masks, image)
    assert reduced.shape == masks.shape
    wrong = np.flatnonzero(((reduced[0] > 0.5) != (image[..., 0] > 100)).any(0))
    assert np.isin(wrong, range(297, 304)).all()
    own, _ = Crf(refine_working_size=None)(masks, image)
    np.testing.assert_array_equal(own, Crf(refine_working_size=900)(masks, image)[0])
    assert (own != reduced).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_masks_that_are_not_finite_make_a_bad_image(value, photo):
    masks = np.zeros((1, *photo.shape[:2]), np.float32)
    masks[0, 3, 3] = value
    with pytest.raises(BadImage, match="refine: non_finite"):
        Crf()(masks, photo)


def test_sizes_that_differ_are_refused(photo):
    with pytest.raises(ValueError, match=r"crf: masks of size \(5, 5\) for an image of size \(36, 40\)"):
        Crf()(np.zeros((1, 5, 5), bool), photo)


@pytest.mark.parametrize(
    "options",
    [
        {"refine_gauss_sxy": 0.0},
        {"refine_bilateral_sxy": float("nan")},
        {"refine_bilateral_srgb": float("inf")},
        {"refine_gauss_weight": -1.0},
        {"refine_bilateral_weight": float("nan")},
        {"refine_iterations": 0},
        {"refine_working_size": 0},
    ],
)
def test_impossible_parameters_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"crf: {next(iter(options))} must"):
        Crf(**options)


def test_presets_fill_what_is_not_given():
    assert list(PRESETS) == ["zero_guidance", "amir", "spectral", "reco"]
    shown = ("gauss_sxy", "gauss_weight", "bilateral_sxy", "bilateral_srgb", "bilateral_weight", "iterations")
    values = {name: [getattr(Crf(name), f"refine_{option}") for option in shown] for name in PRESETS}
    assert values == {
        "zero_guidance": [1, 25, 5, 13, 100, 10],
        "amir": [3, 50, 5, 13, 15, 10],
        "spectral": [3, 3, 80, 13, 10, 5],
        "reco": [1, 3, 67, 3, 4, 10],
    }
    assert Crf("reco", refine_iterations=3).refine_iterations == 3 and Crf("reco").refine_working_size == 448
    with pytest.raises(ValueError, match="crf: unknown refine_preset 'recco'; did you mean 'reco'"):
        Crf("recco")
    assert find("crf") is Crf
    assert pickle.loads(pickle.dumps(Crf("amir"))) == Crf("amir")
