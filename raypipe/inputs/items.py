"""One image of the input as its listing finds it, and the manifest in which all of them have their ids."""

from __future__ import annotations

import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raypipe import schema, storage
from raypipe.storage import Location, SortedSet, Spool

# What the names of pictures end in, also of formats that are not read: those become error rows.
PICTURES = set(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .mpo .heic .heif .avif .jxl .jp2 .j2k .dng .cr2 .cr3 "
    ".nef .arw .orf .rw2 .raf .pef .srw .psd .svg .exr .hdr .ppm .pgm .pbm .tga .ico".split()
)
CHUNK_ROWS = 50_000  # rows of a manifest chunk
SHOWN = 20  # reasons for leaving files out, in one line


class Item(NamedTuple):
    """One manifest row before it gets its id."""

    location: Location
    key: str
    part: str = ""  # `#member` or `#row=3`: which part of the location
    start: int | None = None  # with a length: a byte range; without: nothing could be listed from here on
    length: int | None = None
    row: int | None = None
    column: str | None = None
    public: bool = False  # an address out of a list: it may lead to public addresses of the web alone
    record: tuple | None = None  # of a list: (None, its cells by column); of a table: (its location, the row)


def unlisted(location: Location, name: str, start: int) -> Item:
    """The row that stands for all that a damaged file holds from byte `start` on: it becomes an error row at fetch."""
    return Item(location, f"{posixpath.splitext(storage.as_text(name))[0]}/damaged", "#damaged", start)


class Unusable(ValueError):
    """A value of a list or table that is no picture and no address, or one that may not be read; the text says why."""


class LeftOut(Counter):
    """What a listing left out: how many by reason, in which `{s}` stands for its plural."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[str, str] = {}

    def add(self, reason: str, place: str) -> None:
        """Count a record. place: where it stands, such as `line 3`; that of the first one of a reason is told."""
        self[reason] += 1
        self._first.setdefault(reason, f" (first: {place})")

    def __str__(self) -> str:
        """In words; of more than SHOWN reasons the most frequent."""
        reasons, words = self.most_common(), []
        for reason, number in reasons[:SHOWN]:
            words.append(f"{number:,} {reason.replace('{s}', '' if number == 1 else 's')}{self._first.get(reason, '')}")
        if rest := reasons[SHOWN:]:
            words.append(f"{sum(number for _, number in rest):,} for {len(rest):,} other reasons")
        return ", ".join(words)


def manifest_of(items: Iterator[Item]) -> tuple[Spool, int]:
    """Rows of schema.MANIFEST, and how many entries were dropped because their image had come before.

    In memory are those of a million images or so and of two chunks; ids and keys are sorted on the disk.
    """
    manifest, ids, keys, again = Spool(schema.MANIFEST), SortedSet("S16"), SortedSet("i8"), 0
    while batch := list(itertools.islice(items, CHUNK_ROWS)):
        digests = [hashed(storage.normalise(item.location) + item.part) for item in batch]
        is_new = ids.add(np.array(digests, "S16"))
        again += len(batch) - int(is_new.sum())
        pairs = [(item, digest.hex()) for item, digest in itertools.compress(zip(batch, digests, strict=True), is_new)]
        rows = [
            (image_id, item.location + item.part, key, item.location.uri, *item[3:8])
            for (item, image_id), key in zip(pairs, _unique(pairs, keys), strict=True)
        ]
        columns = zip(*rows, strict=True) if rows else [()] * len(schema.MANIFEST)
        manifest.write(pa.table(dict(zip(schema.MANIFEST.names, columns, strict=True)), schema=schema.MANIFEST))
    return manifest, again


def hashed(place: str) -> bytes:
    """The id of an image, as bytes. place: its normalised location, and which part of it."""
    return blake2b(place.encode(), digest_size=16).digest()


def _unique(pairs: list[tuple[Item, str]], known: SortedSet) -> list[str]:
    """Keys of items by their image ids, which no other row has. known: of all rows before; these are added.

    A number is smaller than a text; two texts of one number only cost a needless suffix.
    """
    keys, own = [_inside(item.key, image_id) for item, image_id in pairs], set()
    taken = known.contains(np.array([hash(key) for key in keys], np.int64))
    for i, (_, image_id) in enumerate(pairs):
        if taken[i] or hash(keys[i]) in own:
            stem, suffix = posixpath.splitext(keys[i])
            keys[i] = f"{stem}-{image_id[:8]}{suffix}"
        own.add(hash(keys[i]))
    known.add(np.fromiter(own, np.int64))
    return keys


def _inside(key: str, image_id: str) -> str:
    """A key that, used as a path, stays inside its folder."""
    if "//" in key or "./" in key or key.startswith("/") or key.endswith("."):
        return "/".join(part for part in key.split("/") if part not in ("", ".", "..")) or image_id
    return key
