"""What a file is by its content, and which page of a TIFF is the picture."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from PIL import TiffImagePlugin

from raypipe.types import BadImage

CONVERT = "convert it first, e.g. `magick photo.{ending} photo.png`"
FRAMES = "extract frames first, e.g. `ffmpeg -i video.{ending} frame_%06d.png`"
ERROR_PAGE = "a download may have brought an error page: fetch the picture again"
# First bytes -> name, and what to do about one that is not read. `.` is any byte; the first match counts, so what is
# special comes before what is general.
SIGNATURES = [
    (rb"\xff\xd8\xff\xf7", "JPEG-LS", CONVERT),
    (rb"\xff\xd8\xff", "JPEG", CONVERT),
    (rb"\x89PNG\r\n\x1a\n....CgBI", "CgBI", CONVERT),
    (rb"\x89PNG\r\n\x1a\n", "PNG", CONVERT),
    (rb"\x89PNG(\n|\r\r?\n)\x1a\r?\n", "garbled PNG", "its line ends were changed: fetch it again as binary"),
    (rb"RIFF....WEBP", "WebP", CONVERT),
    (rb"GIF8[79]a", "GIF", CONVERT),
    (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", "BMP", CONVERT),  # with the sizes that its header may have
    (rb"II\*\x00....CR", "CR2", CONVERT),
    (rb"II[*+]\x00|MM\x00[*+]", "TIFF", CONVERT),
    (rb"IIRO|IIRS|MMOR", "ORF", CONVERT),
    (rb"IIU\x00", "RW2", CONVERT),
    (rb"FUJIFILMCCD-RAW", "RAF", CONVERT),
    (rb"....ftypcrx ", "CR3", CONVERT),
    (rb"....ftyp(avif|avis|(mif1|msf1).{0,32}avif)", "AVIF", CONVERT),
    (rb"....ftyp(hei|hev|mif1|msf1)", "HEIC", CONVERT),
    (rb"....ftypqt  |\x00...(moov|mdat|wide)", "MOV", FRAMES),
    (rb"....ftyp(iso|mp4|avc|M4V|MSNV|dash|3g|f4v|XAVC)", "MP4", FRAMES),
    (rb"....ftyp", "ISO media", "if it is a video, extract frames first, e.g. with ffmpeg"),
    (rb"\x1aE\xdf\xa3.{0,64}webm", "WebM", FRAMES),
    (rb"\x1aE\xdf\xa3", "MKV", FRAMES),
    (rb"RIFF....AVI ", "AVI", FRAMES),
    (rb"\x00\x00\x01[\xb3\xba]", "MPG", FRAMES),
    (rb"(.{4})?G.{187}(.{4})?G.{187}(.{4})?G", "MTS", FRAMES),
    (rb"RIFF....WAVE|ID3|fLaC|OggS", "sound", "remove it from the input"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JXL", CONVERT),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "JP2", CONVERT),
    (rb"%PDF", "PDF", CONVERT),
    (rb"8BPS", "PSD", CONVERT),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS", CONVERT),
    (rb"\x76\x2f\x31\x01", "EXR", CONVERT),
    (rb".{128}DICM", "DICOM", CONVERT),
    (rb"\x00\x00[\x01\x02]\x00[^\x00]", "ICO", CONVERT),
    (rb"P[1-7]\s", "PNM", CONVERT),
    (rb"\x89HDF\r\n\x1a\n", "HDF5", "save its pictures as PNG first"),
    (rb"\x93NUMPY", "NumPy", "save its pictures as PNG first"),
    (rb"PAR1", "Parquet", "give the .parquet itself as the input"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "OLE", "it is a document or a thumbnail cache: remove it"),
    (rb"\x00\x05\x16[\x00\x07]", "AppleDouble", "it holds a Mac's notes on another file: remove it from the input"),
    (rb"Salted__|age-encryption\.org|-----BEGIN PGP", "encrypted", "decrypt it first"),
    (rb"PK\x03\x04|PK\x05\x06", "ZIP", "unpack it first"),
    (rb"\x1f\x8b", "gzip", "unpack it first"),
    (rb"BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "archive", "unpack it first"),
    (rb".{257}ustar", "tar", "give the .tar itself as the input"),
    (rb"version https://git-lfs", "git-lfs", "it is a pointer: run `git lfs pull` first"),
    (rb"(\.git|\.\.|/annex)[\w/.]*/objects/\S+\s*$", "git-annex", "it is a pointer: run `git annex get` first"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml.*?\?>\s*)?(<!--.*?-->\s*)*<(!doctype html|html|head|body)", "HTML", ERROR_PAGE),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml.*|<!--.*)?<(!doctype )?svg", "SVG", CONVERT),
    (rb"(?i)(\xef\xbb\xbf)?\s*<\?xml", "XML", ERROR_PAGE),
]

# TIFF tags (TIFF 6.0, DNG 1.7) and the values that tell a camera's sensor data from a picture
SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, MAKE = 254, 256, 257, 258, 259, 262, 271
BANDS, SUB_DIRECTORIES, SAMPLE_FORMAT, DNG_VERSION = 277, 330, 339, 50706
PARTIAL = 1 | 4  # bits of SUBFILE: the page is a small copy, or a mask
SENSOR = {32803, 34892}  # photometric: colour filter array, linear raw
RAW_COMPRESSIONS = {32767, 32770, 34713, 65535}
RAW_MAKERS = {"NIKON": "NEF", "SONY": "ARW", "PENTAX": "PEF", "SAMSUNG": "SRW"}
RAW = {"CR2", "CR3", "DNG", "ORF", "RW2", "RAF", "RAW", *RAW_MAKERS.values()}
SAMPLES = {1: "unsigned", 2: "signed", 3: "floating point", 5: "complex", 6: "complex"}
MOST_PAGES = 100


def identify(data: bytes) -> tuple[str, bytes]:
    """The format's name by its first bytes, and the file to read: a TIFF begins at its main page. Raises BadImage."""
    if not data:
        raise BadImage("decode", "empty", "the file has zero bytes")
    head = data[:1024]
    name = next((name for pattern, name, _ in SIGNATURES if re.match(pattern, head, re.DOTALL)), "")
    if name == "TIFF":
        return _tiff(data)
    if name:
        return name, data
    if re.search(rb"[\x20-\x7e]{4}", head) and not re.search(rb"[^\t\n\r\f\x20-\xff]|\x7f", head):
        return "plain text", data
    if data.count(0) == len(data):
        raise BadImage("decode", "not_an_image", f"all of its {len(data)} bytes are zero: its content is lost")
    raise BadImage("decode", "not_an_image", f"no known image format; it starts with {data[:8]!r}")


def depth(name: str, data: bytes) -> int:
    """Bits per channel of a PNG or TIFF as stored; 8 for what has no more."""
    if name == "PNG":
        return data[24]  # after length, name, width and height of the IHDR (PNG specification, 11.2.2)
    try:
        return next(_directories(data)).get(BITS, (1,))[0] if name == "TIFF" else 8
    except Exception:  # damaged: decoding it says how
        return 8


def way_out(name: str, data: bytes) -> str:
    """What to do about a file of a format that is not read."""
    if name == "plain text":
        beginning = " ".join(data[:60].decode("utf-8", "replace").split())
        return (
            f"{name} is not an image; it begins {beginning!r}: fetch the picture again, or remove this from the input"
        )
    advice = next((advice for _, known, advice in SIGNATURES if known == name), CONVERT)
    what = f"{name} (camera RAW)" if name in RAW else name
    verb = "is not read" if advice == CONVERT else "is not an image"
    return f"{what} {verb}; {advice.format(ending=name.lower())}"


# TIFF


def _tiff(data: bytes) -> tuple[str, bytes]:
    """TIFF and the file, beginning at its first page in full size; or the camera format that it is."""
    try:
        pages = list(_directories(data))
        first = pages[0]
    except Exception:  # damaged: decoding it as a TIFF says how
        return "TIFF", data
    maker, size = str(first.get(MAKE, "")).upper().split(" ")[0], _area(first)
    if DNG_VERSION in first:
        return "DNG", data
    if any(tags.get(PHOTOMETRIC) in SENSOR or tags.get(COMPRESSION) in RAW_COMPRESSIONS for tags in pages):
        return RAW_MAKERS.get(maker, "RAW"), data
    full = next((tags for tags in pages if not _is_partial(tags) and _area(tags) >= size), None)
    if full is first:
        return "TIFF", data
    if full is None:  # the small copy is all there is
        return RAW_MAKERS.get(maker, "TIFF"), data
    width = 8 if _is_big(data) else 4  # bytes of a place; that of the first page stands in the second such field
    place = full.place.to_bytes(width, "little" if data[:1] == b"I" else "big")
    return "TIFF", data[:width] + place + data[2 * width :]


def _directories(data: bytes) -> Iterator[TiffImagePlugin.ImageFileDirectory_v2]:
    """The tags of a TIFF's pages, each with its `place`; only of the first if that is in full size."""
    header = data[: 16 if _is_big(data) else 8]
    file = io.BytesIO(data)
    places, seen = [TiffImagePlugin.ImageFileDirectory_v2(header).next], set()
    while places and len(seen) < MOST_PAGES:
        place = places.pop(0)
        if not place or place in seen:
            continue
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(place)
        tags.load(file)
        tags.place = place
        if not seen and not _is_partial(tags):
            places = []
        else:
            subs = tags.get(SUB_DIRECTORIES, ())
            places += [tags.next, *(subs if isinstance(subs, tuple) else (subs,))]
        seen.add(place)
        yield tags


def _is_big(data: bytes) -> bool:
    return 43 in data[2:4]  # the mark of a BigTIFF


def _is_partial(tags: TiffImagePlugin.ImageFileDirectory_v2) -> bool:
    return bool(tags.get(SUBFILE, 0) & PARTIAL)


def _area(tags: TiffImagePlugin.ImageFileDirectory_v2) -> int:
    return tags.get(WIDTH, 0) * tags.get(HEIGHT, 0)


def tiff_layout(data: bytes) -> str:
    """How the first page of a TIFF stores its pixels, in words; "" when it does not say."""
    try:
        tags = next(_directories(data))
        if not _area(tags) or PHOTOMETRIC not in tags:
            return ""
        bits, kind, bands = tags.get(BITS, (1,))[0], tags.get(SAMPLE_FORMAT, (1,))[0], tags.get(BANDS, 1)
        words = f"{bands} band{'s' * (bands != 1)} of {bits} bits, {SAMPLES.get(kind, f'sample format {kind}')}"
        return f"{words}, photometric {tags[PHOTOMETRIC]}, compression {tags.get(COMPRESSION, 1)}"
    except Exception:  # damaged
        return ""
