"""What Sempart's head is trained with: a normalised cut, smoothness along edges, two masks that agree, and a zoom.

Pure functions of tensors. Masks are probabilities, float32 (B, 1, H, W), differentiable; images float32 (B, 3, H, W)
with ImageNet's mean 0 and deviation 1; features float32 (B, D, h, w), without gradient. Losses are scalars: means over
all pixels of all images. All of it is float32 where a caller runs in less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from raypipe.networks import IMAGENET_MEAN, IMAGENET_STD
from raypipe.refiners.guided import filter_by_guide

TAU, EPS = 0.4, 1e-6  # cosine above which two patches are alike, and how much others count (reference)
SIGMA = 1.0  # of the weight that pixels alike have (reference)
RADIUS, GUIDED_EPS = 9, 1e-3  # of the guided filter, in px and squared guide units (reference)
FLOOR = 1e-6  # of the two denominators of a cut (reference)
OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1))  # to half of a pixel's eight neighbours; it is one of the other half's


def edges(features: Tensor, *, tau: float = TAU) -> Tensor:
    """Which patches are alike, by the cosine of their features: bool (B, N, N), N = h * w; each is like itself."""
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        directions = unit(features).flatten(2)  # (B, D, N)
        alike = directions.transpose(1, 2) @ directions > tau
    alike.diagonal(dim1=1, dim2=2).fill_(True)
    return alike


def unit(features: Tensor) -> Tensor:
    """Features (B, D, h, w) of length 1 at each place."""
    return F.normalize(features.float(), dim=1, eps=1e-12)


def ncut(mask: Tensor, alike: Tensor, *, eps: float = EPS) -> Tensor:
    """The mean of `ncut_per_image`."""
    return ncut_per_image(mask, alike, eps=eps).mean()


def ncut_per_image(mask: Tensor, alike: Tensor, *, eps: float = EPS) -> Tensor:
    """The soft normalised cut between mask and rest (Shi and Malik, TPAMI 2000): float32 (B,), 0 to 2, 1 if undecided.

    mask: (B, 1, h, w). alike: of `edges`; all other pairs weigh eps. With W = eps + (1 - eps) * alike, one product with
    the boolean matrix gives both W s and the degrees, and as W is symmetric the gradient of s.W.s is 2 W s, so that no
    matrix of floats is kept for the way back.
    """
    s = mask.float().flatten(1).clamp(eps, 1 - eps)  # (B, N)
    with torch.no_grad(), torch.autocast(mask.device.type, enabled=False):
        products = alike.to(s.dtype) @ torch.stack([s, torch.ones_like(s)], dim=2)  # (B, N, 2)
        sums = torch.stack([s.sum(1), s.new_full(s.shape[:1], s.shape[1])], dim=1)[:, None]
        near, degrees = ((1 - eps) * products + eps * sums).unbind(2)  # (B, N) each
        kept = (s * near).sum(1)
    inside = (s * degrees).sum(1)
    cut = inside - (2 * (s * near).sum(1) - kept)  # the value of s.near, with twice its gradient
    outside = degrees.sum(1) - inside
    return cut / inside.clamp(min=FLOOR) + cut / outside.clamp(min=FLOOR)


def gtv_fine(mask: Tensor, image: Tensor, *, sigma: float = SIGMA) -> Tensor:
    """Squared steps to the eight neighbours of each pixel, each as heavy as the two pixels are alike in the image.

    image: (B, C, H, W) of the mask's size; the weight is exp(-|x_i - x_j|^2 / sigma). At the border an image is
    mirrored.
    """
    with torch.no_grad():
        pairs = neighbours(image.float())
        weights = [(-(near - far).square().sum(1, keepdim=True) / sigma).exp() for near, far in pairs]
    return _variation(mask, weights)


def gtv_coarse(mask: Tensor, alike: Tensor, *, eps: float = EPS) -> Tensor:
    """The same on the grid of patches, where those alike weigh 1 and others eps. alike: of `edges`.

    So the published code; of the paper's formula the available text has lost the weight. See `gtv_kernel`.
    """
    height, width = mask.shape[2:]
    cells = torch.arange(height * width, device=mask.device).reshape(1, 1, height, width)
    pairs = neighbours(cells.float())  # float: integers have no mirrored border
    found = (alike[:, near[0].long(), far[0].long()] for near, far in pairs)  # (B, 1, h', w') each
    return _variation(mask, [eps + (1 - eps) * each.float() for each in found])


def gtv_kernel(mask: Tensor, features: Tensor, *, sigma: float = SIGMA) -> Tensor:
    """The other reading of `gtv_coarse`: a pair weighs exp(-|f_i - f_j|^2 / sigma), f of length 1."""
    return gtv_fine(mask, unit(features), sigma=sigma)


def neighbours(values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each of OFFSETS all pairs of neighbours at it, (B, C, H', W') both, in an image mirrored at its border.

    H' is H, or H + 1 where the offset has a row: there also the pair with the mirrored row before the first. Likewise
    columns.
    """
    padded = F.pad(values, (1, 1, 1, 1), mode="reflect")
    for down, right in OFFSETS:
        rows = (slice(1, -1), slice(1, -1)) if not down else (slice(0, -1), slice(1, None))
        columns = {0: (slice(1, -1), slice(1, -1)), 1: (slice(0, -1), slice(1, None))}
        columns[-1] = columns[1][::-1]
        yield padded[:, :, rows[0], columns[right][0]], padded[:, :, rows[1], columns[right][1]]


def _variation(mask: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The mean over pixels and their eight neighbours of weighted squared steps; weights: one per offset.

    A pair is in it twice, once for each of its pixels, but for those at the border: there only one of the two is a
    pixel of the image and the other its mirror.
    """
    total = 0
    for (near, far), weight, (down, right) in zip(neighbours(mask.float()), weights, OFFSETS, strict=True):
        steps = weight * (near - far).square()
        total = total + steps[_pixels(down, right)].sum() + steps[_pixels(-down, -right)].sum()
    return total / (8 * mask.numel())


def _pixels(down: int, right: int) -> tuple[slice, ...]:
    """Which of the pairs at an offset, or at the opposite one, belong to a pixel of the image that looks there."""
    parts = {0: slice(None), 1: slice(1, None), -1: slice(0, -1)}
    return (..., parts[down], parts[right])


def consistency(coarse: Tensor, fine: Tensor) -> Tensor:
    """How far the fine mask, reduced to the coarse one's size, is from it: between the central pixels of each patch."""
    return F.mse_loss(F.interpolate(fine.float(), size=coarse.shape[2:], mode="bilinear"), coarse.float())


def zoom(values: Tensor, top: Sequence[int], left: Sequence[int]) -> Tensor:
    """A window of half the height and width of each image, (B, C, H, W), enlarged to the whole: trick 2.

    top, left: of each window, integers in [0, H / 2] and [0, W / 2]; tensors on a GPU would be waited for.
    """
    height, width = values.shape[2] // 2, values.shape[3] // 2
    places = zip(values, top, left, strict=True)
    windows = [each[:, int(y) : int(y) + height, int(x) : int(x) + width] for each, y, x in places]
    return F.interpolate(torch.stack(windows), scale_factor=2, mode="bilinear")


def teacher_target(mask: Tensor, image: Tensor, *, radius: int = RADIUS, eps: float = GUIDED_EPS) -> Tensor:
    """What the zoomed mask of a student should be: the mask of the zoomed image, filtered along its edges, detached."""
    return guided(mask, image, radius=radius, eps=eps).clamp(EPS, 1 - EPS)


def crop_zoom(student: Tensor, target: Tensor) -> Tensor:
    """The mean squared distance of the student's zoomed mask to `teacher_target`."""
    return F.mse_loss(student.float(), target)


@torch.no_grad()
def guided(masks: Tensor, images: Tensor, *, radius: int = RADIUS, eps: float = GUIDED_EPS) -> Tensor:
    """The guided filter (He, Sun, Tang, TPAMI 2013) of a batch, by the mean of each image's channels: trick 1.

    masks: (B, 1, H, W). images: normalised (B, 3, H, W). Windows end at the border. Returns float32 (B, 1, H, W), not
    clipped: an overshoot of some hundredths is normal.
    """
    masks, guides = masks.float(), grey(images)
    if masks.device.type != "cpu":
        return filtered_together(masks, guides, radius=radius, eps=eps)
    pairs = zip(masks.numpy(), guides.numpy(), strict=True)  # OpenCV's windows are twenty times as fast as torch's
    planes = [next(filter_by_guide(mask, guide, radius=radius, eps=eps)) for mask, guide in pairs]
    return torch.stack([torch.from_numpy(plane) for plane in planes])[:, None]


def filtered_together(masks: Tensor, guides: Tensor, *, radius: int, eps: float) -> Tensor:
    """The guided filter by few operations on all images at once, as a GPU wants it. All are float32 (B, 1, H, W)."""
    guides = guides - guides.mean((2, 3), keepdim=True)  # the filter stays the same, variances lose fewer digits
    planes = torch.cat([guides, masks, guides * masks, guides * guides], dim=1)
    mean, mask, product, square = _box(planes, radius).split(1, dim=1)
    slope = (product - mean * mask) / (square - mean * mean + eps)
    slope, offset = _box(torch.cat([slope, mask - slope * mean], dim=1), radius).split(1, dim=1)
    return slope * guides + offset


def grey(images: Tensor) -> Tensor:
    """The mean of the channels in [0, 1], float32 (B, 1, H, W), of normalised images (B, 3, H, W)."""
    mean, std = (images.new_tensor(each, dtype=torch.float32)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() * std + mean).mean(1, keepdim=True)


def _box(planes: Tensor, radius: int) -> Tensor:
    """Means of (B, C, H, W) over square windows that end at the border: along one side, then along the other."""
    side = 2 * radius + 1
    planes = F.avg_pool2d(planes, (side, 1), 1, (radius, 0), count_include_pad=False)
    return F.avg_pool2d(planes, (1, side), 1, (0, radius), count_include_pad=False)
