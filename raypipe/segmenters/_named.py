"""What methods that name each pixel share: scores of classes on a grid become a label map, some rows at a time.

Scores of all classes at an image's size would be 2.2 GB for 171 classes at 1536 x 2048 px, its label map is 16 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe.types import LabelMap

if TYPE_CHECKING:
    from torch import Tensor

TILE, TILE_ON_GPU = 1 << 20, 1 << 26  # scores at a time: 4 MB, which caches hold, and 256 MB
FAINT = -80.0  # exponent below which a class does not count; of smaller ones exp is denormal, and ten times slower


def label_map(
    scores_of: Callable[[int, int], Tensor],
    size: tuple[int, int],
    names: Sequence[str],
    *,
    temperature: float | None = None,
    background: bool = False,
    note: str = "",
) -> LabelMap:
    """The class with the largest score at each pixel, of equal ones the first; classes that are nowhere are left out.

    scores_of: rows `first` to before `last` of the scores, float32 (C, rows, W) on any device; they are overwritten.
    size: (H, W). names: of the classes in order. temperature: what is kept of a pixel is the largest of the softmax
    over its classes of temperature * score; None: the largest score itself, cut to [0, 1]. background: scores have one
    class more, the first, whose pixels belong to none.
    """
    import torch

    count, (height, width) = len(names) + background, size
    first, step, index = 0, max(1, TILE // (count * width)), None
    while first < height:
        here = slice(first, min(first + step, height))
        scores = scores_of(here.start, here.stop)
        if index is None:  # where the scores are: a GPU would wait for what a CPU does in between
            index, values = (scores.new_empty(size, dtype=kind) for kind in (_fitting(count), torch.float32))
            pixels = scores.new_zeros(count, dtype=torch.int64)  # of each class
            step = max(1, (TILE_ON_GPU if scores.is_cuda else TILE) // (count * width))
        largest = scores.amax(0)
        index[here] = first_of(scores, largest)
        values[here] = largest.clamp_(0, 1) if temperature is None else tempered(scores, largest, temperature)
        pixels += torch.bincount(index[here].flatten(), minlength=count)
        first = here.stop
    present = pixels > 0
    present[:background] = False
    places = (present.cumsum(0) * present).to(index.dtype)
    for rows in index.split(step):
        rows.copy_(places[rows.long()])
    if background:
        values.masked_fill_(index == 0, 0)
    found = index.cpu().numpy()
    labels = [names[i - background] for i in present.nonzero().flatten().tolist()]
    return LabelMap(found.view(f"u{found.itemsize}"), values.cpu().numpy(), labels, note=note)


def _fitting(count: int):
    """The smallest of torch's types for numbers up to a count whose bits are those of an unsigned one."""
    import torch

    return torch.uint8 if count < 1 << 8 else torch.int16 if count < 1 << 15 else torch.int32


def first_of(scores: Tensor, largest: Tensor) -> Tensor:
    """The first class whose score is the largest: int32 (rows, W). Faster than torch's maximum with its index.

    scores: (C, rows, W). largest: over the classes, (rows, W).
    """
    import torch

    count = len(scores)
    left = torch.arange(count, 0, -1, dtype=torch.int32, device=scores.device)[:, None, None]
    return count - (scores == largest).to(torch.int32).mul_(left).amax(0)


def tempered(scores: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """The largest of the softmax of temperature * scores over the classes: exp(m - logsumexp), float32 (rows, W).

    scores: (C, rows, W), overwritten. largest: over the classes, (rows, W).
    """
    return scores.sub_(largest).mul_(temperature).clamp_(min=FAINT).exp_().sum(0).reciprocal_()


class Upsampling:
    """Rows of a grid that is enlarged to an image, as torch's bilinear interpolation of the whole gives them."""

    def __init__(
        self, grid: Tensor, size: tuple[int, int], *, through: Sequence[tuple[tuple[int, int], tuple[int, int]]] = ()
    ):
        """grid: float32 (C, h, w). size: (H, W) of the image.

        through: sizes that the grid has in between, each with the part of it, from the left and the top, that is kept
        and enlarged further.
        """
        self._grid, self._wide, self._place = grid, None, None
        steps = [*through, *[(size, size)] * (not through or through[-1][1] != size)]
        self._rows, self._columns = (
            _weights(grid.shape[1 + axis], [(to[axis], kept[axis]) for to, kept in steps], grid.device)
            for axis in (0, 1)
        )

    def __call__(self, first: int, last: int) -> Tensor:
        """Rows first to before last: float32 (C, last - first, W)."""
        starts, weights = (each[first:last] for each in self._rows)
        wide = self._widened(starts[0], starts[-1] + weights.shape[1])  # (C, k, W)
        return (mixed_at_once if wide.is_cuda else mixed)(wide, starts - starts[0], weights)

    def _widened(self, first: int, last: int) -> Tensor:
        """Rows of the grid at the image's width. Kept, since the next rows of the image often lie between them too."""
        if self._place != (first, last):
            starts, weights = self._columns
            rows = self._grid[:, first:last]
            self._wide = rows[..., starts] * weights[:, 0]
            for k in range(1, weights.shape[1]):
                self._wide.addcmul_(rows[..., starts + k], weights[:, k])
            self._place = (first, last)
        return self._wide


def mixed(wide: Tensor, starts: np.ndarray, weights: Tensor) -> Tensor:
    """Weighted sums (C, n, W) of neighbouring rows of (C, k, W).

    starts: the first row of each sum, (n,), ascending. weights: of that row and those that follow it, (n, K).
    """
    import torch

    count = len(starts)
    rows = wide.new_empty((len(wide), count, wide.shape[2]))
    edges = [0, *np.flatnonzero(np.diff(starts)) + 1, count]
    for begin, end in zip(edges, edges[1:], strict=False):  # sums of the same rows
        part, its = rows[:, begin:end], weights[begin:end]
        for k in range(weights.shape[1]):
            one, share = wide[:, starts[begin] + k][:, None], its[:, k, None]
            torch.mul(one, share, out=part) if k == 0 else part.addcmul_(one, share)
    return rows


def mixed_at_once(wide: Tensor, starts: np.ndarray, weights: Tensor) -> Tensor:
    """As `mixed`, for a GPU: there each of a hundred small steps takes as long as all of them."""
    import torch

    places = torch.from_numpy(starts).to(wide.device)
    rows = wide[:, places] * weights[:, 0, None]
    for k in range(1, weights.shape[1]):
        rows.addcmul_(wide[:, places + k], weights[:, k, None])
    return rows


def _weights(cells: int, steps: Sequence[tuple[int, int]], device) -> tuple[np.ndarray, Tensor]:
    """How each pixel of an axis comes from the cells of a grid, through sizes of which a first part is kept.

    Returns the first cell (n,) and the weights of it and those that follow it (n, K).
    """
    import torch

    places, weights = np.arange(cells)[:, None], np.ones((cells, 1), np.float32)
    for length, kept in steps:
        # as torch, in float32: centres of pixels, ends repeated
        scale = np.float32(len(places)) / np.float32(length)
        source = np.maximum(scale * (np.arange(kept, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
        below = np.minimum(source.astype(int), len(places) - 1)
        above, share = np.minimum(below + 1, len(places) - 1), (source - below)[:, None]
        weights = np.concatenate([weights[below] * (1 - share), weights[above] * share], axis=1)
        places = np.concatenate([places[below], places[above]], axis=1)
    span = int((places.max(1) - places.min(1)).max()) + 1
    first = np.minimum(places.min(1), cells - span)
    gathered = np.zeros((len(first), span), np.float32)
    np.add.at(gathered, (np.arange(len(first))[:, None], places - first[:, None]), weights)
    return first, torch.from_numpy(gathered).to(device)
