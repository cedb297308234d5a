"""Rank a table of embeddings against queries and look candidates up in it: in a plain loop, and on Ray Data.

A part of the table is a pyarrow Table with at least `image_id`, `key`, `embedding` (a list of float16 or
float32, a unit vector; null in rows with an error) and `error` ("" = good). No image stands there twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.archive.topk import MOST_ROWS, TopK

log = logging.getLogger("raypipe")
RANKED_COLUMNS = ["image_id", "key", "embedding", "error"]  # all that a ranking reads
TRIES = 3  # of a ranking on Ray: a consumer that dies takes its share of the rows with it


def rank(parts: Iterable[pa.Table], queries: np.ndarray, k: int, among: pa.Array | None = None) -> TopK:
    """The k best good rows for each query, named (key, image_id). Holds 16,384 rows or one part at a time.

    parts: as above, of any sizes. queries: float32 (C, D), unit rows. among: ids of the images that count; None = all.
    """
    return _rank(_gathered(parts), queries, k, None if among is None else Ids(among))


def _gathered(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in fewer parts: a run may have thousands of a few hundred, and each costs a look at every query."""
    held, count = [], 0
    for part in parts:
        if held and count + len(part) > MOST_ROWS:
            yield pa.concat_tables(held)
            held, count = [], 0
        held, count = [*held, part], count + len(part)
    if held:
        yield pa.concat_tables(held)


def _rank(parts: Iterable[pa.Table], queries: np.ndarray, k: int, among: Ids | None) -> TopK:
    top = TopK(queries, k)
    for part in parts:
        rows = part.filter(pc.equal(part["error"], ""))
        rows = rows if among is None else among.of(rows)
        if len(rows):
            names = list(zip(rows["key"].to_pylist(), rows["image_id"].to_pylist(), strict=True))
            top.add(vectors(rows["embedding"]), names)
    return top


class Ids:
    """The ids of some images, sorted once. Asking Arrow whether a part's ids are among them sorts out all of them for
    each part, which takes a second of a million.
    """

    def __init__(self, ids: pa.Array):
        self._sorted = np.sort(_as_bytes(ids))

    def of(self, part: pa.Table) -> pa.Table:
        """The rows of a part whose `image_id` is one of them."""
        if not len(self._sorted) or not len(part):
            return part.slice(0, 0)
        asked = _as_bytes(part["image_id"])
        places = np.minimum(np.searchsorted(self._sorted, asked), len(self._sorted) - 1)
        return part.filter(pa.array(self._sorted[places] == asked))


def _as_bytes(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return np.array(ids.cast(pa.binary()).to_pylist(), "S")


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """A column of embeddings without nulls as an array (n, D) of its own precision."""
    values = column.combine_chunks().flatten()
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def rank_on_ray(dataset, queries: np.ndarray, k: int, *, consumers: int, among: pa.Array | None = None) -> TopK:
    """The same with the rows of a Ray dataset dealt to some processes, whose results are merged.

    dataset: `ray.data.Dataset` of the rows, which may be read again: a process that dies takes the rows that it has
    seen with it, so all is ranked once more, up to three times. consumers: processes of one core each; one core more
    is needed for reading. Raises RuntimeError when the last try fails too.
    """
    import ray

    from raypipe.runtime.cluster import cause

    consumer = ray.remote(num_cpus=1)(Consumer)
    shared = ray.put((queries, k, None if among is None else Ids(among)))
    for left in reversed(range(TRIES)):
        shares = dataset.select_columns(RANKED_COLUMNS).streaming_split(consumers, equal=False)
        actors = [consumer.remote() for _ in shares]
        try:
            pairs = zip(actors, shares, strict=True)
            first, *others = ray.get([actor.rank.remote(share, shared) for actor, share in pairs])
        except ray.exceptions.RayError as error:
            if not isinstance(cause(error), ray.exceptions.RayError):  # ours, which comes again
                raise
            if not left:
                raise RuntimeError(f"ranking: its processes died {TRIES} times: {error}") from error
            log.warning("a process that ranks has died; ranking again")
            continue
        finally:
            for actor in actors:  # others would wait for the one that died. Cancelled tasks can crash Ray's driver
                ray.kill(actor)
        for other in others:
            first.merge(other)
        return first


class Consumer:
    """A process that ranks its share of the rows."""

    def rank(self, share, shared: tuple) -> TopK:
        """share: `ray.data.DataIterator`. shared: queries, k and Ids, or None for all."""
        return _rank(share.iter_batches(batch_size=MOST_ROWS, batch_format="pyarrow"), *shared)


def look_up(parts: Iterable[pa.Table], ids: pa.Array) -> pa.Table:
    """The rows of some images, in the order of the ids. Raises KeyError for an image that is in no part."""
    wanted = Ids(ids)
    rows = pa.concat_tables([wanted.of(part) for part in parts])
    places = pc.index_in(ids, value_set=rows["image_id"].combine_chunks())
    if places.null_count:
        raise KeyError(f"{places.null_count} of {len(ids)} ranked images are not in the table")
    return rows.take(places)


def look_up_on_ray(dataset, ids: pa.Array) -> pa.Table:
    """The same of the rows of a Ray dataset, which are searched where they are."""
    found = dataset.map_batches(Ids(ids).of, batch_size=None, batch_format="pyarrow")
    return look_up(found.iter_batches(batch_size=None, batch_format="pyarrow"), ids)
