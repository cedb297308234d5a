"""GeoJSON: the masks of georeferenced images as polygons along pixel edges, for QGIS, GDAL and web maps."""

from __future__ import annotations

import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from raypipe import images as pictures
from raypipe import masks, storage
from raypipe.export.about import About
from raypipe.export.formats.coco import EMPTY
from raypipe.export.target import Target
from raypipe.types import BadImage

PIXEL_SCALE, TIE_POINTS, TRANSFORMATION, GEO_KEYS = 33550, 33922, 34264, 34735  # GeoTIFF 1.1, tags
RASTER_TYPE, GEOGRAPHIC, PROJECTED = 1025, 2048, 3072  # GeoTIFF 1.1, keys
POINT, USER_DEFINED = 2, 32767  # RasterPixelIsPoint; no EPSG code
WORLD_BYTES = 4096  # a world file has six lines
UNKNOWN = "files name no coordinate system: their image does not say its own"
LONGITUDE_LATITUDE = 4326  # EPSG; what GeoJSON means without a word

EAST, SOUTH, WEST, NORTH = range(4)
# How outlines turn at a corner: the pixels around that are set (1 = upper left, 2 = upper right, 4 = lower left,
# 8 = lower right, added), the way in, the way out.
TURNS = (
    ((8, 8 + 1), NORTH, EAST),
    ((4, 4 + 2), EAST, SOUTH),
    ((1, 1 + 8), SOUTH, WEST),
    ((2, 2 + 4), WEST, NORTH),
    ((15 - 8,), WEST, SOUTH),
    ((15 - 4,), NORTH, WEST),
    ((15 - 2,), SOUTH, EAST),
    ((15 - 1,), EAST, NORTH),
)
BESIDE = np.array([(0, 0), (0, -1), (-1, -1), (-1, 0)])  # from a corner to the pixel on the right of a way out


class Placed(NamedTuple):
    """Where an image lies: the affine transform (a, b, c, d, e, f) from (column, row) of pixel corners to (x, y).

    x = a * column + b * row + c, y = d * column + e * row + f. epsg: the code of the coordinate system, or None.
    """

    transform: tuple[float, ...]
    epsg: int | None


def place(row: dict, content: bytes) -> Placed:
    """Where a row's original lies: by its GeoTIFF tags, or else by the world file beside it.

    Raises BadImage for an image without either, and for one that was turned upright: its masks no longer fit.
    """
    if pictures.orientation(content) != 1:
        raise BadImage("export", "turned", f"{row['uri']} is stored turned, its place is that of the stored picture")
    try:
        found = of_tags(content)
    except Exception as error:  # tags may hold anything
        raise BadImage("export", "no place", f"{row['uri']} has damaged GeoTIFF tags: {error}") from None
    found = found or of_world_file(row["uri"])
    if found is None:
        raise BadImage("export", "no place", f"{row['uri']} has neither GeoTIFF tags nor a world file beside it")
    a, b, _, d, e, _ = found.transform
    if not np.isfinite(found.transform).all() or a * e == b * d:
        raise BadImage("export", "no place", f"{row['uri']} has a transform without area: {found.transform}")
    return found


ORIGINALS, CATEGORIES = place, True


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write KEY.geojson per image: a MultiPolygon for each segment, in the coordinates of the image.

    Polygons follow the edges of pixels, holes included: those whose centre lies inside are exactly the mask's. Shells
    run counter-clockwise, holes clockwise (RFC 7946). The RFC knows longitude and latitude alone; files in another
    coordinate system name it in the member `crs` of the older specification, which GDAL and QGIS read. Soft masks and
    embeddings are left out.
    """
    remarks = Counter()
    for row in images:
        placed: Placed = row["picture"]
        found = [segment for segment in row["segments"] if segment["area"]]
        remarks[EMPTY] += len(row["segments"]) - len(found)
        remarks[UNKNOWN] += placed.epsg is None
        content = {"type": "FeatureCollection", "source": about.text(), "key": row["key"], "image_id": row["image_id"]}
        if placed.epsg not in (None, LONGITUDE_LATITUDE):
            content["crs"] = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{placed.epsg}"}}
        content["features"] = [_feature(row, segment, placed, about) for segment in found]
        target.put(json.dumps(content).encode(), target.name(row, ".geojson"))
    return remarks


def of_tags(content: bytes) -> Placed | None:
    """What a GeoTIFF's tags say; None for another file, and for one without a transform."""
    if content[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    tags = pictures.READERS["TIFF"](io.BytesIO(content)).tag_v2
    keys = np.array(tags.get(GEO_KEYS, (1, 1, 0, 0)), int).reshape(-1, 4)[1:]  # key, where, count, value
    keys = {int(key): int(value) for key, where, _, value in keys if where == 0}
    if len(matrix := tags.get(TRANSFORMATION, ())) == 16:
        a, b, _, c, d, e, _, f = matrix[:8]
    elif len(scale := tags.get(PIXEL_SCALE, ())) >= 2 and len(tie := tags.get(TIE_POINTS, ())) >= 6:
        a, b, c, d, e, f = scale[0], 0, tie[3] - tie[0] * scale[0], 0, -scale[1], tie[4] + tie[1] * scale[1]
    else:
        return None
    if keys.get(RASTER_TYPE) == POINT:  # the tags speak of pixels' centres
        c, f = c - (a + b) / 2, f - (d + e) / 2
    code = keys.get(PROJECTED, keys.get(GEOGRAPHIC, USER_DEFINED))
    return Placed(tuple(map(float, (a, b, c, d, e, f))), None if code in (0, USER_DEFINED) else code)


def of_world_file(uri: str) -> Placed | None:
    """What the world file of an image says: photo.jgw, photo.jpgw or photo.wld beside photo.jpg. None without one."""
    stem, suffix = posixpath.splitext(uri)
    for name in (stem + suffix[:2] + suffix[-1:] + "w", f"{uri}w", f"{stem}.wld"):  # .jgw, .jpgw, .wld
        try:
            text = storage.read_bytes(name, max_bytes=WORLD_BYTES, public=True)
            a, d, b, e, x, y = map(float, text.split())
        except ValueError:
            raise BadImage("export", "world file", f"{name} has not the six numbers of a world file") from None
        except BadImage as error:
            if error.kind not in ("missing", "not_a_file", "refused"):
                raise
        else:
            return Placed((a, b, x - (a + b) / 2, d, e, y - (d + e) / 2), None)  # x, y: the first pixel's centre
    return None


def _feature(row: dict, segment: dict, placed: Placed, about: About) -> dict:
    a, b, c, d, e, f = placed.transform
    turned = -1 if a * e < b * d else 1  # the usual image has north above: what runs clockwise there does so on the map

    def coordinates(ring: np.ndarray) -> list:
        columns, rows = ring[::turned].T
        return np.stack([a * columns + b * rows + c, d * columns + e * rows + f], 1).tolist()

    parts = [[coordinates(ring) for ring in part] for part in polygons(masks.decode_rle(segment))]
    told = {"category": about.name(segment), "score": segment["score"], "segment": segment["segment"]}
    return {
        "type": "Feature",
        "geometry": {"type": "MultiPolygon", "coordinates": parts},
        "properties": told | {"pixels": segment["area"], "key": row["key"], "image_id": row["image_id"]},
    }


def polygons(mask: np.ndarray) -> list[list[np.ndarray]]:
    """The 4-connected parts of a mask, each as its shell and then its holes. mask: bool (H, W).

    Rings are int64 (P, 2), closed: (column, row) of the pixel corners at which the outline turns. Shells run clockwise
    as one sees the image, holes the other way. No ring meets itself; a hole may touch another ring at a corner.
    """
    import cv2

    _, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    shells, holes = {}, []
    for pixel, ring in _rings(mask):
        (x, y), (next_x, next_y) = ring[:-1].T, ring[1:].T
        if (x * next_y - next_x * y).sum() > 0:  # twice the area
            shells[parts[pixel]] = [ring]
        else:
            holes.append((parts[pixel], ring))
    for part, ring in holes:
        shells[part].append(ring)
    return list(shells.values())


def _rings(mask: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """The closed outlines of a mask, cut where they meet themselves, each with a pixel of the mask along it."""
    points, pixels, following = _turns(mask)
    left = np.ones(len(points), bool)
    for start in range(len(points)):
        path, places, turn = [], {}, start
        while left[turn]:
            left[turn] = False
            if points[turn] in places:  # the outline has been here: what lies between is a ring of its own
                first = places[points[turn]]
                yield pixels[path[first]], np.array([points[each] for each in [*path[first:], path[first]]])
                for each in path[first:]:
                    del places[points[each]]
                del path[first:]
            places[points[turn]] = len(path)
            path.append(turn)
            turn = following[turn]
        if path:
            yield pixels[path[0]], np.array([points[each] for each in [*path, path[0]]])


def _turns(mask: np.ndarray) -> tuple[list[tuple], list[tuple], list[int]]:
    """Where the outlines of a mask turn, with the mask on the right of their direction.

    Returns for each turn the corner, (column, row); the mask's pixel beside the way out of it, (row, column); and the
    number of the turn that this way leads to. Where two pixels meet at a corner alone, each has its own turn.
    """
    padded = np.pad(mask, 1)
    around = padded[:-1, :-1] + 2 * padded[:-1, 1:] + 4 * padded[1:, :-1] + 8 * padded[1:, 1:].astype(np.uint8)
    found = [np.argwhere(np.isin(around, corners)) for corners, *_ in TURNS]
    turns = np.concatenate([np.insert(each, 2, i, axis=1) for i, each in enumerate(found)])
    rows, columns, kind = turns.T
    ways = np.array([way for _, *way in TURNS])
    into, out = ways[kind, 0], ways[kind, 1]
    following = np.empty(len(turns), int)
    for way, order in enumerate((np.lexsort((columns, rows)), np.lexsort((rows, columns))) * 2):
        following[order[out[order] == way]] = order[into[order] == way]  # along a line each start has its end
    pixels = np.stack([rows, columns], 1) + BESIDE[out]
    return list(zip(columns.tolist(), rows.tolist(), strict=True)), list(map(tuple, pixels)), following.tolist()
