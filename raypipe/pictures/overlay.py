"""Masks in colour over an image, and images as data URIs: what every picture here is made with."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np

# Okabe & Ito's palette, readable by colour-blind people (https://jfly.uni-koeln.de/color/), vermilion first.
COLOURS = np.array(
    [(213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (204, 121, 167), (0, 114, 178), (230, 159, 0)],
    np.uint8,
)
# Palette entries after 0 = transparent and the masks' colours: black, dark and half transparent, white.
OUTSIDE, HALO, TRUTH = len(COLOURS) + 1, len(COLOURS) + 2, len(COLOURS) + 3


def overlay(
    image: np.ndarray,
    found: Iterable[np.ndarray],
    foreground: np.ndarray | None = None,
    *,
    places: Sequence[int] | None = None,
) -> np.ndarray:
    """An image in grey with its masks in colour and what lies outside the foreground darkened.

    image: RGB uint8 (H, W, 3). found: bool masks, and foreground: bool, of this or of any other size. Returns RGB uint8
    (H, W, 3). Grey, so that an orange mask shows on an orange animal. places: of each mask's colour in COLOURS, which
    repeat; None = in order.
    """
    import cv2

    found, size = [shrunk(mask, image.shape[:2]) for mask in found], image.shape[:2]
    picture = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None].repeat(3, 2).astype(np.float32)
    if foreground is not None:
        picture[~shrunk(foreground, size)] *= 0.35
    for i in draw_order([mask.sum() for mask in found]):
        colour = COLOURS[(places[i] if places else i) % len(COLOURS)]
        picture[found[i]] = 0.45 * picture[found[i]] + 0.55 * colour
    return picture.round().astype(np.uint8)


def scaled(size: tuple[int, int], side: float) -> tuple[int, int]:
    """(height, width) of a picture whose longer side has at most `side` pixels, each at least 1."""
    factor = min(1.0, side / max(*size, 1))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image at another (height, width), as it is where that is its own."""
    import cv2

    if image.shape[:2] == tuple(size):
        return image
    shrinks = image.shape[0] >= size[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def shrunk(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another size: bool (H, W), true where most of the pixel is."""
    return resized(mask.astype(np.uint8) * 255, size) > 127


def draw_order(areas: Sequence[int]) -> list[int]:
    """Indices of masks by area: large ones first, so that small ones drawn later stay visible."""
    return sorted(range(len(areas)), key=lambda i: -areas[i])


def jpeg(image: np.ndarray, quality: int) -> str:
    """A data URI. image: RGB uint8 (H, W, 3)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, optimize=True)
    return _data_uri("image/jpeg", buffer)


def png(indices: np.ndarray) -> str:
    """A data URI of a palette image. indices: uint8 (H, W), 0 = transparent, then COLOURS, OUTSIDE, HALO, TRUTH."""
    from PIL import Image

    buffer, picture = io.BytesIO(), Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    picture.putpalette([0, 0, 0, *COLOURS.ravel().tolist(), *[0] * 6, 255, 255, 255])
    picture.save(buffer, "PNG", compress_level=6, transparency=bytes([0, *[255] * (len(COLOURS) + 1), 150, 255]))
    return _data_uri("image/png", buffer)


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
