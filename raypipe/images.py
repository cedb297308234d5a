"""Encoded bytes to RGB pixels: recognised by content, checked against the pixel limit first, strict about damage."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from raypipe.types import BadImage

# The readers themselves, not Image.open: that applies Pillow's own pixel limit, which is set for a whole process.
READERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG": JpegImagePlugin.jpeg_factory,  # also MPO, whose first picture is a plain JPEG
    "PNG": PngImagePlugin.PngImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}

# First bytes -> name. `.` is any byte; the first match counts, so what is special comes before what is general.
SIGNATURES = [
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", "BMP"),  # with the sizes that its header may have
    (rb"II\*\x00....CR", "CR2"),
    (rb"II[*+]\x00|MM\x00[*+]", "TIFF"),
    (rb"IIRO|IIRS|MMOR", "ORF"),
    (rb"IIU\x00", "RW2"),
    (rb"FUJIFILMCCD-RAW", "RAF"),
    (rb"....ftypcrx ", "CR3"),
    (rb"....ftyp(avif|avis|(mif1|msf1).{0,32}avif)", "AVIF"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "HEIC"),
    (rb"....(ftyp|moov|mdat|wide)", "MP4"),
    (rb"\x1aE\xdf\xa3|RIFF....AVI ", "MKV"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JXL"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "JP2"),
    (rb"%PDF", "PDF"),
    (rb"8BPS", "PSD"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
    (rb"\x76\x2f\x31\x01", "EXR"),
    (rb"#\?(RADIANCE|RGBE)", "HDR"),
    (rb".{128}DICM", "DICOM"),
    (rb"\x00\x00[\x01\x02]\x00[^\x00]", "ICO"),
    (rb"P[1-7]\s", "PNM"),
    (rb"DDS ", "DDS"),
    (rb"SIMPLE  =", "FITS"),
    (rb"\x89HDF\r\n\x1a\n", "HDF5"),
    (rb"\x93NUMPY", "NumPy"),
    (rb"PAR1", "Parquet"),
    (rb"PK\x03\x04|PK\x05\x06", "ZIP"),
    (rb"\x1f\x8b", "gzip"),
    (rb"BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "archive"),
    (rb".{257}ustar", "tar"),
    (rb"version https://git-lfs", "git-lfs"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)", "HTML"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml.*|<!--.*)?<(!doctype )?svg", "SVG"),
]
RAW = {"CR2", "CR3", "NEF", "ARW", "DNG", "ORF", "RW2", "RAF", "PEF", "SRW", "RAW"}
NO_PICTURE = {  # what to do about files that no picture converter reads
    "MP4": "extract frames first, e.g. `ffmpeg -i video.mp4 frame_%06d.png`",
    "MKV": "extract frames first, e.g. `ffmpeg -i video.mkv frame_%06d.png`",
    **dict.fromkeys(("ZIP", "gzip", "archive"), "unpack it first"),
    "tar": "give the .tar itself as the input",
    "Parquet": "give the .parquet itself as the input",
    **dict.fromkeys(("NumPy", "HDF5"), "save its pictures as PNG first"),
    "HTML": "a download may have brought an error page: fetch the picture again",
    "git-lfs": "it is a pointer: run `git lfs pull` first",
    "plain text": "remove it from the input",
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

# TIFF tags (TIFF 6.0, DNG 1.7) and the values that tell a camera's sensor data from a picture
SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, MAKE, ORIENTATION, DNG_VERSION = 254, 258, 259, 262, 271, 274, 50706
REDUCED, WHITE_IS_ZERO, COLOUR_FILTER_ARRAY = 1, 0, 32803
RAW_COMPRESSIONS = {32767: "ARW", 32770: "SRW", 34713: "NEF", 65535: "PEF"}
RAW_MAKERS = {"NIKON": "NEF", "SONY": "ARW", "PENTAX": "PEF", "SAMSUNG": "SRW"}

END_OF_JPEG = b"\xff\xd9"

_pillow_limit = threading.Lock()


def decode(data: bytes, *, max_pixels: int) -> np.ndarray:
    """Decode one encoded image to upright RGB uint8 (H, W, 3). The array is contiguous, writable and the caller's.

    data: JPEG (also MPO), PNG, WebP, BMP, TIFF or GIF; of animations and multi-page files the first picture.
    Grey is replicated, alpha dropped without blending, 16 bits become round(value / 257), CMYK and palettes are
    converted; colour profiles are not applied. max_pixels: limit on H * W, checked on the header before decoding.
    Raises BadImage("decode", kind, message): empty, truncated, corrupt, too_large, unsupported, not_an_image.
    """
    with opened(data, max_pixels=max_pixels) as image:
        pixels = _to_rgb(image, data)
        if image.format in ("JPEG", "MPO"):
            _check_last_row(pixels, data)
        return upright(pixels, image)


@contextmanager
def opened(data: bytes, *, max_pixels: int) -> Iterator[Image.Image]:
    """The first picture of an encoded image as it is stored, loaded and not yet upright, to make an array of.

    Whatever goes wrong, here or in the block, becomes the BadImage that `decode` speaks of.
    """
    name = _identify(data)
    if name not in READERS:
        raise BadImage("decode", "unsupported", _way_out(name))
    try:
        image = READERS[name](io.BytesIO(data))
        if image.width * image.height > max_pixels:
            text = f"{image.width} x {image.height} pixels, the limit is {max_pixels}"
            raise BadImage("decode", "too_large", text)
        if name == "JPEG" and _end_of_scan(data) < 0:  # Pillow decodes on when zeros stand where the rest was
            raise BadImage("decode", "truncated", "JPEG without an end marker: the file was cut")
        with _without_pillow_limit(image.size):
            image.load()
        yield image
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise _bad(error, name, data) from error


def upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """An array (H, W, ...) of a picture turned as its EXIF says, contiguous."""
    return np.ascontiguousarray(UPRIGHT.get(_orientation(image), UPRIGHT[1])(pixels))


def _identify(data: bytes) -> str:
    """The format's name by its first bytes; BadImage when there is none."""
    if not data:
        raise BadImage("decode", "empty", "the file has zero bytes")
    head = data[:1024]
    name = next((name for pattern, name in SIGNATURES if re.match(pattern, head, re.DOTALL)), "")
    if name == "TIFF":
        return _raw_in_tiff(data) or name
    if name:
        return name
    if re.search(rb"[\x20-\x7e]{4}", head) and not re.search(rb"[^\t\n\r\f\x20-\xff]|\x7f", head):
        return "plain text"
    raise BadImage("decode", "not_an_image", f"no known image format; it starts with {data[:8]!r}")


def _raw_in_tiff(data: bytes) -> str:
    """The camera format of a TIFF that is one, else "". Its first picture is a thumbnail or not yet developed."""
    header = data[: 16 if 43 in data[2:4] else 8]  # 43 marks a BigTIFF
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        if DNG_VERSION in tags:
            return "DNG"
        sensor = tags.get(PHOTOMETRIC) == COLOUR_FILTER_ARRAY or tags.get(COMPRESSION) in RAW_COMPRESSIONS
        thumbnail = tags.get(SUBFILE, 0) & REDUCED
        maker = str(tags.get(MAKE, "")).upper().split(" ")[0]
    except Exception:  # damaged: decoding it as a TIFF says how
        return ""
    if not sensor and not thumbnail:
        return ""
    return RAW_COMPRESSIONS.get(tags.get(COMPRESSION)) or RAW_MAKERS.get(maker, "RAW")


def _way_out(name: str) -> str:
    if name in NO_PICTURE:
        return f"{name} is not an image; {NO_PICTURE[name]}"
    kind = f"{name} (camera RAW)" if name in RAW else name
    return f"{kind} is not read; convert it first, e.g. `magick photo.{name.lower()} photo.png`"


@contextmanager
def _without_pillow_limit(size: tuple[int, int]) -> Iterator[None]:
    """Let Pillow decode a picture that is within our limit but above its own, and put its limit back."""
    if Image.MAX_IMAGE_PIXELS is None or size[0] * size[1] <= Image.MAX_IMAGE_PIXELS:
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
    # Bits per channel as stored, which Pillow keeps only for grey. PNG specification, 11.2.2: after length, name, width
    # and height of the IHDR.
    bits = data[24] if image.format == "PNG" else tags.get(BITS, (8,))[0]
    if image.mode in ("I", "F"):
        bits, values = 16, np.asarray(image)
        if not 255 < values.max() <= 65535 or values.min() < 0 or (values != np.rint(values)).any():
            layout = "32-bit integer" if image.mode == "I" else "floating point"
            advice = "convert it first, e.g. `magick photo.tif -auto-level -depth 16 photo.png`"
            raise BadImage("decode", "unsupported", f"{layout} TIFF whose range is unknown; {advice}")
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


def _end_of_scan(data: bytes) -> int:
    """Where a JPEG's end marker is; -1 when it has none. A thumbnail inside the header has its own, which is not it."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    start = data.find(b"\xff\xda", at)
    return data.find(END_OF_JPEG, start) if start >= 0 else -1


def _check_last_row(pixels: np.ndarray, data: bytes) -> None:
    """Raise when a JPEG's data stop early though an end marker follows, as some downloads and repair tools leave it.

    Decoders fill the rest with mid grey and only warn. If that is how the picture ends, more data before the end
    marker change it; a complete picture stays as it is.
    """
    if (pixels[-1, -8:] != 128).any():
        return
    end = _end_of_scan(data)
    longer = data[:end] + b"\x5a\xa5" * 64 + END_OF_JPEG
    again = JpegImagePlugin.JpegImageFile(io.BytesIO(longer)).convert("RGB")
    if not np.array_equal(np.asarray(again), pixels):
        raise BadImage("decode", "truncated", "JPEG whose data end before its last row")


def _bad(error: Exception, name: str, data: bytes) -> BadImage:
    text = f"{name}: {type(error).__name__}: {error}"
    if isinstance(error, Image.DecompressionBombError):
        return BadImage("decode", "too_large", text)
    if re.search(r"unknown pixel mode|cannot handle|conversion from|unsupported|not supported", str(error), re.I):
        return BadImage("decode", "unsupported", f"{text}; convert it first, e.g. with `magick ... photo.png`")
    return BadImage("decode", "truncated" if _is_cut(name, data) or "truncat" in str(error) else "corrupt", text)


def _is_cut(name: str, data: bytes) -> bool:
    """Whether the end that the format prescribes is missing."""
    if name == "PNG":
        return b"IEND" not in data[-4096:]
    if name == "GIF":
        return not data.rstrip(b"\0").endswith(b";")
    if name == "WebP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if name == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    if name == "TIFF":
        return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big") >= len(data)
    return _end_of_scan(data) < 0


def encode_png(pixels: np.ndarray) -> bytes:
    """An image as PNG. pixels: RGB or RGBA uint8 (H, W, C), or grey uint8 or uint16 (H, W)."""
    import cv2

    turned = {3: "COLOR_RGB2BGR", 4: "COLOR_RGBA2BGRA"}.get(pixels.shape[2]) if pixels.ndim == 3 else None
    stored = pixels if turned is None else cv2.cvtColor(pixels, getattr(cv2, turned))
    return cv2.imencode(".png", stored)[1].tobytes()
