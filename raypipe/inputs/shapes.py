"""Shapes that people draw in annotation tools, as masks: brush strokes, polygons, rectangles and run lengths."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence

import numpy as np

from raypipe import masks
from raypipe.inputs.maskkinds import HALF
from raypipe.types import BadImage

WORD = 8  # bits of a value in Label Studio's run lengths: one channel of a pixel
OUTSIDE = 0.01  # of a side, up to which a point may lie outside the image by rounding


def mask(shape: Mapping, size: Sequence[int]) -> np.ndarray:
    """A shape as bool (H, W). size: of its image, height and width.

    shape: `brush`: Label Studio's run lengths in base64, of RGBA, where pixels are set whose alpha is half or more, as
    its brush draws soft edges. `counts`: COCO's run lengths, as numbers or as text. `polygons`: lists of x, y, x, y,
    ... in pixels, each a part, drawn as pycocotools does, so as everybody who reads COCO. Raises BadImage.
    """
    try:
        if "brush" in shape:
            return brushed(base64.b64decode(shape["brush"]), size)
        return _of_coco(shape, size)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _corrupt(f"{type(error).__name__}: {error}") from error


def brushed(packed: bytes, size: Sequence[int]) -> np.ndarray:
    """The mask in Label Studio's run lengths (the format of @thi.ng/rle-pack): bool (H, W). Raises BadImage.

    packed: number of values (32 bits), bits of a value - 1 (5), four bit counts - 1 (4 each); then pieces: whether it
    is a run (1), which of the four (2), values - 1 in so many bits, and one value for the run, or each of them.
    """
    bits = f"{int.from_bytes(packed):0{8 * len(packed)}b}" if packed else ""
    values, height, width = 4 * math.prod(size), *size
    if len(bits) < 53 or int(bits[:32], 2) != values or int(bits[32:37], 2) + 1 != WORD:
        raise _corrupt(f"a brush mask that is not {width} x {height} pixels of four channels")
    sizes = [int(bits[at : at + 4], 2) + 1 for at in range(37, 53, 4)]
    found, lengths, at, left = [], [], 53, values
    while left > 0:
        digits = sizes[int(bits[at + 1 : at + 3] or "0", 2)]
        start = at + 3 + digits
        length = int(bits[at + 3 : start] or "0", 2) + 1
        is_run = bits[at : at + 1] == "1"
        at = start + WORD * (1 if is_run else length)
        left -= length
        if at > len(bits) or left < 0:
            raise _corrupt("a brush mask that ends early, or holds more than its image")
        found.append(int(bits[start:at], 2).to_bytes(1 if is_run else length))
        lengths += [length] if is_run else [1] * length
    pixels = np.repeat(np.frombuffer(b"".join(found), np.uint8), lengths)
    return pixels[3::4].reshape(height, width) >= HALF


def rectangle(
    x: float, y: float, width: float, height: float, degrees: float = 0, *, about: tuple[float, float] = (0, 0)
) -> list[float]:
    """The corners of a rectangle in pixels that is turned clockwise: x, y, x, y, ...

    about: the point that stays, in widths and heights from the upper left corner, which is that point in Label Studio.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    right, down = about[0] * width, about[1] * height
    sides = [(a - right, b - down) for a, b in ((0, 0), (width, 0), (width, height), (0, height))]
    return [each for a, b in sides for each in (x + right + a * cos - b * sin, y + down + a * sin + b * cos)]


def _of_coco(shape: Mapping, size: Sequence[int]) -> np.ndarray:
    from pycocotools import mask as coco

    height, width = size
    if "polygons" in shape:
        parts = [_inside(each, size) for each in shape["polygons"]]
        return coco.decode(coco.merge(coco.frPyObjects(parts, height, width))).astype(bool)
    counts = shape["counts"]
    if isinstance(counts, str):
        return _of_text({"size": [height, width], "counts": counts})
    lengths = np.array(counts, np.int64)
    if lengths.sum() != height * width or lengths.min() < 0:
        raise ValueError(f"run lengths of {lengths.sum():,} pixels, the image has {height * width:,}")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def _of_text(rle: dict) -> np.ndarray:
    """A mask in the text that COCO makes of run lengths. Raises ValueError where they are not those of its image."""
    try:
        masks.runs([rle])
        return masks.decode_rle(rle)
    except masks.DamagedMask:
        raise ValueError("run lengths that do not fill their image") from None


def _inside(polygon: Sequence[float], size: Sequence[int]) -> list[float]:
    """A polygon with the points at the border that rounding has put outside. Raises ValueError for others, or none."""
    points, sides = np.array(polygon, float).reshape(-1, 2), np.array([size[1], size[0]], float)
    if len(points) < 3:
        raise ValueError(f"a polygon of {len(points)} points, expected three or more")
    margin = np.maximum(1, OUTSIDE * sides)
    if not ((points >= -margin) & (points <= sides + margin)).all():
        raise ValueError("a polygon that reaches outside the image")
    return points.clip(0, sides).ravel().tolist()


def _corrupt(text: str) -> BadImage:
    return BadImage("decode", "corrupt", text)
