"""Encoded bytes to RGB pixels: recognised by content, checked against the pixel limit first, strict about damage."""

from __future__ import annotations

import io
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from raypipe import formats, salvage
from raypipe.types import BadImage

# The readers themselves, not Image.open: that applies Pillow's own pixel limit, which is set for a whole process.
READERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,  # also MPO, whose first picture is a plain JPEG
    "PNG": PngImagePlugin.PngImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}

# EXIF orientation -> what turns the stored picture upright. Other values, which cameras do write, mean 1.
UPRIGHT: dict[object, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image.swapaxes(0, 1)[::-1, ::-1],
    8: lambda image: image.swapaxes(0, 1)[::-1],
}

HAS_END: dict[str, Callable[[bytes], bool]] = {  # whether a file has the end that its format prescribes
    "BMP": lambda data: len(data) >= int.from_bytes(data[2:6], "little"),
    "GIF": lambda data: data.rstrip(b"\0").endswith(b";"),
    "JPEG": lambda data: salvage.end_of_scan(data) >= 0,
    "PNG": lambda data: b"IEND" in data,
    "TIFF": lambda data: int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big") < len(data),
    "WebP": lambda data: len(data) >= 8 + int.from_bytes(data[4:8], "little"),
}

PHOTOMETRIC, ORIENTATION, WHITE_IS_ZERO = 262, 274, 0  # TIFF tags (TIFF 6.0), and a photometric

NARROW, OUTLIERS = 64, 0.001  # levels of 256, as 14 bits have them; share of the values at either end that counts not
END_OF_JPEG = b"\xff\xd9"

_pillow_limit = threading.Lock()
warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata in ruins, which decide nothing


def decode(data: bytes, *, max_pixels: int) -> np.ndarray:
    """Decode one encoded image to upright RGB uint8 (H, W, 3). The array is contiguous, writable and the caller's.

    data: JPEG (also MPO), PNG, WebP, BMP, TIFF or GIF; of animations and multi-page files the first picture.
    Grey is replicated, alpha dropped without blending, 16 bits become round(value / 257), CMYK and palettes are
    converted; colour profiles are not applied. max_pixels: limit on H * W, checked on the header before decoding.
    Raises BadImage("decode", kind, message): empty, truncated, corrupt, too_large, unsupported, not_an_image.
    """
    with opened(data, max_pixels=max_pixels) as (image, content):
        pixels = _to_rgb(image, content)
        if image.format == "JPEG" and (pixels[-1, -8:] == 128).all() and not _is_whole(content):
            raise BadImage("decode", "truncated", "JPEG whose data end before its last row")
        return upright(pixels, image)


@contextmanager
def opened(data: bytes, *, max_pixels: int) -> Iterator[tuple[Image.Image, bytes]]:
    """The first picture of an encoded image, loaded as it is stored, not upright; and the bytes that it came from.

    Whatever goes wrong, here or in the block, becomes the BadImage that `decode` speaks of.
    """
    name, data = formats.identify(data)
    if name not in READERS:
        raise BadImage("decode", "unsupported", formats.way_out(name, data))
    try:
        yield _loaded(name, data, max_pixels)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise _bad(error, name, data) from error


def _loaded(name: str, data: bytes, max_pixels: int) -> tuple[Image.Image, bytes]:
    failure = None
    for content in salvage.readings(name, data, max_pixels=max_pixels):
        try:
            image = _headed(name, content)
            if image.width * image.height > max_pixels:
                text = f"{image.width} x {image.height} pixels, the limit is {max_pixels} (--max-pixels)"
                raise BadImage("decode", "too_large", text)
            if name == "JPEG" and salvage.end_of_scan(content) < 0:
                content = _with_end(content)
                image = READERS[name](io.BytesIO(content))
            with _without_pillow_limit(image.width * image.height):
                image.load()
            return image, content
        except MemoryError:
            raise
        except Exception as error:
            if isinstance(error, BadImage) and (failure is None or error.kind == "too_large"):
                raise
            failure = failure or error.with_traceback(None)  # whose frames would keep the picture
    raise failure


def _headed(name: str, data: bytes) -> Image.Image:
    """A picture whose header alone was read, also above the limit that Pillow has for some formats."""
    try:
        return READERS[name](io.BytesIO(data))
    except Image.DecompressionBombError:
        with _without_pillow_limit():
            return READERS[name](io.BytesIO(data))


def has_narrow_range(data: bytes, pixels: np.ndarray) -> bool:
    """Whether a 16-bit picture uses so little of its range that few of the 256 levels are left.

    data: its file. pixels: what `decode` made of it. Sensors of 10, 12 or 14 bits, as in microscopes, store such.
    """
    name, data = formats.identify(data)
    if formats.depth(name, data) < 16:
        return False
    counts = np.cumsum(np.bincount(pixels.ravel(), minlength=256)) / pixels.size
    low, high = np.searchsorted(counts, (OUTLIERS, 1 - OUTLIERS))  # a hot pixel spans nothing
    return bool(high - low <= NARROW)


def upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """An array (H, W, ...) of a picture turned as its EXIF says, contiguous."""
    return np.ascontiguousarray(UPRIGHT.get(_orientation(image), UPRIGHT[1])(pixels))


def orientation(data: bytes) -> int:
    """How an encoded image is to be turned, as a key of UPRIGHT, by its first bytes; 1 where they do not say."""
    try:
        found = _orientation(_headed(*formats.identify(data)))
    except Exception:  # whoever needs its pixels is told
        return 1
    return found if found in UPRIGHT else 1


@contextmanager
def _without_pillow_limit(pixels: float = math.inf) -> Iterator[None]:
    """Let Pillow read a picture that is within our limit but above its own, and put its limit back."""
    if Image.MAX_IMAGE_PIXELS is None or pixels <= Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _pillow_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _to_rgb(image: Image.Image, data: bytes) -> np.ndarray:
    """A loaded picture as uint8 (H, W, 3)."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = data[24] if image.format == "PNG" else tags.get(formats.BITS, (8,))[0]  # PNG specification, 11.2.2: IHDR
    if image.mode in ("I", "F"):
        bits, values = 16, np.asarray(image)
        if not 255 < values.max() <= 65535 or values.min() < 0 or (values != np.rint(values)).any():
            advice = "convert it first, e.g. `magick photo.tif -auto-level -depth 16 photo.png`"
            text = f"TIFF of {formats.tiff_layout(data)}: its range is unknown; {advice}"
            raise BadImage("decode", "unsupported", text)
    elif not image.mode.startswith("I;16"):
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        return _deep_colour(data, pixels) if bits == 16 and image.mode != "CMYK" else pixels
    white = 2**bits - 1
    grey = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white  # round(value / 257) for 16 bits
    grey = (255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _deep_colour(data: bytes, high_bytes: np.ndarray) -> np.ndarray:
    """16-bit colour rounded to 8 bits. Pillow cuts it to the high bytes, which serve to check what OpenCV reads."""
    import cv2

    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is not None and deep.dtype == np.uint16 and deep.ndim == 3:
        deep = deep[:, :, 2::-1]  # BGR or BGRA -> RGB
        for turn in UPRIGHT.values():  # the two disagree by version and format on who applies the orientation
            turned = turn(deep)
            if np.array_equal(turned >> 8, high_bytes):
                return ((turned.astype(np.uint32) + 128) // 257).astype(np.uint8)
    advice = "convert it first, e.g. `magick photo.tif -depth 8 photo.png`"
    raise BadImage("decode", "unsupported", f"16 bits per channel in an unusual layout; {advice}")


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation that is still to be applied (Pillow applies a TIFF's when loading it)."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # metadata in ruins says nothing about the pixels
        return 1


def _with_end(data: bytes) -> bytes:
    """A JPEG that lacks its end marker, with one. Raises BadImage when more than that is missing."""
    end = salvage.end_of_scans(data)
    scans = data[: max(end, 0)].rstrip(b"\0\xff")  # what fills up a file that was cut
    scans += b"\xff\0" if data.startswith(b"\xff\0", len(scans)) else b""  # as data write 255
    if end < 0 or not _is_whole(scans + END_OF_JPEG):
        raise BadImage("decode", "truncated", "JPEG without an end marker: the file was cut")
    return scans + END_OF_JPEG


def _is_whole(data: bytes) -> bool:
    """Whether a JPEG has data for all of its pixels.

    Decoders fill what is missing with mid grey and only warn. So more data behind the last scan would change a picture
    that was cut, also as some downloads and repair tools close it again; a whole one stays as it is.
    """
    end = salvage.end_of_scans(data)
    scans = data[: salvage.end_of_scan(data) if end < 0 else end]
    restarts = re.findall(rb"\xff([\xd0-\xd7])", scans) or [b"\xd7"]
    more = b"\x5a\xa5" * 64
    after_restart = bytes([0xFF, 0xD0 + (restarts[-1][0] + 1) % 8]) + more  # what decoders wait for between intervals
    pictures = set()
    for each in (b"", more, after_restart):
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(scans + each + END_OF_JPEG))
        pictures.add(sha256(image.convert("RGB").tobytes()).digest())
    return len(pictures) == 1


def _bad(error: Exception, name: str, data: bytes) -> BadImage:
    """What a decoder's failure means, as far as the file itself shows it."""
    text, layout = f"{name}: {type(error).__name__}: {error}", ""
    if name == "TIFF" and isinstance(error, SyntaxError):  # it failed on the header, before any pixel
        layout = formats.tiff_layout(data)
    elif name == "JPEG":
        kind = next((marker for marker, _, _ in salvage.jpeg_segments(data) if marker in salvage.SOF), 0)
        layout = f"a coding other than baseline or progressive (SOF{kind - 0xC0})" if kind > 0xC2 else ""
    if layout:
        text = f"{name} of {layout} is not read"
    if layout or re.search(r"unknown pixel mode|cannot handle|conversion from|unsupported|not supported", text, re.I):
        return BadImage("decode", "unsupported", f"{text}; convert it first, e.g. with `magick ... photo.png`")
    return BadImage("decode", "truncated" if not HAS_END[name](data) or "truncat" in str(error) else "corrupt", text)


def encode_png(pixels: np.ndarray) -> bytes:
    """An image as PNG. pixels: RGB or RGBA uint8 (H, W, C), or grey uint8 or uint16 (H, W)."""
    import cv2

    turned = {3: "COLOR_RGB2BGR", 4: "COLOR_RGBA2BGRA"}.get(pixels.shape[2]) if pixels.ndim == 3 else None
    stored = pixels if turned is None else cv2.cvtColor(pixels, getattr(cv2, turned))
    return cv2.imencode(".png", stored)[1].tobytes()
