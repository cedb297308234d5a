"""Images by Parquet tables: their bytes, or where they are."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.inputs.addresses import Addresses
from raypipe.inputs.columns import ADDRESS_FIELDS, find_column, find_folder, is_picture, leaves, picture_of
from raypipe.inputs.items import Item, LeftOut, Unusable, unlisted
from raypipe.inputs.lists import rows_of
from raypipe.inputs.records import Record
from raypipe.storage import Location, map_ahead
from raypipe.types import BadImage

BATCH_ROWS = 50_000  # rows of a column of addresses that are read together,
BATCH_BYTES = 1 << 26  # and their bytes at most
SAMPLE, SAMPLE_OF_BYTES = 64, 4  # rows that decide about the column; fewer where they may be pictures

TEXT = (pa.string(), pa.large_string(), pa.string_view())
BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())


def list_tables(
    files: list[tuple[str, str]], column: str | None, skipped: LeftOut, *, allow_private: bool
) -> Iterator[Item]:
    """Rows of tables, given as (location, relative name). `skipped` counts the rows without image.

    The first one decides about the column; then each file's footer is read, never its pixels. Raises ValueError when
    none is readable or the column is missing.
    """
    for kept in (_footer, _first_rows, _column):  # a table may have been written anew since this process read it
        kept.cache_clear()
    footers = list(map_ahead(_footer_or_error, (location for location, _ in files)))
    good = [pair for pair, footer in zip(files, footers, strict=True) if not isinstance(footer, Exception)]
    if not good:
        raise ValueError(f"{files[0][1]} is not a readable Parquet table: {footers[0]}")
    name, folder, are_pictures = _planned(good[0][0], column, Addresses(good[0][0], allow_private=allow_private))
    for (location, file), footer in zip(files, footers, strict=True):
        if isinstance(footer, Exception):
            yield unlisted(location, file, 0)
        elif footer.schema.to_arrow_schema().get_field_index(name) < 0:
            raise ValueError(f"{file} has no column {name!r}, which the other tables have")
    for location, file in good:
        table = _Table(location, os.path.splitext(storage.as_text(file))[0], name, allow_private=allow_private)
        yield from table.items(folder, skipped, are_pictures=are_pictures)


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


def _kind(kind: pa.DataType) -> str:
    """What a column of this type can be: `text` (addresses, or base64), `bytes`, or "" for something else."""
    if _is_list(kind) or pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_struct(kind):
        kinds = [_kind(field.type) for field in kind if field.name in ("bytes", *ADDRESS_FIELDS)]
        return next((each for each in ("bytes", "text") if each in kinds), "")
    if kind in TEXT:
        return "text"
    return "bytes" if kind in BYTES or pa.types.is_fixed_size_binary(kind) else ""


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _planned(location: Location, column: str | None, addresses: Addresses) -> tuple[str, str | None, bool]:
    """The column with the images, that with their folders, and whether the first one holds pictures themselves."""
    schema = _footer(location).schema.to_arrow_schema()
    kinds = {field.name: _kind(field.type) for field in schema if _kind(field.type)}
    shown = ", ".join(f"{field.name!r} ({field.type})" for field in schema)
    if column is not None:
        column = column if column in kinds else column.removesuffix(".bytes")
        if column not in kinds:
            raise ValueError(f"no column {column!r} of strings, bytes or images; the columns are {shown}")
    if [*kinds.values()] == ["bytes"] or kinds.get(column) == "bytes":
        return column or next(iter(kinds)), None, True
    seen = _sample(location, kinds)
    name = find_column(seen, kinds, column, addresses, shown=shown)
    if kinds[name] == "bytes":
        return name, None, True
    first = next((leaf for row in seen for leaf in leaves(row.get(name)) if isinstance(leaf, str)), "")
    are_pictures = is_picture(first)
    return name, None if are_pictures else find_folder(seen, name, addresses), are_pictures


def _sample(location: Location, kinds: dict[str, str]) -> list[dict]:
    """The first rows of some columns; [] where they are damaged, which those who fetch them find out."""
    count = SAMPLE_OF_BYTES if "bytes" in kinds.values() else SAMPLE
    try:
        return next(_batches(location, kinds, count), [])
    except (pa.ArrowException, OSError):
        return []


def _batches(location: Location, names: Iterable[str], count: int, group: int | None = None) -> Iterator[list[dict]]:
    """The rows of some columns, `count` at a time, of one row group or of all."""
    footer, (filesystem, path) = _footer(location), storage.resolve(location)
    columns = [stored for name in names for stored in _stored(footer, name)]
    groups = range(footer.num_row_groups) if group is None else [group]
    with filesystem.open_input_file(path) as file, storage.open_table(file, footer) as table:
        for batch in table.iter_batches(count, row_groups=groups, columns=columns):
            yield batch.to_pylist()


def _stored(footer: pq.FileMetaData, name: str) -> list[str]:
    """The stored columns of a column's pictures and their addresses: of an object no other fields."""
    stored = [footer.schema.column(i).path for i in range(footer.num_columns)]
    stored = [path for path in stored if path == name or path.startswith(f"{name}.")]
    return [path for path in stored if path.rpartition(".")[2] in ("bytes", *ADDRESS_FIELDS)] or stored


class _Table:
    """One table, by the column with its images."""

    def __init__(self, location: Location, stem: str, name: str, *, allow_private: bool):
        self._location, self._stem, self._name, self._is_public = location, stem, name, not allow_private
        self._footer = _footer(location)
        self._type = self._footer.schema.to_arrow_schema().field(name).type
        self._stored = _stored(self._footer, name)
        self._addresses = Addresses(location, allow_private=allow_private)

    def items(self, folder: str | None, skipped: LeftOut, *, are_pictures: bool) -> Iterator[Item]:
        """A row per picture. are_pictures: so the first one says; what has no bytes is known when it is fetched."""
        are_pictures = are_pictures or _kind(self._type) == "bytes"
        options = {"folder": folder, "stem": self._stem, "embedded": self._item}
        options["recorded"] = lambda number, _: (self._location, int(number))
        row = 0
        for group in range(self._footer.num_row_groups):
            if are_pictures and not self._is_empty(group):
                yield from self._pictures(group, row, skipped)
            else:
                yield from rows_of(self._records(group, row, folder), self._name, self._addresses, skipped, **options)
            row += self._footer.row_group(group).num_rows

    def _records(self, group: int, row: int, folder: str | None) -> Iterator[Record]:
        """The rows of a row group, of which the first one is the row-th."""
        facts, names = self._footer.row_group(group), [self._name, folder] if folder else [self._name]
        count = max(1, min(BATCH_ROWS, BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)))
        records = itertools.chain.from_iterable(_batches(self._location, names, count, group))
        return ((f"row {i}", record) for i, record in enumerate(records, row))

    def _pictures(self, group: int, first: int, skipped: LeftOut) -> Iterator[Item]:
        """The pictures of a row group, of which the first row is the first-th, without reading one."""
        for row, paths in enumerate(self._paths(group), first):
            if not paths:
                skipped.add("record{s} without image", f"row {row}")
            for index, path in enumerate(paths):
                number = f"{row}.{index}" if len(paths) > 1 else f"{row}"
                key = storage.as_text(path) if path else f"{self._stem}/{number.replace('.', '/')}"
                yield self._item("", key, f"#row={number}", index)

    def _paths(self, group: int) -> list[list[str | None]]:
        """The pictures of each row, each by its path if it has one."""
        path = next((name for name in self._stored if name.endswith(".path")), None)
        if path is None and not _is_list(self._type):
            return [[None]] * self._footer.row_group(group).num_rows
        values = _column(self._location, (path or self._stored[0],), group)
        if path is None:
            return [[None] * (count or 0) for count in pc.list_value_length(values).to_pylist()]
        cells = values.to_pylist() if _is_list(self._type) else [[cell] for cell in values.to_pylist()]
        paths = [[picture and picture["path"] for picture in cell or []] for cell in cells]
        return [[each if isinstance(each, str) else None for each in row] for row in paths]

    def _is_empty(self, group: int) -> bool:
        """Whether no row of a row group has bytes, if that is known without reading them."""
        facts = self._footer.row_group(group)
        chunks = {chunk.path_in_schema: chunk for chunk in map(facts.column, range(facts.num_columns))}
        stored = next((name for name in self._stored if name.endswith(".bytes")), self._stored[0])
        statistics = chunks[stored].statistics
        return statistics is not None and statistics.null_count == facts.num_rows and not _is_list(self._type)

    def _item(self, text: str, key: str, part: str, index: int) -> Item:
        row = int(part.removeprefix("#row=").partition(".")[0])
        column = f"{self._name}.bytes" if f"{self._name}.bytes" in self._stored else self._name
        start = index if _is_list(self._type) else None
        record = (self._location, row)
        return Item(self._location, key, part, start, None, row, column, self._is_public, record)


@lru_cache(maxsize=1)  # consecutive rows share it; more than one may not fit in memory
@storage.patiently
def _column(location: Location, stored: tuple[str, ...], group: int) -> pa.ChunkedArray:
    """Some stored columns of one column, of one row group."""
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file, storage.open_table(file, _footer(location)) as table:
        return table.read_row_group(group, columns=list(stored)).column(0)


@storage.patiently
def plain_columns(location: Location) -> pa.Table:
    """The columns of a table that hold numbers, times, truth values or text."""
    names = [f.name for f in _footer(location).schema.to_arrow_schema() if not pa.types.is_nested(f.type)]
    names = [name for name in names if _kind(_footer(location).schema.to_arrow_schema().field(name).type) != "bytes"]
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file, storage.open_table(file, _footer(location)) as table:
        return table.read(columns=names)


@lru_cache(maxsize=8)
def _first_rows(location: Location) -> list[int]:
    """The first row of each row group, and behind them the number of rows."""
    footer = _footer(location)
    return list(itertools.accumulate((footer.row_group(i).num_rows for i in range(footer.num_row_groups)), initial=0))


def read_cell(location: Location, column: str, *, row: int, index: int, max_bytes: int, public: bool) -> bytes:
    """The encoded picture in a row of a table; its row group's column stays in memory for the next call.

    column: the name, with `.bytes` where the picture is in an object. index: which of the cell's pictures. A picture
    that has no bytes is read from its address; public: as for `storage.read_bytes`. Raises BadImage("fetch", kind,
    message): missing, too_large, invalid, and of its address; and what pyarrow raises for a table damaged or gone.
    """
    firsts, footer = _first_rows(location), _footer(location)
    if row >= firsts[-1]:
        raise BadImage("fetch", "missing", f"{location} has only {firsts[-1]} rows")
    group = bisect_right(firsts, row) - 1
    is_whole = column in footer.schema.to_arrow_schema().names
    stored = _stored(footer, column if is_whole else column.removesuffix(".bytes"))
    try:
        found = leaves(_column(location, tuple(stored), group)[row - firsts[group]].as_py())
        leaf = found[index] if index < len(found) else None
        if leaf is None:
            raise BadImage("fetch", "missing", f"row {row} of {location} has no bytes and no path")
        if isinstance(leaf, Unusable):
            raise BadImage("fetch", "invalid", f"row {row} of {location} holds {leaf} in {column!r}")
        if isinstance(leaf, str) and not is_picture(leaf):
            place = Addresses(location, allow_private=not public).item(leaf)
            return storage.read_bytes(place.location, max_bytes=max_bytes, public=place.public)
    except Unusable as error:
        raise BadImage("fetch", "refused", f"row {row} of {location}: {error}") from error
    content = picture_of(leaf) if isinstance(leaf, str) else leaf
    storage.check_size(len(content), max_bytes)
    return content
