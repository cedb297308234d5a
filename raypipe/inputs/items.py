"""One image of the input as its listing finds it, before it gets an id."""

from __future__ import annotations

import posixpath
from collections import Counter
from typing import NamedTuple

from raypipe import storage
from raypipe.storage import Location

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
    public: bool = False  # an address out of a list: it may lead to public addresses of the web alone


def unlisted(location: Location, name: str, start: int) -> Item:
    """The row that stands for all that a damaged file holds from byte `start` on: it becomes an error row at fetch."""
    return Item(location, f"{posixpath.splitext(storage.as_text(name))[0]}/damaged", "#damaged", start)


class LeftOut:
    """Records of lists and tables that give no row: how many for each reason, and where the first one stands."""

    def __init__(self) -> None:
        self._counts, self._first = Counter(), {}

    def add(self, reason: str, place: str) -> None:
        """Count a record. place: such as `line 3`."""
        self._counts[reason] += 1
        self._first.setdefault(reason, place)

    def add_to(self, skipped: Counter) -> None:
        """Put the reasons, each with its first place, among all that a listing left out."""
        skipped.update({f"{reason} (first: {self._first[reason]})": count for reason, count in self._counts.items()})
