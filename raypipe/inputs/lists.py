"""Images by lists of their addresses: text, separated columns, JSON lines."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import partial

from raypipe import storage
from raypipe.inputs.items import Item
from raypipe.storage import Location
from raypipe.types import BadImage

FIELD_CHARACTERS = 1 << 30  # of a CSV field: a column beside the URIs may hold whole documents or encoded images
URI_COLUMNS = "uri url path file filename file_name image image_path image_uri image_url".split()


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


def of_list(source: Location, suffix: str, column: str | None) -> Iterator[Item]:
    """The rows of a list. suffix: one of READ_LIST. Raises FileNotFoundError, ValueError."""
    if suffix == ".txt" and column is not None:
        raise ValueError(f"--column {column!r} has no effect: a .txt list has no columns")
    try:
        content = storage.read_bytes(source, max_bytes=1 << 34)
    except BadImage as error:
        raise (FileNotFoundError if error.kind == "missing" else ValueError)(error.message) from error

    def entries() -> Iterator[str]:
        lines = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", errors="surrogateescape", newline=None)
        try:
            yield from READ_LIST[suffix](lines, column)
        except csv.Error as error:
            raise ValueError(f"{source} cannot be read as {suffix}: {error}") from error

    return (uri_item(source, entry) for entry in entries() if entry)


def _lines(lines: Iterable[str], column: None) -> Iterator[str]:
    return (line for line in map(str.strip, lines) if not line.startswith("#"))


def _separated(lines: Iterable[str], column: str | None, *, separator: str = ",") -> Iterator[str]:
    csv.field_size_limit(FIELD_CHARACTERS)
    rows = csv.reader(lines, delimiter=separator)
    names = next(rows, [])
    index = names.index(find_uri_column(names, column))
    return (row[index].strip() for row in rows if len(row) > index)


def _json_lines(lines: Iterable[str], column: str | None) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            column = column if column in entry else find_uri_column(list(entry), column)
            yield str(entry[column] or "")
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"line {number} is not a JSON object: {error}") from None


READ_LIST = {".txt": _lines, ".csv": _separated, ".tsv": partial(_separated, separator="\t"), ".jsonl": _json_lines}
