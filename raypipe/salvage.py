"""What is left of a damaged file that carries pixels: metadata, checksums and a missing end decide nothing."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)  # of a JPEG, but for those without a length
SOS, EOI, APP0, APP1, APP14, COM = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE, 0xFE
SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
# What a TIFF needs to be read: layout, place, compression, colours (TIFF 6.0); and the orientation
TIFF_TAGS = {254, 262, 266, 273, 274, 284, 292, 293, 317, 332, 338, 339, 347}
TIFF_TAGS.update(range(256, 260), range(277, 280), range(320, 326), range(512, 522), range(529, 533))
XMP, PNG_XMP = b"http://ns.adobe.com/xap/1.0/\0", b"XML:com.adobe.xmp\0\0"  # the latter not compressed
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel of a PNG, by its colour type
WEBP_CHUNKS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"XMP "}


def readings(name: str, data: bytes, *, max_pixels: int) -> Iterator[bytes]:
    """The file, and then what is left of it without metadata but for an orientation.

    A decoder that fails on a profile, a text, a checksum or the end of a file gets to the pixels in a later one. The
    last one of a JPEG ends with its last scan; that of a PNG with at most max_pixels has its pixel stream packed anew,
    if that holds them all.
    """
    yield data
    if name == "JPEG":
        yield _bare_jpeg(data)
        yield data[: max(0, end_of_scans(data))]
    elif name == "PNG":
        yield from _bare_pngs(data, max_pixels)
    elif name == "TIFF":
        yield _bare_tiff(data)
    elif name == "WebP":
        yield _bare_webp(data)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, and where the segment begins and ends, up to the end marker; the data of scans are jumped over."""
    at = 2
    while match := MARKER.search(data, at):
        marker, start = match[1][0], match.end() - 2
        at = start + 2
        if marker == EOI:
            yield marker, start, at
            return
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
        yield marker, start, at


def end_of_scan(data: bytes) -> int:
    """Where a JPEG's end marker is; -1 when it has none. A thumbnail inside the header has its own, which is not it."""
    start = next((start for marker, start, _ in jpeg_segments(data) if marker == SOS), -1)
    return data.find(b"\xff\xd9", start) if start >= 0 else -1


def end_of_scans(data: bytes) -> int:
    """Where the data end of the scan that brings a JPEG's last bits; -1 when scans are missing.

    Whether the data inside a scan are whole is not looked at.
    """
    missing: dict[tuple[int, int], int] = {}  # lowest bit that has come, of each coefficient of each component
    for marker, start, end in jpeg_segments(data):
        if marker in SOF:
            missing = {(component, i): 1 for component in data[start + 10 : end : 3] for i in range(64)}
        elif marker == SOS and len(scan := data[start + 4 : end]) >= 6:
            first, last, bits = scan[-3:]
            for component in scan[1:-3:2]:
                missing |= {(component, i): bits & 15 for i in range(first, min(last, 63) + 1)}
            if not any(missing.values()):
                following = MARKER.search(data, end)
                return following.start() if following else len(data)
    return -1


def _bare_jpeg(data: bytes) -> bytes:
    kept = [data[:2]]
    for marker, start, end in jpeg_segments(data):
        content = data[start + 4 : end]
        if marker == SOS:
            return b"".join([*kept, data[start:]])
        keep = marker != COM and not APP0 <= marker <= 0xEF
        keep |= marker == APP0 and content.startswith(b"JFIF\0") and len(content) >= 14  # decides about the colours,
        keep |= marker == APP14 and content.startswith(b"Adobe") and len(content) >= 12  # as this does
        keep |= marker == APP1 and content.startswith((b"Exif\0\0", XMP))
        if keep:
            kept.append(data[start:end])
    return data


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, content and checksum of each chunk; the last ones may be cut."""
    at = 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : end], data[end : end + 4]
        at = end + 4


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of chunks, kind and content of each."""
    parts = [struct.pack(">I", len(content)) + kind + content + _checksum(kind, content) for kind, content in chunks]
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts])


def _checksum(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(kind + content))


def _bare_pngs(data: bytes, max_pixels: int) -> Iterator[bytes]:
    """The PNG without metadata; and packed anew, if its stream holds what the header promises.

    A stream counts if a checksum vouches for it: that of its chunks, or its own at its end.
    """
    chunks = list(_png_chunks(data))
    header, proof = next(((content, proof) for kind, content, proof in chunks if kind == b"IHDR"), (b"", b""))
    kept = [(kind, content) for kind, content, _ in chunks if kind in (b"PLTE", b"eXIf") or content.startswith(PNG_XMP)]
    stream = b"".join(content for kind, content, _ in chunks if kind == b"IDAT")
    if proof == _checksum(b"IHDR", header):
        yield _png((b"IHDR", header), *kept, (b"IDAT", stream), (b"IEND", b""))
    if len(header) != 13:
        return
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if width * height > max_pixels or colour not in SAMPLES or interlaced:
        return
    expected = height * (1 + (width * depth * SAMPLES[colour] + 7) // 8)
    try:
        rows = zlib.decompressobj().decompress(stream[:-4], expected + 1)  # without its checksum
    except zlib.error:
        return
    is_sound = all(proof == _checksum(kind, content) for kind, content, proof in chunks if kind == b"IDAT")
    if len(rows) == expected and (is_sound or stream.endswith(struct.pack(">I", zlib.adler32(rows)))):
        yield _png((b"IHDR", header), *kept, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))


def _bare_tiff(data: bytes) -> bytes:
    """The file with a new first directory behind its end."""
    order = "little" if data[:1] == b"I" else "big"
    width, digits, size = (8, 8, 20) if 43 in data[2:4] else (4, 2, 12)  # bytes of a place, of a number, of an entry
    start = int.from_bytes(data[width : 2 * width], order)
    number = int.from_bytes(data[start : start + digits], order)
    places = range(start + digits, min(start + digits + number * size, len(data) - size + 1), size)
    kept = [data[at : at + size] for at in places if int.from_bytes(data[at : at + 2], order) in TIFF_TAGS]
    padded = data + b"\0" * (len(data) % 2)
    directory = len(kept).to_bytes(digits, order) + b"".join(kept) + bytes(width)
    return padded[:width] + len(padded).to_bytes(width, order) + padded[2 * width :] + directory


def _bare_webp(data: bytes) -> bytes:
    at, kept = 12, []
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        content = data[at + 8 : at + 8 + length]
        if data[at : at + 4] in WEBP_CHUNKS and len(content) == length:
            kept.append(data[at : at + 8] + content + b"\0" * (length % 2))
        at += 8 + length + length % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body
