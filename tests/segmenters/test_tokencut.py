"""TokenCut against stored reference solutions, its plain formulation, and images that cannot be cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data
from support import golden, tiny
from support.tiny.dino import write_model

from raypipe.benchmark import methods
from raypipe.benchmark.figures import Sizes
from raypipe.benchmark.plain import tokencut as plain
from raypipe.benchmark.plain._dino import PlainDino
from raypipe.features.grid import Features
from raypipe.segmenters import tokencut
from raypipe.segmenters.tokencut import Tokencut
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")
STORED = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return tiny.options("tokencut", tmp_path_factory.mktemp("tokencut"))["weights"]


def loaded(weights: str, device: str = "cpu", **options) -> Tokencut:
    method = Tokencut(weights=weights, **options)
    method.load(device)
    return method


def check(stored: dict, result: str):
    """The mask of stored features, as they are of an image resized (mask) or padded (box) to whole patches."""
    size, grid, patch = tuple(stored["init_image_size"]), tuple(stored["dims"]), int(stored["patch_size"])
    graph = "binary" if stored["binary_graph"] else "weighted"
    method = Tokencut(weights="color", result=result, tau=float(stored["tau"]), eps=float(stored["eps"]), graph=graph)
    seen = size if result == "box" else tuple(cells * patch for cells in grid)
    features = Features(torch.tensor(stored["feats"][0, 1:]), grid, patch, seen, method.FIT)
    (found,) = method.find([np.zeros((*size, 3), np.uint8)], [features])
    assert found.note == "" and found.masks.shape == (1, *size)
    np.testing.assert_allclose(found.scores, stored["eigenvalues"][2] - stored["eigenvalues"][1], atol=1e-5)
    if result == "mask":
        np.testing.assert_array_equal(found.masks[0], stored["mask_fullres"])
    else:
        rows, columns = found.masks[0].nonzero()
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_array_equal(box, stored["box"])


@pytest.mark.parametrize("result", ["mask", "box"])
@pytest.mark.parametrize("name", ["tokencut_astronaut", "tokencut_coffee_weighted"])
def test_stored_masks_and_boxes(name, result):
    check(golden.arrays(STORED / f"{name}.npz"), result)


@pytest.mark.parametrize("result", ["mask", "box"])
@pytest.mark.parametrize("name", ["astronaut_p16", "chelsea_p8", "coffee_p8_weighted"])
def test_shared_masks_and_boxes(name, result, shared):
    check(golden.arrays(shared / "golden" / "tokencut" / f"{name}.npz"), result)


@pytest.mark.parametrize("options", [{}, {"tau": 0.3, "eps": 1e-4}, {"graph": "weighted", "tau": 0.1}])
def test_masks_are_those_of_the_plain_formulation(weights, options):
    method = loaded(weights, **options)
    dino = PlainDino(method._dino.network)
    for image in (data.chelsea()[:150, 100:260], data.coffee()[100:228, 200:325], data.astronaut()[:64, 150:214]):
        (found,) = method.segment([image])
        np.testing.assert_array_equal(found.masks, plain.of_network(method, dino, image))
        assert found.masks.any() and found.note == ""


@pytest.mark.parametrize("features", ["network", "color"])
def test_the_benchmark_finds_the_masks_of_the_plain_formulation(features, weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # where ours would be bfloat16
    given = weights if features == "network" else "color"
    figures = methods.measure("tokencut", Sizes(side=160, photographs=1, repeats=1), True, given)
    rows = {figure.figure: figure for figure in figures}
    assert rows["times faster than plain"].values and rows["time per image, 160 x 160 px"].values
    assert max(rows["share of pixels unlike plain"].values) == 0


def test_a_box_comes_from_the_padded_image(weights):
    image = data.chelsea()[:123, 100:245]
    (mask,), (box,) = (loaded(weights, result=result).features([image]) for result in ("mask", "box"))
    assert (mask.fit, mask.seen, mask.grid) == ("resize", (120, 144), (15, 18))
    assert (box.fit, box.seen, box.grid) == ("pad", (123, 145), (16, 19))
    (found,) = loaded(weights, result="box").segment([image])
    assert found.masks.shape == (1, 123, 145) and found.masks.any()


def test_the_facets_differ(weights):
    image = data.coffee()[100:228, 200:328]
    facets = {facet: loaded(weights, facet=facet) for facet in ("key", "query", "value", "kqv")}
    patches = {facet: next(iter(method.features([image]))).patches for facet, method in facets.items()}
    assert patches["kqv"].shape[1] == 3 * patches["key"].shape[1]
    masks = {facet: next(method.segment([image])).masks for facet, method in facets.items()}
    assert len({mask.tobytes() for mask in masks.values()}) > 1


def method_and_features(patches, grid, **options):
    method = Tokencut(weights="color", **options)
    image = np.zeros((grid[0] * 8, grid[1] * 8, 3), np.uint8)
    return method, image, Features(torch.as_tensor(patches, dtype=torch.float32), grid, 8, image.shape[:2], method.FIT)


def find(patches, grid, **options):
    method, image, features = method_and_features(patches, grid, **options)
    (found,) = method.find([image], [features])
    return found


@pytest.mark.parametrize("graph", ["binary", "weighted"])
@pytest.mark.parametrize("patches", [torch.ones(12, 4), torch.eye(12), torch.zeros(12, 4)])
def test_where_all_patches_are_alike_or_none_are_there_is_no_cut(patches, graph):
    for result, filled in (("mask", False), ("box", True)):
        found = find(patches, (3, 4), graph=graph, result=result)
        assert found.note == "degenerate" and found.masks.shape == (1, 24, 32)
        assert (found.masks == filled).all()


def test_three_equal_islands_have_no_one_cut():
    patches = torch.eye(3).repeat_interleave(4, 0)
    assert find(patches, (3, 4)).note == "degenerate"


def test_one_or_two_patches():
    assert find(torch.ones(1, 3), (1, 1)).note == "degenerate,few_patches"
    found = find(torch.ones(2, 3), (1, 2))
    assert found.note == "degenerate,few_patches" and found.scores == [0]
    found = find(torch.eye(2), (1, 2))  # different ones: of equal entries the first is the seed
    assert found.note == "few_patches"
    np.testing.assert_array_equal(found.masks[0], np.arange(16) < 8 * np.ones((8, 1)))


def test_a_small_gap_is_an_ambiguous_cut():
    patches = torch.eye(40)
    patches[3:] = patches[3]
    found = find(patches, (5, 8), eps=1e-6)  # three isolated patches, one of which is set apart
    assert found.note == "ambiguous_cut" and 1e-6 < found.scores[0] < 1e-3


def test_only_what_is_connected_with_the_seed_is_taken():
    patches = torch.tensor([[1.0, 0], [0, 1]])[[0, 1, 1, 1, 1, 1, 1, 0, 0]]
    found = find(patches, (3, 3))
    np.testing.assert_array_equal(found.masks[0, ::8, ::8], [[1, 0, 0], [0, 0, 0], [0, 0, 0]])  # all of 3 are alike


@pytest.mark.parametrize("at_once", [1 << 28, 40_000, 1])  # all, two of 144 patches, one
def test_images_of_one_grid_in_one_call_get_what_each_gets_alone(weights, at_once, monkeypatch):
    monkeypatch.setattr(tokencut, "AT_ONCE", at_once)
    method = loaded(weights)
    photos = [
        data.chelsea()[:96, :96],
        data.coffee()[:64, :96],
        data.astronaut()[:96, :96],
        data.rocket()[:96, 300:396],
    ]
    features = list(method.features(photos))
    together = list(method.find(photos, features))
    for image, each, found in zip(photos, features, together, strict=True):
        (alone,) = method.find([image], [each])
        np.testing.assert_array_equal(found.masks, alone.masks)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)


def test_options_that_act_after_the_features_leave_them_alone(weights):
    assert set(Tokencut.stages["features"]) == {"graph", "tau", "eps"}
    image = data.chelsea()[:96, :96]
    one, other = loaded(weights), loaded(weights, graph="weighted", tau=0.4, eps=1e-3)
    features = next(iter(one.features([image])))
    assert torch.equal(features.patches, next(iter(other.features([image]))).patches)
    (shared,), (own,) = other.find([image], [features]), other.segment([image])
    np.testing.assert_array_equal(shared.masks, own.masks)


def test_hand_made_features_find_a_bright_disc():
    y, x = np.mgrid[:320, :384]
    disc = (y - 140) ** 2 + (x - 220) ** 2 < 90**2
    noise = np.random.default_rng(0).integers(0, 25, (320, 384, 3))
    image = (np.where(disc[..., None], (220, 180, 60), (30, 60, 90)) + noise).astype(np.uint8)
    (found,) = loaded("color").segment([image])
    assert (found.masks[0] & disc).sum() / (found.masks[0] | disc).sum() > 0.8


def test_features_that_are_no_numbers_are_an_error_of_the_image(tmp_path):
    folder = write_model(tmp_path)
    method = loaded(str(folder))
    method._dino.network.layers[0].mlp.fc1.bias.fill_(float("nan"))
    with pytest.raises(BadImage, match="segment: non_finite"):
        list(method.segment([data.chelsea()[:64, :64]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.0}, "tau must be from -1 to below 1, got 1.0"),
        ({"tau": -0.1, "graph": "weighted"}, "tau must be from 0 to below 1, got -0.1"),
        ({"tau": float("nan")}, "tau must be from -1"),
        ({"eps": 0.0}, "eps must be between 0 and 1, got 0.0"),
        ({"weights": "color", "facet": "value"}, "facet 'value' has no effect"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"tokencut: {message}"):
        Tokencut(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_masks_of_the_cpu(weights):
    photos = [data.chelsea()[:240, :240], data.coffee()[:240, :240], data.astronaut()[:200, :180]]
    of_cpu = list(loaded(weights, dtype="float32").segment(photos))
    of_gpu = list(loaded(weights, "cuda", dtype="float32").segment(photos))
    for one, other in zip(of_cpu, of_gpu, strict=True):
        assert (one.masks != other.masks).mean() < 0.01
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
