"""What tells, without a label, whether a mask is good: signals of single masks; of all, higher is better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def matches(one: dict, other: dict, *, polarity: str = "fixed") -> np.ndarray:
    """For each mask of an image the IoU of the mask of another run that meets it best: float64 (N,), N >= 1.

    one, other: rows of `trust.EVERY_MASK` of one size; a run that found nothing counts as one empty mask. polarity:
    with "best" a mask of the other may stand for what it leaves of both foregrounds, as in `agree`. Works on the run
    lengths: no mask is decoded.
    """
    from pycocotools import mask as coco

    size = [one["height"], one["width"]]
    first, second = (rles(each["masks"], size) for each in (one, other))
    areas, others = (np.atleast_1d(coco.area(each)).astype(np.int64) for each in (first, second))
    found = np.asarray(coco.iou(first, second, [0] * len(second))).reshape(len(first), len(second))
    together = areas[:, None] + others[None, :]
    iou = np.where(together > 0, found, 1.0)
    if polarity == "best":
        pixels = union(one["foreground"], other["foreground"], size)
        shared = np.rint(np.where(together > 0, found, 0.0) * together / (1 + found))
        left = pixels - others[None, :]  # of both foregrounds, in which all masks lie
        whole = left + shared
        iou = np.maximum(iou, np.where(whole > 0, (areas[:, None] - shared) / np.maximum(whole, 1), 1.0))
    return iou.max(1)


def rles(masks: Sequence[str], size: Sequence[int]) -> list[dict]:
    """Masks as COCO's library takes them; an empty one where there is none."""
    return [{"size": size, "counts": counts.encode()} for counts in masks] or [empty(size)]


def empty(size: Sequence[int]) -> dict:
    """The run lengths of an empty mask."""
    from pycocotools import mask as coco

    return coco.encode(np.zeros(size, np.uint8, order="F"))


def union(one: str | None, other: str | None, size: Sequence[int]) -> int:
    """The pixels of both foregrounds; None = the whole image."""
    from pycocotools import mask as coco

    if one is None or other is None:
        return size[0] * size[1]
    return int(coco.area(coco.merge([{"size": size, "counts": each.encode()} for each in (one, other)])))
