"""Images inside larger files: rows of Parquet tables, members of WebDataset tars."""

from __future__ import annotations

import io
import itertools
import os
import posixpath
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.storage import Location, map_ahead
from raypipe.types import BadImage

BATCH_ROWS = 50_000  # rows of a column of URIs that are read together
TAR_BUFFER = 1 << 15  # bytes: the headers of small neighbours come with one request, large pictures are jumped over
URI_COLUMNS = "uri url path file filename file_name image image_path image_uri image_url".split()
# What the names of pictures end in, also of formats that are not read: those become error rows.
PICTURES = set(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .mpo .heic .heif .avif .jxl .jp2 .j2k .dng .cr2 .cr3 "
    ".nef .arw .orf .rw2 .raf .pef .srw .psd .svg .exr .hdr .ppm .pgm .pbm .tga .ico".split()
)


class Item(NamedTuple):
    """One manifest row before it gets its id."""

    location: Location
    key: str
    part: str = ""  # `#member` or `#row=3`: which part of the location
    start: int | None = None  # with a length: a byte range; without: nothing could be listed from here on
    length: int | None = None
    row: int | None = None
    column: str | None = None


# URIs, in tables and in lists


def find_uri_column(names: list[str], column: str | None) -> str:
    """The asked-for column, or the first of the usual names (in any case) that is there. Raises ValueError."""
    lower = {name.strip().lower(): name for name in names}
    usual = next((lower[name] for name in URI_COLUMNS if name in lower), None)
    if column in names or (column is None and usual is not None):
        return usual if column is None else column
    wanted = f"column {column!r}" if column else f"column named {', '.join(URI_COLUMNS)}"
    raise ValueError(f"no {wanted}; the columns are {', '.join(map(repr, names))}; choose one with --column")


def uri_item(source: Location, entry: str) -> Item:
    """The row of a file by its entry in the list or table `source`. Its key depends on nothing but the entry.

    The key of a relative entry is the entry itself, normalised and without leading `..`; that of an absolute path is
    the path, that of a URI host or bucket and path: no scheme, no credentials, no query of a web address.
    """
    location = storage.locate(source, entry)
    if storage.split(entry) is not None:
        key = Location(entry).partition("://")[2]
    elif entry.lower().startswith(("/", "file://")):
        key = storage.local_path(entry).lstrip("/")
    else:
        key = re.sub(r"^(\.\./)+", "", posixpath.normpath(entry))
    return Item(location, storage.as_text(key))


# Parquet tables


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
            yield _unlisted(location, file, 0)
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
    return pq.read_metadata(path, filesystem=filesystem)


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
    with pq.ParquetFile(path, filesystem=filesystem) as table:
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
    with pq.ParquetFile(path, filesystem=filesystem) as table:
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


# WebDataset tars


def list_tars(files: list[tuple[str, str]], skipped: Counter) -> Iterator[Item]:
    """The pictures in tars, given as (location, relative name); `skipped` counts the other members.

    Only headers are read. Raises ValueError when the only file is no tar, OSError when one cannot be read.
    """
    for (_, name), (items, left_out) in zip(files, map_ahead(_members, files), strict=True):
        if len(files) == 1 and len(items) == 1 and items[0].length is None:
            start = items[0].start
            raise ValueError(f"{name} is not a readable tar: it is damaged from byte {start} on, or compressed")
        skipped.update(left_out)
        yield from items


def _members(file: tuple[str, str]) -> tuple[list[Item], Counter]:
    """The pictures of a tar by its headers, and what was left out. Damage ends the list with an `_unlisted` row."""
    (location, name), items, skipped = file, [], Counter()
    stem = posixpath.splitext(storage.as_text(name))[0]
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file, io.BufferedReader(file, TAR_BUFFER) as stream:
        archive = None
        try:
            archive = tarfile.TarFile(fileobj=stream)
            for member in archive:
                archive.members = []  # it would keep them all
                if reason := _not_a_picture(member):
                    skipped[reason] += 1
                    continue
                part = storage.as_text(member.name)
                items.append(Item(location, f"{stem}/{part}", f"#{part}", member.offset_data, member.size))
            stream.seek(archive.offset)  # tarfile takes a broken header in the middle for the end: is its marker there?
            damaged = archive.offset if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) else None
        except (tarfile.TarError, ValueError, EOFError, OSError) as error:
            damaged = archive.offset if archive else 0
            if isinstance(error, OSError) and damaged <= file.size():  # not a jump behind the end: no damage
                raise
    if damaged is not None:
        items.append(_unlisted(location, name, damaged))
    return items, skipped


def _not_a_picture(member: tarfile.TarInfo) -> str:
    """Why a member is left out; "" for a picture."""
    if not member.isreg() or member.issparse():
        return "members that are no regular files"
    if any(part.startswith((".", "_")) for part in member.name.split("/") if part not in (".", "..")):
        return "hidden names"
    suffix = posixpath.splitext(member.name)[1].lower()
    return "" if suffix in PICTURES else suffix or "members without extension"


def _unlisted(location: Location, name: str, start: int) -> Item:
    """The row that stands for all that a damaged file holds from byte `start` on: it becomes an error row at fetch."""
    return Item(location, f"{posixpath.splitext(storage.as_text(name))[0]}/damaged", "#damaged", start)
