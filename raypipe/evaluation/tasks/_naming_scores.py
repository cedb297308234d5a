"""How segments of free text meet the classes of a ground truth (zero-guidance, ICCV 2023, section 4.2 and supplement).

Every score follows from two small tables: how many pixels each segment shares with each class, counted once, and how
similar each segment is to each class. So all thresholds cost hardly more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raypipe.masks import decode_rle, runs

VOID, GROUND = 0, 1  # columns of `Overlaps.pixels` before those of classes: ignored pixels, and those of no class
CURVE = np.arange(101) / 100  # overlaps at which recall and precision are taken
STEP = 0.01  # between them


class Overlaps(NamedTuple):
    """What an image's segments share with its ground truth. Where segments overlap, pieces are their intersections."""

    members: np.ndarray  # float64 (S, A), 1 where a segment has a piece
    pixels: np.ndarray  # float64 (A, 2 + G): of each piece those at VOID, at GROUND and of each class in `present`
    present: np.ndarray  # int64 (G,): numbers of the classes in the ground truth, ascending
    truth: np.ndarray  # float64 (2 + G,): the same of the whole image

    @property
    def shared(self) -> np.ndarray:
        """The same as `pixels` of each segment: float64 (S, 2 + G)."""
        return self.members @ self.pixels


class Scores(NamedTuple):
    """What one assignment of segments to classes comes to in one image, at each of T thresholds.

    float64, NaN where there is no measure. In the last five lines at the headline's threshold alone.
    """

    union: np.ndarray  # (T,): mean IoU over the classes, of all of a class's segments together
    best: np.ndarray  # (T,): the same of the segment that is most similar to it
    recall: np.ndarray  # (T,): share of classes with a segment of tau_iou or more
    area: np.ndarray  # (T,): under that share over the IoU
    precision: np.ndarray  # (T,): share of accepted segments with tau_iou or more
    accepted: np.ndarray  # int64 (T,): segments
    curve: np.ndarray  # (101,): recall over CURVE
    precise: np.ndarray  # (101,): precision over CURVE
    of_truth: tuple[float, float]  # recall and area of intersection / ground truth
    of_segment: tuple[float, float]  # the same of intersection / prediction
    classes: dict[int, float]  # IoU of each class, by its number


def overlaps(segments: Sequence[dict], label: np.ndarray) -> Overlaps:
    """Count the pixels of an image once. segments: run lengths. label: int32 (H, W), as `classmaps.read` gives it."""
    number, members = _painted(segments, label.size)
    if number is None:
        number, members = _pieces(segments, label.shape)
    most = int(label.max(initial=0))
    pieces = np.int32(members.shape[1])
    place = label.T.ravel() * pieces + number + pieces  # column by column, as runs are
    counts = np.bincount(place, minlength=(most + 2) * pieces).reshape(most + 2, -1)
    present = np.flatnonzero(counts[2:].any(1)) + 1
    pixels = counts[[0, 1, *(present + 1)]].T.astype(np.float64)
    return Overlaps(members, pixels, present, pixels.sum(0))


def scores(
    found: Overlaps,
    similarity: np.ndarray,
    numbers: np.ndarray,
    areas: np.ndarray,
    thresholds: np.ndarray,
    *,
    at: int,
    tau_iou: float,
    open_ground: bool,
) -> Scores:
    """Assign each segment to its most similar class, drop those below each threshold, and score what is left.

    similarity: float64 (S, C). numbers: int64 (C,), the class of each column; of equally similar ones the first counts.
    areas: (S,), of equally similar segments the largest one is the best. thresholds: (T,); a similarity equal to one
    is accepted. at: which of them is the headline's. tau_iou: of recall and precision. open_ground: a class that the
    ground truth does not have is not counted on pixels of no class (VOC). Ignored pixels never count.
    """
    assigned, top = numbers[similarity.argmax(1)], similarity.max(1)  # (S,)
    against = _Against(found, np.union1d(found.present, assigned), open_ground)
    is_of = assigned == against.classes[:, None]  # (K, S)
    accepted = top >= thresholds[:, None]  # (T, S)
    chosen = accepted[:, None] & is_of  # (T, K, S)
    counted = against.there | chosen.any(-1)  # (T, K): the classes of the image at each threshold
    covered = np.minimum(chosen @ found.members, 1) @ found.pixels
    union = np.where(counted, against.ratios(covered, np.arange(len(is_of)))[0], np.nan)
    ious, of_truth, of_segment = against.ratios(found.shared, np.searchsorted(against.classes, assigned))  # (S,)
    best = np.where(counted, _of_best(ious, chosen, is_of, np.lexsort((-areas, -top))), np.nan)
    reached = _reached(ious, chosen)
    recall, area = _recall(reached, counted, tau_iou)
    curve = (counted[at] & (reached[at] >= CURVE[:, None])).sum(1)
    others = (_reached(each, chosen[at : at + 1]) for each in (of_truth, of_segment))
    more = [_recall(each, counted[at : at + 1], tau_iou) for each in others]
    return Scores(
        _mean(union),
        _mean(best),
        recall,
        area,
        _share((accepted & (ious >= tau_iou)).sum(1), accepted.sum(1)),
        accepted.sum(1),
        _share(curve, counted[at].sum()),
        _share((accepted[at] & (ious >= CURVE[:, None])).sum(1), accepted[at].sum()),
        *((float(recall[0]), float(area[0])) for recall, area in more),
        dict(zip(against.classes.tolist(), union[at].tolist(), strict=True)),
    )


class _Against:
    """The classes of an image, those of its ground truth and those of its segments, and what counts for each."""

    def __init__(self, found: Overlaps, classes: np.ndarray, open_ground: bool):
        self.classes, self.there = classes, np.isin(classes, found.present)  # (K,)
        self._column = np.where(self.there, 2 + np.searchsorted(found.present, classes), VOID)
        self._truth = np.where(self.there, found.truth[self._column], 0)
        self._has_ground = self.there | (not open_ground)  # whether pixels of no class count

    def ratios(self, pixels: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """IoU, intersection / ground truth and intersection / segment, (...), of what is assigned to classes[which].

        pixels: (..., 2 + G), as of `Overlaps`. 0 / 0 is NaN.
        """
        column = np.broadcast_to(self._column[which], pixels.shape[:-1])[..., None]
        hits = np.where(self.there[which], np.take_along_axis(pixels, column, -1)[..., 0], 0)
        left_out = pixels[..., VOID] + np.where(self._has_ground[which], 0, pixels[..., GROUND])
        size, truth = pixels.sum(-1) - left_out, self._truth[which]
        with np.errstate(invalid="ignore", divide="ignore"):
            return hits / (size + truth - hits), hits / truth, hits / size


def _of_best(ious: np.ndarray, chosen: np.ndarray, is_of: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The IoU of each class's first segment in an order: (T, K), 0 where it is not chosen. is_of: (K, S)."""
    if not len(order):
        return np.zeros(chosen.shape[:2])
    first = order[is_of[:, order].argmax(1)]  # of a class without a segment another one's, which is never chosen
    return np.where(chosen[:, np.arange(len(first)), first], ious[first], 0.0)


def _reached(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The largest value of each class's segments: (T, K), -1 without one. values: (S,). chosen: (T, K, S).

    A class of several has none where one of them has none, NaN, as in the authors' code.
    """
    reached = np.where(chosen, values, -1).max(-1, initial=-1)
    return np.where(np.isnan(reached), -1, reached)


def _recall(reached: np.ndarray, counted: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """The share of classes that reach tau, and the area under that share over CURVE by trapezoids: two (T,)."""
    steps = np.searchsorted(CURVE, reached, side="right")  # how many of CURVE are reached
    under = STEP * np.where(steps == len(CURVE), steps - 1, np.maximum(steps - 0.5, 0))
    count = counted.sum(1)
    return _share((counted & (reached >= tau)).sum(1), count), _share((counted * under).sum(1), count)


def _painted(segments: Sequence[dict], size: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Which segment, from 1, each pixel belongs to, int32 (H W,), 0 for none; None where segments overlap.

    And which segment has which of these pieces: (S, S + 1).
    """
    starts, ends, owner = runs(segments)
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    members = np.eye(len(segments) + 1)[1:]
    if (starts[1:] < ends[:-1]).any():
        return None, members
    values, edges = np.zeros(2 * len(order) + 1, np.int32), np.zeros(2 * len(order) + 2, np.int64)
    values[1::2], edges[1:-1:2], edges[2:-1:2], edges[-1] = owner[order] + 1, starts, ends, size
    return np.repeat(values, np.diff(edges)), members


def _pieces(segments: Sequence[dict], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The same of segments that overlap: each piece, from 1, has other segments than the next, (S, A)."""
    number, of_piece = np.zeros(size[::-1], np.int32), [[]]
    for i, each in enumerate(segments):
        mask = decode_rle(each).T
        inside = number[mask]
        fresh = np.zeros(len(of_piece), np.int32)
        for old in np.flatnonzero(np.bincount(inside)):
            fresh[old] = len(of_piece)
            of_piece.append([*of_piece[old], i])
        number[mask] = fresh[inside]
    members = np.zeros((len(segments), len(of_piece)))
    for piece, its in enumerate(of_piece):
        members[its, piece] = 1
    return number.ravel(), members


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return part / whole


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, without NaN; NaN where there is nothing else."""
    return _share(np.nansum(values, -1), np.count_nonzero(~np.isnan(values), -1))
