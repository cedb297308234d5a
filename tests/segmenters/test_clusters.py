"""Clusters of spectral coordinates: against stored labels and against every way to split a few points."""

from itertools import product

import numpy as np
import pytest
from support.golden import arrays

from raypipe.segmenters._clusters import cluster, spread_out


def inertia(points: np.ndarray, labels: np.ndarray) -> float:
    groups = [points[labels == label] for label in np.unique(labels)]
    return sum(((group - group.mean(0)) ** 2).sum() for group in groups)


def numbered(labels: np.ndarray) -> list[int]:
    """Labels by first appearance, one at a time."""
    seen = {}
    return [seen.setdefault(label, len(seen)) for label in labels.tolist()]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_stored_eigenvectors_give_the_stored_labels(shared, k):
    case = arrays(shared / "golden/selfmask/cluster_astronaut_p16.npz")
    labels = cluster(case["eigenvectors"][:k].T, k)
    assert (labels == numbered(case[f"labels_k{k}"].ravel())).mean() >= 0.995


@pytest.mark.parametrize(("k", "width"), [(2, 1), (2, 3), (3, 2)])
def test_no_other_split_of_a_few_points_is_better(k, width):
    points = np.random.default_rng(k).normal(size=(8, width))
    best = min(inertia(points, np.array(labels)) for labels in product(range(k), repeat=8))
    assert inertia(points, cluster(points, k)) == pytest.approx(best)


def test_clusters_are_numbered_as_they_are_met_whatever_the_seed():
    rng = np.random.default_rng(0)
    centre = rng.permutation(np.arange(60) % 4)
    points = np.eye(4)[centre] * 10 + rng.normal(size=(60, 4))
    for seed in range(4):
        assert cluster(points, 4, seed=seed).tolist() == numbered(centre)


def test_few_distinct_points_give_as_many_clusters():
    points = np.repeat([[1.0, 2], [3, 4]], 3, axis=0)
    assert cluster(points, 4).tolist() == [0, 0, 0, 1, 1, 1]
    assert cluster(points[:1], 3).tolist() == [0]


def test_starts_are_distinct_points_while_there_are_any():
    points = np.random.default_rng(1).integers(0, 2, (40, 2)).astype(float)
    assert len(np.unique(points, axis=0)) == 4
    for centres in spread_out(points, 4, 20, np.random.default_rng(0)):
        assert len(np.unique(centres, axis=0)) == 4
    assert spread_out(points, 6, 3, np.random.default_rng(0)).shape == (3, 6, 2)
