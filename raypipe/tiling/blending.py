"""What was found in tiles as planes of the image: means of all that cover a pixel, those in the middle counting most.

Tiles come in the order of `Tiling.places`, and only those that reach below the finished rows are held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, pairwise, product
from typing import NamedTuple

import numpy as np

from raypipe.tiling.places import Place
from raypipe.types import LabelMap, Segments

HALF = 0.5  # of the weight at a pixel


class Tile(NamedTuple):
    """What was found in a tile, and of which segment of the image each of its segments is a part: by any key."""

    place: Place
    found: Segments
    keys: Sequence[Hashable]


class Facts:
    """What is told of the segments of an image besides their pixels, from those of its tiles."""

    def __init__(self):
        self.is_hard, self._notes = True, []
        self._parts: dict[Hashable, list[tuple]] = {}  # by key: area, label, score and embedding in each tile

    def seen(self, place: Place, found: Segments, keys: Sequence[Hashable] | None) -> Tile:
        """A tile, remembered. keys: None = the numbers of its segments."""
        areas = [float(plane.sum()) for plane in found.planes()]
        keys = range(len(areas)) if keys is None else keys
        self.is_hard = _is_hard(found)
        self._notes.append([*filter(None, found.note.split(","))])
        told = (found.labels, found.scores, () if found.embeddings is None else found.embeddings)
        told = ([*values] if len(values) else [None] * len(areas) for values in told)
        for key, *part in zip(keys, areas, *told, strict=True):
            self._parts.setdefault(key, []).append(part)
        return Tile(place, found, keys)

    def unite(self, groups: Sequence[Iterable[Hashable]]) -> None:
        """Let the keys of each group be one: the group's number."""
        self._parts = {i: [part for key in keys for part in self._parts[key]] for i, keys in enumerate(groups)}

    def of(self, keys: Sequence[Hashable]) -> dict:
        """Labels, scores, embeddings and note of segments, as arguments of Segments."""
        labels, scores, vectors = zip(*(_mean(self._parts[key]) for key in keys), strict=True) if keys else [()] * 3
        return {
            "labels": () if None in labels else labels,
            "scores": () if None in scores else scores,
            "embeddings": np.stack(vectors) if keys and vectors[0] is not None else None,
            "note": self._note(),
        }

    def _note(self) -> str:
        """The notes of all tiles; one of some tiles alone says so, unless it tells of a thing and not of an image."""
        counts = Counter(note for notes in self._notes for note in dict.fromkeys(notes))
        is_whole = {note: count == len(self._notes) or ":" in note for note, count in counts.items()}
        return ",".join(note if whole else f"in_tiles:{note}" for note, whole in is_whole.items())


def _mean(parts: Sequence[tuple]) -> tuple[str | None, float | None, np.ndarray | None]:
    """The label, score and embedding of a segment from areas, labels, scores and embeddings of its parts."""
    areas, labels, scores, vectors = zip(*parts, strict=True)
    shares = np.array(areas) if any(areas) else np.ones(len(areas))
    scored = [i for i, score in enumerate(scores) if score is not None and shares[i]]
    score = float(np.average([scores[i] for i in scored], weights=shares[scored])) if scored else None
    vector = None if vectors[0] is None else np.average(vectors, axis=0, weights=shares).astype(np.float32)
    return labels[0], score, vector


def _is_hard(found: Segments) -> bool:
    return not isinstance(found, LabelMap) and found.masks.dtype == bool


def blended(tiles: Iterable[Tile], size: tuple[int, int], facts: Facts) -> Segments:
    """Masks that may overlap, a plane of the image each."""
    planes = averaged(tiles, size)
    keys = sorted(planes) if all(isinstance(key, int) for key in planes) else [*planes]
    if not keys:
        return Segments(np.zeros((0, *size), bool if facts.is_hard else np.float32), **facts.of(keys))
    found = planes[keys[0]][None] if len(keys) == 1 else np.stack([planes[key] for key in keys])  # one: not copied
    return Segments(found, **facts.of(keys))


def averaged(tiles: Iterable[Tile], size: tuple[int, int]) -> dict[Hashable, np.ndarray]:
    """By key the average of the tiles, float32 (H, W), or of binary masks bool: more than half of the weight."""
    planes: dict[Hashable, np.ndarray] = {}
    for cell, covering in _cells(tiles):
        is_hard = _is_hard(covering[0][0].found)
        for key, average in _averages(cell, covering).items():
            if key not in planes:
                planes[key] = np.zeros(size, bool if is_hard else np.float32)
            planes[key][cell.slices] = average > HALF if is_hard else average
    return planes


def mapped(tiles: Iterable[Tile], size: tuple[int, int], facts: Facts, *, largest_first: bool = False) -> LabelMap:
    """Masks that never overlap, as a map: each pixel has the key of the largest average, or none."""
    index, values = np.zeros(size, np.uint16), np.zeros(size, np.float32)
    numbers: dict[Hashable, int] = {}
    areas = np.zeros(np.iinfo(np.uint16).max + 1, np.int64)
    for cell, covering in _cells(tiles):
        chosen, best = index[cell.slices], values[cell.slices]  # views: filled in place
        for key, average in _averages(cell, covering).items():
            chosen[average > best] = numbers.setdefault(key, len(numbers) + 1)
            np.maximum(best, average, out=best)
        is_none = sum(weight * _is_free(tile, cell) for tile, weight in covering) > HALF
        chosen[is_none] = best[is_none] = 0
        areas += np.bincount(chosen.ravel(), minlength=len(areas))
    keys = [key for key, number in numbers.items() if areas[number]]
    if largest_first:
        keys.sort(key=lambda key: -areas[numbers[key]])
    order = np.zeros(len(numbers) + 1, np.uint16)
    order[[numbers[key] for key in keys]] = np.arange(1, len(keys) + 1)
    for row in index:  # no second map
        row[:] = order[row]
    return (_HardMap if facts.is_hard else LabelMap)(index, values, count=len(keys), **facts.of(keys))


class _HardMap(LabelMap):
    """A map of binary masks; its values say how sure tiles are of them together."""

    @property
    def masks(self) -> np.ndarray:
        return np.stack([*self.planes()]) if self.count else np.zeros((0, *self.index.shape), bool)

    def planes(self) -> Iterator[np.ndarray]:
        return (self.index == i for i in range(1, self.count + 1))


def _averages(cell: Place, covering: Sequence[tuple[Tile, np.ndarray]]) -> dict[Hashable, np.ndarray]:
    """By key the weighted mean over the tiles that cover a cell, float32 in [0, 1], or the mask of the only tile."""
    sums: dict[Hashable, np.ndarray] = {}
    for tile, weight in covering:
        for i, key in enumerate(tile.keys):
            part = _part(tile, i, cell)
            part = part if len(covering) == 1 else part * weight
            sums[key] = np.minimum(sums[key] + part, 1) if key in sums else part
    return sums


def _part(tile: Tile, i: int, cell: Place) -> np.ndarray:
    """The piece of a tile's mask in a part of it."""
    found, here = tile.found, tile.place.of(cell)
    if isinstance(found, LabelMap):
        return np.where(found.index[here] == i + 1, found.values[here], np.float32(0))
    return found.masks[i][here]


def _is_free(tile: Tile, cell: Place) -> np.ndarray:
    """Where in a part of a tile none of its segments is."""
    found, here = tile.found, tile.place.of(cell)
    return found.index[here] == 0 if isinstance(found, LabelMap) else ~found.masks[:, *here].any(0)


def _cells(tiles: Iterable[Tile]) -> Iterator[tuple[Place, list[tuple[Tile, np.ndarray]]]]:
    """The parts of the image that the same tiles cover, with these and their weights, which sum to 1."""
    held: list[Tile] = []
    done = 0
    for tile in chain(tiles, [None]):
        top = tile.place.top if tile else max((each.place.bottom for each in held), default=0)
        if top > done:
            yield from _between(held, done, top)
            done, held = top, [each for each in held if each.place.bottom > top]
        if tile:
            held.append(tile)


def _between(held: Sequence[Tile], top: int, bottom: int) -> Iterator[tuple[Place, list[tuple[Tile, np.ndarray]]]]:
    """Those between two rows of pixels, from the tiles that reach there."""
    places = [tile.place for tile in held]
    rows = sorted({top, bottom, *(y for each in places for y in (each.top, each.bottom) if top < y < bottom)})
    columns = sorted({x for each in places for x in (each.left, each.right)})
    for (y, y_end), (x, x_end) in product(pairwise(rows), pairwise(columns)):
        cell = Place(0, 0, y, x, y_end, x_end)
        if covering := [tile for tile in held if tile.place.shared(cell)]:
            weights = [tile.place.weight(cell) for tile in covering]
            total = sum(weights)
            yield cell, [(tile, weight / total) for tile, weight in zip(covering, weights, strict=True)]
