"""Images by Parquet tables: their bytes, or where they are."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.inputs.items import Item, unlisted
from raypipe.inputs.lists import find_uri_column, uri_item
from raypipe.storage import Location, map_ahead
from raypipe.types import BadImage

BATCH_ROWS = 50_000  # rows of a column of URIs that are read together


def list_tables(files: list[tuple[str, str]], column: str | None) -> Iterator[Item]:
    """Rows of tables, given as (location, relative name).

    The first one decides about the column; then each file's footer is read, never its pixels. Raises ValueError when
    none is readable or the column is missing.
    """
    first = _footer_or_error(files[0][0])
    if isinstance(first, Exception) and len(files) == 1:
        raise ValueError(f"{files[0][1]} is not a readable Parquet table: {first}")
    footers = [first, *map_ahead(_footer_or_error, (location for location, _ in files[1:]))]
    tables = [footer.schema.to_arrow_schema() for footer in footers if not isinstance(footer, Exception)]
    if not tables:
        raise ValueError(f"none of the {len(files)} .parquet files is readable: {first}")
    name = _image_column(tables[0], column)
    for (location, file), footer in zip(files, footers, strict=True):
        if isinstance(footer, Exception):
            yield unlisted(location, file, 0)
        elif footer.schema.to_arrow_schema().get_field_index(name) < 0:
            raise ValueError(f"{file} has no column {name!r}, which the other tables have")
    good = [(*pair, footer) for pair, footer in zip(files, footers, strict=True) if not isinstance(footer, Exception)]
    for location, file, footer in good:
        if _holds(tables[0].field(name).type) == "uri":
            yield from (uri_item(location, uri) for uri in _column_of_uris(location, name))
        else:
            yield from _cells_of(location, os.path.splitext(storage.as_text(file))[0], footer, name)


def _footer_or_error(location: Location) -> pq.FileMetaData | Exception:
    try:
        return _footer(location)
    except (pa.ArrowException, OSError) as error:
        return error


@lru_cache(maxsize=8)
@storage.patiently
def _footer(location: Location) -> pq.FileMetaData:
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file:
        return storage.read_footer(file)


def _holds(kind: pa.DataType) -> str:
    """What a column of this type can be: `uri`, `bytes`, `struct` (Hugging Face image), or "" for something else."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return "struct"
    if kind in (pa.string(), pa.large_string(), pa.string_view()):
        return "uri"
    return "bytes" if kind in (pa.binary(), pa.large_binary(), pa.binary_view()) else ""


def _image_column(table: pa.Schema, column: str | None) -> str:
    usable = {field.name: _holds(field.type) for field in table if _holds(field.type)}
    if column is not None:
        name = column.removesuffix(".bytes")
        if name not in usable:
            columns = ", ".join(f"{field.name!r} ({field.type})" for field in table)
            raise ValueError(f"no column {column!r} of strings, bytes or images; the columns are {columns}")
        return name
    images = [name for name, kind in usable.items() if kind != "uri"]
    if "image" in usable:
        return "image"
    if len(images) > 1:
        raise ValueError(f"several columns may hold the image: {', '.join(images)}; choose one with --column")
    return images[0] if images else find_uri_column([name for name in usable], None)


def _column_of_uris(location: Location, name: str) -> Iterator[str]:
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file, storage.open_table(file, _footer(location)) as table:
        for batch in table.iter_batches(BATCH_ROWS, columns=[name]):
            yield from filter(None, batch.column(0).to_pylist())


def _cells_of(location: Location, stem: str, footer: pq.FileMetaData, name: str) -> Iterator[Item]:
    """A row per cell; where a whole row group has Hugging Face paths but no bytes, a row per path."""
    leaves = [footer.schema.column(i).path for i in range(footer.num_columns)]
    dotted = f"{name}.bytes" if f"{name}.bytes" in leaves else name
    row = 0
    for group in range(footer.num_row_groups):
        chunk = footer.row_group(group).column(leaves.index(dotted))
        count = footer.row_group(group).num_rows
        paths = _column(location, f"{name}.path", group).to_pylist() if f"{name}.path" in leaves else [None] * count
        empty = chunk.statistics is not None and chunk.statistics.null_count == count
        for path in paths:
            if empty and path:
                yield uri_item(location, path)
            else:
                yield Item(location, path or f"{stem}/{row}", f"#row={row}", row=row, column=dotted)
            row += 1


@storage.patiently
def _column(location: Location, dotted: str, group: int) -> pa.ChunkedArray:
    """One column, or one field of a struct, of one row group."""
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file, storage.open_table(file, _footer(location)) as table:
        values = table.read_row_group(group, columns=[dotted]).column(0)
    return pc.struct_field(values, dotted.rpartition(".")[2]) if pa.types.is_struct(values.type) else values


_column_kept = lru_cache(maxsize=1)(_column)  # consecutive rows share it; more than one may not fit in memory


@lru_cache(maxsize=8)
def _first_rows(location: Location) -> list[int]:
    """The first row of each row group, and behind them the number of rows."""
    footer = _footer(location)
    return list(itertools.accumulate((footer.row_group(i).num_rows for i in range(footer.num_row_groups)), initial=0))


def read_cell(location: Location, column: str, *, row: int, max_bytes: int) -> bytes:
    """The bytes in a row of a table; its row group's column stays in memory for the next call.

    column: the dotted name, such as `image.bytes`. Raises BadImage("fetch", kind, message): missing, too_large; and
    what pyarrow raises for a table that is damaged or gone.
    """
    firsts = _first_rows(location)
    if row >= firsts[-1]:
        raise BadImage("fetch", "missing", f"{location} has only {firsts[-1]} rows")
    group = bisect_right(firsts, row) - 1
    value = _column_kept(location, column, group)[row - firsts[group]]
    if not value.is_valid:
        raise BadImage("fetch", "missing", f"row {row} of {location} has no bytes")
    content = value.as_buffer()
    if content.size > max_bytes:
        raise BadImage("fetch", "too_large", f"{content.size} bytes, the limit is {max_bytes}")
    return content.to_pybytes()
