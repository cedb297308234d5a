"""The best images of each category by sorting all images for each category."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np

from raypipe.archive.topk import GRID, UNITS, TopK
from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, timed

IMAGES, WIDTH, QUERIES, K = 200_000, 64, 100, 714  # 714 candidates for archives of 500


def compare(_subject, _device: str, _images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """On random unit vectors. The plain order is that of scores in single precision; the exact one is not timed."""
    embeddings, queries, keys = corpus()
    seconds = [[], []]
    for _ in range(repeats):
        for times, arm in zip(seconds, (quick_order, plain_order), strict=True):
            times.append(timed(arm, embeddings, queries, keys)[0])
    exact = [np.rint(rows * GRID).astype(np.float64) / GRID for rows in (embeddings, queries)]
    expected = plain_order(*exact, keys)
    tracemalloc.start()
    found = quick_order(embeddings, queries, keys)
    memory = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    unlike = float(np.mean([ours != other for ours, other in zip(found, expected, strict=True)]))
    case = f"{IMAGES:,} x {WIDTH}, {QUERIES} queries, k = {K}"
    return [
        *compared("archive_ranking", seconds, f"a full sort per query; {case}", per="ranking"),
        Figure("archive_ranking", "memory beside the embeddings", "MB", [memory], "largest, of Python and numpy"),
        Figure("archive_ranking", "share of queries unlike a full sort of exact scores", "", [unlike]),
    ]


def corpus() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Embeddings (IMAGES, WIDTH), queries (QUERIES, WIDTH), both float32 unit rows, and the images' keys."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(IMAGES + QUERIES, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:IMAGES], rows[IMAGES:], [f"images/{i * 7919 % IMAGES:06d}.jpg" for i in range(IMAGES)]


def quick_order(embeddings: np.ndarray, queries: np.ndarray, keys: list[str]) -> list[list[str]]:
    """The keys of the K best rows of each query, in order."""
    top = TopK(queries, K)
    top.add(embeddings, keys)
    return [found.names for found in top.result()]


def plain_order(embeddings: np.ndarray, queries: np.ndarray, keys: list[str]) -> list[list[str]]:
    """The same by sorting all rows by key once, and for each query once more by score, which keeps the keys' order."""
    by_key = np.argsort(np.array(keys))
    best = []
    for scores in queries @ embeddings[by_key].T:
        order = np.argsort(-np.rint(scores * UNITS).astype(np.int32), kind="stable")
        best.append([keys[i] for i in by_key[order[:K]]])
    return best
