"""Colours of squares as Pillow changes them, which NamedMask's code has do it: whole levels of 0..255 after each step.

Squares have one size, so that a GPU works on all at once that are changed alike; a CPU, whose caches hold one, on each
by itself. Levels are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raypipe.training import augment
from raypipe.training.augment import Jitter

LUMA = (19595, 38470, 7471)  # of 2^16, ITU-R BT.601 as Pillow has it


def jitter_(images: Tensor, draws: Sequence[Jitter | None]) -> None:
    """Change brightness, contrast, saturation and hue of images (N, 3, S, S), each in its own order, in place."""
    chosen = [i for i, draw in enumerate(draws) if draw is not None]
    for position in range(4):
        for kind, change_ in enumerate((_brighten_, _contrast_, _saturate_, _turn_)):
            its = [i for i in chosen if draws[i].order[position] == kind]
            _each_(images, its, change_, [draws[i][kind] for i in its])


def grey_(images: Tensor, chosen: Sequence[bool]) -> None:
    """Give the chosen images (N, 3, S, S) three equal channels, in place."""
    its = [i for i, is_chosen in enumerate(chosen) if is_chosen]
    _each_(images, its, lambda some, _: some.copy_(_luma(some).expand_as(some)), [0.0] * len(its))


def blur_(images: Tensor, sigmas: Sequence[float | None], size: int) -> None:
    """Gaussian filters of `size` x `size` px, mirrored at the edges, in place; None: as they are."""
    its = [i for i, sigma in enumerate(sigmas) if sigma is not None]

    def change_(some: Tensor, values: Tensor) -> None:
        some.copy_(augment.blurred(some, values.flatten(), size).round_())

    _each_(images, its, change_, [sigmas[i] for i in its])


def _each_(images: Tensor, chosen: list[int], change_: Callable, values: list[float]) -> None:
    """Apply a change, which works in place, to the chosen images, with a value (n, 1, 1, 1) for each."""
    if images.device.type == "cpu":
        for i, value in zip(chosen, values, strict=True):
            change_(images[i : i + 1], torch.tensor([[[[value]]]]))
    elif chosen:
        at = torch.tensor(chosen).to(images.device, non_blocking=True)
        some = images[at]
        change_(some, torch.tensor(values).to(images.device, non_blocking=True)[:, None, None, None])
        images[at] = some


def _brighten_(images: Tensor, factors: Tensor) -> None:
    images.mul_(factors).clamp_(0, 255).floor_()


def _contrast_(images: Tensor, factors: Tensor) -> None:
    mean = (_luma(images).mean((1, 2, 3), keepdim=True) + 0.5).floor_()
    images.sub_(mean).mul_(factors).add_(mean).clamp_(0, 255).floor_()


def _saturate_(images: Tensor, factors: Tensor) -> None:
    luma = _luma(images)
    images.sub_(luma).mul_(factors).add_(luma).clamp_(0, 255).floor_()


def _luma(images: Tensor) -> Tensor:
    """(n, 3, S, S) -> (n, 1, S, S), in whole levels. All sums are below 2^24, so float32 has them exactly."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).add_(2**15).mul_(2**-16).floor_()


def _turn_(images: Tensor, turns: Tensor) -> None:
    """Turn the hue of Pillow's HSV, whose three values have 256 levels each, by whole levels.

    A channel is V - S V max(0, min(k, 4 - k, 1)), k = 6 H + 5, 3, 1 (mod 6), for red, green and blue.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    # which channel is the largest: 0 or 1 each, red before green before blue
    is_red = torch.eq(red, value).to(red.dtype)
    is_green = torch.eq(green, value).to(red.dtype).mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    hue = is_red.mul_(green - blue).addcmul_(is_green, blue - red).addcmul_(is_blue, red - green)
    hue.div_(chroma.clamp(min=1)).add_(is_green, alpha=2).add_(is_blue, alpha=4).div_(6).add_(1).frac_()
    hue.mul_(255).floor_().add_(turns.mul(255).trunc_()[:, 0]).remainder_(256).mul_(6 / 255)
    spread = (chroma * 255).div_(value.clamp(min=1)).floor_().div_(255).mul_(value)
    for channel, n in zip((red, green, blue), (5, 3, 1), strict=True):
        k = (hue + n).remainder_(6)
        torch.sub(value, torch.minimum(k, 4 - k).clamp_(0, 1).mul_(spread), out=channel)
        channel.round_()
