"""Objects that several tiles saw parts of: which masks are one, and masks that are small beside their image."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations, groupby, product
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from raypipe import masks
from raypipe.tiling.blending import Facts, Tile, averaged, mapped
from raypipe.tiling.places import Place
from raypipe.types import Segments

SAME = 0.5  # IoU within what two tiles share above which two masks are of one object
CUT = 2  # px from its tile's border within which a mask ends there


class Placed(Segments):
    """Binary masks that are small beside their image: each a part of it, as run lengths, until somebody asks."""

    def __init__(self, parts: Sequence[tuple[Place, dict]], size: tuple[int, int], **facts):
        """parts: where each mask lies, and what is set there, of `masks.encode_rle`. facts: as of Segments."""
        self.parts, self.size = parts, size
        vars(self).update(facts)

    @property
    def masks(self) -> np.ndarray:
        return np.stack([*self.planes()]) if self.parts else np.zeros((0, *self.size), bool)

    def planes(self) -> Iterator[np.ndarray]:
        for place, rle in self.parts:
            plane = np.zeros(self.size, bool)
            plane[place.slices] = masks.decode_rle(rle)
            yield plane


class Stored(NamedTuple):
    """The binary masks of a tile as run lengths, and their labels."""

    place: Place
    rles: list[dict]
    labels: Sequence[str]

    def tile(self, numbers: Sequence[int], keys: Sequence[Hashable], *, origin: tuple[int, int] = (0, 0)) -> Tile:
        """Some of its masks again, of an image that begins at (top, left) of the whole."""
        (y, x), (_, _, top, left, bottom, right) = origin, self.place
        place = Place(0, 0, top - y, left - x, bottom - y, right - x)
        chosen = [self.rles[i] for i in numbers]
        return Tile(place, Segments(masks.decode_segments(chosen, (bottom - top, right - left))), keys)

    def overlapping(self) -> np.ndarray:
        """Which of its masks have pixels in common: bool (N, N)."""
        return masks.iou(self.rles, self.rles) > 0

    def inside(self, other: Place) -> tuple[list[int], list[dict], list[bool]]:
        """Its masks with pixels in what it shares with another tile: their numbers, and their run lengths there.

        And whether they end there at a border of their tile that the other one goes beyond.
        """
        from pycocotools import mask as coco

        part, found = self.place.shared(other), []
        rows, columns = here = self.place.of(part)
        inner = [edge == mine != its for edge, mine, its in zip(part[2:], self.place[2:], other[2:], strict=True)]
        for i, (x, y, width, height) in enumerate(coco.toBbox(self.rles) if self.rles else ()):
            if x >= columns.stop or x + width <= columns.start or y >= rows.stop or y + height <= rows.start:
                continue  # not worth decoding
            mask = masks.decode_rle(self.rles[i])[here]
            if mask.any():
                ends = (mask[:CUT], mask[:, :CUT], mask[-CUT:], mask[:, -CUT:])
                is_cut = any(is_inner and end.any() for is_inner, end in zip(inner, ends, strict=True))
                found.append((i, masks.encode_rle(mask), is_cut))
        return tuple(map(list, zip(*found, strict=True))) if found else ([], [], [])


def objects(
    tiles: Iterable[tuple[Place, Segments]], size: tuple[int, int], facts: Facts, *, exclusive: bool
) -> Segments:
    """Binary masks, of which those are one object that agree where their tiles overlap (`_groups`).

    An object has the pixels that more than half of the weight of those tiles is for that have a part of it: another
    tile may have missed it. Exclusive ones are as `mapped` says. The largest is the first.
    """
    stored: list[Stored] = []
    for place, found in tiles:
        stored.append(Stored(place, [masks.encode_rle(plane > 0) for plane in found.planes()], found.labels))
        facts.seen(place, found, [(len(stored) - 1, i) for i in range(len(stored[-1].rles))])
    groups = _groups(stored)
    facts.unite(groups)
    if exclusive:
        key_of = {node: key for key, nodes in enumerate(groups) for node in nodes}
        numbers = (range(len(each.rles)) for each in stored)
        whole = (stored[t].tile(its, [key_of[t, i] for i in its]) for t, its in enumerate(numbers))
        return mapped(whole, size, facts, largest_first=True)
    parts = [_united(stored, nodes) for nodes in groups]
    areas = masks.areas([rle for _, rle in parts])
    order = sorted(range(len(parts)), key=lambda key: -areas[key])
    return Placed([parts[key] for key in order], size, **facts.of(order))


def _united(stored: Sequence[Stored], nodes: Sequence[tuple[int, int]]) -> tuple[Place, dict]:
    """One mask of an object's pieces: where it lies, and its run lengths there.

    nodes: the pieces as (number of the tile, number there), ascending. Those of one tile speak with one voice: as two
    each would be against the other.
    """
    if len(nodes) == 1:
        ((t, i),) = nodes
        return stored[t].place, stored[t].rles[i]
    its = {t: [i for _, i in pieces] for t, pieces in groupby(nodes, key=itemgetter(0))}
    tops, lefts, bottoms, rights = zip(*(stored[t].place[2:] for t in its), strict=True)
    top, left, bottom, right = min(tops), min(lefts), max(bottoms), max(rights)
    tiles = (stored[t].tile(numbers, [0] * len(numbers), origin=(top, left)) for t, numbers in its.items())
    return Place(0, 0, top, left, bottom, right), masks.encode_rle(averaged(tiles, (bottom - top, right - left))[0])


def _groups(stored: Sequence[Stored]) -> list[list[tuple[int, int]]]:
    """The masks that are one object, as (number of the tile, number there), ascending; by their first ones.

    What may be one (`_alike`) is joined, the most alike first, but never so that masks of one tile become one that
    overlap there, as a thing and its part. No order of the tiles matters.
    """
    overlapping = [each.overlapping() for each in stored]

    def may_join(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> bool:
        common = {t for t, _ in one} & {t for t, _ in other}  # few: most objects have a part in other tiles
        both = ([node for node in nodes if node[0] in common] for nodes in (one, other))
        return not any(t == u and overlapping[t][i, j] for (t, i), (u, j) in product(*both))

    group = {(t, i): [(t, i)] for t, each in enumerate(stored) for i in range(len(each.rles))}
    pairs = (pair for t, u in combinations(range(len(stored)), 2) for pair in _alike(stored, t, u))
    for *_, one, other in sorted(pairs):
        first, second = group[one], group[other]
        if first is not second and may_join(first, second):
            both = sorted(first + second)
            group.update(dict.fromkeys(both, both))
    return [nodes for node, nodes in group.items() if nodes[0] == node]


def _alike(stored: Sequence[Stored], t: int, u: int) -> Iterator[tuple[int, float, tuple[int, int], tuple[int, int]]]:
    """The masks of two tiles that may be one object, as (tile, number), the more likely the less the numbers before.

    Those of one label whose IoU within what the tiles share is above SAME. After these also those of which one is cut
    by its tile's border and has more than that share of its pixels there in the other: a piece of what goes on.
    """
    from pycocotools import mask as coco

    one, other = stored[t], stored[u]
    if not one.place.shared(other.place):
        return
    (first, a, a_cut), (second, b, b_cut) = one.inside(other.place), other.inside(one.place)
    if not (a and b):
        return
    alike = masks.iou(a, b)
    inside = np.where(np.array(a_cut)[:, None], coco.iou(a, b, [1] * len(b)), 0)  # shares of the masks in `a`
    inside = np.maximum(inside, np.where(np.array(b_cut), coco.iou(b, a, [1] * len(a)).T, 0))
    for k, m in np.argwhere(np.maximum(alike, inside) > SAME):
        i, j = first[k], second[m]
        if [*one.labels[i : i + 1]] == [*other.labels[j : j + 1]]:
            is_piece = int(alike[k, m] <= SAME)
            yield is_piece, -float((alike, inside)[is_piece][k, m]), (t, i), (u, j)
