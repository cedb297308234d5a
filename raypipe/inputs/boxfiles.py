"""Boxes that a detector found: a file of MegaDetector results, whose boxes become the foreground of images."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from raypipe import storage
from raypipe.lookup import suggest
from raypipe.types import BadImage

MAX_BYTES = 1 << 31  # of a file of results; a million images take some 300 MB
CONFIDENCE = 0.2  # from which a box counts where the file recommends nothing: MegaDetector 5's recommendation
ANIMAL = "animal"  # the category whose boxes count; in a file without it all do


def match(uri: str, keys: Iterable[str]) -> dict[str, list]:
    """The boxes of the images that the file knows: keys -> [[x, y, width, height], ...], relative to the image.

    uri: MegaDetector results, format 1.0 to 1.6. Boxes of the category `animal`, where there is one, from the
    confidence on that the file recommends (`typical_detection_threshold`) or CONFIDENCE. An entry is an image's whose
    `file` is its key, or a longer path that ends with it and is the only one that does. Entries of failed files are not
    there. Raises ValueError for a file that is none, or that knows no image.
    """
    try:
        content = json.loads(storage.read_bytes(uri, max_bytes=MAX_BYTES))
        named = {number for number, name in content["detection_categories"].items() if name.strip().lower() == ANIMAL}
        told = content["info"].get("detector_metadata") or {}
        least = told.get("typical_detection_threshold") or CONFIDENCE
        found = {_path(each["file"]): _boxes(each, named, least) for each in content["images"]}
    except BadImage as error:
        raise ValueError(str(error)) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"it has no MegaDetector results: {type(error).__name__} {error}") from None
    keys, ends = list(keys), defaultdict(list)
    for path in found:
        ends[path.rpartition("/")[2]].append(path)
    known = {}
    for key in keys:
        longer = [path for path in ends[key.rpartition("/")[2]] if f"/{path}".endswith(f"/{key}")]
        path = key if key in found else longer[0] if len(longer) == 1 else None
        if path is not None and found[path] is not None:
            known[key] = found[path]
    if keys and not known:
        raise ValueError(f"none of its files is {keys[0]!r} or ends with it; {suggest(keys[0], list(found)[:1000])}")
    return known


def mask(boxes: list, size: tuple[int, int]) -> np.ndarray:
    """All pixels in any box, bool (H, W). boxes: as of `match`. Edges are rounded; a box has a pixel at least."""
    inside = np.zeros(size, bool)
    for x, y, width, height in boxes:
        left, top = round(x * size[1]), round(y * size[0])
        right, bottom = round((x + width) * size[1]), round((y + height) * size[0])
        inside[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return inside


def _path(file: str) -> str:
    return file.replace("\\", "/").removeprefix("./")


def _boxes(entry: dict, named: set[str], least: float) -> list | None:
    """The boxes that count; None for a file that failed. Raises ValueError for one that lies outside the image."""
    if entry.get("failure") or entry.get("detections") is None:
        return None
    found = [each for each in entry["detections"] if each["conf"] >= least and (each["category"] in named or not named)]
    boxes = [[float(side) for side in each["bbox"]] for each in found]
    if any(len(box) != 4 or not all(-0.01 <= side <= 1.01 for side in box) for box in boxes):
        raise ValueError(f"the boxes of {entry['file']!r} are not relative to the image")
    return [[max(0.0, x), max(0.0, y), width, height] for x, y, width, height in boxes]
