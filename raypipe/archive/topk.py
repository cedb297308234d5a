"""The k best rows of a table for each query, exactly, whatever the blocks and in whatever order they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

UNITS = 2**20  # scores are whole multiples of 1 / UNITS: what differs by less is a tie, which the name decides
# Queries and embeddings are rounded to 1 / GRID, which single precision holds for all up to 1; sums of the products of
# unit vectors then are exact in double precision, in any order.
GRID = np.float32(2**26)
SCORES = 8_000_000  # of one block at most: 32 MB
MOST_ROWS = 16_384  # of one block
ROOM = 65_536  # names that may be held beyond twice those in use


class Ranked(NamedTuple):
    """The best rows of one query, best first."""

    names: list
    scores: np.ndarray  # float32 (n,), multiples of 1 / UNITS


class TopK:
    """The first k rows for each query in the order (score descending, name ascending), over all rows that were added.

    A score is the cosine of unit vectors (also a dot product of up to 2047), rounded to 1 / 2**20. It is computed in
    single precision to find the rows that may count, and of these exactly, with both vectors rounded to 2**-26. So
    neither the blocks nor the order of rows, machines or matrix routines change a result, and the best k of several
    parts are the best k of all. Holds up to C * k rows and, at a time, 8 million scores.
    """

    def __init__(self, queries: np.ndarray, k: int):
        """queries: float32 (C, D), unit rows. k: at least 1. Raises ValueError for others."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if queries.ndim != 2 or not queries.size or not np.isfinite(queries).all():
            raise ValueError(f"queries: expected finite rows (C, D), got {queries.shape}")
        self.k, self.not_finite = k, 0  # rows whose embedding is no finite vector: counted, never compared
        self._queries = _rounded(np.ascontiguousarray(queries, np.float32))
        self._exact = self._queries.astype(np.float64)
        self._lengths = np.linalg.norm(self._exact, axis=1)
        self._scores = [np.zeros(0, np.int32) for _ in queries]  # in 1 / UNITS, of the rows held, in no order
        self._places = [np.zeros(0, np.int64) for _ in queries]  # of their names
        self._names, self._room = [], ROOM

    def add(self, embeddings: np.ndarray, names: Sequence, valid: np.ndarray | None = None) -> None:
        """Take the rows of a block into account.

        embeddings: float16 or float32 (n, D), unit rows. names: n different values that can be compared, such as a key
        (text compares as its UTF-8 bytes do) or a tuple. valid: bool (n,), which rows count; None = all.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self._queries.shape[1]:
            raise ValueError(f"embeddings: expected (n, {self._queries.shape[1]}), got {embeddings.shape}")
        step = max(1, min(MOST_ROWS, SCORES // len(self._queries)))
        for first in range(0, len(embeddings), step):
            block = np.asarray(embeddings[first : first + step], np.float32)
            usable = np.isfinite(np.einsum("nd,nd->n", block, block))
            counted = np.ones(len(block), bool) if valid is None else valid[first : first + step]
            self.not_finite += int((counted & ~usable).sum())
            rows = np.flatnonzero(usable & counted)
            if len(rows):
                self._add(_rounded(block if len(rows) == len(block) else block[rows]), names, first + rows)

    def _add(self, block: np.ndarray, names: Sequence, rows: np.ndarray) -> None:
        """block: float32 (n, D), rounded; all of it counts. rows: where its names are."""
        passes = self._passes(block)
        alive = passes.any(axis=0)
        places = len(self._names) - 1 + np.cumsum(alive)
        self._names.extend(names[row] for row in rows[alive].tolist())
        for c in np.flatnonzero(passes.any(axis=1)):
            found = np.flatnonzero(passes[c])
            exact = block[found].astype(np.float64) @ self._exact[c]
            self._hold(c, np.rint(exact * UNITS).astype(np.int32), places[found])
        self._forget()

    def _passes(self, block: np.ndarray) -> np.ndarray:
        """Which rows of a block may be among the best, bool (C, n): no fewer than those that are."""
        scores, k, width = self._queries @ block.T, self.k, block.shape[1]
        longest = float(np.sqrt(np.einsum("nd,nd->n", block, block).max()))
        # A sum of D products in any order is off by at most D u / (1 - D u) times the lengths, u = 2**-24 (Higham,
        # Accuracy and Stability of Numerical Algorithms, 2002, sec. 3.1).
        margins = 2.0**-24 * (width + 16) * self._lengths * longest + 1e-9
        lowest = np.full(len(scores), -np.inf)
        for c, held in enumerate(self._scores):
            if len(held) >= k:
                lowest[c] = (held.min() - 0.5) / UNITS - margins[c]
            elif len(block) > k:  # of this block by itself only its own best can be among the best
                lowest[c] = np.partition(scores[c], len(block) - k)[len(block) - k] - 2 * margins[c] - 1 / UNITS
        return scores >= lowest[:, None].astype(np.float32)

    def _hold(self, c: int, scores: np.ndarray, places: np.ndarray) -> None:
        """Add rows of one query and keep the best k."""
        scores, places = np.append(self._scores[c], scores), np.append(self._places[c], places)
        if len(scores) > self.k:
            last = np.partition(scores, len(scores) - self.k)[len(scores) - self.k]
            kept, tied = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
            room = self.k - len(kept)
            if len(tied) > room:
                tied = np.array(sorted(tied.tolist(), key=lambda i: self._names[places[i]])[:room])
            kept = np.append(kept, tied)
            scores, places = scores[kept], places[kept]
        self._scores[c], self._places[c] = scores, places

    def _forget(self) -> None:
        """Drop the names of rows that are no longer held, when there are many."""
        if len(self._names) > self._room:
            used, places = np.unique(np.concatenate(self._places), return_inverse=True)
            self._names = [self._names[place] for place in used.tolist()]
            self._places = np.split(places, np.cumsum([len(each) for each in self._places])[:-1])
            self._room = 2 * len(self._names) + ROOM

    def merge(self, other: TopK) -> None:
        """Take the rows into account that another one of the same queries holds."""
        first = len(self._names)
        self._names.extend(other._names)
        for c, (scores, places) in enumerate(zip(other._scores, other._places, strict=True)):
            self._hold(c, scores, places + first)
        self.not_finite += other.not_finite
        self._forget()

    def result(self) -> list[Ranked]:
        """The best rows of each query."""
        return [self._ranked(*each) for each in zip(self._scores, self._places, strict=True)]

    def _ranked(self, scores: np.ndarray, places: np.ndarray) -> Ranked:
        order = np.argsort(-scores, kind="stable")
        scores, names = scores[order], [self._names[place] for place in places[order].tolist()]
        edges = np.flatnonzero(np.diff(scores)) + 1
        for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(scores)], strict=True):
            if last - first > 1:
                names[first:last] = sorted(names[first:last])
        return Ranked(names, (scores / UNITS).astype(np.float32))


def _rounded(vectors: np.ndarray) -> np.ndarray:
    """float32 (n, D), as whole multiples of 1 / GRID."""
    return np.rint(vectors * GRID) / GRID
