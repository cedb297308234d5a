"""Mean field of the fully connected CRF with two Gaussian kernels (Kraehenbuehl and Koltun, NIPS 2011)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

TINY = 1e-20  # added to sums of kernels, as in the published code


def dense_crf(
    image: np.ndarray,
    unary: np.ndarray | torch.Tensor,
    *,
    gauss_sxy: float = 1.0,
    gauss_weight: float = 25.0,
    bilateral_sxy: float = 5.0,
    bilateral_srgb: float = 13.0,
    bilateral_weight: float = 100.0,
    iterations: int = 10,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Labels that keep to their energies and to each other where pixels are near and alike.

    image: uint8 (H, W, 3) RGB, or (B, H, W, 3) for several images. unary: float (k, H, W) energies, lower is better,
    `inf` for a forbidden label; (B, k, H, W) for several images; (N, k, H, W) for several problems on one image. sxy in
    pixels, srgb in levels of 0..255; the defaults are those of zero-guidance segmentation.
    Returns q, float32 of the shape of `unary`, which sums to 1 over k, and int16 labels without the axis k, its argmax
    (the lowest of several). Raises ValueError for other shapes or types, k = 0, and a pixel with NaN, -inf or nothing
    but inf.
    """
    import torch

    if not isinstance(unary, torch.Tensor):
        unary = torch.from_numpy(np.array(unary, np.float32))  # a copy, since torch wants to be able to write
    _check(image, unary)
    pixels, energies = torch.from_numpy(np.array(image)).to(device), unary.to(device, torch.float32)
    is_batch = image.ndim == 4
    # Rows are pixels, of all images one after the other; columns are labels, of all problems of an image.
    rows = energies.permute(0, 2, 3, 1) if is_batch else energies.movedim((-2, -1), (0, 1))
    if unary.shape[-3] == 1:
        q = torch.ones_like(rows)
    else:
        kernels = [
            (gauss_weight, kernel(pixels, sxy=gauss_sxy)),
            (bilateral_weight, kernel(pixels, sxy=bilateral_sxy, srgb=bilateral_srgb)),
        ]
        shape = (pixels[..., 0].numel(), -1, unary.shape[-3])
        q = mean_field(rows.reshape(shape), kernels, iterations=iterations).reshape(rows.shape)
    q = (q.movedim(-1, 1) if is_batch else q.movedim((0, 1), (-2, -1))).contiguous()
    return q.cpu().numpy(), q.argmax(-3).to("cpu", torch.int16).numpy()


def _check(image: np.ndarray, unary: torch.Tensor) -> None:
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        text = f"expected a uint8 RGB image (H, W, 3), got {image.dtype} {image.shape}; scale floats to 0..255 first"
        raise ValueError(f"crf: {text}")
    fits = unary.shape[-2:] == image.shape[-3:-1] and (unary.shape[0] == len(image) or image.ndim == 3)
    if not fits or unary.ndim not in ({4} if image.ndim == 4 else {3, 4}):
        raise ValueError(f"crf: energies of shape {tuple(unary.shape)} for an image of shape {image.shape}")
    if unary.shape[-3] == 0:
        raise ValueError("crf: expected energies of at least one label, got none")
    if unary.isnan().any() or unary.isneginf().any() or unary.isposinf().all(-3).any():
        raise ValueError("crf: expected an energy for each label and pixel, got NaN, -inf or only inf at some")


def kernel(pixels: torch.Tensor, *, sxy: float, srgb: float | None = None):
    """A Gaussian filter over the pixels of uint8 (H, W, 3) or (B, H, W, 3), normalised on both sides.

    Over their position and, with srgb, their colour. Returns a function on float32 (P, C), P = B * H * W.
    """
    import torch

    from raypipe.refiners.crf.lattice import Lattice

    height, width = pixels.shape[-3:-1]
    y, x = (torch.arange(side, device=pixels.device, dtype=torch.float64) / sxy for side in (height, width))
    images = pixels.reshape(-1, height, width, 3)
    position = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(len(images), -1, -1, -1)
    points = position if srgb is None else torch.cat([position, images.double() / srgb], -1)
    groups = torch.arange(len(images), device=pixels.device).repeat_interleave(height * width)
    lattice = Lattice(points.reshape(-1, points.shape[-1]), groups)
    scale = torch.rsqrt(lattice(torch.ones_like(groups, dtype=torch.float32)[:, None]) + TINY)  # (P, 1)
    return lambda values: scale * lattice(scale * values)


def mean_field(energies: torch.Tensor, kernels: list[tuple], *, iterations: int) -> torch.Tensor:
    """The approximate marginals with Potts compatibility, all pixels in parallel.

    energies: float32 (P, N, k), of N problems on the same pixels. kernels: pairs of a weight and a filter on (P, C).
    Returns float32 (P, N, k).
    """
    q = softmax(-energies)
    for _ in range(iterations):
        flat = q.flatten(1)  # (P, N * k)
        pull = sum(weight * smooth(flat) for weight, smooth in kernels)
        q = softmax(pull.view_as(q) - energies)
    return q


def softmax(values: torch.Tensor) -> torch.Tensor:
    """Over the last, short axis; on a CPU ten times faster when that is moved to the front."""
    import torch

    return torch.softmax(values.movedim(-1, 0).contiguous(), 0).movedim(0, -1)
