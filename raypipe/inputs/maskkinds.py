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
TRANSPARENT = {"1", "L", "P", "RGB", "LA", "PA", "RGBA", "La", "RGBa"}  # modes whose alpha, or colour key, Pillow gives
WHITE_IS_ZERO, PHOTOMETRIC = 0, 262  # TIFF 6.0


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
    if kind is None and value is None:
        return None
    if kind is not None and value is not None:
        raise ValueError(f"--label-kind {kind} has no effect with --label-value, which sets the pixels of these values")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--label-kind {kind!r}: choose one of {', '.join(KINDS)}, or give --label-value N")
    found = parse(kind or str(value))
    if kind is None and (found is None or not found.values):
        raise ValueError(f"--label-value {value!r}: expected whole numbers such as 1 or 1,2")
    return found


@dataclass(frozen=True)
class Stored:
    """A mask file as it is stored, upright."""

    values: np.ndarray  # (H, W): levels of grey, numbers of a palette, or RGB as one number
    picture: np.ndarray  # what one sees, uint8: (H, W) of grey, (H, W, 3) of colours
    white: float  # the level of white in `values`; 0 where these are no levels of grey
    alpha: np.ndarray | None  # (H, W) uint8; None = the file has none, so all is opaque
    is_lossy: bool  # neighbours of a value are that value too
    is_palette: bool

    def brightest(self) -> np.ndarray:
        """The brightest channel of what one sees, uint8 (H, W)."""
        return self.picture if self.picture.ndim == 2 else self.picture.max(2)

    def luma(self) -> np.ndarray:
        """How light it is on a white sheet: float32 (H, W) in 0..255."""
        luma = self.picture.astype(np.float32) if self.picture.ndim == 2 else self.picture @ LUMA
        if self.alpha is None:
            return luma
        return 255 - (255 - luma) * (self.alpha.astype(np.float32) / 255)


def stored(content: bytes, *, max_pixels: int) -> Stored:
    """A mask file as it is stored. Raises BadImage, as `images.decode` does, when it cannot be read."""
    if content.startswith(b"\xff\xd8\xff"):  # JPEG has neither palette nor alpha
        pixels = images.decode(content, max_pixels=max_pixels)
        return Stored(_as_number(pixels), pixels, 0, None, True, False)
    with images.opened(content, max_pixels=max_pixels) as (image, content):
        is_lossy = image.format == "WEBP" and b"VP8L" not in content[: 1 << 16]
        alpha = None
        if image.mode in TRANSPARENT and (image.mode[-1:] in "Aa" or "transparency" in image.info):
            alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        values, picture, white = _values(image, content)
        turned = (None if each is None else images.upright(each, image) for each in (values, picture, alpha))
        values, picture, alpha = turned
        return Stored(values, picture, white, alpha, is_lossy, image.mode in ("P", "PA"))


def _values(image: Image.Image, content: bytes) -> tuple[np.ndarray, np.ndarray, float]:
    """Values, picture and white of `Stored`, not yet upright."""
    mode = image.mode
    if mode in ("P", "PA"):
        values = np.asarray(image if mode == "P" else image.getchannel(0))
        colours = np.zeros((256, 3), np.uint8)
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)[:256]
        colours[: len(palette)] = palette
        return values, colours[values], 0
    if mode in ("1", "L", "LA", "La"):
        grey = np.asarray(image.convert("L"))
        bits = content[24] if image.format == "PNG" else 8  # PNG specification, 11.2.2: of the IHDR
        step = {2: 85, 4: 17}.get(bits, 1)  # what Pillow multiplies small numbers with
        return grey if step == 1 else grey // step, grey, 255 // step
    if mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint16)
        tags = image.tag_v2 if image.format == "TIFF" else {}
        deep = 65535 - deep if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else deep
        return deep, (deep >> 8).astype(np.uint8), 65535
    if mode in ("I", "F"):
        return _wide(np.asarray(image))
    pixels = np.asarray(image.convert("RGB"))
    return _as_number(pixels), pixels, 0


def _wide(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Whole numbers of 32 bits, or probabilities as floating point. Raises BadImage for other numbers."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and 0 <= low and high <= 1 and len(np.unique(values)) > 2:
        return values, np.rint(values * 255).astype(np.uint8), 1
    if not low >= 0 or (values != np.rint(values)).any():
        text = f"numbers between {low} and {high} are no mask; save whole numbers, or values in 0..1"
        raise BadImage("decode", "unsupported", text)
    white = 255 if high <= 255 else 65535
    return values.astype(np.int64), (values / (white / 255)).clip(0, 255).astype(np.uint8), white


def _as_number(pixels: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3) as one number per pixel, int32 (H, W)."""
    red, green, blue = np.moveaxis(pixels.astype(np.int32), 2, 0)
    return (red << 16) | (green << 8) | blue
