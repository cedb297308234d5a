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
