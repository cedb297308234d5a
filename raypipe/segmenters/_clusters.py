"""K-means that several methods share: many starts moved at once, and clusters of spectral coordinates."""

from __future__ import annotations

import numpy as np

MOST = 255  # clusters: their numbers fit into a byte


def cluster(points: np.ndarray, k: int, *, seed: int = 0, restarts: int = 10, max_iter: int = 300) -> np.ndarray:
    """Labels of the best of several k-means++ starts (Arthur and Vassilvitskii 2007): int64 (n,), below k.

    points: float (n, D), such as rows of eigenvectors. Clusters are numbered in the order in which the points first
    meet them, so that the numbers do not depend on which of equally good starts won. Points with fewer than k distinct
    values give as many clusters as there are values. Deterministic: equal points and seed, equal labels.
    """
    points = np.asarray(points, np.float64)
    starts = spread_out(points, min(k, len(points)), restarts, np.random.default_rng(seed))
    labels, _, distances = lloyd(points, np.ones(len(points)), starts, max_iter=max_iter, eps=0)
    _, first, numbers = np.unique(labels[distances.argmin()], return_index=True, return_inverse=True)
    return first.argsort().argsort()[numbers]


def spread_out(points: np.ndarray, k: int, attempts: int, rng: np.random.Generator) -> np.ndarray:
    """Starts of k-means++: each centre is a point drawn with its squared distance to the nearest centre as weight.

    points: (n, D) float64. Returns centres (attempts, k, D). Where no distance is left any point may come again.
    """
    chosen = rng.integers(len(points), size=(attempts, 1))
    distances = np.full((attempts, len(points)), np.inf)
    for draw in rng.random((k - 1, attempts)):
        distances = np.minimum(distances, ((points - points[chosen[:, -1:]]) ** 2).sum(2))
        shares = distances.cumsum(1)
        reached = shares > draw[:, None] * shares[:, -1:]  # strict: a point without distance is passed over
        chosen = np.column_stack([chosen, reached.argmax(1)])
    return points[chosen]


def lloyd(
    points: np.ndarray, counts: np.ndarray, centres: np.ndarray, *, max_iter: int, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lloyd's iterations for A independent attempts, stopping each as OpenCV does.

    points: (U, D) float64, such as distinct colours. counts: (U,), how often each occurs. centres: (A, k, D), where
    each attempt starts; k is at most MOST.
    Ends after max_iter - 1 updates or when no centre moved more than eps; labels belong to the centres before the last
    update. Returns labels (A, U) uint8, centres (A, k, D) and sums of squared distances (A,).
    """
    weighted = np.column_stack([points, np.ones(len(points))]) * counts[:, None]  # (U, D + 1): sums of a group
    centres, labels = centres.copy(), np.zeros((len(centres), len(points)), np.uint8)
    running = np.arange(len(centres))
    for _ in range(max_iter - 1):
        before = centres[running]
        labels[running] = nearest(points, before)
        centres[running] = means(points, weighted, labels[running], before.shape[1])
        moved = ((centres[running] - before) ** 2).sum(2).max(1)
        running = running[moved > eps**2]
        if not running.size:
            break
    distances = [((points - own[label]) ** 2).sum(1) @ counts for own, label in zip(centres, labels, strict=True)]
    return labels, centres, np.array(distances)


def nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre. points: (U, D). centres: (A, k, D). Returns uint8 (A, U); the first wins a tie."""
    closeness = centres @ points.T - (centres**2).sum(2, keepdims=True) / 2  # (A, k, U): -squared distance / 2, shifted
    best, labels = closeness[:, 0], np.zeros(closeness[:, 0].shape, np.uint8)
    for i in range(1, centres.shape[1]):  # a plain arg-max over so short an axis is several times slower
        labels[closeness[:, i] > best] = i
        best = np.maximum(best, closeness[:, i])
    return labels


def means(points: np.ndarray, weighted: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Mean points of the clusters. weighted: (U, D + 1) sums and count per point. labels: (A, U). Returns (A, k, D).

    An emptied cluster takes one point: the largest cluster's that is farthest from its mean (as in OpenCV).
    """
    sums = np.stack([(labels == i) @ weighted for i in range(k)], 1)  # (A, k, D + 1)
    for attempt, empty in np.argwhere(sums[..., -1] == 0):
        own = sums[attempt]
        largest = own[:, -1].argmax()
        members = points[labels[attempt] == largest]
        farthest = members[((members - own[largest, :-1] / own[largest, -1]) ** 2).sum(1).argmax()]
        point = np.append(farthest, 1)
        own[largest] -= point
        own[empty] += point
    return sums[..., :-1] / sums[..., -1:]
