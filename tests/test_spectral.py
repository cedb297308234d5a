"""Eigenvectors of graphs against dense solvers of SciPy: photographs, made-up graphs, stored reference solutions."""

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.linalg
import torch
from skimage import data
from support import golden

from raypipe import spectral

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-5
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "retina")


def unit_features(name: str, seed: int) -> torch.Tensor:
    """Colour and place of a random part of a photograph, randomly projected: float32 (P, 32), rows of length 1."""
    rng = np.random.default_rng(seed)
    photo = getattr(data, name)()
    (top, left), (height, width) = rng.integers(0, 100, 2), rng.integers(13, 21, 2)
    part = photo[top : top + 280, left : left + 280]
    mean = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA).reshape(-1, 3).astype(np.float32)
    sharp = cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST).reshape(-1, 3).astype(np.float32)
    place = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].reshape(2, -1).T
    columns = np.concatenate([mean, np.abs(sharp - mean), place], 1)
    columns = (columns - columns.mean(0)) / (columns.std(0) + 1e-6)
    features = np.tanh(columns @ rng.standard_normal((8, 32)) / 8**0.5) + 0.05
    return torch.nn.functional.normalize(torch.tensor(features, dtype=torch.float32), dim=1)


def binary(features: torch.Tensor, tau: float) -> torch.Tensor:
    return (features @ features.T > tau).float()


def islands(*sizes: int) -> torch.Tensor:
    """Complete graphs side by side, with nothing between them."""
    return torch.block_diag(*(torch.ones(size, size) for size in sizes))


def dense_solution(weights: torch.Tensor, eps: float = EPS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All eigenvalues, eigenvectors as columns and degrees of the graph by LAPACK in double precision."""
    graph = (1 - eps) * weights.double().numpy() + eps
    degree = graph.sum(1)
    return *scipy.linalg.eigh(np.diag(degree) - graph, np.diag(degree)), degree


def iou(one, other) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_cuts_of_photographs_are_those_of_the_dense_solver(tau):
    for seed in range(10):
        weights = binary(unit_features(PHOTOGRAPHS[seed % 5], seed), tau)
        cut = spectral.second_eigenvectors(weights[None], eps=EPS)
        values, vectors, degree = dense_solution(weights)
        expected = torch.tensor(vectors[:, 1].copy())[None]
        assert abs((cut.vector * cut.degree * expected).sum()) > 0.999
        assert (cut.vector**2 * cut.degree).sum() == pytest.approx(1)
        assert iou(spectral.orient(cut.vector)[1], spectral.orient(expected)[1]) >= 0.99
        assert cut.value[0] == pytest.approx(values[1], abs=1e-6)
        assert cut.gap[0] == pytest.approx(values[2] - values[1], abs=1e-5)
        np.testing.assert_allclose(cut.degree[0], degree, rtol=1e-12)


def test_a_certified_cut_of_a_photograph_is_exact():
    certified = 0
    for seed in range(30):
        weights = binary(unit_features(PHOTOGRAPHS[seed % 5], seed), 0.2)
        cut = spectral.second_eigenvectors(weights[None], eps=EPS)
        if cut.certified:
            certified += 1
            expected = spectral.orient(torch.tensor(dense_solution(weights)[1][:, 1].copy())[None])
            _, upper, seed = spectral.orient(cut.vector)
            assert torch.equal(upper, expected[1]) and torch.equal(seed, expected[2])
    assert certified >= 28


@pytest.mark.parametrize("sizes", [(30, 90), (50, 50), (1, 60), (7, 20, 40, 60), (1, 2), (1, 1), (1, 1, 1, 3)])
def test_islands_are_cut_apart(sizes):
    weights = islands(*sizes)
    cut = spectral.second_eigenvectors(weights[None], eps=EPS)
    values, vectors, _ = dense_solution(weights)
    assert cut.value[0] == pytest.approx(values[1], abs=1e-6)
    _, upper, seed = spectral.orient(cut.vector)
    expected = spectral.orient(torch.tensor(vectors[:, 1].copy())[None])
    assert torch.equal(upper, expected[1]) and torch.equal(seed, expected[2]) and cut.certified.all()


def test_the_gap_of_two_nodes_is_that_to_the_largest_eigenvalue_there_can_be():
    cut = spectral.second_eigenvectors(islands(1, 1)[None], eps=EPS)
    assert (cut.value + cut.gap).item() == 2


@pytest.mark.parametrize("weights", [islands(40, 40, 40), islands(*[9] * 6), torch.ones(30, 30), torch.eye(30)])
def test_where_no_one_vector_is_second_the_gap_is_zero_and_nothing_is_certified(weights):
    cut = spectral.second_eigenvectors(weights[None], eps=EPS)
    assert cut.value[0] == pytest.approx(dense_solution(weights)[0][1], abs=1e-6)
    assert cut.gap[0] < 1e-9 and not cut.certified.any()


def test_rounding_of_single_precision_does_not_keep_the_iteration_from_ending(monkeypatch):
    quick, calls = spectral._quick, []
    monkeypatch.setattr(spectral, "_quick", lambda *given: calls.append(given) or quick(*given))
    weights = islands(300, 300, 300) * 0.77  # sums of 300 equal numbers are off by up to 4e-7 of them
    weights.fill_diagonal_(1)
    cut = spectral.second_eigenvectors(weights[None] + 1e-5)
    assert 0 < len(calls) < 10 and cut.residual[0] < 1e-12 and not cut.certified


def test_isolated_patches_are_cut_off_before_what_holds_together_better():
    weights = islands(1, 1, 1, 300)
    weights[3:100, 200:] = weights[200:, 3:100] = 0
    cut = spectral.second_eigenvectors(weights[None], eps=EPS)
    values, vectors, _ = dense_solution(weights)
    assert cut.value[0] == pytest.approx(values[1], abs=1e-7)
    assert spectral.orient(cut.vector)[1][0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_vectors_close_to_each_other_take_restarts_and_are_still_found():
    place = torch.arange(400)
    weights = ((place[:, None] - place).abs() <= 3).float()  # a chain: a gap of 4e-4
    cut = spectral.second_eigenvectors(weights[None], eps=EPS)
    values, vectors, degree = dense_solution(weights)
    assert abs(cut.vector[0].numpy() * degree @ vectors[:, 1]) > 1 - 1e-9
    assert cut.gap[0] == pytest.approx(values[2] - values[1], rel=1e-3)


def test_a_batch_gives_what_each_graph_gives_alone():
    features = unit_features("astronaut", 0)
    graphs = torch.stack([binary(features, tau) for tau in (0.0, 0.2, 0.4)])
    graphs = torch.cat([graphs, islands(100, len(graphs[0]) - 100)[None]])
    together = spectral.second_eigenvectors(graphs, eps=EPS)
    for i, graph in enumerate(graphs):
        alone = spectral.second_eigenvectors(graph[None], eps=EPS)
        torch.testing.assert_close(spectral.orient(together.vector)[0][i], spectral.orient(alone.vector)[0][0])
        assert together.certified[i] == alone.certified[0]


def test_no_matrix_of_the_graph_is_held_in_double_precision(monkeypatch):
    weights, seen = binary(unit_features("coffee", 1), 0.2)[None], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            seen.extend(out.numel() for out in outputs if isinstance(out, torch.Tensor) and out.dtype == torch.float64)
            return result

    monkeypatch.setattr(spectral, "CACHED", 1 << 13)
    with Watch():
        spectral.second_eigenvectors(weights, eps=EPS)
        spectral.smallest_eigenpairs(spectral.dense(weights), weights.sum(2), 5)
    assert 0 < max(seen) < weights.numel() / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_cuts_of_the_cpu():
    features = unit_features("astronaut", 0)
    graphs = torch.stack([binary(features, tau) for tau in (0.0, 0.2, 0.4)])
    of_cpu, of_gpu = (spectral.second_eigenvectors(graphs.to(device), eps=EPS) for device in ("cpu", "cuda"))
    for one, other in zip(spectral.orient(of_cpu.vector), spectral.orient(of_gpu.vector), strict=True):
        torch.testing.assert_close(other.cpu(), one, atol=1e-6, rtol=1e-4)
    assert of_gpu.certified.all()
    similarity = (features @ features.T).clamp(min=0)[None]
    for normalised in (True, False):
        pairs = [
            spectral.smallest_eigenpairs(spectral.dense(each), each.sum(2), 5, normalised=normalised)
            for each in (similarity, similarity.cuda())
        ]
        torch.testing.assert_close(pairs[1][0].cpu(), pairs[0][0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_smallest_eigenpairs_are_those_of_the_dense_solver(count, normalised):
    features = unit_features("chelsea", 3)
    weights = (features @ features.T).clamp(min=0)
    degree = weights.sum(1).double()
    laplacian, mass = (torch.diag(degree) - weights.double()).numpy(), torch.diag(degree).numpy()
    expected, columns = scipy.linalg.eigh(laplacian, mass if normalised else None, subset_by_index=[0, count - 1])
    values, vectors = spectral.smallest_eigenpairs(
        spectral.dense(weights[None]), degree[None], count, normalised=normalised
    )
    assert values.shape == (1, count) and vectors.shape == (1, count, len(weights)) and values.min() >= 0
    np.testing.assert_allclose(values[0], expected, atol=1e-6 * max(1, expected[-1]))
    for one, other in zip(vectors[0].numpy(), columns.T, strict=True):
        other = other * np.sign(one @ other)
        np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(other).max())


def test_there_are_at_most_one_fewer_eigenpairs_than_nodes():
    values, vectors = spectral.smallest_eigenpairs(spectral.dense(islands(2, 3)[None]), torch.ones(1, 5), 20)
    assert values.shape == (1, 4) and vectors.shape == (1, 4, 5)
    values, vectors = spectral.smallest_eigenpairs(spectral.dense(torch.ones(1, 1, 1)), torch.ones(1, 1), 5)
    assert values.tolist() == [[0]] and vectors.abs().tolist() == [[[1]]]


def test_every_copy_of_a_multiple_eigenvalue_is_found():
    weights = islands(*[12] * 9)
    values, vectors = spectral.smallest_eigenpairs(spectral.dense(weights[None]), weights.sum(1)[None], 11)
    np.testing.assert_allclose(values[0], [0] * 9 + [1] * 2, atol=1e-6)
    within = vectors[0, :9].reshape(9, 9, 12)
    np.testing.assert_allclose(within, within[..., :1].expand(-1, -1, 12), atol=1e-5)  # constant on each island


def test_signs():
    vectors = torch.tensor([[3.0, 1, 2, -1], [1, 2, -3, 0], [1, 2, 3, 4], [-1, -2, 1, 0], [0, 0, 0, 0]])
    turned = spectral.minority_positive(vectors)
    torch.testing.assert_close(turned, vectors * torch.tensor([-1.0, -1, 1, 1, 1])[:, None])


def test_signs_and_halves_do_not_hang_on_rounding_or_on_the_sign_of_the_solver():
    halves = torch.tensor([[2.0, 1, -1, -2], [3, 1e-17, -3, 0], [1e-17, 2, -1, -1e-17]])
    expected = torch.tensor([[-2.0, -1, 1, 2], [-3, 0, 3, 0], [0, -2, 1, 0]])
    for sign in (1, -1):
        torch.testing.assert_close(spectral.minority_positive(sign * halves), expected)
        vector = sign * torch.tensor([[1e-17, 5, -1e-17, -5, 0, 2e-17]])  # two nodes that are like no others
        turned, upper, seed = spectral.orient(vector)
        assert turned[0, 1] == 5 and upper.tolist() == [[False, True] + [False] * 4] and seed == 1


def test_the_seed_is_the_first_of_equals_and_turns_the_vector_and_its_mean_to_the_other_half():
    vectors = torch.tensor([[2.0, -3, 1, 3 + 1e-7, -3], [0, 3, -1, -2, 0], [-5, 1, 2, 1, 1]])
    turned, upper, seed = spectral.orient(vectors)
    assert seed.tolist() == [1, 1, 0]
    torch.testing.assert_close(turned, vectors * torch.tensor([-1.0, 1, -1])[:, None])
    assert upper.int().tolist() == [[0, 1, 0, 0, 1], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["tokencut_astronaut.npz", "tokencut_coffee_weighted.npz"])
def test_stored_cuts(name):
    check_cut(golden.arrays(Path(__file__).parent / "golden" / name))


@pytest.mark.parametrize("name", ["astronaut_p16", "chelsea_p8", "coffee_p8_weighted"])
def test_shared_cuts(name, shared):
    check_cut(golden.arrays(shared / "golden" / "tokencut" / f"{name}.npz"))


def check_cut(stored: dict):
    features = torch.nn.functional.normalize(torch.tensor(stored["feats"][0, 1:]), dim=1)
    similarity, tau, eps = features @ features.T, float(stored["tau"]), float(stored["eps"])
    if stored["binary_graph"]:
        cut = spectral.second_eigenvectors((similarity > tau).float()[None], eps=eps)
    else:
        cut = spectral.second_eigenvectors(similarity.where(similarity >= tau, eps)[None])
    vector, upper, seed = spectral.orient(cut.vector)
    expected = stored["eigenvector"].ravel()
    np.testing.assert_allclose(vector[0], expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose((cut.value, cut.value + cut.gap), stored["eigenvalues"][1:3, None], atol=1e-5)
    np.testing.assert_allclose(cut.degree[0], stored["degree"], rtol=1e-6)
    np.testing.assert_array_equal(upper[0], stored["bipartition"].ravel())
    assert seed.item() == stored["seed"] and cut.certified.all()


@pytest.mark.parametrize(
    "name", ["astronaut_p16_nocolor", "astronaut_p8_unnorm", "chelsea_p8_knn", "coffee_p16_knn_down8"]
)
def test_shared_laplacian_eigenpairs(name, shared):
    stored = golden.arrays(shared / "golden" / "deep_spectral" / f"{name}.npz")
    features = torch.nn.functional.normalize(torch.tensor(stored["feats"]), dim=1)
    cell, grid = stored["patch_size"] / stored["downsample"], tuple(stored["dims"])
    if cell != 1:
        size = [int(side * cell) for side in grid]
        features = enlarged(features, grid, size=size, align_corners=False)
    weights = (features @ features.T).clamp(min=0)
    weights, colour = weights / weights.max(), np.zeros(weights.shape, np.float32)
    if "color_rows" in stored:
        colour[stored["color_rows"], stored["color_cols"]] = stored["color_vals"] * stored["color_lambda"]
    product = partial(add, spectral.dense(weights[None]), spectral.dense(torch.tensor(colour)[None]))
    degree = product(torch.ones(1, len(weights), 1))[..., 0]
    check_pairs(product, degree, stored, stored["eigenvalues_exact_f64"], normalised=bool(stored["lapnorm"]))


def test_shared_eigenpairs_of_a_low_rank_graph(shared):
    stored = golden.arrays(shared / "golden" / "selfmask" / "cluster_astronaut_p16.npz")
    features = enlarged(torch.tensor(stored["feats"]), tuple(stored["dims"]), scale_factor=2, align_corners=True)
    features = torch.nn.functional.normalize(features, dim=1).double()
    lowest = (features @ features.T).min()

    def product(vectors):  # of (X X^T - lowest) / (1 - lowest), without the P x P matrix
        return (features @ (features.T @ vectors) - lowest * vectors.sum(1, keepdim=True)) / (1 - lowest)

    degree = product(torch.ones(1, len(features), 1, dtype=torch.float64))[..., 0]
    np.testing.assert_allclose(degree[0], stored["adjacency_row_sums"], rtol=1e-6)
    check_pairs(product, degree, stored, stored["eigenvalues"])


def check_pairs(product, degree, stored: dict, expected: np.ndarray, *, normalised: bool = True):
    vectors = stored["eigenvectors"]
    values, found = spectral.smallest_eigenpairs(product, degree, len(vectors), normalised=normalised)
    np.testing.assert_allclose(values[0], expected[: len(vectors)], atol=1e-5 * max(1, expected[-1]))
    for one, other in zip(found[0].numpy(), vectors, strict=True):
        np.testing.assert_allclose(one * np.sign(one @ other), other, atol=1e-3 * np.abs(other).max())


def add(one, other, vectors):
    return one(vectors) + other(vectors)


def enlarged(features: torch.Tensor, grid: tuple, **options) -> torch.Tensor:
    plane = features.T.reshape(1, -1, *grid)
    return torch.nn.functional.interpolate(plane, mode="bilinear", **options)[0].flatten(1).T.contiguous()
