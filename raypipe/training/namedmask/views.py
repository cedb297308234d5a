"""Samples of NamedMask's training: an image scaled into a square with other colours, objects of others pasted over it.

(Shin, Xie, Albanie, CVPR Workshops 2023, section 3.3, and its released code.) What changes the size is done where the
images are, by Pillow; colours are changed and objects pasted where the network is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raypipe import networks
from raypipe.training import augment
from raypipe.training.namedmask import colours

if TYPE_CHECKING:
    from raypipe.training.augment import Jitter
    from raypipe.training.namedmask import NamedMask
    from raypipe.training.recipe import Sample

IGNORED = -1  # label of pixels that are no image
JITTER = (0.8, 0.8, 0.8, 0.2)  # of brightness, contrast, saturation and hue
SIGMA = (0.1, 2.0)  # px, of the blur
# how often an image lies at the lower right of its square, the upper right, the lower left and the upper left: the
# released code draws anew for each of its conditions
CORNERS = {"uniform": (0.25, 0.25, 0.25, 0.25), "reference": (0.25, 0.1875, 0.140625, 0.421875)}


class Draw(NamedTuple):
    """The random choices of one image of a sample."""

    height: int  # px that it is scaled to
    width: int
    corner: tuple[bool, bool]  # whether its square is filled up above it, and at its left
    offset: tuple[int, int]  # top and left of the square in the image, where that is larger
    is_flipped: bool
    jitter: Jitter | None
    is_grey: bool
    sigma: float | None  # px, of the blur; None without


class Square(NamedTuple):
    """An image as it comes into a sample."""

    image: np.ndarray  # RGB uint8 (S, S, 3)
    labels: np.ndarray  # int16 (S, S): 0 the background, IGNORED what is no image
    draw: Draw


class Place(NamedTuple):
    """An object's box in its square, and where it goes: px."""

    top: int
    left: int
    height: int
    width: int
    new_top: int
    new_left: int


class Placing(NamedTuple):
    """What is random about a sample as a whole."""

    places: list[Place | None]  # of the object of each square but the first; None where there is none
    seed: int  # of what the network drops


def draw(random: np.random.Generator, recipe: NamedMask, shape: tuple[int, int]) -> Draw:
    """Always the same number of choices, in the same order. shape: height and width of the image."""
    scale, side = random.uniform(recipe.min_scale, recipe.max_scale), recipe.crop
    height, width = (max(1, int(each * scale)) for each in shape)
    corner = int(np.searchsorted(np.cumsum(CORNERS[recipe.padding])[:3], random.random(), side="right"))
    offset = augment.draw_corner(random, (max(height, side), max(width, side)), side)
    is_flipped = augment.draw_chance(random, recipe.flip)
    jitter = augment.draw_jitter(random, *JITTER, recipe.jitter)
    is_grey = augment.draw_chance(random, recipe.grey)
    sigma = augment.draw_blur(random, *SIGMA, recipe.blur)
    is_filled = (corner in (0, 2), corner in (0, 1))  # above, at the left
    return Draw(height, width, is_filled, offset, is_flipped, jitter, is_grey, sigma)


def square(sample: Sample, draw: Draw, side: int) -> Square:
    """Scale, fill up, cut and mirror an image and its mask alike."""
    image = sample["image"]
    mask = np.unpackbits(sample["mask"], count=image.shape[0] * image.shape[1]).reshape(image.shape[:2])
    return Square(*placed(image, mask * sample["label"], draw, side), draw)


def placed(image: np.ndarray, labels: np.ndarray, draw: Draw, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A square of `side` px of an image RGB uint8 (H, W, 3) and its labels int16 (H, W).

    The image is scaled bilinearly, over all that a pixel covers, and what is missing to the square gets its mean colour
    and IGNORED; labels are those of the pixel at the same place, rounded down.
    """
    (height, width), (top, left) = draw[:2], draw.offset
    rows, columns = slice(top, top + side), slice(left, left + side)
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    scaled = np.asarray(picture)
    scaled_labels = labels[_nearest(len(labels), height)[rows, None], _nearest(labels.shape[1], width)[columns]]
    window = scaled[rows, columns]
    if window.shape[:2] != (side, side):
        high, wide = window.shape[:2]
        y, x = (side - length if is_filled else 0 for length, is_filled in zip((high, wide), draw.corner, strict=True))
        image, labels = np.empty((side, side, 3), np.uint8), np.full((side, side), IGNORED, np.int16)
        image[:] = np.reshape(picture.histogram(), (3, 256)) @ np.arange(256) // (height * width)  # numpy's mean: slow
        image[y : y + high, x : x + wide], labels[y : y + high, x : x + wide] = window, scaled_labels
        window, scaled_labels = image, labels
    if draw.is_flipped:
        window, scaled_labels = window[:, ::-1], scaled_labels[:, ::-1]
    return np.ascontiguousarray(window), np.ascontiguousarray(scaled_labels, dtype=np.int16)


def _nearest(old: int, new: int) -> np.ndarray:
    """The pixels of an axis that a nearest neighbour takes, as torch has them: rounded down, in float32."""
    return np.minimum((np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(np.int64), old - 1)


def places(random: np.random.Generator, squares: Sequence[Square], box: str) -> list[Place | None]:
    """Where the objects of squares are pasted: uniform over all places where they lie in the square whole.

    box: `inclusive`, or `reference` without the last row and column of an object (released code).
    """
    return [_place(random, each.labels, 0 if box == "inclusive" else 1) for each in squares]


def _place(random: np.random.Generator, labels: np.ndarray, lost: int) -> Place | None:
    """lost: px that an object is cut short at the bottom and the right."""
    draws = random.random(2)  # also where there is nothing to paste
    (rows, columns), side = ((labels > 0).any(axis).nonzero()[0] for axis in (1, 0)), len(labels)
    if not len(rows):
        return None
    height, width = (int(each[-1] - each[0] + 1) - lost for each in (rows, columns))
    new = (
        min(int(each * (side - length + 1)), side - length) for each, length in zip(draws, (height, width), strict=True)
    )
    return Place(int(rows[0]), int(columns[0]), height, width, *new)


def coloured(squares: Sequence[Square], device: str) -> Tensor:
    """The squares' images with other colours, float32 (N, 3, S, S), normalised, on the device."""
    draws = [each.draw for each in squares]
    levels = torch.stack(augment.moved([each.image for each in squares], device)).permute(0, 3, 1, 2)
    images = torch.empty(levels.shape, device=device).copy_(levels)
    colours.jitter_(images, [draw.jitter for draw in draws])
    colours.grey_(images, [draw.is_grey for draw in draws])
    with networks.autocast(device, "float32"):  # as matrices are multiplied
        colours.blur_(images, [draw.sigma for draw in draws], augment.kernel_size(min(images.shape[2:])))
    return augment.normalise(images.div_(255))


def paste_(images: Tensor, labels: Tensor, places: Sequence[Place | None]) -> None:
    """Write the objects of all squares but the first over the first, in place, later ones over earlier ones.

    images: float (n, 3, S, S). labels: (n, S, S); objects are above 0. places: n - 1, as of `places`.
    """
    for image, its, place in zip(images[1:], labels[1:], places, strict=True):
        if place is None:
            continue
        source = (slice(place.top, place.top + place.height), slice(place.left, place.left + place.width))
        target = (
            slice(place.new_top, place.new_top + place.height),
            slice(place.new_left, place.new_left + place.width),
        )
        is_object = its[source] > 0
        for canvas, given in ((images[0][:, *target], image[:, *source]), (labels[0][target], its[source])):
            canvas.copy_(torch.where(is_object, given, canvas))
