"""What to label: folders, globs, lists, tables and tars -> manifest rows, and the encoded bytes of each row."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import posixpath
import re
import tarfile
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple
from urllib.parse import quote_from_bytes

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import schema, storage
from raypipe.types import BadImage

CHUNK_ROWS = 50_000  # rows of a manifest chunk
READS_AHEAD = 16  # remote files read at the same time
TAR_BUFFER = 1 << 15  # bytes: the headers of small neighbours come with one request, large pictures are jumped over
COLUMNS = "uri url path file filename file_name image image_path image_uri image_url".split()
LISTS = {".txt", ".csv", ".tsv", ".jsonl"}
PACKED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)
# What lies beside images and is none; everything else is tried, whatever its name.
SIDECARS = set(
    ".txt .csv .tsv .json .jsonl .ndjson .geojson .xml .yaml .yml .toml .md .rst .html .htm .css .js .xmp .aae .ini "
    ".cfg .db .sqlite .log .py .ipynb .sh .zip .gz .tgz .bz2 .xz .zst .7z .rar .npy .npz .pkl .pickle .pt .pth "
    ".safetensors .mat .h5 .hdf5 .arrow .feather .tfrecord .lst .idx .rec .sha256 .md5 .sig .part .tmp .lock .bak .doc "
    ".docx .xls .xlsx".split()
)
SIDECAR_NAMES = {"license", "licence", "copying", "notice", "readme", "authors", "changelog", "makefile"}
# Members of a tar sample that are pictures, also of formats that are not read: those become error rows.
PICTURES = set(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .mpo .heic .heif .avif .jxl .jp2 .j2k .dng .cr2 .cr3 "
    ".nef .arw .orf .rw2 .raf .pef .srw .psd .svg .exr .hdr .ppm .pgm .pbm .tga .ico".split()
)


class Item(NamedTuple):
    """One manifest row before it gets its id."""

    location: str
    key: str
    part: str = ""  # `#member` or `#row=3`: which part of the location
    start: int | None = None  # with a length: a byte range; without: nothing could be listed from here on
    length: int | None = None
    row: int | None = None
    column: str | None = None


class Listing:
    """What a source holds. Iterate `chunks` once; the counts are complete afterwards."""

    def __init__(self, source: str, items: Iterable[Item], skipped: Counter):
        self.chunks: Iterator[pa.Table] = self._chunks(items)  # tables of schema.MANIFEST, up to 50,000 rows each
        self.skipped = skipped  # what was left out: extension or reason -> how many
        self.duplicates = 0  # entries dropped because their image had come before
        self._source = storage.redact(source)

    def remarks(self) -> list[str]:
        """Sentences for the log about what was left out."""
        remarks = []
        if self.skipped:
            remarks.append(f"{self._source}: left out {_count(self.skipped)}")
        if self.duplicates:
            remarks.append(f"{self._source}: {self.duplicates:,} entries are listed twice and labelled once")
        return remarks

    def _chunks(self, items: Iterable[Item]) -> Iterator[pa.Table]:
        ids, keys, items = set(), set(), iter(items)
        while batch := list(itertools.islice(items, CHUNK_ROWS)):
            rows = []
            for item in batch:
                digest = blake2b((storage.normalise(item.location) + item.part).encode(), digest_size=16)
                if digest.digest() in ids:
                    self.duplicates += 1
                    continue
                ids.add(digest.digest())
                image_id, uri = digest.hexdigest(), storage.redact(item.location) + item.part
                rows.append((image_id, uri, _unique(item.key, image_id, keys), item.location, *item[3:]))
            columns = zip(*rows, strict=True) if rows else [()] * len(schema.MANIFEST)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema.MANIFEST, strict=True)]
            yield pa.Table.from_arrays(arrays, schema=schema.MANIFEST)


def _unique(key: str, image_id: str, keys: set[int]) -> str:
    """A key that no other row has and that, used as a path, stays inside its folder. Changes `keys`."""
    if "//" in key or "./" in key or key.startswith("/") or key.endswith("."):
        key = "/".join(part for part in key.split("/") if part not in ("", ".", "..")) or image_id
    if hash(key) in keys:
        stem, suffix = posixpath.splitext(key)
        key = f"{stem}-{image_id[:8]}{suffix}"
    keys.add(hash(key))  # a number is smaller than the text; two texts of one number only cost a needless suffix
    return key


def _count(skipped: Counter) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in skipped.most_common())


def list_inputs(source: str, *, column: str | None = None) -> Listing:
    """List the images of a source without reading any pixel.

    source: a path or URI of a folder (recursive), a glob, an image, a list (.txt: a URI per line; .csv, .tsv, .jsonl),
    a Parquet table or a tar, or a folder or glob of only tables or only tars. column: the column of a list or table
    with URIs or images; None finds it. Rows come in the order of the names, or of the list.
    Raises ValueError (nothing there, no such column, unknown scheme, unreadable) or FileNotFoundError at once.
    """
    skipped: Counter = Counter()
    items = _items(source, column, skipped)
    try:
        first = next(items, None)
    except FileNotFoundError:
        raise FileNotFoundError(f"{storage.redact(source)} does not exist") from None
    except OSError as error:
        raise ValueError(f"{storage.fetch_error(error, source).message}") from error
    if first is None:
        left_out = f"; left out: {_count(skipped)}" if skipped else ""
        raise ValueError(f"no images, .tar or .parquet files in {storage.redact(source)}{left_out}")
    return Listing(source, itertools.chain([first], items), skipped)


def _items(source: str, column: str | None, skipped: Counter) -> Iterator[Item]:
    kind = storage.kind(source)
    if kind == "file":
        return _of_file(source, column, skipped)
    if kind == "folder":
        names = storage.walk(source, skipped)
        return _of_files(((storage.join(source, name), name) for name in names), column, skipped, sidecars=SIDECARS)
    if kind == "other":
        raise ValueError(f"{storage.redact(source)} is neither a file nor a folder")
    parts = storage.split(source)
    if not storage.WILDCARD.search(parts.key if parts else source):
        raise FileNotFoundError(source)
    folder, names = storage.glob(source, skipped)
    return _of_files(((storage.join(folder, name), name) for name in names), column, skipped, sidecars=set())


def _of_file(source: str, column: str | None, skipped: Counter) -> Iterator[Item]:
    location = source if storage.split(source) else storage.local_uri(storage.local_path(source))
    name = _text(posixpath.basename(_path(location)))
    suffix = _suffix(name)
    if suffix in LISTS:
        return _of_list(location, suffix, column)
    if PACKED_TAR.search(name):
        raise ValueError(f"{name}: a compressed tar cannot be read in parallel; unpack it to .tar first")
    if suffix in SIDECARS:
        raise ValueError(f"{name} is no image; lists end in .txt, .csv, .tsv or .jsonl, tables in .parquet")
    return _of_files(iter([(location, name)]), column, skipped, sidecars=set())


def _of_files(
    files: Iterator[tuple[str, str]], column: str | None, skipped: Counter, *, sidecars: set[str]
) -> Iterator[Item]:
    """Images, or the contents of tars or tables when the (location, relative name) pairs hold nothing else."""
    held: dict[str, list[tuple[str, str]]] = {".tar": [], ".parquet": []}
    image = None
    for location, name in files:
        if _suffix(name) in held:
            held[_suffix(name)].append((location, name))
        elif not _is_sidecar(name, sidecars, skipped):
            image = (location, name)
            break
    if image is None and all(held.values()):
        raise ValueError("both .tar and .parquet files and no images; choose with a glob such as 'folder/**/*.tar'")
    if image is None and held[".parquet"]:
        yield from _of_tables(held[".parquet"], column)
        return
    if column is not None:
        raise ValueError(f"--column {column!r} has no effect: the input has no columns")
    if image is None:
        yield from _of_tars(held[".tar"], skipped)
        return
    for location, name in itertools.chain(*held.values(), [image], files):
        if sidecars and _suffix(name) in held:
            skipped[f"{_suffix(name)} (beside images)"] += 1
        elif not _is_sidecar(name, sidecars, skipped):
            yield Item(location, _text(name))


def _is_sidecar(name: str, sidecars: set[str], skipped: Counter) -> bool:
    suffix = _suffix(name)
    if sidecars and (suffix in sidecars or posixpath.basename(name).lower() in SIDECAR_NAMES):
        skipped[suffix or posixpath.basename(name)] += 1
        return True
    return False


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _text(name: str) -> str:
    return name if storage.is_text(name) else quote_from_bytes(os.fsencode(name))


def _path(location: str) -> str:
    """What is shown of a location as a path: local names raw, web addresses without their query."""
    return storage.local_path(location) or storage.redact(location)


def _ahead(function: Callable, arguments: Iterable, *, depth: int = READS_AHEAD) -> Iterator:
    """function(argument) for all, in order, up to `depth` of them running ahead in threads."""
    pool, running = ThreadPoolExecutor(depth), deque()
    try:
        for argument in arguments:
            running.append(pool.submit(function, argument))
            if len(running) >= depth:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# Lists


def _of_list(source: str, suffix: str, column: str | None) -> Iterator[Item]:
    if suffix == ".txt" and column is not None:
        raise ValueError(f"--column {column!r} has no effect: a .txt list has no columns")
    try:
        content = storage.read_bytes(source, max_bytes=1 << 34)
    except BadImage as error:
        raise (FileNotFoundError if error.kind == "missing" else ValueError)(error.message) from error

    def locations() -> Iterator[str]:
        lines = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", errors="surrogateescape", newline=None)
        return (_located(source, entry) for entry in READ_LIST[suffix](lines, column) if entry)

    return _of_uris(locations)


def _lines(lines: Iterable[str], column: None) -> Iterator[str]:
    return (line for line in map(str.strip, lines) if not line.startswith("#"))


def _separated(separator: str) -> Callable[[Iterable[str], str | None], Iterator[str]]:
    def entries(lines: Iterable[str], column: str | None) -> Iterator[str]:
        rows = csv.reader(lines, delimiter=separator)
        names = next(rows, [])
        index = names.index(_uri_column(names, column))
        return (row[index].strip() for row in rows if len(row) > index)

    return entries


def _json_lines(lines: Iterable[str], column: str | None) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            column = column if column in entry else _uri_column(list(entry), column)
            yield str(entry[column] or "")
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"line {number} is not a JSON object: {error}") from None


READ_LIST = {".txt": _lines, ".csv": _separated(","), ".tsv": _separated("\t"), ".jsonl": _json_lines}


def _uri_column(names: list[str], column: str | None) -> str:
    found = [column] if column in names else []
    if column is None:
        lower = {name.strip().lower(): name for name in names}
        found = [lower[name] for name in COLUMNS if name in lower]
    if not found:
        wanted = f"column {column!r}" if column else f"column named {', '.join(COLUMNS)}"
        raise ValueError(f"no {wanted}; the columns are {', '.join(map(repr, names))}; choose one with --column")
    return found[0]


def _located(source: str, entry: str) -> str:
    """The location that an entry of a list or table means; relative ones start at the folder of `source`.

    An entry on the same kind of store takes over credentials and endpoint of the source.
    """
    home, there = storage.split(source), storage.split(entry)
    if there is not None:
        same = home is not None and home.scheme == there.scheme and not (there.user or there.options)
        return there._replace(user=home.user, options=home.options).at(there.key) if same and home.options else entry
    if storage.SCHEME.match(entry) or entry.startswith("/"):
        return storage.local_uri(storage.local_path(entry))
    if home is None:
        return storage.join(os.path.dirname(storage.local_path(source)), entry)
    key = home.key.partition("?")[0] if home.scheme in storage.WEB_SCHEMES else home.key
    return storage.join(home.at(posixpath.dirname(key)), entry)


def _of_uris(locations: Callable[[], Iterator[str]]) -> Iterator[Item]:
    """Rows for whole files, with keys relative to their common folder; runs through `locations` twice."""
    paths = map(_path, locations())
    low = high = next(paths, "")
    for path in paths:
        low, high = min(low, path), max(high, path)
    prefix = posixpath.commonprefix([low, high])  # of the two that differ most
    start = prefix.rfind("/") + 1
    return (Item(location, _text(_path(location)[start:]).replace("://", "/")) for location in locations())


# Parquet tables


def _of_tables(files: list[tuple[str, str]], column: str | None) -> Iterator[Item]:
    """Rows of tables. The first one decides about the column; then each file's footer is read, never its pixels."""
    first = _footer_or_error(files[0][0])
    if isinstance(first, Exception) and len(files) == 1:
        raise ValueError(f"{files[0][1]} is not a readable Parquet table: {first}")
    footers = [first, *_ahead(_footer_or_error, (location for location, _ in files[1:]))]
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
    if _holds(tables[0].field(name).type) == "uri":
        yield from _of_uris(lambda: (uri for location, _, _ in good for uri in _column_of_uris(location, name)))
        return
    for location, file, footer in good:
        yield from _cells_of(location, os.path.splitext(_text(file))[0], footer, name)


def _footer_or_error(location: str) -> pq.FileMetaData | Exception:
    try:
        return _footer(location)
    except (pa.ArrowException, OSError) as error:
        return error


@lru_cache(maxsize=8)
@storage.patiently
def _footer(location: str) -> pq.FileMetaData:
    filesystem, path = storage.resolve(location)
    return pq.read_metadata(path, filesystem=filesystem)


def _holds(kind: pa.DataType) -> str:
    """What a column of this type can be: `uri`, `bytes`, `struct` (Hugging Face image), or "" for something else."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return "struct"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "uri"
    return (
        "bytes" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) else ""
    )


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
    return images[0] if images else _uri_column([name for name in usable], None)


def _column_of_uris(location: str, name: str) -> Iterator[str]:
    filesystem, path = storage.resolve(location)
    with pq.ParquetFile(path, filesystem=filesystem) as table:
        for batch in table.iter_batches(CHUNK_ROWS, columns=[name]):
            yield from (_located(location, uri) for uri in batch.column(0).to_pylist() if uri)


def _cells_of(location: str, stem: str, footer: pq.FileMetaData, name: str) -> Iterator[Item]:
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
                yield Item(_located(location, path), path)
            else:
                yield Item(location, path or f"{stem}/{row}", f"#row={row}", row=row, column=dotted)
            row += 1


@storage.patiently
def _column(location: str, dotted: str, group: int) -> pa.ChunkedArray:
    """One column, or one field of a struct, of one row group."""
    filesystem, path = storage.resolve(location)
    with pq.ParquetFile(path, filesystem=filesystem) as table:
        values = table.read_row_group(group, columns=[dotted]).column(0)
    return pc.struct_field(values, dotted.rpartition(".")[2]) if pa.types.is_struct(values.type) else values


_column_kept = lru_cache(maxsize=1)(_column)  # consecutive rows share it; more than one may not fit in memory


# WebDataset tars


def _of_tars(files: list[tuple[str, str]], skipped: Counter) -> Iterator[Item]:
    for (_, name), (items, left_out) in zip(files, _ahead(_members, files), strict=True):
        if len(files) == 1 and len(items) == 1 and items[0].length is None:
            raise ValueError(
                f"{name} is not a readable tar: it is damaged from byte {items[0].start} on, or compressed"
            )
        skipped.update(left_out)
        yield from items


def _members(file: tuple[str, str]) -> tuple[list[Item], Counter]:
    """The pictures of a tar by its headers, and what was left out. Damage ends the list with an `_unlisted` row."""
    (location, name), items, skipped = file, [], Counter()
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file, io.BufferedReader(file, TAR_BUFFER) as stream:
        archive = None
        try:
            archive = tarfile.TarFile(fileobj=stream)
            for member in archive:
                archive.members = []  # it would keep them all
                reason = _not_a_picture(member)
                if reason:
                    skipped[reason] += 1
                    continue
                part = _text(member.name)
                key = f"{posixpath.splitext(_text(name))[0]}/{part}"
                items.append(Item(location, key, f"#{part}", member.offset_data, member.size))
            damaged = archive.offset if not _ends_here(stream, archive.offset) else None
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
    suffix = _suffix(member.name)
    return "" if suffix in PICTURES else suffix or "members without extension"


def _ends_here(stream: io.BufferedReader, offset: int) -> bool:
    """Whether the archive's end marker is there. tarfile takes a broken header in the middle for the end."""
    stream.seek(offset)
    return stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _unlisted(location: str, name: str, start: int) -> Item:
    """The row that stands for all that a damaged file holds from byte `start` on: it becomes an error row at fetch."""
    return Item(location, f"{posixpath.splitext(_text(name))[0]}/damaged", "#damaged", start)


# Bytes


def fetch(rows: list[dict], *, max_bytes: int) -> Iterator[bytes | BadImage]:
    """The encoded bytes of manifest rows, in order; a BadImage where they cannot be had (yielded, never raised).

    Local files are read one at a time as they are asked for, remote ones up to 16 ahead. Of a table, the last row
    group's image column stays in memory. max_bytes: limit per image, checked before it is read.
    """

    def read(row: dict) -> bytes | BadImage:
        return _bytes_or_error(row, max_bytes)

    remote = [row["row"] is None and storage.split(row["location"]) is not None for row in rows]
    ahead = _ahead(read, [row for row, is_remote in zip(rows, remote, strict=True) if is_remote])
    for row, is_remote in zip(rows, remote, strict=True):
        yield next(ahead) if is_remote else read(row)


def _bytes_or_error(row: dict, max_bytes: int) -> bytes | BadImage:
    location, start, length = row["location"], row["start"], row["length"]
    try:
        if row["row"] is not None:
            return _cell(location, row["column"], row["row"], max_bytes)
        if start is not None and length is None:
            text = f"{storage.redact(location)} is damaged from byte {start} on: what follows is not listed; repair it"
            return BadImage("fetch", "damaged", text)
        return storage.read_bytes(location, start=start, length=length, max_bytes=max_bytes)
    except BadImage as error:
        return error
    except MemoryError:
        return BadImage("fetch", "memory", "not enough memory to read it", retryable=True)
    except Exception as error:  # a damaged table, a library of a file system
        return storage.fetch_error(error, location)


@lru_cache(maxsize=8)
def _first_rows(location: str) -> list[int]:
    """The first row of each row group, and behind them the number of rows."""
    footer = _footer(location)
    return list(itertools.accumulate((footer.row_group(i).num_rows for i in range(footer.num_row_groups)), initial=0))


def _cell(location: str, column: str, row: int, max_bytes: int) -> bytes:
    firsts = _first_rows(location)
    if row >= firsts[-1]:
        raise BadImage("fetch", "missing", f"{storage.redact(location)} has only {firsts[-1]} rows")
    group = bisect_right(firsts, row) - 1
    value = _column_kept(location, column, group)[row - firsts[group]]
    if not value.is_valid:
        raise BadImage("fetch", "missing", f"row {row} of {storage.redact(location)} has no bytes")
    content = value.as_buffer()
    if content.size > max_bytes:
        raise BadImage("fetch", "too_large", f"{content.size} bytes, the limit is {max_bytes}")
    return content.to_pybytes()
