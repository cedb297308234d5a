"""Maps of parts: made of given regions, and taken apart into the segments that are left once siblings are joined."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raypipe.segmenters.zero_guidance.merging import Node
from raypipe.segmenters.zero_guidance.parts import Parts
from raypipe.types import BadImage, Segments

MOST = 1000  # regions of a map: each is a mask of the image's size (PASCAL Context has 459 classes)


def of_regions(regions: np.ndarray) -> Parts:
    """A part for each number but 0 of a map, under this number. regions: int (H, W). Raises BadImage for too many."""
    values, places = np.unique(regions, return_inverse=True)
    is_part = values != 0
    if (count := int(is_part.sum())) > MOST:
        text = f"{count} regions, at most {MOST} are named; give a map of classes or of fewer segments"
        raise BadImage("segment", "many_regions", text)
    numbers = np.where(is_part, is_part.cumsum() - 1, -1).astype(np.int32)
    return Parts(numbers[places].reshape(regions.shape), values[is_part].tolist(), "")


def segments(found: Parts, left: Mapping[int, Node], size: tuple[int, int]) -> Segments:
    """What is left of an image's parts at its (height, width), in the order of `arranged`."""
    index, ids = arranged(found, left, size)
    chosen = [left[tree_id] for tree_id in ids]
    one = "one_segment" if len(ids) == 1 and index.min() == 0 and found.note != "too_small" else ""
    notes = ",".join([found.note, one, *(node.name.note for node in chosen)]).split(",")
    vectors = np.array([node.image for node in chosen], np.float32) if chosen else np.zeros((0, 0), np.float32)
    return Segments(
        index == np.arange(len(ids)).reshape(-1, 1, 1),
        [node.name.text for node in chosen],
        [node.name.score for node in chosen],
        ",".join(dict.fromkeys(filter(None, notes))),
        embeddings=vectors,
    )


def arranged(found: Parts, left: Mapping[int, Node], size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """Segments at an image's size: the number of each pixel's or -1, int (H, W), and their tree ids.

    The largest is the first, of equal ones that of the lower tree id. What has no pixel is not among them.
    """
    ids, numbers = sorted(left), np.full(len(found.tree_ids) + 1, -1, np.int32)  # the last: of pixels of no part
    for number, tree_id in enumerate(ids):
        numbers[[*left[tree_id].leaves]] = number
    index, shape = numbers[found.segment_map], found.segment_map.shape
    rows, columns = (((np.arange(a) + 0.5) * b / a).astype(int) for a, b in zip(size, shape, strict=True))  # nearest
    pixels = np.outer(np.bincount(rows, minlength=shape[0]), np.bincount(columns, minlength=shape[1]))  # of each cell
    areas = [int(pixels[index == number].sum()) for number in range(len(ids))]
    order = sorted(filter(areas.__getitem__, range(len(ids))), key=lambda number: -areas[number])
    places = np.full(len(ids) + 1, -1, np.int32)
    places[order] = np.arange(len(order))
    return places[index][rows[:, None], columns], [ids[number] for number in order]
