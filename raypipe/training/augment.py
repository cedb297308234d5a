"""Changes to images before a network sees them: random numbers drawn on the CPU, applied where the network is.

What is drawn are plain numbers, from a sample's own generator (`data.generator`), and nothing else decides what is
applied. Until they are cropped to one size, images come as lists, since their sizes differ. Each is worked on by
itself: it turns out the same to the last bit in any batch (on the CPU, for one number of threads), and nothing is
padded. Colours are float32, RGB, in [0, 1]. The arithmetic is that of torchvision on tensors; published code, which has
Pillow do it, rounds to 8 bits after each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raypipe.networks import IMAGENET_MEAN, IMAGENET_STD, autocast

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision rounds it
LEAST_CHROMA = 1e-12  # in place of 0 in a division, of greys whose hue is of no effect


class Jitter(NamedTuple):
    """A change of colours: three factors, a turn of the hue, and in which order they are applied."""

    brightness: float
    contrast: float
    saturation: float
    hue: float  # of a whole turn
    order: tuple[int, ...]  # of these four, by their position here


class Scaled(NamedTuple):
    """The size that an image is scaled to, and where the square begins that is cut from it: all in px."""

    height: int
    width: int
    top: int
    left: int


def draw_chance(random: np.random.Generator, p: float) -> bool:
    """Whether something happens that has the probability p."""
    return bool(random.random() < p)


def draw_jitter(
    random: np.random.Generator, brightness: float, contrast: float, saturation: float, hue: float, p: float
) -> Jitter | None:
    """As torchvision's ColorJitter, applied with probability p; None where it is not.

    A factor is uniform in [max(0, 1 - x), 1 + x], the turn in [-hue, hue], and all 24 orders are equally likely.
    """
    is_applied = draw_chance(random, p)
    factors = [float(random.uniform(max(0.0, 1 - x), 1 + x)) for x in (brightness, contrast, saturation)]
    turn, order = float(random.uniform(-hue, hue)), tuple(random.permutation(4).tolist())
    return Jitter(*factors, turn, order) if is_applied else None


def draw_corner(random: np.random.Generator, shape: Sequence[int], size: int) -> tuple[int, int]:
    """Top and left of a size x size square, uniform over all that lie in an image. shape: its height, width, ..."""
    top, left = (int(random.integers(side - size + 1)) for side in shape[:2])
    return top, left


def draw_scaled(random: np.random.Generator, shape: Sequence[int], size: int, low: float, high: float) -> Scaled:
    """A scale uniform in [low, high], and a square in the scaled image, which is padded where it is smaller than that.

    Scaled sides are cut off to whole px, as in SelfMask's code.
    """
    scale = random.uniform(low, high)
    height, width = (max(1, int(side * scale)) for side in shape[:2])
    return Scaled(height, width, *draw_corner(random, (max(height, size), max(width, size)), size))


def draw_blur(random: np.random.Generator, low: float, high: float, p: float) -> float | None:
    """A sigma in px, uniform in [low, high], with probability p; None where nothing is blurred."""
    is_applied, sigma = draw_chance(random, p), float(random.uniform(low, high))
    return sigma if is_applied else None


def moved(arrays: Sequence[np.ndarray], device: str) -> list[Tensor]:
    """Arrays of one dtype as tensors on the device, moved there at once, while what is computed there goes on."""
    values = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device != "cpu":
        values = values.pin_memory().to(device, non_blocking=True)
    parts = values.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def pixels(images: Sequence[np.ndarray], device: str) -> list[Tensor]:
    """RGB uint8 (H, W, 3) -> float32 (3, H, W) in [0, 1] on the device."""
    planes = (image.permute(2, 0, 1) for image in moved(images, device))
    return [torch.empty(image.shape, device=device).copy_(image).div_(255) for image in planes]


def jitter(images: Sequence[Tensor], draws: Sequence[Jitter | None]) -> list[Tensor]:
    """Images (3, H, W) with other colours; contrast is that of the whole image, so this comes before `crop`."""
    pairs = zip(images, draws, strict=True)
    return [image if draw is None else _jittered(image.clone(), draw) for image, draw in pairs]


def _jittered(image: Tensor, draw: Jitter) -> Tensor:
    """One image, changed in place: towards black, its mean grey or its greys, or turned in hue."""
    for which in draw.order:
        if which == 0:
            image.mul_(draw.brightness)
        elif which == 1:
            image.lerp_(_luma(image).mean(), 1 - draw.contrast)
        elif which == 2:
            image.lerp_(_luma(image), 1 - draw.saturation)
        elif draw.hue:
            _turn_hue(image, draw.hue)
        image.clamp_(0, 1)
    return image


def _luma(image: Tensor) -> Tensor:
    """(3, H, W) -> (1, H, W)."""
    red, green, blue = image.split(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _turn_hue(image: Tensor, turn: float) -> None:
    """Turn the hue of HSV, in place: red, green, blue are V - C max(0, min(k, 4 - k, 1)), k = 6 H + 5, 3, 1 (mod 6).

    V is the largest channel, C how far above the smallest it is. Without masks, which cost more than all the rest.
    """
    red, green, blue = image
    value = image.amax(0)
    chroma = value - image.amin(0)
    is_red, is_green = (torch.eq(channel, value, out=torch.empty_like(value)) for channel in (red, green))  # 0.0, 1.0
    is_green.mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    hue = is_red.mul_(green - blue).addcmul_(is_green, blue - red).addcmul_(is_blue, red - green)
    hue.div_(chroma.clamp(min=LEAST_CHROMA)).add_(is_green, alpha=2).add_(is_blue, alpha=4).add_(6 * (turn + 1))
    for channel, n in zip(image, (5, 3, 1), strict=True):
        k = (hue + n).div_(6).frac_().mul_(6)
        torch.sub(value, torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma), out=channel)


def grey(images: Sequence[Tensor], chosen: Sequence[bool]) -> list[Tensor]:
    """Images (3, H, W), the chosen ones without colour: three equal channels."""
    pairs = zip(images, chosen, strict=True)
    return [_luma(image).expand_as(image) if is_chosen else image for image, is_chosen in pairs]


def crop(images: Sequence[Tensor], corners: Sequence[tuple[int, int]], size: int) -> Tensor:
    """A square of each image (C, H, W): (B, C, size, size). corners: its top and left."""
    corners = zip(images, corners, strict=True)
    return torch.stack([image[:, top : top + size, left : left + size] for image, (top, left) in corners])


def flip(images: Sequence[Tensor], chosen: Sequence[bool]) -> Tensor:
    """Images or masks of one size, (..., W), the chosen ones mirrored: (B, ..., W)."""
    pairs = zip(images, chosen, strict=True)
    return torch.stack([image.flip(-1) if is_chosen else image for image, is_chosen in pairs])


def normalise(images: Sequence[Tensor]) -> Tensor:
    """Images of one size, (3, H, W) in [0, 1]: (B, 3, H, W), with ImageNet's mean 0 and deviation 1."""
    result = torch.stack(list(images))
    for channel, mean, deviation in zip(result.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(deviation)
    return result


def scale_and_crop(
    images: Sequence[Tensor], masks: Sequence[Tensor], draws: Sequence[Scaled], size: int
) -> tuple[Tensor, Tensor]:
    """Squares of scaled images and masks: float32 (B, 3, size, size) and bool (B, size, size).

    images: (3, H, W), scaled bilinearly, over all that a pixel covers, and filled up at the right and below with their
    mean colour. masks: bool (H, W), one per image, to the nearest pixel; filled up with False (SelfMask).
    """
    squares = torch.empty(len(images), 3, size, size, device=images[0].device)
    windows = torch.zeros(len(masks), size, size, dtype=torch.bool, device=masks[0].device)
    for i, (image, mask, draw) in enumerate(zip(images, masks, draws, strict=True)):
        shape, rows, columns = draw[:2], slice(draw.top, draw.top + size), slice(draw.left, draw.left + size)
        image = functional.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
        mask = functional.interpolate(mask[None, None].byte(), shape, mode="nearest")[0, 0]
        squares[i] = image.mean((1, 2), keepdim=True)
        image, mask = image[:, rows, columns], mask[rows, columns]
        height, width = mask.shape
        squares[i, :, :height, :width], windows[i, :height, :width] = image, mask
    return squares, windows


def kernel_size(side: int) -> int:
    """Of `blur`: about a tenth of the shorter side of an image, odd (SelfMask)."""
    return int(0.1 * side // 2 * 2) + 1


def blur(images: Sequence[Tensor], sigmas: Sequence[float | None], size: int) -> list[Tensor]:
    """Images (C, H, W) after Gaussian filters of `size` x `size` px, mirrored at their edges; None: as they are."""
    pairs = zip(images, sigmas, strict=True)
    with autocast(images[0].device.type, "float32"):  # as matrices are multiplied
        return [image if sigma is None else blurred(image[None], sigma, size)[0] for image, sigma in pairs]


def blurred(images: Tensor, sigmas: Tensor | float, size: int) -> Tensor:
    """`blur` of images of one size (n, C, H, W), with one sigma for all or (n,): in matrices of float32.

    As products with a matrix for rows and one for columns, which is faster than convolutions of this width.
    """
    offsets = torch.arange(-(size // 2), size // 2 + 1, device=images.device)
    sigmas = torch.as_tensor(sigmas, device=images.device).reshape(-1, 1)
    weights = (offsets / sigmas).square().mul(-0.5).softmax(1)  # (n or 1, size)
    rows, columns = (_filter(side, offsets, weights) for side in images.shape[2:])
    return rows @ images @ columns.mT


def _filter(side: int, offsets: Tensor, weights: Tensor) -> Tensor:
    """Matrices (n, 1, side, side) that average neighbours; those beyond an edge are mirrored at the last pixel."""
    sources = (torch.arange(side, device=offsets.device)[:, None] + offsets).abs()
    sources = side - 1 - (side - 1 - sources).abs()  # (side, size)
    matrix = torch.zeros(len(weights), side, side, device=offsets.device)
    shape = len(weights), *sources.shape
    return matrix.scatter_add_(2, sources.expand(shape), weights[:, None].expand(shape))[:, None]
