"""Signals of masks to one number, without labels: ranks, by how far the signals agree with each other."""

from __future__ import annotations

import numpy as np


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


def loadings(ranks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What each of K signals counts: float64 (K,), their sum 1 or, where none tells masks apart, 0.

    The first signal is the one to trust, the agreement: nothing but other methods' masks says what a good mask is. Each
    other one counts by how far it goes along with that, directly or through further signals that do: the first column
    of the square of their matrix of rank correlations, which is a step of the power iteration to its first principal
    component that begins at the agreement. The component itself can be what two signals of colour have in common, and
    no quality at all. Only positive correlations count, for each signal is made so that higher is better. Without the
    first one the others begin alike. ranks: (N, K), NaN where a signal is missing. weights: (N,), of the masks.
    """
    count = ranks.shape[1]
    matrix = np.zeros((count, count))
    there = np.array([spread(ranks[:, i]) for i in range(count)])
    for i in range(count):
        for j in range(i + 1):
            both = np.isfinite(ranks[:, i]) & np.isfinite(ranks[:, j])
            alike = 1.0 if i == j else max(0.0, correlation(ranks[both][:, [i, j]], weights[both]))
            matrix[i, j] = matrix[j, i] = alike * there[i] * there[j]
    start = np.eye(count)[0] if there[0] else there.astype(float)
    found = matrix @ matrix @ start
    return found / found.sum() if found.any() else found


def slopes(ranks: np.ndarray, first: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> dict[int, float]:
    """By group, how far a signal's ranks go along with the first one's: their correlation, at least 0.

    What a method's own score is worth differs between methods. 1 where the first signal says nothing. ranks, first:
    (N,), NaN where missing. weights: (N,). groups: int (N,), runs.
    """
    found = {}
    for group in np.unique(groups):
        both = (groups == group) & np.isfinite(ranks) & np.isfinite(first)
        pairs = np.column_stack([ranks, first])[both]
        found[group] = max(0.0, correlation(pairs, weights[both])) if spread(pairs[:, 1]) else 1.0
    return found


def spread(values: np.ndarray) -> bool:
    """Whether values differ."""
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
