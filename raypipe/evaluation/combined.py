"""Signals of masks to one number, without labels: ranks, weighted by how far the signals agree with each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_WEIGHT = 1e-3  # of a run that agrees with none, so that it still counts where there is no other


class Ranks:
    """The share of some values that lie below others, ties half: a rank in 0..1 that further values get too."""

    def __init__(self, values: np.ndarray, weights: np.ndarray, groups: np.ndarray):
        """values: float64 (N,); NaN is left out. weights: (N,), above 0. groups: int (N,); each is ranked by itself."""
        self._of = {}
        for group in np.unique(groups):
            its = np.flatnonzero(np.isfinite(values) & (groups == group))
            its = its[np.argsort(values[its], kind="stable")]
            if len(its):
                below = np.append(0.0, np.cumsum(weights[its]))
                self._of[group] = values[its], below / below[-1]

    def __call__(self, values: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """float64 (N,) in 0..1; NaN stays NaN, as does all of a group that had no value."""
        found = np.full(len(values), np.nan)
        for group, (known, below) in self._of.items():
            its = np.isfinite(values) & (groups == group)
            left, right = (below[np.searchsorted(known, values[its], side)] for side in ("left", "right"))
            found[its] = (left + right) / 2
        return found


def run_weights(ious: np.ndarray, runs: np.ndarray, methods: Sequence[str]) -> np.ndarray:
    """How much each of R runs counts when masks are compared with it: float64 (R,), above 0.

    That is how far it agrees with the runs of other methods, its mean IoU with theirs, shared among the runs of its
    method: several settings of one method make its errors no truer. ious: (N, R) of images' first masks with each run's
    best, NaN where there is none. runs: (N,), whose mask it is. methods: of each run.
    """
    count = len(methods)
    mean = np.full((count, count), np.nan)
    for run in range(count):
        its = ious[runs == run]
        known = np.isfinite(its)
        mean[run] = np.where(known.any(0), np.where(known, its, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)
    same = np.array([[one == other for other in methods] for one in methods])
    others = np.where(same & ~same.all(), np.nan, mean)  # runs of one method alone are compared with each other
    np.fill_diagonal(others, np.nan)
    known = np.isfinite(others)
    agreement = np.where(known, others, 0).sum(0) / np.maximum(known.sum(0), 1)
    return np.maximum(agreement, LEAST_WEIGHT) / same.sum(0)


def weighted(ious: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of IoUs (N, R) over runs by their weights (R,): float64 (N,); NaN for a mask compared with none."""
    known = np.isfinite(ious)
    total = (known * weights).sum(1)
    return np.where(total > 0, np.where(known, ious, 0) @ weights / np.where(total > 0, total, 1), np.nan)


def loadings(ranks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What each of K signals counts: float64 (K,), their sum 1, 0 for one that is not there or agrees with no other.

    The first principal component of their rank correlations, of which only positive ones count: each signal is made so
    that higher means better, hence one that contradicts the others tells nothing. ranks: (N, K), NaN where a signal is
    missing. weights: (N,), of the masks.
    """
    count = ranks.shape[1]
    correlations = np.eye(count)
    for i in range(count):
        for j in range(i):
            both = np.isfinite(ranks[:, i]) & np.isfinite(ranks[:, j])
            correlations[i, j] = correlations[j, i] = max(0.0, correlation(ranks[both][:, [i, j]], weights[both]))
    there = np.array([spread(ranks[:, i]) for i in range(count)])
    correlations *= np.outer(there, there)
    vector = there / max(there.sum(), 1)
    for _ in range(1000):  # power iteration: non-negative, and from equal weights the same each time
        vector = correlations @ vector
        vector /= max(vector.sum(), 1e-300)
    return vector


def spread(values: np.ndarray) -> bool:
    """Whether a signal tells masks apart."""
    known = values[np.isfinite(values)]
    return bool(len(known)) and known.min() < known.max()


def correlation(pairs: np.ndarray, weights: np.ndarray) -> float:
    """The correlation of two columns (N, 2) by weights (N,); 0 where one is constant or there is no pair."""
    if len(pairs) < 2:
        return 0.0
    centred = pairs - np.average(pairs, axis=0, weights=weights)
    covariance = (centred * weights[:, None]).T @ centred
    scale = np.sqrt(covariance[0, 0] * covariance[1, 1])
    return float(covariance[0, 1] / scale) if scale > 0 else 0.0
