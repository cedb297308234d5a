"""Guided filter: soft mask edges that follow the image's (He, Sun, Tang, TPAMI 2013)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raypipe.refiners._arrays import check

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclass
class Guided:
    """Smooth masks so that their edges follow the image's; the result is soft."""

    # Radius and eps are those of Sempart's reference, working size and guide of its supplement.
    refine_radius: int = 9  # half window in px of an image whose short side is refine_working_size
    refine_eps: float = 1e-3  # regulariser in squared guide units, guide in 0..1; 1e-5 to 1e-2 are worth a sweep
    # The radius grows with the image, the filter itself runs at full size: its cost does not depend on the radius, and
    # filtering a reduced image is an approximation that is off by up to 0.17. None: the radius is in image pixels.
    refine_working_size: int | None = 320  # short side in px that the radius is meant for
    refine_guide: Literal["mean", "luma", "rgb"] = "mean"  # mean of the three channels
    refine_subsample: int = 1  # filter an image reduced by this factor: faster, approximate (He and Sun, 2015)

    def __post_init__(self):
        if self.refine_radius < 1:
            raise ValueError(f"guided: refine_radius must be at least 1, got {self.refine_radius!r}")
        if not self.refine_eps > 0:
            raise ValueError(f"guided: refine_eps must be above 0, got {self.refine_eps!r}")
        if self.refine_working_size is not None and self.refine_working_size < 1:
            raise ValueError(f"guided: refine_working_size must be at least 1, got {self.refine_working_size!r}")
        if self.refine_guide not in ("mean", "luma", "rgb"):
            raise ValueError(f"guided: refine_guide must be mean, luma or rgb, got {self.refine_guide!r}")
        if self.refine_subsample < 1:
            raise ValueError(f"guided: refine_subsample must be at least 1, got {self.refine_subsample!r}")

    def __call__(self, masks: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, str]:
        """Refine masks (N, H, W), bool or float in [0, 1], along the edges of image (H, W, 3) uint8 RGB.

        Returns float32 (N, H, W) in [0, 1] and a note: `refine_rejected` if a mask lost all its foreground (values
        above 0.5) or, with an eps beyond float32, is not finite; such a mask is kept as it was. Raises BadImage when
        the given masks are not finite, ValueError when sizes differ.
        """
        check(masks, image, name="guided")
        refined = guided_filter(
            masks,
            image,
            radius=self._radius(image),
            eps=self.refine_eps,
            guide=self.refine_guide,
            subsample=self.refine_subsample,
        )
        lost = (masks > 0.5).any(axis=(1, 2)) & ~(refined > 0.5).any(axis=(1, 2))
        rejected = lost | ~np.isfinite(refined).all(axis=(1, 2))
        refined[rejected] = masks[rejected]
        return refined, "refine_rejected" if rejected.any() else ""

    def _radius(self, image: np.ndarray) -> int:
        if self.refine_working_size is None:
            return self.refine_radius
        return max(1, round(self.refine_radius * min(image.shape[:2]) / self.refine_working_size))


def guided_filter(
    masks: np.ndarray,
    image: np.ndarray,
    *,
    radius: int = 9,
    eps: float = 1e-3,
    guide: Literal["mean", "luma", "rgb"] = "mean",
    subsample: int = 1,
) -> np.ndarray:
    """Smooth masks so that their edges follow the image's (He et al., TPAMI 2013).

    masks: (N, H, W) bool or float in [0, 1]. image: (H, W, 3) uint8 RGB; the guide is its channel mean, its luma or
    its three channels, in [0, 1]. radius: half window in pixels, cut off at the image's border. eps: regulariser in
    squared guide units; larger is smoother. subsample: work on every such pixel only (approximate).
    Returns float32 (N, H, W), clipped to [0, 1]. Raises ValueError when sizes differ. O(N H W), independent of radius.
    """
    if masks.shape[1:] != image.shape[:2]:
        raise ValueError(f"guided: masks of size {masks.shape[1:]} for an image of size {image.shape[:2]}")
    channels = guide_channels(image, guide)
    out = np.empty(masks.shape, np.float32)
    for i, mask in enumerate(filter_by_guide(masks, channels, radius=radius, eps=eps, subsample=subsample)):
        np.clip(mask, 0, 1, out=out[i])
    return out


def guide_channels(image: np.ndarray, guide: str) -> np.ndarray:
    """RGB uint8 (H, W, 3) to the guide, float32 (C, H, W) in [0, 1]: C = 3 for "rgb", else 1."""
    if guide == "rgb":
        return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / 255
    weights = LUMA if guide == "luma" else np.full(3, 1 / 3, np.float32)
    return (image @ weights)[None] / 255


def filter_by_guide(
    masks: np.ndarray, guide: np.ndarray, *, radius: int, eps: float, subsample: int = 1
) -> Iterator[np.ndarray]:
    """The guided filter itself. masks: (N, H, W). guide: float32 (C, H, W), C = 1 or 3, in [0, 1].

    Yields float32 (H, W) per mask, not clipped: overshoot of some hundredths is normal.
    """
    import cv2

    height, width = guide.shape[1:]
    small = guide[:, ::subsample, ::subsample]
    # The filter does not change when the guide is shifted; around 0 the variances below lose fewest digits.
    centre = small.mean((1, 2), keepdims=True)
    guide, small = guide - centre, small - centre
    box = box_filter(small.shape[1:], max(1, radius // subsample))
    mean_guide = [box(channel) for channel in small]
    inverse = inverse_covariance(small, mean_guide, box, eps)
    for mask in masks:
        target = np.ascontiguousarray(mask[::subsample, ::subsample], np.float32)
        mean_target = box(target)
        covariance = [box(g * target) - m * mean_target for g, m in zip(small, mean_guide, strict=True)]
        slopes = [sum(i * c for i, c in zip(row, covariance, strict=True)) for row in inverse]
        offset = mean_target - sum(slope * m for slope, m in zip(slopes, mean_guide, strict=True))
        planes = [box(plane) for plane in (*slopes, offset)]
        if subsample > 1:
            planes = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR) for plane in planes]
        yield sum((slope * g for slope, g in zip(planes[:-1], guide, strict=True)), planes[-1])


def box_filter(size: tuple[int, int], radius: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that averages float32 (h, w) of that size over square windows, cut off at the border."""
    import cv2

    def total(plane: np.ndarray) -> np.ndarray:
        side = 2 * radius + 1
        return cv2.boxFilter(plane, cv2.CV_32F, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)

    pixels = total(np.ones(size, np.float32))
    return lambda plane: total(plane) / pixels


def inverse_covariance(
    guide: np.ndarray, mean: list[np.ndarray], box: Callable[[np.ndarray], np.ndarray], eps: float
) -> list[list[np.ndarray]]:
    """(Sigma + eps * identity)^-1 per pixel, Sigma the windowed covariance of guide (C, h, w).

    Returns C rows of C float32 planes (h, w); planes that are equal by symmetry are one array.
    """
    pairs = [(i, j) for i in range(len(guide)) for j in range(i, len(guide))]
    sigma = [box(guide[i] * guide[j]) - mean[i] * mean[j] for i, j in pairs]
    if len(guide) == 1:
        return [[1 / (sigma[0] + np.float32(eps))]]
    # In float64: for a grey image Sigma has rank one and the determinant is of the order of eps^2.
    rr, rg, rb, gg, gb, bb = (
        plane.astype(np.float64) + eps * (i == j) for plane, (i, j) in zip(sigma, pairs, strict=True)
    )
    a, b, c = gg * bb - gb * gb, rb * gb - rg * bb, rg * gb - rb * gg
    d, e, f = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
    determinant = rr * a + rg * b + rb * c
    a, b, c, d, e, f = ((cofactor / determinant).astype(np.float32) for cofactor in (a, b, c, d, e, f))
    return [[a, b, c], [b, d, e], [c, e, f]]


REFINER = Guided
