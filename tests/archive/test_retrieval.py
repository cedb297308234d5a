"""Candidates from tables of embeddings: the same from any parts, in a loop and on Ray Data, also when one dies."""

import os

import numpy as np
import pyarrow as pa
import pytest
import ray

from raypipe.archive import retrieval
from raypipe.archive.topk import TopK

WIDTH = 24
K = 60
CUTS = [144, 741, 1140, 1487, 1500, 4000]  # of a table into seven uneven parts
FLOAT32 = pa.float32()


def table(count, *, kind=FLOAT32):
    """Rows of a table of embeddings: every seventh failed, a third of the others are equal."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, WIDTH))
    rows[::3] = rows[0]
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(kind.to_pandas_dtype())
    failed = np.arange(count) % 7 == 6
    embeddings = pa.array([None if bad else row for row, bad in zip(rows, failed, strict=True)], pa.list_(kind, WIDTH))
    columns = {
        "image_id": pa.array([f"{i * 7919 % count:06d}" for i in range(count)]),
        "key": pa.array([f"k{i % 400}" for i in range(count)]),  # some keys stand twice
        "embedding": embeddings,
        "error": pa.array(np.where(failed, "decode: corrupt: cut", "")),
        "sha256": pa.array([f"{i}" for i in range(count)]),
    }
    return pa.table(columns)


def some_queries():
    rows = np.random.default_rng(9).normal(size=(4, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def in_parts(rows, cuts):
    edges = [0, *cuts, len(rows)]
    return [rows.slice(first, last - first) for first, last in zip(edges, edges[1:], strict=False)]


def listed(top: TopK):
    return [(each.names, each.scores.tolist()) for each in top.result()]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_good_rows_alone_are_ranked_by_score_then_key_then_id(kind):
    rows, queries = table(900, kind=kind), some_queries()
    good = [row for row in rows.to_pylist() if not row["error"]]
    scores = np.array([row["embedding"] for row in good], np.float64) @ queries.T.astype(np.float64)
    for c, (names, found) in enumerate(listed(retrieval.rank(in_parts(rows, [5, 6, 500]), queries, K))):
        ours = dict(zip(names, found, strict=True))
        order = sorted(
            good, key=lambda row: (-ours.get((row["key"], row["image_id"]), -2), row["key"], row["image_id"])
        )
        assert names == [(row["key"], row["image_id"]) for row in order[:K]]
        np.testing.assert_allclose(found, np.sort(scores[:, c])[::-1][:K], atol=1e-6)


def test_only_images_that_count_are_ranked_and_a_column_of_any_chunks_is_read():
    rows = table(300)
    among = rows["image_id"].combine_chunks()[100:140]
    (names, _), *_ = listed(retrieval.rank([pa.concat_tables(in_parts(rows, [1, 7, 150]))], some_queries(), K, among))
    good = {row["image_id"] for row in rows.slice(100, 40).to_pylist() if not row["error"]}
    assert {image_id for _, image_id in names} == good
    strangers = pa.array(["x", "000001000", ""])
    assert listed(retrieval.rank([rows], some_queries(), K, strangers)) == [([], [])] * 4
    assert listed(retrieval.rank([rows], some_queries(), K, strangers[:0])) == [([], [])] * 4


def test_rows_are_looked_up_in_the_order_of_the_ids():
    rows = table(300)
    ids = rows["image_id"].combine_chunks().take([250, 3, 3 + 7, 0])
    assert retrieval.look_up(in_parts(rows, [4, 200]), ids)["sha256"].to_pylist() == ["250", "3", "10", "0"]
    with pytest.raises(KeyError, match="1 of 1 ranked images are not in the table"):
        retrieval.look_up([rows], pa.array(["nowhere"]))


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("consumers", [1, 3])
def test_any_number_of_consumers_ranks_as_the_plain_loop_does(cluster, consumers):
    rows, queries = table(5000), some_queries()
    dataset = ray.data.from_arrow(in_parts(rows, CUTS))
    found = listed(retrieval.rank_on_ray(dataset, queries, K, consumers=consumers))
    assert found == listed(retrieval.rank([rows], queries, K))


def test_consumers_rank_as_the_plain_loop_does_also_after_one_died_and_rows_are_looked_up(
    cluster, tmp_path, monkeypatch
):
    rows, queries = table(5000), some_queries()
    dataset = ray.data.from_arrow(in_parts(rows, CUTS))
    flag, among = tmp_path / "died", rows["image_id"].combine_chunks()[1000:3000]

    class Mortal(retrieval.Consumer):
        """The first one dies with a batch in its hands."""

        def rank(self, share, shared, flag=str(flag)):
            try:
                with open(flag, "x"):
                    next(iter(share.iter_batches(batch_size=64)))
                    os._exit(1)
            except FileExistsError:
                return super().rank(share, shared)

    monkeypatch.setattr(retrieval, "Consumer", Mortal)
    expected = listed(retrieval.rank([rows], queries, K, among))
    assert listed(retrieval.rank_on_ray(dataset, queries, K, consumers=2, among=among)) == expected
    assert flag.exists()
    ids = rows["image_id"].combine_chunks().take([4999, 0, 1487])
    assert retrieval.look_up_on_ray(dataset, ids)["sha256"].to_pylist() == ["4999", "0", "1487"]


def test_a_fault_of_the_table_is_no_death_and_is_raised_at_once(cluster):
    wide = np.eye(2, WIDTH + 1, dtype=np.float32)
    with pytest.raises(ValueError, match=r"embeddings: expected \(n, 25\), got \(43, 24\)"):
        retrieval.rank_on_ray(ray.data.from_arrow(table(50)), wide, K, consumers=1)
