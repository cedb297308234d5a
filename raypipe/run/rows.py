"""The rows of a run for those who come after the job: part by part, each image once, chosen by an SQL condition."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import schema, storage
from raypipe.run.run import Run, superseded

BATCH_ROWS = 250  # images handed on at once; an image of a hundred masks may take a megabyte
# What a condition can name, besides the columns of a joined table.
IMAGE_COLUMNS = "image_id uri key sha256 height width note seconds attempt error method segments".split()
SEGMENT_COLUMNS = "segment area share score label bbox".split()


def run_names(places: tuple[str, ...]) -> list[str]:
    """A short name for each run: as many last parts of its path as tell it from the others.

    Raises ValueError for a run that is named twice.
    """
    paths = [storage.redact(place).rstrip("/").split("/") for place in places]
    if len({tuple(path) for path in paths}) < len(paths):
        raise ValueError(f"the same run is named twice: {', '.join(map(storage.redact, places))}")
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return ["/".join(path) for path in paths]


def select(run: Run, *, where: str | None = None, joined: pa.Table | None = None) -> Iterator[dict]:
    """The images that match a condition, as rows of `schema.MASKS` with the column `method` and without `soft`.

    where: an SQL condition (DuckDB) over one row per segment with the image's columns: IMAGE_COLUMNS (`segments` is the
    image's number of them), `segment` (index from 0), `area`, `share` (area / (height * width)), `score`, `label`,
    `bbox`. An image without segment is one row in which those are null. A row's `segments` holds those that match, each
    with its index as `segment`. None takes every image with all segments. joined: see `read_joined`.
    Memory is bounded by 250 rows and, for 16 bytes or so an image, by the commit records.
    Raises ValueError at once for a condition that does not work, and FileNotFoundError when the folder is no run.
    """
    condition = None if where is None else Condition(where, joined)
    return (row for batch in batches(run) for row in _chosen(batch, condition))


def batches(run: Run, *, leaves: tuple[str, ...] | None = None) -> Iterator[pa.Table]:
    """Committed rows, up to 250 at a time, in the order of the parts, each id once, with the column `method`.

    leaves: read of each segment only these fields; None = all but `soft`. Safe while a job writes.
    """
    method, lost = run.masks.rpartition("=")[2], defaultdict(list)
    for image_id, part in superseded(run.commits()):
        lost[part].append(image_id)
    leaves = leaves or tuple(field.name for field in schema.SEGMENT if field.name != "soft")
    for name in run.parts():
        with run.folder.fs.open_input_file(run.folder.path(run.masks, name)) as file, pq.ParquetFile(file) as part:
            for batch in part.iter_batches(BATCH_ROWS, columns=_paths(part, leaves)):
                table = pa.table(batch)
                if lost[name]:
                    table = table.filter(pc.invert(pc.is_in(table["image_id"], value_set=pa.array(lost[name]))))
                yield table.append_column("method", pa.repeat(pa.scalar(method), len(table)))


def flatten(table: pa.Table) -> pa.Table:
    """One row per segment with the image's columns, and one with nulls per image without segment.

    table: rows of `batches`. Returns the columns IMAGE_COLUMNS and SEGMENT_COLUMNS, and `row`, the index in `table`.
    """
    segments = pa.chunked_array(table["segments"]).combine_chunks()
    counts = pc.fill_null(pc.list_value_length(segments), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    lines = np.maximum(counts, 1)  # (images,)
    row = np.repeat(np.arange(len(table)), lines)  # (lines,)
    segment = np.arange(len(row)) - np.repeat(np.cumsum(lines) - lines, lines)
    place = pa.array(np.repeat(np.cumsum(counts) - counts, lines) + segment, mask=counts[row] == 0)
    found = pc.list_flatten(segments).take(place)
    names = [name for name in IMAGE_COLUMNS if name != "segments"]
    columns = {"row": pa.array(row)} | {name: table[name].take(pa.array(row)) for name in names}
    columns |= {"segments": pa.array(counts[row]), "segment": pa.array(segment, mask=counts[row] == 0)}
    columns |= {name: pc.struct_field(found, name) for name in ("area", "score", "label", "bbox")}
    pixels = pc.multiply(columns["height"].cast(pa.float64()), columns["width"].cast(pa.float64()))
    return pa.table(columns | {"share": pc.divide(columns["area"].cast(pa.float64()), pixels)})


class Condition:
    """An SQL condition over the rows of `flatten`, checked when it is made."""

    def __init__(self, where: str, joined: pa.Table | None = None):
        """where, joined: as in `select`. Raises ValueError with DuckDB's message and the columns there are."""
        import duckdb

        self._database = duckdb.connect(config={"enable_external_access": "false"})
        self._query = "SELECT row, segment FROM one_batch"
        columns = [*IMAGE_COLUMNS, *SEGMENT_COLUMNS]
        if joined is not None:
            key = _key(joined)
            joined = joined.select([name for name in joined.column_names if name == key or name not in columns])
            columns += [name for name in joined.column_names if name != key]
            self._database.register("joined", joined)
            self._query += f" LEFT JOIN joined USING ({key})"
        self._query += f" WHERE (\n{where}\n)"  # on its own line: it may end with a comment
        try:
            self._check_form(where)
            self.matches(_empty())
        except (duckdb.Error, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"--where {where!r}: {reason}; the columns are {', '.join(columns)}") from None

    def _check_form(self, where: str) -> None:
        """Raise ValueError unless the text by itself is one condition that each row answers alone."""
        query = f"SELECT 1 FROM one_batch WHERE\n{where}\n"
        parsed = json.loads(self._database.execute("SELECT json_serialize_sql(?)", [query]).fetchall()[0][0])
        if parsed["error"]:
            raise ValueError(parsed["error_message"])
        if len(parsed["statements"]) != 1:
            raise ValueError("expected one condition, got several statements")
        if '"class": "SUBQUERY"' in json.dumps(parsed):  # it would see 250 images at a time
            raise ValueError("a condition cannot hold a query; give a table with more columns (--join)")

    def matches(self, table: pa.Table) -> dict[int, list[int]]:
        """What matches in rows of `batches`: index of the image -> indices of its segments, both ascending."""
        self._database.register("one_batch", flatten(table))
        found = self._database.execute(self._query).fetchall()
        self._database.unregister("one_batch")
        chosen: dict[int, list[int]] = {}
        for row, segment in sorted(found, key=lambda pair: (pair[0], pair[1] or 0)):
            chosen.setdefault(row, []).extend([] if segment is None else [segment])
        return chosen


def read_joined(uri: str) -> pa.Table:
    """A Parquet table with one row per image, whose columns a condition can use, such as an agreement or metrics.

    uri: a file with the column `key` or, if it has none, `image_id`; columns that the rows have themselves are not
    used. Raises FileNotFoundError or ValueError.
    """
    filesystem, path = storage.resolve(uri)
    try:
        table = pq.read_table(path, filesystem=filesystem, partitioning=None)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{storage.redact(uri)} is no Parquet table: {error}") from None
    if _key(table) is None:
        raise ValueError(
            f"{storage.redact(uri)}: expected a column key or image_id, got {', '.join(table.schema.names)}"
        )
    if len(pc.unique(table[_key(table)])) < len(table):
        raise ValueError(
            f"{storage.redact(uri)}: expected one row per image, but some {_key(table)} stands there twice"
        )
    return table


def _key(joined: pa.Table) -> str | None:
    return next((name for name in ("key", "image_id") if name in joined.column_names), None)


def _chosen(table: pa.Table, condition: Condition | None) -> Iterator[dict]:
    chosen = condition and condition.matches(table)
    if chosen is not None:
        table = table.take(pa.array(chosen.keys(), pa.int64()))
    kept = iter(chosen.values()) if chosen is not None else None
    for row in table.to_pylist():
        segments = [segment | {"segment": i} for i, segment in enumerate(row["segments"] or [])]
        yield row | {"segments": segments if kept is None else [segments[i] for i in next(kept)]}


def _paths(part: pq.ParquetFile, leaves: tuple[str, ...]) -> list[str]:
    """The stored columns to read: all of `schema.MASKS`, of the segments only `leaves`."""
    paths = [part.metadata.schema.column(i).path for i in range(part.metadata.num_columns)]
    return [
        path
        for path in paths
        if path.split(".")[0] in schema.MASKS.names
        and (path.split(".")[0] != "segments" or path.split(".")[3] in leaves)
    ]


def _empty() -> pa.Table:
    """No rows, with the columns of `batches`."""
    return schema.MASKS.empty_table().append_column("method", pa.array([], pa.string()))
