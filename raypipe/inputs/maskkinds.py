"""What the pixels of a mask file mean: the kinds that there are, a file as it is stored, and its mask by kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from raypipe import images
from raypipe.types import BadImage

KINDS = {  # what counts as set
    "light": "light on dark: from half of white on",
    "ink": "dark ink on a white or transparent sheet",
    "alpha": "what is opaque in cut-outs",
    "nonzero": "any value but 0",
}
HALF = 128  # of 255
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class Kind:
    """How mask files are read: by one of KINDS, or the pixels of some stored values (of an index map) are set."""

    name: str
    values: tuple[int, ...] = ()  # numbers of a palette or levels of grey as stored, RGB as one number R * 65536 + ...

    def __str__(self) -> str:
        """As `parse` reads it."""
        return ",".join(map(str, self.values)) or self.name

    @property
    def words(self) -> str:
        """The same for people."""
        return f"{'values' if len(self.values) > 1 else 'value'} {self}" if self.values else KINDS[self.name]

    def mask(self, file: Stored) -> np.ndarray:
        """What is set in a file: bool (H, W). Raises BadImage for one that cannot be of this kind."""
        if self.name == "alpha":
            if file.alpha is None:
                raise BadImage("decode", "other_kind", "a mask without transparency among cut-outs")
            return file.alpha >= HALF
        if self.values:
            return np.isin(file.values, self.values)
        if self.name == "nonzero":
            return file.values != 0
        return file.luma() < HALF if self.name == "ink" else file.brightest() >= HALF


LIGHT = Kind("light")


def parse(text: str) -> Kind | None:
    """A kind by its name, or values such as `1` or `1,2`; None for any other text."""
    if text in KINDS:
        return Kind(text)
    words = text.split(",")
    if all(word.strip().isascii() and word.strip().isdigit() for word in words):
        return Kind("value", tuple(sorted({int(word) for word in words})))
    return None


def chosen(kind: str | None, value: int | str | None) -> Kind | None:
    """The kind that `--label-kind` and `--label-value` ask for; None without them. Raises ValueError."""
    if kind is not None and value is not None:
        raise ValueError(f"--label-kind {kind} has no effect with --label-value, which sets the pixels of these values")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--label-kind {kind!r}: choose one of {', '.join(KINDS)}, or give --label-value N")
    if value is not None and not getattr(parse(str(value)), "values", ()):
        raise ValueError(f"--label-value {value!r}: expected whole numbers such as 1 or 1,2")
    return None if kind is value is None else parse(kind or str(value))


@dataclass(frozen=True)
class Stored:
    """A mask file as it is stored, upright."""

    values: np.ndarray  # (H, W): levels of grey, numbers of a palette, or RGB as one number
    picture: np.ndarray  # what one sees, uint8: (H, W) of grey, (H, W, 3) of colours
    alpha: np.ndarray | None  # (H, W) uint8; None = the file has none, so all is opaque
    white: float  # the level of white in `values`; 0 where these are no levels of grey
    is_lossy: bool  # neighbours of a value are that value too
    is_palette: bool

    def brightest(self) -> np.ndarray:
        """The brightest channel of what one sees, uint8 (H, W)."""
        return self.picture if self.picture.ndim == 2 else self.picture.max(2)

    def darkest(self) -> np.ndarray:
        """The darkest channel of it."""
        return self.picture if self.picture.ndim == 2 else self.picture.min(2)

    def luma(self) -> np.ndarray:
        """How light it is on a white sheet: float32 (H, W) in 0..255."""
        luma = self.picture.astype(np.float32) if self.picture.ndim == 2 else self.picture @ LUMA
        if self.alpha is None:
            return luma
        return 255 - (255 - luma) * (self.alpha.astype(np.float32) / 255)


def numbers(file: Stored, *, of_colours: bool = False, expected: str = "numbers of a palette, or grey levels"):
    """The numbers of a label map as they are stored: (H, W), integer. Raises BadImage for a file that has none.

    of_colours: three channels are a number together. expected: for people.
    """
    if file.is_lossy:
        raise BadImage("decode", "other_kind", "a label map in a lossy format, whose numbers are gone; save it as PNG")
    if file.values.dtype.kind == "f":
        raise BadImage("decode", "other_kind", "a label map of fractions, expected numbers of classes")
    in_colours = file.picture.ndim == 3 and not file.is_palette
    if in_colours != of_colours:
        text = f"{'colours' if in_colours else 'a palette or grey levels'}, expected {expected}"
        raise BadImage("decode", "other_kind", f"a label map in {text}")
    return file.values


def stored(content: bytes, *, max_pixels: int) -> Stored:
    """A mask file as it is stored. Raises BadImage, as `images.decode` does, when it cannot be read."""
    if content.startswith(b"\xff\xd8\xff"):  # JPEG has neither palette nor alpha
        pixels = images.decode(content, max_pixels=max_pixels)
        return Stored(_as_number(pixels), pixels, None, 0, True, False)
    with images.opened(content, max_pixels=max_pixels) as (image, _):
        is_lossy = image.format == "WEBP" and b"VP8L" not in content[: 1 << 16]
        is_palette, rgba = image.mode in ("P", "PA"), None
        if is_palette or (image.has_transparency_data and not image.mode.startswith("I")):
            rgba = np.asarray(image.convert("RGBA"))
        values, picture, white = (np.asarray(image.getchannel(0)), rgba[:, :, :3], 0) if is_palette else _values(image)
        alpha = rgba[:, :, 3] if image.has_transparency_data and rgba is not None else None
        turned = (None if each is None else images.upright(each, image) for each in (values, picture, alpha))
        return Stored(*turned, white, is_lossy, is_palette)


def _values(image: Image.Image) -> tuple[np.ndarray, np.ndarray, float]:
    """Values, picture and white of `Stored`, not yet upright, where there is no palette."""
    if image.mode in ("1", "L", "LA", "La"):
        grey = np.asarray(image.convert("L"))
        return grey, grey, 255
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint16)
        return deep, (deep >> 8).astype(np.uint8), 65535
    if image.mode in ("I", "F"):
        return _wide(np.asarray(image))
    pixels = np.asarray(image.convert("RGB"))
    return _as_number(pixels), pixels, 0


def _wide(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Whole numbers of 32 bits, or probabilities as floating point. Raises BadImage for other numbers."""
    low, high, are_whole = values.min(), values.max(), (values == np.rint(values)).all()
    if 0 <= low and high <= 1 and not are_whole:
        return values, np.rint(values * 255).astype(np.uint8), 1
    if not (low >= 0 and are_whole):
        text = f"numbers between {low} and {high} are no mask; save whole numbers, or values in 0..1"
        raise BadImage("decode", "unsupported", text)
    white = 255 if high <= 255 else 65535
    return values.astype(np.int64), (values / (white / 255)).clip(0, 255).astype(np.uint8), white


def _as_number(pixels: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3) as one number per pixel, int32 (H, W)."""
    return pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
