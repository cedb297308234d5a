"""The bilateral solver with one sparse matrix for the splat and one per axis, made by SciPy, anew for every mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, halves, in_turns

SIZE = (640, 480)  # width and height of the photographs here
RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def compare(refiner, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """The refiner with its defaults, but for its right to reject a solution, which the plain formulation has not."""
    from dataclasses import replace

    import cv2

    images = [cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA) for image in images]
    refiner = replace(refiner, refine_accept_iou=0.0)
    sigmas = (refiner.refine_sigma_space, refiner.refine_sigma_luma, refiner.refine_sigma_chroma)
    arms = [
        lambda image: refiner(halves(image), image)[0],
        lambda image: np.stack([sparse_bilateral_solver(mask, image, *sigmas) for mask in halves(image)]),
    ]
    seconds, (ours, other) = in_turns(arms, images, repeats)
    errors = [float(np.abs(a - b).max()) for a, b in zip(ours, other, strict=True)]
    difference = Figure("bilateral", "largest difference to plain", "", errors, "ours as float32")
    return [*compared("bilateral", seconds, "SciPy's matrices in float64, two masks, 640 x 480"), difference]


def sparse_bilateral_solver(
    mask: np.ndarray,
    image: np.ndarray,
    sigma_space: float,
    sigma_luma: float,
    sigma_chroma: float,
    *,
    strength: float = 256.0,
    confidence: float = 0.999,
    iterations: int = 25,
) -> np.ndarray:
    """The solver as its paper's and TokenCut's code lay it out (Barron and Poole, ECCV 2016, algorithm 1).

    mask: (H, W) bool or float in [0, 1]. image: RGB uint8 (H, W, 3). Returns float64 (H, W).
    """
    from scipy import sparse
    from scipy.sparse.linalg import cg

    splat, blurs = grid_matrices(image, (sigma_space, sigma_luma, sigma_chroma))

    def blur(values: np.ndarray) -> np.ndarray:
        return 2 * len(blurs) * values + sum(matrix @ values for matrix in blurs)

    pixels = splat @ np.ones(mask.size)
    n = np.ones(len(pixels))
    for _ in range(10):
        n = np.sqrt(n * pixels / blur(n))
    m = n * blur(n)
    diagonal_n = sparse.diags_array(n)
    smoothness = sparse.diags_array(m) - diagonal_n @ blur(diagonal_n)
    weight = np.full(mask.size, confidence)
    system = strength * smoothness + sparse.diags_array(splat @ weight)
    right = splat @ (weight * mask.ravel())
    preconditioner = sparse.diags_array(1 / np.maximum(system.diagonal(), 1e-5))
    start = right / (splat @ weight)
    solution, _ = cg(system, right, x0=start, rtol=1e-5, atol=0.0, maxiter=iterations, M=preconditioner)
    return (splat.T @ solution).reshape(mask.shape)


def grid_matrices(image: np.ndarray, sigmas: tuple[float, float, float]) -> tuple:
    """The splat of P pixels into V cells, sparse (V, P), and the neighbours on each of five axes, sparse (V, V)."""
    from scipy import sparse

    sigma_space, sigma_luma, sigma_chroma = sigmas
    yuv = image.reshape(-1, 3) @ RGB_TO_YUV.T + (0, 128, 128)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].reshape(2, -1)
    colours = yuv / (sigma_luma, sigma_chroma, sigma_chroma)
    planes = [x / sigma_space, y / sigma_space, *colours.T]
    coordinates = np.stack(planes, 1).astype(np.int64)
    base = coordinates.max() + 2  # so that two cells never have one number
    powers = base ** np.arange(5)
    numbers, first, cell = np.unique(coordinates @ powers, return_index=True, return_inverse=True)
    pixels = len(coordinates)
    splat = sparse.csr_array((np.ones(pixels), (cell, np.arange(pixels))), shape=(len(numbers), pixels))
    blurs = []
    for axis in range(5):
        both = sparse.csr_array((len(numbers), len(numbers)))
        for side in (-1, 1):
            wanted = coordinates[first]
            wanted[:, axis] += side
            wanted = wanted @ powers
            found = np.isin(wanted, numbers)
            places = (np.flatnonzero(found), np.searchsorted(numbers, wanted[found]))
            both = both + sparse.csr_array((np.ones(found.sum()), places), shape=both.shape)
        blurs.append(both)
    return splat, blurs
