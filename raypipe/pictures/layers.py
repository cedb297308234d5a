"""Small pictures for a page: an image as JPEG; its masks, their contours and the truth as PNGs to lay over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from raypipe import masks
from raypipe.inputs import originals
from raypipe.pictures import names
from raypipe.pictures.names import Name
from raypipe.pictures.overlay import COLOURS, HALO, OUTSIDE, TRUTH, draw_order, jpeg, png, resized, scaled, shrunk
from raypipe.types import BadImage

QUALITIES = ((1.0, 80), (1.0, 60), (0.75, 60), (0.5, 50), (0.25, 40))  # (scale, JPEG quality) until it is small enough


class Layers(NamedTuple):
    """Masks of an image, a run's or the true one, as data URIs of the size of the picture."""

    mask: str
    contour: str


class Picture(NamedTuple):
    """An image and what each run found in it."""

    original: str | None  # data URI; None where the file cannot be read
    remark: str  # why not; "" when it can
    width: int
    height: int
    layers: list[Layers | None]  # per run; None where the run has no masks of it
    truth: Layers | None  # None where it is not known
    colours: Mapping[str, int] = {}  # of categories, by name: places in COLOURS; a mask of none has that of its index
    names: Sequence[list[Name]] = ()  # on the objects of each run, and last of the truth; () where none are written
    line: float = 0.0  # how high these are

    @property
    def nbytes(self) -> int:
        """Length of the data URIs."""
        texts = [self.original or "", *(text for layers in [*self.layers, self.truth] if layers for text in layers)]
        return sum(map(len, texts))


def draw(
    content: bytes | BadImage,
    rows: list[dict | None],
    *,
    truth: np.ndarray | None = None,
    classes: Sequence[str] | None = None,
    side: int,
    max_bytes: int,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Picture:
    """The picture of one image. content: its file, as `originals.Originals` finds it, or what is wrong with that.

    rows: the masks row of each run, None where it has none. truth: the true mask, bool (H, W), where that is known; or
    a label map int (H, W) whose value i > 0 means classes[i], and one below 0 that a pixel does not count. classes: of
    such a map; where they are given, if only as (), a colour stands for a label, which is written on its object.
    change: what is done to the photograph first, such as blurring its faces; RGB uint8 (H, W, 3) before and after.
    side: length of the longer side in pixels. Quality and side go down until the data URIs fit into max_bytes together;
    at a quarter of the side they are taken as they are.
    """
    row, image, remark = next(row for row in rows if row), None, ""
    try:
        if isinstance(content, BadImage):
            raise content
        image = originals.decode(row, content)
        image = change(image) if change else image
    except BadImage as error:
        remark = error.message
    colours = {} if classes is None else _colours(rows, truth, classes)
    for scale, quality in QUALITIES:
        size = height, width = scaled((row["height"], row["width"]), side * scale)
        original = None if image is None else jpeg(resized(image, size), quality)
        layers = [each and draw_layers(each, size, colours) for each in rows]
        picture = Picture(original, remark, width, height, layers, _of_truth(truth, size, classes, colours), colours)
        if picture.nbytes <= max_bytes:
            break
    if classes is None:
        return picture
    named = _named(rows, truth, size, classes)
    line = names.height(size, max(map(len, named)))
    return picture._replace(names=[names.written(each, line) for each in named], line=line)


def draw_layers(row: dict, size: tuple[int, int], colours: Mapping[str, int] = MappingProxyType({})) -> Layers:
    """Masks and contours of one row. row: `segments`, `foreground`. size: (height, width) of the picture.

    colours: places in COLOURS by the masks' labels; where a mask has no such label its index counts.

    Masks are opaque: who lays them over an image chooses the opacity. What lies outside the foreground is black. Large
    masks are drawn first, so that small ones stay visible.
    """
    import cv2

    fill, lines = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    cross = np.ones((3, 3), np.uint8)
    if row["foreground"]:
        fill[~shrunk(masks.decode_rle(row["foreground"]), size)] = OUTSIDE
    for i in draw_order([segment["area"] for segment in row["segments"]]):
        mask = shrunk(masks.decode_rle(row["segments"][i]), size)
        colour = colours.get(row["segments"][i]["label"], i % len(COLOURS)) + 1
        fill[mask] = colour
        inner = cv2.erode(mask.astype(np.uint8), cross, iterations=2).astype(bool)
        outer = cv2.dilate(mask.astype(np.uint8), cross).astype(bool)
        lines[outer & ~mask & (lines == 0)] = HALO
        lines[mask & ~inner] = colour
    return Layers(png(fill), png(lines))


def draw_truth(truth: np.ndarray, size: tuple[int, int]) -> Layers:
    """The true mask in white, and its outline with a dark edge, so that it shows on any ground. truth: bool (H, W).

    The outline lies around the mask, and that of `draw_layers` inside its own: where a mask is right both are seen.
    """
    import cv2

    mask = shrunk(truth, size)
    grown = [cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=n) > 0 for n in (2, 3)]
    lines = np.where(mask, 0, np.where(grown[0], TRUTH, np.where(grown[1], HALO, 0)))
    return Layers(png(mask * np.uint8(TRUTH)), png(lines.astype(np.uint8)))


def draw_classes(
    truth: np.ndarray, size: tuple[int, int], classes: Sequence[str], colours: Mapping[str, int]
) -> Layers:
    """A label map in the colours of its classes, with what does not count in white, and the classes' outlines.

    Arguments as of `draw`.
    """
    import cv2

    small = _nearest(truth, size)
    fill = np.where(small < 0, TRUTH, 0).astype(np.uint8)
    for i in np.unique(small[small > 0]):
        fill[small == i] = colours[classes[i]] + 1
    numbers, cross = np.maximum(small, 0).astype(np.uint16), np.ones((3, 3), np.uint8)
    edge = (cv2.dilate(numbers, cross) != cv2.erode(numbers, cross)).astype(np.uint8)
    lines = np.where(edge, TRUTH, np.where(cv2.dilate(edge, cross), HALO, 0))
    return Layers(png(fill), png(lines.astype(np.uint8)))


def _of_truth(truth: np.ndarray | None, size: tuple[int, int], *named) -> Layers | None:
    if truth is None:
        return None
    return draw_truth(truth, size) if truth.dtype == bool else draw_classes(truth, size, *named)


def _colours(rows: list[dict | None], truth: np.ndarray | None, classes: Sequence[str]) -> dict[str, int]:
    """Of the classes that an image has, then of what else was found in it."""
    true = [] if truth is None or truth.dtype == bool else [classes[i] for i in np.unique(truth[truth > 0])]
    labels = [segment["label"] for row in rows if row for segment in row["segments"]]
    return names.colours([*true, *filter(None, labels)])


def _named(
    rows: list[dict | None], truth: np.ndarray | None, size: tuple[int, int], classes: Sequence[str]
) -> list[list[tuple[str, np.ndarray]]]:
    """The names of each run's masks, and last of the truth's, with their pixels at the picture's size."""
    found = []
    for row in rows:
        segments = row["segments"] if row else ()
        found.append([(each["label"] or "", shrunk(masks.decode_rle(each), size)) for each in segments])
    if truth is None or truth.dtype == bool:
        return [*found, []]
    small = _nearest(truth, size)
    return [*found, [(classes[i], small == i) for i in np.unique(small[small > 0])]]


def _nearest(truth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map at another size: each pixel has the number at its middle."""
    rows, columns = (((np.arange(n) + 0.5) * of / n).astype(int) for n, of in zip(size, truth.shape, strict=True))
    return truth[rows[:, None], columns]
