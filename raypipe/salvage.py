"""What is left of a damaged file that carries pixels: metadata, checksums and a missing end decide nothing."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd7])", re.DOTALL)  # of a JPEG, but for those without a length
SOS, EOI, APP0, APP1, APP14, COM = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE, 0xFE
SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
# What a TIFF needs to be read: layout, place, compression, colours (TIFF 6.0); and the orientation
TIFF_TAGS = {254, 262, 266, 273, 284, 292, 293, 317, 332, 338, 339, 347}
TIFF_TAGS.update(range(256, 260), range(277, 280), range(320, 326), range(512, 522), range(529, 533))
ORIENTATION = 274
XMP = b"http://ns.adobe.com/xap/1.0/\0"


def readings(name: str, data: bytes, *, max_pixels: int) -> Iterator[bytes]:
    """The file, and then what is left of it without metadata: first but for an orientation, then without any.

    A decoder that fails on a profile, a text, a checksum or the end of a file gets to the pixels in a later one. The
    last one of a JPEG ends with its last scan; that of a PNG with at most max_pixels has its pixel stream packed anew,
    if that holds them all.
    """
    yield data
    bare = {"JPEG": _bare_jpeg, "PNG": _bare_png, "TIFF": _bare_tiff, "WebP": _bare_webp}.get(name)
    for keep_orientation in (True, False) if bare else ():
        yield bare(data, keep_orientation)
    if name == "JPEG":
        yield data[: max(0, end_of_scans(data))]
    if name == "PNG":
        yield from _packed_anew(data, max_pixels)


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


def jpeg_kind(data: bytes) -> int:
    """The marker of a JPEG's frame, which tells how it is coded; 0 when it has none."""
    return next((marker for marker, _, _ in jpeg_segments(data) if marker in SOF), 0)


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


def _bare_jpeg(data: bytes, keep_orientation: bool) -> bytes:
    kept = [data[:2]]
    for marker, start, end in jpeg_segments(data):
        content = data[start + 4 : end]
        if marker == SOS:
            return b"".join([*kept, data[start:]])
        if marker == APP0:
            keep = content.startswith(b"JFIF\0") and len(content) >= 14  # it decides about the colour space,
        elif marker == APP14:
            keep = content.startswith(b"Adobe") and len(content) >= 12  # as this does
        elif marker == APP1:
            keep = keep_orientation and content.startswith((b"Exif\0\0", XMP))
        else:
            keep = marker != COM and not APP0 <= marker <= 0xEF
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


def _png(chunks: list[tuple[bytes, bytes, bytes]]) -> bytes:
    parts = [struct.pack(">I", len(content)) + kind + content + checksum for kind, content, checksum in chunks]
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts])


def _checked(kind: bytes, content: bytes) -> tuple[bytes, bytes, bytes]:
    return kind, content, struct.pack(">I", zlib.crc32(kind + content))


def _bare_png(data: bytes, keep_orientation: bool) -> bytes:
    chunks = list(_png_chunks(data))
    head = [chunk for chunk in chunks if chunk[0] == b"IHDR"][:1]  # with its checksum: it says what the pixels are
    carriers = {b"PLTE"} | ({b"eXIf"} if keep_orientation else set())
    head += [_checked(kind, content) for kind, content, _ in chunks if kind in carriers]
    if keep_orientation:
        xmp = b"XML:com.adobe.xmp\0\0"  # not compressed
        head += [_checked(kind, text) for kind, text, _ in chunks if kind == b"iTXt" and text.startswith(xmp)]
    stream = b"".join(content for kind, content, _ in chunks if kind == b"IDAT")
    return _png([*head, _checked(b"IDAT", stream), _checked(b"IEND", b"")])


def _packed_anew(data: bytes, max_pixels: int) -> Iterator[bytes]:
    """The PNG with right checksums, if its stream holds what the header promises and an old checksum vouches for it."""
    chunks = list(_png_chunks(data))
    header = next((content for kind, content, _ in chunks if kind == b"IHDR"), b"")
    stream = b"".join(content for kind, content, _ in chunks if kind == b"IDAT")
    if len(header) != 13:
        return
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if width * height > max_pixels or colour not in (0, 2, 3, 4, 6):
        return
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    expected = 0
    for x, y, right, down in passes if interlaced else [(0, 0, 1, 1)]:
        columns, rows = max(0, -(-(width - x) // right)), max(0, -(-(height - y) // down))
        expected += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    try:
        rows = zlib.decompressobj().decompress(stream[:-4], expected + 1)  # without its checksum
    except zlib.error:
        return
    intact = all(chunk == _checked(*chunk[:2]) for chunk in chunks if chunk[0] == b"IDAT")
    if len(rows) == expected and (intact or stream.endswith(struct.pack(">I", zlib.adler32(rows)))):
        palette = [_checked(kind, content) for kind, content, _ in chunks if kind == b"PLTE"]
        yield _png(
            [_checked(b"IHDR", header), *palette, _checked(b"IDAT", zlib.compress(rows, 1)), _checked(b"IEND", b"")]
        )


def _bare_tiff(data: bytes, keep_orientation: bool) -> bytes:
    """The file with a new first directory behind its end."""
    order = "little" if data[:1] == b"I" else "big"
    width, digits, size = (8, 8, 20) if 43 in data[2:4] else (4, 2, 12)  # bytes of a place, of a number, of an entry
    start = int.from_bytes(data[width : 2 * width], order)
    number = int.from_bytes(data[start : start + digits], order)
    places = range(start + digits, min(start + digits + number * size, len(data) - size + 1), size)
    tags = TIFF_TAGS | ({ORIENTATION} if keep_orientation else set())
    kept = [data[at : at + size] for at in places if int.from_bytes(data[at : at + 2], order) in tags]
    padded = data + b"\0" * (len(data) % 2)
    directory = len(kept).to_bytes(digits, order) + b"".join(kept) + bytes(width)
    return padded[:width] + len(padded).to_bytes(width, order) + padded[2 * width :] + directory


def _bare_webp(data: bytes, keep_orientation: bool) -> bytes:
    carriers = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
    carriers |= {b"EXIF", b"XMP "} if keep_orientation else set()
    at, kept = 12, []
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        content = data[at + 8 : at + 8 + length]
        if data[at : at + 4] in carriers and len(content) == length:
            kept.append(data[at : at + 8] + content + b"\0" * (length % 2))
        at += 8 + length + length % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body
