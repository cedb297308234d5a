"""The bilateral solver on its grid (Barron and Poole, "The Fast Bilateral Solver", ECCV 2016).

Pixels that share a cell in space and colour share one unknown, so that 300,000 pixels leave some 20,000.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from raypipe.masks import largest_component

YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # JPEG's, of RGB
CHROMA_OFFSET = 128  # so that no colour has a negative one
AXES = 5  # of the grid: y, x, luma and two of chroma
# The paper's and TokenCut's code:
BISTOCHASTIC_ROUNDS = 10
DIAGONAL_FLOOR = 1e-5  # of the preconditioner
TOLERANCE = 1e-5  # length of the residual by that of the right side at which a mask is solved


class Grid:
    """The cells in space and colour that an image's pixels fall into, and how they blur; for all masks of that image.

    cell: int (P,), of each of the P = H * W pixels. blur: sparse float64 (V, V), of the V cells: B of the paper. n, m:
    float64 (V,), with diag(n) B diag(n) 1 = m: how it is made bistochastic.
    """

    def __init__(self, image: np.ndarray, sigma_space: float, sigma_luma: float, sigma_chroma: float):
        """image: uint8 (H, W, 3) RGB. sigma_space: side of a cell in px. sigma_luma, sigma_chroma: in 256 levels."""
        self.size = image.shape[:2]
        keys, strides = cell_keys(image, sigma_space, sigma_luma, sigma_chroma)
        # With the index, which nobody wants, numpy sorts by merging: faster, since neighbours are often alike.
        cells, _, self.cell = np.unique(keys, return_index=True, return_inverse=True)
        self.blur = neighbourhood(cells, strides)
        pixels = np.bincount(self.cell).astype(np.float64)
        self.n = np.ones(len(cells))
        for _ in range(BISTOCHASTIC_ROUNDS):
            self.n = np.sqrt(self.n * pixels / (self.blur @ self.n))
        self.m = self.n * (self.blur @ self.n)

    def __len__(self) -> int:
        return len(self.n)

    def splat(self, plane: np.ndarray) -> np.ndarray:
        """Sums of float (H, W) over the pixels of every cell: float64 (V,)."""
        return np.bincount(self.cell, plane.ravel(), len(self))

    def solve(
        self,
        targets: Iterable[np.ndarray],
        *,
        strength: float = 256.0,
        confidence: float | np.ndarray = 0.999,
        iterations: int = 25,
        tolerance: float = TOLERANCE,
    ) -> Iterator[np.ndarray]:
        """Masks that are smooth on the grid and near `targets`, bool or float (H, W) of any scale.

        strength: lambda, of smoothness. confidence: how much a target counts, from 0 on, for all or per pixel (H, W).
        iterations: of conjugate gradients, at most; photographs take 60 to 90 down to the tolerance, which is that of
        the residual as part of the right side. Yields float64 (H, W) per target, not clipped.
        """
        from scipy import sparse
        from scipy.sparse.linalg import cg

        confidence = np.broadcast_to(np.float64(confidence), self.size)
        trust = self.splat(confidence)  # (V,)
        scaling = sparse.diags_array(self.n)
        smoothness = sparse.diags_array(self.m) - scaling @ self.blur @ scaling
        system = sparse.csr_array(strength * smoothness + sparse.diags_array(trust))
        preconditioner = sparse.diags_array(1 / np.maximum(system.diagonal(), DIAGONAL_FLOOR))
        for target in targets:
            data = self.splat(confidence * target)
            start = np.divide(data, trust, out=np.zeros_like(data), where=trust > 0)  # each cell's mean
            solution, _ = cg(system, data, start, rtol=tolerance, atol=0.0, maxiter=iterations, M=preconditioner)
            yield solution[self.cell].reshape(self.size)


def cell_keys(
    image: np.ndarray, sigma_space: float, sigma_luma: float, sigma_chroma: float
) -> tuple[np.ndarray, list[int]]:
    """The cell of each pixel of uint8 (H, W, 3) as one number, int64 (P,), and what a step along each axis adds to it.

    Mixed radix with an empty cell at the end of every axis, so that a step never leads to the other side.
    """
    height, width = image.shape[:2]
    # One matrix product, since a colour on the border of two cells falls where its rounding says.
    luma, *chroma = YUV @ image.reshape(-1, 3).T.astype(np.float64)  # each (P,)
    planes = (
        np.arange(height)[:, None] / sigma_space,
        np.arange(width) / sigma_space,
        luma.reshape(height, width) / sigma_luma,
        *((plane.reshape(height, width) + CHROMA_OFFSET) / sigma_chroma for plane in chroma),
    )
    keys, strides = np.zeros((height, width), np.int64), []
    for plane in planes:
        steps = plane.astype(np.int64)
        radix = int(steps.max()) + 2
        keys = keys * radix + steps
        strides = [*(stride * radix for stride in strides), 1]
    return keys.ravel(), strides


def neighbourhood(cells: np.ndarray, strides: list[int]):
    """The blur of the grid: twice its axes times a cell plus its two neighbours on every axis, where there are any.

    cells: int64 (V,), sorted keys. Returns a sparse float64 (V, V), symmetric.
    """
    from scipy import sparse

    everyone = np.arange(len(cells))
    rows, columns = [everyone], [everyone]
    for stride in strides:
        after = np.searchsorted(cells, cells + stride)
        after[after == len(cells)] = 0  # the first cell is never the one after
        here = np.flatnonzero(cells[after] == cells + stride)
        rows += [here, after[here]]
        columns += [after[here], here]
    values = np.ones(sum(map(len, rows)))
    values[: len(cells)] = 2 * AXES
    places = (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_array((values, places), shape=(len(cells), len(cells)))


def filled_component(mask: np.ndarray) -> np.ndarray:
    """Holes of a bool (H, W) filled, then the largest of its 4-connected parts; an empty mask stays empty.

    TokenCut's code counts the background as a part, and so returns it where the object covers more than half of the
    image.
    """
    from scipy import ndimage

    return largest_component(ndimage.binary_fill_holes(mask))
