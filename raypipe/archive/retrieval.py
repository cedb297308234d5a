"""Rank a table of embeddings against queries and look candidates up in it: in a plain loop, and on Ray Data.

A part of the table is a pyarrow Table with at least `image_id`, `key`, `embedding` (a list of float16 or
float32, a unit vector; null in rows with an error) and `error` ("" = good). No image stands there twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.archive.topk import MOST_ROWS, TopK

log = logging.getLogger("raypipe")
RANKED_COLUMNS = ["image_id", "key", "embedding", "error"]  # all that a ranking reads
TRIES = 3  # of a ranking on Ray: a consumer that dies takes its share of the rows with it


def rank(parts: Iterable[pa.Table], queries: np.ndarray, k: int, among: pa.Array | None = None) -> TopK:
    """The k best good rows for each query, named (key, image_id). Holds a part at a time.

    parts: as above, of any sizes. queries: float32 (C, D), unit rows. among: ids of the images that count; None = all.
    """
    top = TopK(queries, k)
    for part in parts:
        rows = part.filter(pc.equal(part["error"], ""))
        if among is not None:
            rows = rows.filter(pc.is_in(rows["image_id"], value_set=among))
        if len(rows):
            names = list(zip(rows["key"].to_pylist(), rows["image_id"].to_pylist(), strict=True))
            top.add(vectors(rows["embedding"]), names)
    return top


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

    consume, shared = ray.remote(num_cpus=1, max_retries=0)(rank_share), ray.put((queries, k, among))
    for left in reversed(range(TRIES)):
        shares = dataset.select_columns(RANKED_COLUMNS).streaming_split(consumers, equal=False)
        running = [consume.remote(share, shared) for share in shares]
        try:
            first, *others = ray.get(running)
        except ray.exceptions.RayError as error:
            if not isinstance(cause(error), ray.exceptions.RayError):  # ours, which comes again
                raise
            if not left:
                raise RuntimeError(f"ranking: its processes died {TRIES} times: {error}") from error
            log.warning("a process that ranks has died; ranking again")
            continue
        finally:
            for task in running:  # others would wait for the one that died
                ray.cancel(task, force=True)
        for other in others:
            first.merge(other)
        return first


def rank_share(share, shared: tuple) -> TopK:
    """What `rank` finds in a consumer's share (`ray.data.DataIterator`). shared: its other arguments."""
    return rank(share.iter_batches(batch_size=MOST_ROWS, batch_format="pyarrow"), *shared)


def look_up(parts: Iterable[pa.Table], ids: pa.Array) -> pa.Table:
    """The rows of some images, in the order of the ids. Raises KeyError for an image that is in no part."""
    rows = pa.concat_tables([_those(part, ids) for part in parts])
    places = pc.index_in(ids, value_set=rows["image_id"].combine_chunks())
    if places.null_count:
        raise KeyError(f"{places.null_count} of {len(ids)} ranked images are not in the table")
    return rows.take(places)


def look_up_on_ray(dataset, ids: pa.Array) -> pa.Table:
    """The same of the rows of a Ray dataset, which are searched where they are."""
    found = dataset.map_batches(_those, fn_args=(ids,), batch_size=None, batch_format="pyarrow")
    return look_up(found.iter_batches(batch_size=None, batch_format="pyarrow"), ids)


def _those(part: pa.Table, ids: pa.Array) -> pa.Table:
    return part.filter(pc.is_in(part["image_id"], value_set=ids))
