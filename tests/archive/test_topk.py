"""The exact ranking: stored cases, a slow loop, and whatever way the rows come in."""

import pickle

import numpy as np
import pytest
from support import golden

from raypipe.archive import topk
from raypipe.archive.topk import TopK


def unit(rng, *shape, kind=np.float32):
    rows = rng.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(kind)


def slow(embeddings, queries, names, k):
    """For each query the first k of all rows, sorted as a whole: (names, scores in units)."""
    exact = np.rint(np.float64(embeddings) * 2**26) @ np.rint(np.float64(queries) * 2**26).T
    units = np.rint(exact / 2**32).astype(int)
    orders = [sorted(range(len(names)), key=lambda i: (-units[i, c], names[i]))[:k] for c in range(len(queries))]
    return [([names[i] for i in order], units[order, c]) for c, order in enumerate(orders)]


def ranked(parts, queries, k, *, consumers=1):
    """Parts (embeddings, names, valid) dealt to some consumers in turns, and merged."""
    tops = [TopK(queries, k) for _ in range(consumers)]
    for i, part in enumerate(parts):
        tops[i % consumers].add(*part)
    for other in tops[1:]:
        tops[0].merge(pickle.loads(pickle.dumps(other)))
    return tops[0].result()


@pytest.mark.parametrize("consumers", [1, 2, 3])
@pytest.mark.parametrize("name", ["topk_ties", "topk_float", "topk_short"])
def test_the_order_is_that_of_the_stored_cases_for_any_shards_and_blocks(shared, name, consumers):
    case = golden.arrays(shared / f"golden/clip_archive/{name}.npz")
    count, k = len(case["keys"]), int(case["k"])
    names = [(str(key), i) for i, key in enumerate(case["keys"])]
    cuts = [list(case["shard_cuts"])] if "shard_cuts" in case else []
    for edges in [*cuts, [], *(range(block, count, block) for block in (1 if count < 10 else 37, 64, 1000))]:
        edges = [0, *edges, count]
        parts = [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]
        rows = [(case["embeddings"][part], names[part], case["valid"][part]) for part in parts]
        for c, found in enumerate(ranked(rows, case["queries"], k, consumers=consumers)):
            index = np.full(case["top_index"].shape[1], -1)
            index[: len(found.names)] = [i for _, i in found.names]
            np.testing.assert_array_equal(index, case["top_index"][c])
            if "top_score" in case:
                np.testing.assert_allclose(found.scores, case["top_score"][c], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_no_cut_into_blocks_and_consumers_changes_what_a_full_sort_gives(kind):
    rng = np.random.default_rng(0)
    queries = unit(rng, 5, 48)
    embeddings = unit(rng, 1500, 48, kind=kind)
    embeddings[rng.integers(0, 1500, 400)] = embeddings[7]  # ties by the hundred
    names = [f"é{i * 7919 % 1500}" if i % 3 else f"z{i}" for i in range(1500)]
    expected = slow(embeddings, queries, names, 90)
    for consumers in (1, 2, 3):
        order, edges = rng.permutation(1500), np.sort(rng.integers(0, 1500, 11 * consumers))
        parts = [(embeddings[rows], [names[row] for row in rows], None) for rows in np.split(order, edges)]
        for found, (first, units) in zip(ranked(parts, queries, 90, consumers=consumers), expected, strict=True):
            assert found.names == first
            np.testing.assert_array_equal(found.scores * 2**20, units)


def test_scores_that_a_plain_product_rounds_by_its_shape_have_one_order():
    rng = np.random.default_rng(1)
    queries, embeddings = unit(rng, 3, 768), unit(rng, 4000, 768)
    embeddings[1:] = 0.01 * embeddings[1:] + embeddings[0]  # all scores within 1e-3
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    names = [f"{i:05d}" for i in range(4000)]
    expected = slow(embeddings, queries, names, 300)
    for block in (50, 333, 4000):
        parts = [(embeddings[i : i + block], names[i : i + block]) for i in range(0, 4000, block)]
        assert [found.names for found in ranked(parts, queries, 300)] == [first for first, _ in expected]


def test_rows_that_are_not_finite_are_counted_and_never_compared():
    queries, embeddings = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32).repeat(2, axis=0)
    embeddings[0, 2], embeddings[3, 0], embeddings[5, 1] = np.nan, np.inf, -np.inf
    top = TopK(queries, 4)
    top.add(embeddings, "abcdef", np.array([True, True, True, True, True, False]))
    assert top.not_finite == 2  # what does not count is not looked at
    assert [found.names for found in top.result()] == [["b", "c", "e"], ["c", "b", "e"], ["e", "b", "c"]]


def test_names_of_rows_that_fell_out_are_forgotten(monkeypatch):
    monkeypatch.setattr(topk, "ROOM", 50)
    rng = np.random.default_rng(2)
    queries, embeddings = unit(rng, 4, 16), unit(rng, 3000, 16)
    top, names = TopK(queries, 10), [f"{i:04d}" for i in range(3000)]
    for i in range(0, 3000, 100):
        top.add(embeddings[i : i + 100], names[i : i + 100])
        assert len(top._names) <= 2 * 40 + 50
    expected = slow(embeddings, queries, names, 10)
    assert [found.names for found in top.result()] == [first for first, _ in expected]


def test_wrong_queries_embeddings_and_k_are_refused():
    queries = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        TopK(queries, 0)
    for wrong in (queries[0], queries[:0], queries * np.nan):
        with pytest.raises(ValueError, match="queries: expected finite rows"):
            TopK(wrong, 2)
    with pytest.raises(ValueError, match=r"embeddings: expected \(n, 3\), got \(2, 4\)"):
        TopK(queries, 2).add(np.zeros((2, 4), np.float32), "ab")
