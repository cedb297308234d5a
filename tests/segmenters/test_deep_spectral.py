"""Deep Spectral Methods against stored arrays, SciPy's dense solver and slow loops."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from skimage import data
from support.golden import arrays

from raypipe.benchmark.plain.deep_spectral import eigenvectors
from raypipe.features.color import describe
from raypipe.features.grid import Features
from raypipe.segmenters import deep_spectral
from raypipe.segmenters.deep_spectral import DeepSpectral, Solution, boxed, enlarged, graph, split

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = Path(__file__).parents[1] / "golden"
COLOURED = ["deep_spectral_coffee", "coffee_p16_knn_down8", "chelsea_p8_knn"]
STORED = [*COLOURED, "astronaut_p16_nocolor", "astronaut_p8_unnorm"]


@pytest.fixture(params=STORED)
def case(request):
    if request.param.startswith("deep_spectral"):
        return arrays(OWN / f"{request.param}.npz")
    return arrays(request.getfixturevalue("shared") / f"golden/deep_spectral/{request.param}.npz")


def solve(case, **options) -> tuple[DeepSpectral, Features]:
    """The method with the options of a stored case, and its features."""
    options |= {name: case[name].item() for name in ("color_lambda", "downsample")} | {"lapnorm": bool(case["lapnorm"])}
    size, grid = tuple(case["image_size"].tolist()), tuple(case["dims"].tolist())
    features = Features(torch.from_numpy(case["feats"]), grid, int(case["patch_size"]), size, "crop")
    return DeepSpectral(weights="color", **options), features


def test_eigenpairs_are_the_stored_ones(case):
    method, features = solve(case, result="segments", eigenvectors=int(case["K"]))
    (found,) = method._solve([case["image"]], [features])
    scale = 1 if method.lapnorm else case["degree"].mean()  # gaps of the plain Laplacian are relative
    exact = case["eigenvalues_exact_f64"][: len(found.values)]
    np.testing.assert_allclose(found.values * scale, exact, atol=1e-4 * exact.max())
    vectors = found.vectors.reshape(len(exact), -1)
    for one, other in zip(vectors[1:], case["eigenvectors"][1:], strict=True):  # the sign too
        np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(other).max())
    assert np.ptp(vectors[0]) < 1e-3 * np.abs(vectors[0]).max()


def test_the_mask_is_the_stored_one_and_goes_on_where_the_crop_ends(case):
    method, features = solve(case)
    (found,) = method.find([case["image"]], [features])
    (height, width), side, cells = case["image_size"], method.downsample, case["object_mask"]
    expected = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            row, column = y // side, x // side
            if row >= cells.shape[0] or column >= cells.shape[1]:
                row, column = y * cells.shape[0] // height, x * cells.shape[1] // width
            expected[y, x] = cells[row, column]
    np.testing.assert_array_equal(found.masks[0], expected)
    scale = 1 if method.lapnorm else case["degree"].mean()
    gap = np.diff(case["eigenvalues_exact_f64"])[1] / scale
    np.testing.assert_allclose(found.scores, [gap], atol=1e-4)
    assert found.note == ""


def test_the_box_is_the_stored_one(case):
    method, features = solve(case, result="box")
    (found,) = method.find([case["image"]], [features])
    rows, columns = np.flatnonzero(found.masks[0].any(1)), np.flatnonzero(found.masks[0].any(0))
    assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == case["box"].tolist()


@pytest.mark.parametrize("case", COLOURED, indirect=True)
def test_colours_of_neighbours_are_the_stored_matrix(case):
    small = graph.small(case["image"], case["image_lr"].shape[:2])
    np.testing.assert_array_equal(small, case["image_lr"])
    count = small.shape[0] * small.shape[1]
    found = graph.matrix([graph.nearest_colours(small, "cpu")], count).to_dense().numpy()
    expected = np.zeros((count, count), np.float32)
    expected[case["color_rows"], case["color_cols"]] = case["color_vals"]
    assert (found != expected).sum() <= 0.001 * len(case["color_vals"])


def test_equally_near_neighbours_are_taken_in_raster_order():
    points = np.random.default_rng(0).integers(0, 3, (60, 2)).astype(float)  # some are in one place
    expected = []
    for i, point in enumerate(points):
        distance = [(((point - other) ** 2).sum(), j) for j, other in enumerate(points)]
        expected += [(i, j) for _, j in sorted(distance)[:3]]
    assert graph.neighbours(points, 3).T.tolist() == [list(pair) for pair in expected]


def test_a_random_walk_joins_the_four_neighbours_by_likeness():
    image = np.random.default_rng(0).integers(100, 120, (3, 4, 3)).astype(np.uint8)
    found = graph.matrix([graph.random_walk(image, "cpu")], 12).to_dense().numpy()
    for i in range(12):
        for j in range(12):
            (y, x), (v, u) = divmod(i, 4), divmod(j, 4)
            difference = (image[y, x] / 255 - image[v, u] / 255) @ (image[y, x] / 255 - image[v, u] / 255)
            expected = np.exp(-difference / 0.033**2) if abs(y - v) + abs(x - u) == 1 else 0
            assert found[i, j] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("color_matrix", ["knn", "rw"])
@pytest.mark.parametrize("lapnorm", [True, False])
def test_features_and_colours_apart_are_one_matrix(lapnorm, color_matrix):
    image = data.astronaut()[:120, :168]
    features = describe(image, 12, fit="crop")
    options = {"lapnorm": lapnorm, "color_lambda": 3.0, "color_matrix": color_matrix}
    method = DeepSpectral(weights="color", result="segments", **options)
    (found,) = method._solve([image], [features])
    units = features.patches / features.patches.norm(dim=1, keepdim=True)
    small = graph.small(image, features.grid)
    edges = {"knn": graph.nearest_colours, "rw": graph.random_walk}[color_matrix](small, "cpu")
    weights = (units @ units.T).clamp(min=0) + 3 * graph.matrix([edges], len(units)).to_dense()
    degree = weights.sum(1).double().numpy()
    mass = np.diag(degree) if lapnorm else None
    expected, columns = scipy.linalg.eigh(np.diag(degree) - weights.double().numpy(), mass, subset_by_index=[0, 4])
    np.testing.assert_allclose(found.values * (1 if lapnorm else degree.mean()), expected, atol=1e-5 * expected[-1])
    for one, other in zip(found.vectors[1:], columns.T[1:], strict=True):
        one = one.ravel() * np.sign(one.ravel() @ other)
        np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(other).max())


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_a_photograph_gives_the_mask_of_the_plain_formulation(name):
    image = getattr(data, name)()[:240:2, :320:2]
    features = describe(image, 8, fit="crop")
    (found,) = DeepSpectral(weights="color").find([image], [features])
    values, vectors = eigenvectors(features.patches.numpy())
    np.testing.assert_array_equal(
        found.masks[0], features.enlarged((vectors[1] > 0).reshape(features.grid), (120, 160))
    )
    np.testing.assert_allclose(found.scores, [values[2] - values[1]], atol=1e-5)


@pytest.mark.parametrize("color_lambda", [0.0, 2.0])
def test_images_of_one_grid_together_give_what_each_gives_alone(color_lambda, monkeypatch):
    monkeypatch.setattr(deep_spectral, "AT_ONCE", 2 * 48**2)  # two at a time
    images = [data.astronaut()[:48, 100:164], data.coffee()[:64, :48], data.chelsea()[100:148, 100:164]]
    images.append(data.astronaut()[100:148, :64])
    method = DeepSpectral(weights="color", color_lambda=color_lambda)
    features = [describe(image, 8, fit="crop") for image in images]
    for image, each, found in zip(images, features, method.find(images, features), strict=True):
        (alone,) = method.find([image], [each])
        np.testing.assert_array_equal(found.masks, alone.masks)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-6)


@pytest.mark.parametrize("lapnorm", [True, False])
@pytest.mark.parametrize("first", [4, 5, 6, 7])
def test_a_graph_in_two_parts_is_cut_between_them(first, lapnorm):
    is_first = np.arange(16) < first
    patches = torch.from_numpy(np.stack([is_first, ~is_first], 1).astype(np.float32))
    features = Features(patches, (1, 16), 4, (4, 64), "crop")
    (found,) = DeepSpectral(weights="color", lapnorm=lapnorm).find([np.zeros((4, 64, 3), np.uint8)], [features])
    np.testing.assert_array_equal(found.masks[0], np.broadcast_to(np.arange(64) < 4 * first, (4, 64)))
    assert found.note == ""


def test_the_constant_leads_whatever_was_mixed():
    parts = np.repeat(np.eye(3), [2, 3, 4], axis=1)
    parts /= np.linalg.norm(parts, axis=1, keepdims=True)
    values = torch.tensor([[0, 1e-9, 2e-9, 0.5], [0, 0.1, 0.2, 0.3]])
    vectors = torch.from_numpy(np.stack([np.vstack([parts, np.ones(9)])] * 2))
    turned = graph.constant_first(values, vectors, torch.ones(2, 9).double()).numpy()
    np.testing.assert_allclose(np.abs(turned[0, 0]), 1 / 3)
    np.testing.assert_allclose(turned[0, :3] @ turned[0, :3].T, np.eye(3), atol=1e-12)
    np.testing.assert_array_equal(turned[0, 3], vectors[0, 3])
    np.testing.assert_array_equal(turned[1], vectors[1])  # in one piece: as it is


def test_the_mean_is_another_place_to_cut():
    image = data.coffee()[:160, :240]
    features = describe(image, 8, fit="crop")
    zero, mean = (DeepSpectral(weights="color", cut=cut) for cut in ("zero", "mean"))
    (solution,) = zero._solve([image], [features])
    vector = solution.vectors[1]
    for method, threshold in ((zero, 0), (mean, vector.mean())):
        (found,) = method.find([image], [features])
        np.testing.assert_array_equal(found.masks[0], features.enlarged(vector > threshold, image.shape[:2]))


def test_cells_of_the_graph_may_be_smaller_than_patches():
    image = data.chelsea()[:96, :130]
    features = describe(image, 16, fit="crop")
    method = DeepSpectral(weights="color", downsample=12)
    assert method._cells(features) == (8, 10)
    (found,) = method.find([image], [features])
    blocks = found.masks[0, :96, :120].reshape(8, 12, 10, 12)
    np.testing.assert_array_equal(blocks, blocks[:, :1, :, :1].repeat(12, 1).repeat(12, 3))


def test_the_box_is_the_largest_part_and_corners_connect():
    positive = np.array([[1, 0, 0, 0, 1], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]], bool)
    assert boxed(positive).astype(int).tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert boxed(~positive).astype(int).tolist() == boxed(positive).astype(int).tolist()  # the smaller side
    assert boxed(np.zeros((2, 3), bool)).all() and boxed(np.ones((2, 3), bool)).all()


def solution(labels: np.ndarray, values=(0, 0.1, 0.2, 0.3)) -> Solution:
    """One whose cells of one label have equal coordinates."""
    points = np.random.default_rng(0).normal(size=(labels.max() + 1, 3))
    return Solution(np.array(values), np.stack([np.ones(labels.shape), *points[labels].transpose(2, 0, 1)]), False)


def test_regions_are_numbered_from_the_one_along_the_border():
    labels = np.array([[0, 0, 1, 1, 1], [0, 2, 2, 3, 1], [0, 2, 3, 3, 1], [1, 1, 1, 1, 1]])
    found = split(solution(labels), 4, 0)
    assert (found[labels == 1] == 0).all()
    for label in range(4):
        assert len(np.unique(found[labels == label])) == 1
    assert sorted(np.unique(found)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("values", "count"), [((0, 0.5, 0.6, 0.9), 3), ((0, 0.1, 0.4, 0.5), 2), ((0, 0.1, 0.2, 0.3, 0.7), 4)]
)
def test_the_largest_gap_behind_the_constant_tells_the_number_of_regions(values, count):
    labels = np.arange(30).reshape(5, 6) // 5
    assert split(solution(labels, values), 0, 0).max() + 1 == count


@pytest.mark.parametrize("regions", [0, 2, 5])
def test_segments_are_the_regions_without_the_background(regions):
    image = data.astronaut()[:200, :232]
    method = DeepSpectral(weights="color", result="segments", regions=regions)
    features = describe(image, 8, fit="crop")
    (found,) = method.find([image], [features])
    if regions:
        assert len(found.masks) == regions - 1
    assert found.masks.any((1, 2)).all() and found.masks.sum(0).max() == 1 and found.masks.dtype == bool
    background = ~found.masks.any(0)
    edges = [np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]]
    along = [sum(mask[edge].sum() for edge in edges) for mask in (background, *found.masks)]
    assert along[0] == max(along)
    (again,) = replace(method, seed=3).find([image], [features])
    assert (again.masks != found.masks).mean() < 0.05  # other starts find another optimum at most, as good to 1e-4


ALIKE = Features(torch.ones(20, 3), (4, 5), 4, (16, 20), "crop")


@pytest.mark.parametrize("color_lambda", [0.0, 1.0])
@pytest.mark.parametrize(("result", "count", "share"), [("mask", 1, 0), ("box", 1, 1), ("segments", 0, 0)])
def test_an_image_of_one_colour_is_degenerate(result, count, share, color_lambda):
    method = DeepSpectral(weights="color", result=result, color_lambda=color_lambda)
    (found,) = method.find([np.full((16, 20, 3), 90, np.uint8)], [ALIKE])
    assert found.note == "degenerate" and found.masks.shape == (count, 16, 20)
    assert not found.masks.size or found.masks.mean() == share


def test_colours_tell_apart_what_features_do_not():
    image = np.full((16, 20, 3), 90, np.uint8)
    image[4:12, 4:12] = 200
    (found,) = DeepSpectral(weights="color", color_lambda=100.0).find([image], [ALIKE])
    assert found.note != "degenerate" and found.masks.any() and not found.masks.all()


@pytest.mark.parametrize(("result", "count"), [("mask", 1), ("box", 1), ("segments", 0)])
@pytest.mark.parametrize("cells", [1, 3])
def test_three_cells_or_fewer_are_the_whole_image(cells, result, count):
    features = Features(torch.eye(3)[:cells], (1, cells), 4, (4, 4 * cells), "crop")
    (found,) = DeepSpectral(weights="color", result=result).find([np.zeros((4, 4 * cells, 3), np.uint8)], [features])
    assert found.masks.shape == (count, 4, 4 * cells) and found.masks.all() and found.note == "few_patches"


def test_a_symmetric_image_may_be_cut_either_way():
    corners = torch.eye(4)[torch.tensor([0, 1, 2, 3])] + 0.5
    features = Features(corners, (2, 2), 4, (8, 8), "crop")
    (found,) = DeepSpectral(weights="color").find([np.zeros((8, 8, 3), np.uint8)], [features])
    assert found.note == "ambiguous_cut" and found.scores[0] == pytest.approx(0, abs=1e-6)


def test_a_cell_without_features_changes_nothing_but_itself():
    image = data.coffee()[:96, :128]
    features = describe(image, 8, fit="crop")
    features.patches[5] = 0
    (found,) = DeepSpectral(weights="color")._solve([image], [features])
    assert np.isfinite(found.vectors).all() and found.values[1] > 1e-3
    assert found.vectors[1].flat[5] == pytest.approx(0, abs=1e-6)


def test_a_reduced_image_is_enlarged_without_a_seam():
    cells = np.arange(6).reshape(1, 2, 3) % 2 == 0
    found = enlarged(cells, (10, 14), 4, (20, 28), fill=True)
    np.testing.assert_array_equal(found, enlarged(cells, (10, 14), 4, (10, 14), fill=True).repeat(2, 1).repeat(2, 2))
    box = enlarged(np.ones((1, 2, 3), bool), (10, 14), 4, (10, 14), fill=False)
    assert box[0, :8, :12].all() and box.sum() == 96


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"regions": 1}, "regions must be 0 or from 2 to 255, got 1"),
        ({"regions": 256, "result": "segments"}, "regions must be 0 or from 2 to 255, got 256"),
        ({"cut": "median"}, "unknown cut 'median'; did you mean 'mean'"),
        ({"eigenvectors": 2}, "eigenvectors must be at least 3, got 2"),
        ({"color_lambda": -1.0}, "color_lambda must not be negative, got -1.0"),
        ({"downsample": 0}, "downsample must be at least 1, got 0"),
        ({"regions": 3}, "regions 3 has an effect only with result segments"),
        ({"eigenvectors": 9}, "eigenvectors 9 has an effect only with result segments"),
        ({"cut": "mean", "result": "box"}, "cut 'mean' has an effect only with result mask"),
        ({"color_matrix": "rw"}, "color_matrix 'rw' has an effect only with color_lambda above 0"),
    ],
)
def test_impossible_options_are_refused(options, text):
    with pytest.raises(ValueError, match=f"deep_spectral: {text}"):
        DeepSpectral(weights="color", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options", [{}, {"color_lambda": 3.0}, {"result": "segments", "color_lambda": 1.0, "color_matrix": "rw"}]
)
def test_a_gpu_finds_what_the_cpu_finds(options):
    images = [data.astronaut()[:200], data.coffee()[:200, :512], data.chelsea()[:200, :448]]
    features = [describe(image, 8, fit="crop") for image in images]
    there = [replace(each, patches=each.patches.cuda()) for each in features]
    method = DeepSpectral(weights="color", **options)
    for one, other in zip(method.find(images, features), method.find(images, there), strict=True):
        assert one.masks.shape == other.masks.shape and (one.masks != other.masks).mean() < 0.01
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-3)
