"""Rows of large images as rows of their tiles, and back: each tile goes through the method as an image does."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from raypipe.tiling import Place, Tiling, merge
from raypipe.types import PatternSegmenter, Segmenter, Segments

log = logging.getLogger("raypipe")
OF_PIXELS = ("image", "foreground", "regions")  # what of a row is cut with it


def check(tiling: Tiling, segmenter: Segmenter) -> None:
    """Raise ValueError for a method of which tiles make no sense."""
    if reason := segmenter.untiled():
        raise ValueError(f"--tiles {tiling}: not with {segmenter.name}, {reason}")
    if segmenter.across == "object" and not tiling.overlap:
        text = f"{segmenter.name} finds objects, which are joined where tiles overlap"
        raise ValueError(f"--tiles {tiling}: {text}; OVERLAP must be above 0")
    if segmenter.across == "index" and not isinstance(segmenter, PatternSegmenter):
        _say_each(segmenter.name)


@functools.cache
def _say_each(method: str) -> None:
    """Say in the log, once, what a method of one object makes of tiles without any."""
    log.info("%s looks for an object in each tile, also where there is none", method)


def places(row: dict, tiling: Tiling) -> list[Place]:
    """The tiles of a row's image, without those that hold no foreground; none where it is its only tile or has none."""
    found = tiling.places(row["image"].shape[:2])
    if len(found) == 1:
        return []
    foreground = row.get("foreground")
    return [place for place in found if foreground is None or foreground[place.slices].any()]


def cut(rows: Iterable[dict], tiling: Tiling) -> Iterator[dict]:
    """The tiles of all rows, one after the other; of a row without tiles the row itself.

    `part_of` is the number of a tile's row, `place` where it lies.
    """
    for number, row in enumerate(rows):
        chosen = places(row, tiling)
        if not chosen:
            yield row | {"part_of": number, "place": None}
        for place in chosen:
            pixels = {name: np.ascontiguousarray(row[name][place.slices]) for name in OF_PIXELS if name in row}
            yield pixels | {"error": "", "note": "", "part_of": number, "place": place}


def whole(row: dict, parts: Iterator[dict], segmenter: Segmenter) -> dict:
    """A row from its tiles' rows as the method leaves them: its `found` and `seconds`, and a note on those that failed.

    parts: in the order of `cut`, and consumed one by one. If all failed, the error is that of the first.
    """
    first = next(parts)
    if first["place"] is None:
        return {name: value for name, value in first.items() if name not in ("part_of", "place")}
    failed, seconds = [], [0.0]

    def good(tiles: Iterable[dict]) -> Iterator[tuple[Place, Segments]]:
        for tile in tiles:
            if tile["error"]:
                failed.append((tile["place"], tile["error"]))
                continue
            seconds.append(tile["seconds"])
            yield tile["place"], tile["found"]

    tiles = good(chain([first], parts))
    start = next(tiles, None)
    if start is None:
        return row | {"error": failed[0][1]}
    size, kind = row["image"].shape[:2], {"across": segmenter.across, "exclusive": segmenter.exclusive}
    found = merge(chain([start], tiles), size, **kind)
    names = [f"tile_failed:{place.row}/{place.col}" for place, _ in failed]
    notes = [*filter(None, [row.get("note"), found.note, *names])]
    return row | {"found": found, "note": ",".join(notes), "seconds": sum(seconds)}
