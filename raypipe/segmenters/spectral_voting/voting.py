"""Candidate masks that vote for the most typical of them (Shin, Albanie, Xie, CVPRW 2022, section 3.2).

Masks of several grids meet on cells in which every one of them is constant, each with its height and width in px: as
exact as on pixels, and far fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALL, LARGE = 0.05, 0.95  # shares of the image below and above which a mask may be left out (the authors' code)


@dataclass(frozen=True)
class Vote:
    """What the candidates agreed on."""

    kept: np.ndarray  # (K,) indices of the candidates that voted
    scores: np.ndarray  # (K,) float64: sums of each one's IoU with all of them, itself included
    winner: int  # the candidate of the highest score, the first of equals
    all_filtered: bool  # no candidate passed the filters, so that all voted


def vote(
    masks: np.ndarray, heights: np.ndarray, widths: np.ndarray, *, remove_long: bool, remove_small_large: bool
) -> Vote:
    """The candidate that overlaps most with all others.

    masks: bool (M, h, w), M > 0, on cells of `heights` (h,) and `widths` (w,) px. remove_long: leave out masks that
    touch both the upper and the lower side, or both the left and the right one: they are background.
    remove_small_large: leave out masks below 5 % of the image or with a box above 95 % of it. Empty masks do not vote.
    Where nothing is left all vote, empty ones too.
    """
    areas = np.outer(heights, widths).ravel().astype(np.float64)
    flat = masks.reshape(len(masks), -1).astype(np.float64)
    rows, columns = (_extents(masks.any(axis), sides) for axis, sides in ((2, heights), (1, widths)))
    passed = flat.any(1)
    if remove_long:
        passed &= ~(_whole(rows, heights.sum()) | _whole(columns, widths.sum()))
    if remove_small_large:
        # the box as the authors count it: last minus first row, without the one that this leaves out
        boxes = (rows[:, 1] - rows[:, 0] - 1) * (columns[:, 1] - columns[:, 0] - 1)
        passed &= (flat @ areas >= SMALL * areas.sum()) & (boxes <= LARGE * areas.sum())
    kept = np.flatnonzero(passed) if passed.any() else np.arange(len(masks))
    scores = overlaps(flat[kept], areas).sum(1)
    return Vote(kept, scores, int(kept[scores.argmax()]), not passed.any())


def overlaps(masks: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """IoU of every two of M masks, (M, M): 0 for two empty ones. masks: float64 (M, P) of 0 and 1. areas: (P,) px.

    The authors add 1e-7 to the union. Here a mask agrees with itself exactly, so that two that are left always tie.
    """
    weighted = masks * areas
    shared = weighted @ masks.T
    own = weighted.sum(1)
    return shared / np.maximum(own[:, None] + own - shared, 1)


def _extents(touched: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """First px and the one behind the last of what M masks touch along an axis, (M, 2). touched: bool (M, cells)."""
    ends = np.concatenate([[0], np.cumsum(sides)])
    return np.stack([ends[touched.argmax(1)], ends[touched.shape[1] - touched[:, ::-1].argmax(1)]], axis=1)


def _whole(extents: np.ndarray, side: int) -> np.ndarray:
    return (extents[:, 0] == 0) & (extents[:, 1] == side)


def shared_cells(places: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The cells along one axis of an image on which several grids are constant.

    places: of each grid the index of its cell at every px, (S,), ascending. Returns the first px of each shared cell
    and how many it has.
    """
    changes = np.any([np.diff(each) != 0 for each in places], axis=0)
    first = np.concatenate([[0], np.flatnonzero(changes) + 1])
    return first, np.diff(np.append(first, len(places[0])))
