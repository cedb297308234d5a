"""Spectral voting: stored clusters and votes, grids that do not fit each other, images without clusters."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data
from support.golden import arrays
from support.tiny.dino import write_model

from raypipe.benchmark.plain import spectral_voting as plain
from raypipe.features.color import describe
from raypipe.features.grid import Features
from raypipe.segmenters.spectral_voting import SpectralVoting, coordinates, least_cosine, unit_nodes
from raypipe.segmenters.spectral_voting.voting import shared_cells, vote
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parents[1] / "golden"
VOTES = ("vote_all_filtered", "vote_blobs_long_small", "vote_blobs_none", "vote_from_clusters")


@pytest.fixture(scope="module")
def stored():
    return arrays(GOLDEN / "spectral_voting_clusters.npz")


@pytest.fixture(scope="module")
def described(stored) -> Features:
    """The stored features, as of a network with patches of 16 px."""
    patch = int(stored["patch_size"])
    return Features(torch.from_numpy(stored["feats"]), tuple(stored["dims"]), patch, stored["image"].shape[:2], "pad")


@pytest.fixture(scope="module")
def method() -> SpectralVoting:
    made = SpectralVoting(weights="color")
    made.load("cpu")
    return made


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (96, 128, 3)).astype(np.uint8)


def test_spectral_coordinates_are_those_of_the_dense_problem(stored, described):
    unit = unit_nodes(described, tuple(2 * side for side in described.grid))
    vectors = coordinates(unit, 4).T.numpy()
    affinity = (unit @ unit.T).double().numpy()
    affinity = (affinity - affinity.min()) / (affinity.max() - affinity.min())
    degree = affinity.sum(1)
    np.testing.assert_allclose(degree, stored["adjacency_row_sums"], rtol=1e-5)
    np.testing.assert_allclose(vectors @ np.diag(degree) @ vectors.T, np.eye(4), atol=1e-5)
    quotients = [y @ (degree * y) - y @ affinity @ y for y in vectors]
    np.testing.assert_allclose(quotients, stored["eigenvalues"][:4], atol=1e-5)
    for ours, theirs in zip(vectors, stored["eigenvectors"][:4], strict=True):
        theirs = theirs * np.sign(ours @ theirs)
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())


def test_clusters_are_the_stored_ones(stored, described, method):
    found = method._clusters(described, stored["image"].shape[:2])
    masks = iter(stored["candidate_masks"])
    for k, labels in zip(stored["ks"], found.maps, strict=True):
        known = stored[f"labels_k{k}"]
        assert max((np.array(order)[known] == labels).mean() for order in permutations(range(k))) >= 0.995
        pixels = labels[found.rows[:, None], found.columns]
        ours = {(pixels == label).tobytes() for label in range(k)}
        assert ours == {next(masks).tobytes() for _ in range(k)}


def test_the_winner_of_stored_features_is_that_of_the_plain_formulation(stored, described, method):
    (found,) = method.find([stored["image"]], [described_jointly(described)])
    masks = plain.candidates(described, stored["image"].shape[:2], ks=(2, 3, 4), upsampling=2, seed=0)
    np.testing.assert_array_equal(found.masks[0], plain.voted(masks)[0])
    assert found.masks.dtype == bool and found.note == ""


def described_jointly(first: Features, *others: Features):
    from raypipe.segmenters.spectral_voting import Joint

    return Joint(**vars(first), others=others)


@pytest.mark.parametrize("case", VOTES)
def test_votes_are_the_stored_ones(case):
    stored = arrays(GOLDEN / f"spectral_voting_{case}.npz")
    masks = stored["candidate_masks"]
    filters = {name: bool(stored[f"{name}_masks"]) for name in ("remove_long", "remove_small_large")}
    found = vote(masks, *(np.ones(side, int) for side in masks.shape[1:]), **filters)
    np.testing.assert_array_equal(found.kept, stored["kept_indices"])
    np.testing.assert_allclose(found.scores, stored["vote_scores"], atol=1e-6)
    assert found.winner == stored["best_index"] and found.all_filtered == (case == "vote_all_filtered")
    np.testing.assert_array_equal(masks[found.winner], stored["best_mask"])


def test_two_that_are_left_tie_and_the_first_wins():
    masks = np.zeros((2, 9, 9), bool)
    masks[0, 1:3, 1:8], masks[1, 2:8, 1:3] = True, True
    for order in (masks, masks[::-1]):
        found = vote(order, np.full(9, 7), np.full(9, 3), remove_long=True, remove_small_large=False)
        assert found.winner == 0 and found.scores[0] == found.scores[1]


@pytest.mark.parametrize(("size", "patches"), [((96, 128), (16, 8)), ((70, 45), (14, 8)), ((50, 50), (16, 14))])
def test_backbones_of_other_patches_vote_on_shared_cells_as_on_pixels(size, patches, method):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    backbones = []
    for patch in patches:
        grid = tuple(-(-side // patch) for side in size)
        made = torch.from_numpy(rng.normal(size=(grid[0] * grid[1], 5)).astype(np.float32))
        backbones.append(Features(made, grid, patch, size, "pad"))
    (found,) = method.find([image], [described_jointly(*backbones)])
    masks = [plain.candidates(each, size, ks=method.ks, upsampling=2, seed=0) for each in backbones]
    ours = np.concatenate([pixels_of(method, each, size) for each in backbones])
    winner, best = plain.voted(ours)
    np.testing.assert_array_equal(found.masks[0], winner)
    assert len(ours) == sum(map(len, masks)) == 18 and 0 <= best < 18


def pixels_of(method: SpectralVoting, features: Features, size) -> np.ndarray:
    """All candidates of one backbone on pixels."""
    found = method._clusters(features, size)
    maps = [labels[found.rows[:, None], found.columns] for labels in found.maps]
    return np.concatenate([labels == np.arange(k)[:, None, None] for k, labels in zip(method.ks, maps, strict=True)])


def test_shared_cells_are_the_coarsest_on_which_all_grids_are_constant():
    first, lengths = shared_cells([np.array([0, 0, 0, 1, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 1, 1])])
    assert first.tolist() == [0, 2, 3, 6] and lengths.tolist() == [2, 1, 3, 1]


def test_the_least_cosine_does_not_depend_on_how_many_rows_are_looked_at_together(described, monkeypatch):
    unit = unit_nodes(described, described.grid)
    monkeypatch.setattr("raypipe.segmenters.spectral_voting.AT_ONCE", 7 * len(unit))
    assert least_cosine(unit) == pytest.approx((unit @ unit.T).min().item(), abs=1e-6)


def test_nodes_without_features_stand_alone():
    unit = torch.eye(4).repeat_interleave(6, 0)[:, :3]  # as of a residual network: nothing is negative, six are 0
    found = coordinates(unit, 3)
    assert found.isfinite().all() and found[18:].abs().max() < 1e-6
    for first in (0, 6, 12):
        torch.testing.assert_close(found[first : first + 6], found[first].expand(6, -1))
    assert coordinates(torch.zeros(24, 3), 3) is None


@pytest.mark.parametrize(
    ("size", "note"), [((16, 16), "few_patches"), ((20, 30), "few_patches"), ((9, 9), "too_small")]
)
def test_images_with_too_few_patches_have_an_empty_mask(size, note, method, noise):
    (found,) = method.segment([noise[: size[0], : size[1]]])
    assert found.note == note and found.masks.shape == (1, *size) and not found.masks.any()


def test_features_that_are_all_alike_have_an_empty_mask(method, noise, described):
    alike = replace(described, patches=torch.ones_like(described.patches))
    (found,) = method.find([noise], [described_jointly(alike)])
    assert found.note == "degenerate" and not found.masks.any()
    (found,) = method.find([noise], [described_jointly(alike, replace(described, seen=(96, 128)))])
    assert found.note == "" and found.masks.any()  # the other backbone votes alone


def test_where_all_candidates_reach_from_side_to_side_all_vote(method):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, 32:] = 255
    two = replace(method, ks=(2,))
    two.load("cpu")
    (found,) = two.segment([stripes])
    assert found.note == "no_candidate" and found.masks.any()


def test_features_that_are_no_numbers_are_an_error_of_the_image(tmp_path, noise):
    method = SpectralVoting(weights=str(write_model(tmp_path)))
    method.load("cpu")
    method._backbones[0].network.layernorm.weight.data[0] = np.nan
    with pytest.raises(BadImage, match="segment: non_finite"):
        list(method.segment([noise]))


def test_two_backbones_are_two_networks_and_give_twice_the_candidates(tmp_path, noise):
    both = SpectralVoting(weights="color", weights_2=str(write_model(tmp_path)))
    assert both.networks == ("weights_2",) and SpectralVoting().networks == ("weights",)
    both.load("cpu")
    assert list(both.checksums()) == ["model.safetensors"]
    (features,) = both.features([noise])
    assert [features.patch, *(each.patch for each in features.others)] == [16, 8]
    (found,) = both.segment([noise])
    assert found.masks.any()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ks": ()}, r"ks must be different numbers, 2 to 255, got \(\)"),
        ({"ks": (1, 2)}, r"ks must be different numbers, 2 to 255, got \(1, 2\)"),
        ({"ks": (2, 256)}, r"ks must be different numbers, 2 to 255, got \(2, 256\)"),
        ({"ks": (3, 2, 3)}, r"ks must be different numbers"),
        ({"upsampling": 3}, "upsampling must be 1 or 2, got 3"),
        ({"weights": "color", "weights_3": "color"}, "each backbone can vote once, got 'color', 'color'"),
        ({"max_side": 0}, "max_side must be at least 1"),
        ({"weights_2": ""}, "weights_2 must be"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, text):
    with pytest.raises(ValueError, match=f"^spectral_voting: {text}"):
        SpectralVoting(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_finds(method):
    images = [data.astronaut()[:200], data.coffee()[:200, :512], data.chelsea()[:200, :448]]
    features = [described_jointly(describe(image, 8)) for image in images]
    there = [replace(each, patches=each.patches.cuda()) for each in features]
    for one, other in zip(method.find(images, features), method.find(images, there), strict=True):
        assert one.masks.any() and (one.masks != other.masks).mean() < 0.01
