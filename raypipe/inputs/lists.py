"""Images by lists of their addresses: each record becomes rows, or is counted as left out."""

from __future__ import annotations

import csv
import itertools
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator

from raypipe import storage
from raypipe.inputs.addresses import Addresses
from raypipe.inputs.columns import find_column, find_folder, is_picture, joined, leaves
from raypipe.inputs.items import Item, LeftOut, Unusable
from raypipe.inputs.records import LINE, Record, decode, records
from raypipe.storage import Location
from raypipe.types import BadImage

SUFFIXES = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson"}
MAX_BYTES = 1 << 34  # of a list
SAMPLE = 1000  # records that decide about the column; the next ones where these hold none
BASE64 = "base64"  # the `column` of a row whose byte range is a picture as text


def list_entries(
    source: Location, suffix: str, column: str | None, skipped: LeftOut, *, allow_private: bool
) -> Iterator[Item]:
    """The rows of a list. suffix: one of SUFFIXES. `skipped` counts the records without image.

    Raises FileNotFoundError, and ValueError with the line for what cannot be read as such a list.
    """
    try:
        content = storage.read_bytes(source, max_bytes=MAX_BYTES)
    except BadImage as error:
        raise (FileNotFoundError if error.kind == "missing" else ValueError)(error.message) from error
    addresses = Addresses(source, allow_private=allow_private)
    stem = posixpath.splitext(posixpath.basename(storage.as_text(source)))[0]
    try:
        text, encoding = decode(content, source)
        name, folder, found = _planned(records(text, suffix), column, addresses)
        embedded = _Embedded(source, content, encoding)
        yield from rows_of(found, name, addresses, skipped, folder=folder, stem=stem, embedded=embedded)
    except csv.Error as error:
        raise ValueError(f"{source} cannot be read as {suffix}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _planned(
    found: Iterator[Record], column: str | None, addresses: Addresses
) -> tuple[str, str | None, Iterator[Record]]:
    """The columns of the images and of their folders, by the first records that tell; and all records again."""
    seen = []
    while more := list(itertools.islice(found, SAMPLE)):
        seen += more
        try:
            return *_columns(more, column, addresses), itertools.chain(seen, found)
        except ValueError:
            continue
    return *_columns(seen, column, addresses), iter(seen)


def _columns(seen: list[Record], column: str | None, addresses: Addresses) -> tuple[str, str | None]:
    cells = [record for _, record in seen if isinstance(record, dict)]
    names = dict.fromkeys(name for record in cells for name in record)
    if not names.keys() - {LINE}:
        if column is not None:
            raise ValueError(f"--column {column!r} has no effect: the list has no columns")
        return LINE, None
    name = find_column(cells, names, column, addresses)
    return name, find_folder(cells, name, addresses)


def rows_of(
    found: Iterable[Record],
    column: str,
    addresses: Addresses,
    skipped: LeftOut,
    *,
    folder: str | None,
    stem: str,
    embedded: Callable[[str, str, str, int], Item],
    recorded: Callable[[str, dict], tuple] = lambda number, cells: (None, cells),
) -> Iterator[Item]:
    """A row per picture in a column of records; those without are counted in `skipped`.

    folder: the column with the folders of the files, if there is one. stem: begins the key of a picture in a cell.
    embedded(text, key, part, index): the row of such a picture, which is the index-th of its cell. recorded(number,
    cells): what `Item.record` says of a record.
    """
    for place, record in found:
        word, _, number = place.partition(" ")
        try:
            for index, leaf, is_one in _pictures(record, column):
                if is_picture(leaf):
                    part = number if is_one else f"{number}.{index}"
                    item = embedded(leaf, f"{stem}/{part.replace('.', '/')}", f"#{word}={part}", index)
                else:
                    item = addresses.item(joined(record.get(folder), leaf))
                yield item._replace(record=recorded(number, record))
        except Unusable as error:
            skipped.add(str(error), place)


def _pictures(record: dict | Unusable, column: str) -> list[tuple[int, str, bool]]:
    """The pictures in a record: (index in its cell, base64 or address, whether it is the only one)."""
    if isinstance(record, Unusable):
        raise Unusable(f"record{{s}} with {record}")
    found = leaves(record.get(column))
    if found and isinstance(found[0], Unusable):
        raise Unusable(f"record{{s}} with {found[0]}" + (f" in {column!r}" if column else ""))
    if not any(found):
        raise Unusable("record{s} without image")
    return [(index, leaf, len(found) == 1) for index, leaf in enumerate(found) if leaf]


class _Embedded:
    """Makes the rows of pictures that stand in a list as text, each by the range of bytes that holds it."""

    def __init__(self, source: Location, content: bytes, encoding: str):
        self._source, self._content, self._encoding, self._behind = source, content, encoding, 0

    def __call__(self, text: str, key: str, part: str, index: int) -> Item:
        escaped = json.dumps(text)[1:-1]
        for spelling in dict.fromkeys((text, escaped, escaped.replace("/", "\\/"))):
            encoded = spelling.encode(self._encoding)
            start = self._content.find(encoded, self._behind)
            if start >= 0:
                self._behind = start + len(encoded)
                return Item(self._source, key, part, start, len(encoded), None, BASE64)
        raise Unusable("record{s} with a picture in an unusual spelling")


def picture_text(content: bytes) -> str:
    """The text of a picture from its range of bytes in a list: its characters are ASCII in all encodings."""
    content = content.replace(b"\0", b"")
    return json.loads(b'"' + content + b'"') if b"\\" in content else content.decode("ascii", "replace")
