"""What to label: folders, globs, lists, tables and tars -> manifest rows, and the encoded bytes of each row."""

from __future__ import annotations

import contextlib
import itertools
import logging
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyarrow as pa

from raypipe import schema, storage
from raypipe.inputs import archives, folders
from raypipe.inputs.columns import picture_of
from raypipe.inputs.items import PICTURES, Item, LeftOut, hashed, manifest_of
from raypipe.inputs.lists import BASE64, SUFFIXES, list_entries, picture_text
from raypipe.inputs.records import LINE
from raypipe.inputs.tables import list_tables, plain_columns, read_cell
from raypipe.inputs.tars import list_tars
from raypipe.storage import Location, Spool, map_ahead
from raypipe.types import BadImage

log = logging.getLogger("raypipe")

NO_COLUMNS = "{} has no columns: lists (.csv, .jsonl) and tables (.parquet) have some"
TEXT_FACTOR = 6  # bytes of a list for one of a picture at most: base64 in UTF-16 or UTF-32
PACKED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)
# What lies beside images and is none; everything else is tried, whatever its name.
SIDECARS = set(
    ".txt .csv .tsv .json .jsonl .ndjson .geojson .xml .yaml .yml .toml .md .rst .html .htm .css .js .xmp .aae .ini "
    ".cfg .db .sqlite .log .py .ipynb .sh .zip .gz .tgz .bz2 .xz .zst .7z .rar .npy .npz .pkl .pickle .pt .pth "
    ".safetensors .mat .h5 .hdf5 .arrow .feather .tfrecord .lst .idx .rec .sha256 .md5 .sig .part .tmp .lock .bak .doc "
    ".docx .xls .xlsx .gpx .kml .srt .wav .ctg .mrk .pp3 .dop .vrd .arp .lrcat .lnk .url .crdownload .partial".split()
)
PACKED = {".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"}
SIDECAR_NAMES = {"license", "licence", "copying", "notice", "readme", "authors", "changelog", "makefile"}


def list_inputs(source: str, *, column: str | None = None, allow_private: bool = False) -> pa.Table:
    """What `spool_inputs` finds, in memory."""
    return spool_inputs(source, column=column, allow_private=allow_private).read()


def spool_inputs(source: str, *, column: str | None = None, allow_private: bool = False) -> Spool:
    """List the images of a source without reading any pixel: rows of schema.MANIFEST. Logs what it left out.

    source: a path or URI of a folder (recursive; that of an archive stands for its images), a glob, an image, a list
    (.txt: a URI per line; .csv, .tsv, .jsonl, .json), a Parquet table or a tar, or a folder or glob of tables or of
    tars, without pictures beside them. column: the column of a list or table with URIs or images, or the ending of the
    pictures in tars; None finds it. allow_private: what a list or table names may lie in a private network. Rows come
    in the order of the names, or of the list. An image has the same key however the rest of the source changes; one
    that is listed twice has one row.
    Raises ValueError (nothing there, no such column, unknown scheme, unreadable) or FileNotFoundError.
    """
    source, skipped = Location(source), LeftOut()
    with _explained(source):
        if (images := archives.images(source, allow_private=allow_private)) is not None:
            _refuse_column(column)
            if not len(images):
                raise ValueError(f"no images in the archive {source}: it found none for any of its categories")
            return Spool.of(schema.MANIFEST, [images])
        items = _items(source, column, skipped, allow_private)
        first = next(items, None)
    if first is None:
        why = f"left out: {skipped}" if skipped else "choose a folder, list or table that holds some"
        raise ValueError(f"no images, .tar or .parquet files in {source}; {why}")
    manifest, again = manifest_of(itertools.chain([first], items))
    if skipped:
        log.warning("%s: left out %s", source, skipped)
    if again:
        many = "1 entry is" if again == 1 else f"{again:,} entries are"
        log.warning("%s: %s listed twice and labelled once", source, many)
    return manifest


def records(
    source: str, select: Callable[[pa.Table], Sequence], *, column: str | None = None, allow_private: bool = False
) -> Iterator[tuple[str, object]]:
    """What the rows of the tables or of the list behind the images say: pairs of an image's id and a value.

    select: from the plain columns of a table (no pictures, no nested values) to a value for each of its rows. The other
    arguments as of `spool_inputs`. An image that is listed twice comes twice. Raises ValueError for an input without
    columns, and what `spool_inputs` and `select` raise.
    """
    source = Location(source)
    with _explained(source):
        if archives.images(source) is not None:
            raise ValueError(NO_COLUMNS.format(source))
        items = _items(source, column, LeftOut(), allow_private)
        for location, its in itertools.groupby(items, key=lambda item: item.record and item.record[0]):
            found = [(hashed(storage.normalise(item.location) + item.part).hex(), item.record) for item in its]
            if location is None:
                if not all(record and record[1].keys() - {LINE} for _, record in found):
                    raise ValueError(NO_COLUMNS.format(source))
                values = select(_plain_columns([cells for _, (_, cells) in found]))
            else:
                rows = select(plain_columns(location))
                values = [rows[row] for _, (_, row) in found]
            yield from zip((image_id for image_id, _ in found), values, strict=True)


def _plain_columns(records: Sequence[dict]) -> pa.Table:
    """The columns of a list, of which a record may lack some; values of several kinds are text, as in a .csv."""
    columns = {}
    for name in dict.fromkeys(name for cells in records for name in cells):
        values = [cells.get(name) for cells in records]
        if not any(isinstance(value, dict | list | bytes) for value in values):
            try:
                columns[name] = pa.array(values)
            except pa.ArrowException:
                columns[name] = pa.array([None if value is None else str(value) for value in values], pa.string())
    return pa.table(columns)


@contextlib.contextmanager
def _explained(source: Location) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(storage.missing(source)) from None
    except OSError as error:
        raise ValueError(f"{storage.fetch_error(error, source).message}") from error


def _items(source: Location, column: str | None, skipped: LeftOut, allow_private: bool) -> Iterator[Item]:
    kind, parts, sidecars = folders.kind(source), storage.split(source), set()
    path = parts.key if parts else source.uri
    has_braces, is_web = folders.BRACES.search(path), parts is not None and parts.is_web
    if kind == "file" and not (is_web and has_braces):  # a web address is a file without asking
        return _of_file(source, column, skipped, allow_private)
    if kind == "other":
        raise ValueError(f"{source} is neither a file nor a folder")
    if kind == "folder":
        folder, names, sidecars = source, folders.walk(source, skipped), SIDECARS
    elif has_braces or folders.WILDCARD.search(path):
        folder, names = folders.glob(source.uri, skipped)
    elif other := folders.in_other_form(source):
        return _items(other, column, skipped, allow_private)
    else:
        raise FileNotFoundError(source)
    files = ((storage.join(folder, name), name.partition("?")[0] if is_web else name) for name in names)  # no secrets
    return _of_files(files, column, skipped, allow_private, sidecars=sidecars)


def _of_file(source: Location, column: str | None, skipped: LeftOut, allow_private: bool) -> Iterator[Item]:
    location = source if storage.split(source) else Location(storage.normalise(source))
    name = storage.as_text(posixpath.basename(storage.local_path(location) or location))
    suffix = _suffix(name)
    if suffix in SUFFIXES:
        return list_entries(location, suffix, column, skipped, allow_private=allow_private)
    if PACKED_TAR.search(name):
        raise ValueError(f"{name}: a compressed tar cannot be read in parallel; unpack it to .tar first")
    if suffix in PACKED:
        raise ValueError(f"{name} is packed; unpack it and give its folder")
    if suffix in SIDECARS:
        raise ValueError(f"{name} is no image; lists end in {', '.join(sorted(SUFFIXES))}, tables in .parquet")
    return _of_files(iter([(location, name)]), column, skipped, allow_private, sidecars=set())


def _of_files(
    files: Iterator[tuple[str, str]], column: str | None, skipped: LeftOut, allow_private: bool, *, sidecars: set[str]
) -> Iterator[Item]:
    """Images, or the contents of tars or tables where no name among the (location, relative name) pairs is a picture's.

    So one stray file beside tables is left out, and files without extension are tried where there is nothing else.
    """
    files = (file for file in files if not _is_sidecar(file[1], sidecars, skipped))
    seen = []
    for file in files:
        seen.append(file)
        if _suffix(file[1]) in PICTURES:
            break
    tars, tables = ([file for file in seen if _suffix(file[1]) == suffix] for suffix in (".tar", ".parquet"))
    packed = bool(tars or tables) and _suffix(seen[-1][1]) not in PICTURES
    if not packed:
        _refuse_column(column)
        for location, name in itertools.chain(seen, files):
            if sidecars and _suffix(name) in (".tar", ".parquet"):
                skipped[f"{_suffix(name)} (beside images)"] += 1
            else:
                yield Item(location, storage.as_text(name))
        return
    if tars and tables:
        raise ValueError("both .tar and .parquet files and no images; choose with a glob such as 'folder/**/*.tar'")
    beside = ".parquet" if tables else ".tar"
    strays = (_suffix(name) or "without extension" for _, name in seen if _suffix(name) not in (".tar", ".parquet"))
    skipped.update(f"{stray} (beside {beside})" for stray in strays)
    if tables:
        yield from list_tables(tables, column, skipped, allow_private=allow_private)
    else:
        yield from list_tars(tars, column, skipped)


def _refuse_column(column: str | None) -> None:
    if column is not None:
        raise ValueError(f"--column {column!r} has no effect: the input has no columns")


def _is_sidecar(name: str, sidecars: set[str], skipped: LeftOut) -> bool:
    suffix, base = _suffix(name), posixpath.basename(name)
    is_sidecar = suffix in sidecars or (bool(sidecars) and base.lower() in SIDECAR_NAMES)
    if is_sidecar:
        skipped["compressed tar{s} (unpack to .tar first)" if PACKED_TAR.search(base) else suffix or base] += 1
    return is_sidecar


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


# Bytes


def fetch(rows: list[dict], *, max_bytes: int) -> Iterator[bytes | BadImage]:
    """The encoded bytes of manifest rows, in order; a BadImage where they cannot be had (yielded, never raised).

    Local files are read one at a time as they are asked for, remote ones up to 16 ahead. Of a table, the last row
    group's image column stays in memory. max_bytes: limit per image, checked before it is read.
    """

    read = partial(_bytes_or_error, max_bytes=max_bytes)
    remote = [row["row"] is None and storage.split(row["location"]) is not None for row in rows]
    ahead = map_ahead(read, [row for row, is_remote in zip(rows, remote, strict=True) if is_remote])
    for row, is_remote in zip(rows, remote, strict=True):
        yield next(ahead) if is_remote else read(row)


def _bytes_or_error(row: dict, *, max_bytes: int) -> bytes | BadImage:
    location, start, length = Location(row["location"]), row["start"], row["length"]
    try:
        if row["row"] is not None:
            index, public = start or 0, row["public"]
            return read_cell(location, row["column"], row=row["row"], index=index, max_bytes=max_bytes, public=public)
        if start is not None and length is None:
            text = f"{location} is damaged from byte {start} on: what follows is not listed; repair it"
            return BadImage("fetch", "damaged", text)
        if row["column"] == BASE64:
            content = storage.read_bytes(location, start=start, length=length, max_bytes=TEXT_FACTOR * max_bytes)
            content = picture_of(picture_text(content))
            storage.check_size(len(content), max_bytes)
            return content
        return storage.read_bytes(location, start=start, length=length, max_bytes=max_bytes, public=row["public"])
    except BadImage as error:
        hint = " (--max-bytes)" if error.kind == "too_large" else ""
        return BadImage(error.stage, error.kind, error.message + hint)
    except MemoryError:
        return BadImage("fetch", "memory", "not enough memory to read it")
    except Exception as error:  # a damaged table, a library of a file system
        return storage.fetch_error(error, location)
