"""Large images in tiles: where these lie, and how what a method found in each of them becomes one result.

Arrays only. `places` cuts, `blending` makes planes of the image from planes of tiles, `objects` joins what is one.
Which segments of two tiles are one is the method's to say (`Segmenter.across`).
"""

from __future__ import annotations

from collections.abc import Iterable

from raypipe.tiling.blending import Facts, blended, mapped
from raypipe.tiling.objects import Placed, objects
from raypipe.tiling.places import Place, Tiling
from raypipe.types import Segments

__all__ = ["Place", "Placed", "Tiling", "merge"]


def merge(tiles: Iterable[tuple[Place, Segments]], size: tuple[int, int], *, across: str, exclusive: bool) -> Segments:
    """One result of an image of (height, width) from those of its tiles, of which some may be missing, not all.

    across: index, segments of the same number are one; label, those of the same name; object, those that agree where
    their tiles overlap (see `objects`). Values are averaged over the tiles that cover a pixel: a binary mask has the
    pixels that more than half of the weight is for, of exclusive ones the largest average has the pixel, if not more
    than half of the weight is for none. Scores and embeddings are means weighted by area. A note of some tiles alone
    becomes in_tiles:NOTE. Segments are in the order of their numbers, of their first tiles, or the largest first.
    """
    facts = Facts()
    if across == "object":
        return objects(tiles, size, facts, exclusive=exclusive)
    keyed = (facts.seen(place, found, found.labels if across == "label" else None) for place, found in tiles)
    return (mapped if exclusive else blended)(keyed, size, facts)
