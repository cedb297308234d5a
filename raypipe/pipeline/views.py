"""`label --jitter N`: each image again, changed a little, and how much of every segment comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raypipe import masks
from raypipe.types import Segmenter

# Of each round of views: small enough a change that a person would draw the same masks.
SCALES = (0.8, 0.9, 0.7, 0.6)  # of both sides
CROPS = (0.9, 0.8, 0.95, 0.7)  # of both sides, about the centre
SEEDS = (1000, 2000, 3000, 4000)  # beyond those from `seed` on that a method tries itself (gloper)


@dataclass(frozen=True)
class View:
    """An image cropped, then scaled, then mirrored; or looked at with another seed."""

    crop: float = 1.0
    scale: float = 1.0
    is_mirrored: bool = False
    seed: int = 0  # added to the method's

    def row(self, row: dict) -> dict:
        """A decoded row as this view has it: `image`, and `foreground` or `regions` where it has them."""
        return {"error": "", "note": "", "image": self.of(row["image"])} | {
            name: self.of_numbers(row[name]) for name in ("foreground", "regions") if name in row
        }

    def of(self, image: np.ndarray) -> np.ndarray:
        """An image, uint8 (H, W, 3), in this view: (h, w, 3), at least a pixel."""
        import cv2

        seen = image[self.window(image.shape[:2])]
        if self.scale != 1:
            height, width = self._scaled(seen.shape[:2])
            seen = cv2.resize(np.ascontiguousarray(seen), (width, height), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(seen[:, ::-1] if self.is_mirrored else seen)

    def of_numbers(self, plane: np.ndarray) -> np.ndarray:
        """A mask or numbered regions (H, W) of any type in this view: of each pixel the nearest one's value."""
        seen = plane[self.window(plane.shape)]
        sides = zip(seen.shape, self._scaled(seen.shape), strict=True)
        nearest = [(np.arange(new) * 2 + 1) * old // (2 * new) for old, new in sides]
        seen = seen[np.ix_(*nearest)]
        return np.ascontiguousarray(seen[:, ::-1] if self.is_mirrored else seen)

    def back(self, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A mask of this view, bool (h, w), in the image: bool, of `size` (H, W), False outside of `window`."""
        import cv2

        found, window = np.zeros(size, bool), self.window(size)
        height, width = found[window].shape
        mask = np.ascontiguousarray(mask[:, ::-1] if self.is_mirrored else mask)
        if self.scale != 1:
            mask = cv2.resize(mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR) > 127
        found[window] = mask
        return found

    def window(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """What it has of an image of `size` (H, W): rows and columns, at least one of each."""
        cuts = (int(side * (1 - self.crop) / 2) for side in size)
        return tuple(slice(cut, side - cut) for cut, side in zip(cuts, size, strict=True))

    def _scaled(self, size: Sequence[int]) -> tuple[int, int]:
        return tuple(max(1, round(side * self.scale)) for side in size)


def views(segmenter: Segmenter) -> list[View]:
    """All views for a method, in the order in which they are taken.

    Mirrored, smaller, cropped, with another seed, and so on in other strengths. Without seeds for a method that draws
    no random numbers, which would agree with itself.
    """
    rounds = zip(SCALES, CROPS, SEEDS, strict=True)
    found = [
        [View(is_mirrored=True, scale=scale if i else 1), View(scale=scale), View(crop=crop)]
        + [View(seed=seed)] * segmenter.random
        for i, (scale, crop, seed) in enumerate(rounds)
    ]
    return sum(found, [])


def stability(
    segments: Sequence[dict], seen: Sequence[tuple[View, Sequence[dict]]], size: tuple[int, int], *, is_ordered: bool
) -> list[float | None]:
    """Of each segment the mean IoU, in [0, 1], with what its views have in its place; None where no view shows it.

    segments: of the image, as `masks.encode_segments` has them. seen: views, each with its segments in its own pixels.
    size: (height, width) of the image. is_ordered: segments without labels belong together by their index.
    """
    every = np.array([_agreement(segments, its, view, size, is_ordered) for view, its in seen])  # (V, N)
    counts = np.isfinite(every).sum(0)
    sums = np.nansum(every, 0)
    return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]


def _agreement(
    segments: Sequence[dict], its: Sequence[dict], view: View, size: tuple[int, int], is_ordered: bool
) -> np.ndarray:
    """IoU (N,) of segments with those of one view, where both can see; NaN for a segment that lies outside of that.

    An empty mask and an empty one, or none, agree.
    """
    theirs = [masks.encode_rle(view.back(masks.decode_rle(each), size)) for each in its]
    mine = list(segments)
    if view.crop != 1:
        shown = np.zeros(size, bool)
        shown[view.window(size)] = True
        mine = [masks.encode_rle(masks.decode_rle(each) & shown) for each in segments]
    iou, areas = masks.iou(mine, theirs), masks.areas(mine)
    found = (areas == 0).astype(np.float64)
    for i, j in _pairs([each["label"] for each in segments], [each["label"] for each in its], iou, is_ordered):
        found[i] = iou[i, j]
    is_outside = (areas == 0) & (np.array([each["area"] for each in segments]) > 0)
    found[is_outside] = np.nan
    return found


def _pairs(mine: list, theirs: list, iou: np.ndarray, is_ordered: bool) -> Iterator[tuple[int, int]]:
    """Indices of segments that are compared, each once: of one label, of one index, else so that IoU is greatest."""
    if is_ordered and not any(mine):
        yield from ((i, i) for i in range(min(iou.shape)))
        return
    from scipy.optimize import linear_sum_assignment

    for label in dict.fromkeys(mine):
        rows, columns = (np.flatnonzero([each == label for each in labels]) for labels in (mine, theirs))
        if len(rows) and len(columns):
            pairs = linear_sum_assignment(iou[np.ix_(rows, columns)], maximize=True)
            yield from ((rows[i], columns[j]) for i, j in zip(*pairs, strict=True))
