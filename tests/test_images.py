"""Decoding: every format, mode and orientation that is read, and a precise error for all else."""

import io
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.malformed import deep_png, encoded, malformed, photo, save

from raypipe.images import UPRIGHT, decode, has_narrow_range
from raypipe.types import RETRYABLE, BadImage

LIMIT = 50_000_000


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return folder, malformed(folder)


@pytest.fixture
def image():
    return photo(np.random.default_rng(1), 33, 47)


def outcome(content: bytes) -> str:
    try:
        image = decode(content, max_pixels=LIMIT)
    except BadImage as error:
        assert error.stage == "decode" and error.message and error.kind not in RETRYABLE
        return error.kind
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
    return "ok"


def kind_of(content: bytes) -> tuple[str, str]:
    with pytest.raises(BadImage) as caught:
        decode(content, max_pixels=LIMIT)
    return caught.value.kind, caught.value.message


def test_every_odd_file_has_the_expected_outcome(odd_files):
    folder, expected = odd_files
    assert len(expected) >= 220
    wrong = {}
    for name, allowed in expected.items():
        found = outcome(Path(folder, name).read_bytes())
        if found not in ({allowed} if isinstance(allowed, str) else allowed):
            wrong[name] = (found, allowed)
    assert not wrong


def test_the_odd_files_are_the_same_for_one_seed(odd_files, tmp_path):
    folder, expected = odd_files
    assert malformed(tmp_path) == expected
    assert all(Path(folder, name).read_bytes() == Path(tmp_path, name).read_bytes() for name in os.listdir(folder))


@pytest.mark.parametrize("name", ["plain.png", "lossless.webp", "plain.bmp", "plain.tif", "packed.tif"])
def test_lossless_formats_give_the_same_pixels_back(name, image):
    np.testing.assert_array_equal(decode(encoded(image)[name], max_pixels=LIMIT), image)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_close_to_the_picture(subsampling, progressive, image):
    content = save(Image.fromarray(image), ".jpg", quality=95, subsampling=subsampling, progressive=progressive)
    assert np.abs(decode(content, max_pixels=LIMIT).astype(int) - image).mean() < 6


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("value", range(11))
def test_pictures_are_turned_upright_and_invalid_orientations_ignored(value, suffix, image):
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"lossless": True} if suffix == ".webp" else {}
    stored = decode(save(Image.fromarray(image), suffix, **options), max_pixels=LIMIT)
    turned = decode(save(Image.fromarray(image), suffix, exif=exif, **options), max_pixels=LIMIT)
    upright = {  # written out by where the first row and the first column are (EXIF 2.32, tag 0x0112)
        2: np.fliplr(stored),
        3: np.rot90(stored, 2),
        4: np.flipud(stored),
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored),
    }.get(value, stored)
    np.testing.assert_array_equal(turned, upright)
    assert turned.flags.c_contiguous and turned.flags.writeable


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_rounded_and_not_cut(channels):
    deep = np.random.default_rng(2).integers(0, 65536, (9, 11, channels), dtype=np.uint16)
    expected = np.rint(deep / 257).astype(np.uint8)
    expected = expected[..., :3] if channels > 2 else np.repeat(expected[..., :1], 3, axis=2)
    found = decode(deep_png(deep[..., 0] if channels == 1 else deep), max_pixels=LIMIT)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_colour_tiff_is_rounded_and_turned(orientation):
    tifffile = pytest.importorskip("tifffile")
    deep, file = np.random.default_rng(3).integers(0, 65536, (9, 11, 3), dtype=np.uint16), io.BytesIO()
    tifffile.imwrite(file, deep, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    expected = UPRIGHT[orientation](np.rint(deep / 257).astype(np.uint8))
    np.testing.assert_array_equal(decode(file.getvalue(), max_pixels=LIMIT), expected)


def test_16_bit_grey_with_white_as_zero_is_inverted():
    deep = np.random.default_rng(4).integers(0, 65536, (9, 11), dtype=np.uint16)
    content = save(Image.fromarray(deep), ".tif", tiffinfo={262: 0})
    expected = 255 - np.rint(deep / 257)
    np.testing.assert_array_equal(decode(content, max_pixels=LIMIT)[..., 1], expected)


def test_32_bit_tiff_with_16_bit_values_is_read_and_any_other_range_is_not():
    values = np.random.default_rng(5).integers(0, 65536, (9, 11)).astype(np.int32)
    found = decode(save(Image.fromarray(values), ".tif"), max_pixels=LIMIT)
    np.testing.assert_array_equal(found[..., 0], np.rint(values / 257))
    for other in (values * 1000, values // 1000, values - 70000):
        kind, message = kind_of(save(Image.fromarray(other.astype(np.int32)), ".tif"))
        assert kind == "unsupported" and "magick" in message


def test_alpha_is_dropped_without_blending(image):
    rgba = np.dstack([image, np.zeros(image.shape[:2], np.uint8)])
    np.testing.assert_array_equal(decode(save(Image.fromarray(rgba), ".png"), max_pixels=LIMIT), image)


def test_cmyk_jpeg_is_not_inverted():
    red = Image.new("RGB", (32, 32), (250, 10, 10)).convert("CMYK")
    found = decode(save(red, ".jpg", quality=95), max_pixels=LIMIT)
    assert np.abs(found.astype(int) - (250, 10, 10)).max() < 8


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_the_first_picture_of_several_counts(suffix):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    found = decode(save(frames[0], suffix, save_all=True, append_images=frames[1:]), max_pixels=LIMIT)
    assert (found.mean((0, 1)) > 200).tolist() == [True, False, False]


def test_the_pixel_limit_is_exact():
    content = save(Image.new("RGB", (100, 50)), ".png")
    assert decode(content, max_pixels=5000).shape == (50, 100, 3)
    with pytest.raises(BadImage, match="too_large"):
        decode(content, max_pixels=4999)


def test_pillows_own_limit_neither_warns_nor_raises_and_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    picture = Image.new("RGB", (100, 50))
    contents = [save(picture, suffix) for suffix in (".png", ".jpg", ".bmp", ".tif")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {decode(content, max_pixels=5000).shape for content in contents} == {(50, 100, 3)}
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "plain.png", "plain.bmp", "plain.tif", "plain.gif"])
def test_a_cut_picture_is_never_half_a_picture(name, share):
    content = encoded(photo(np.random.default_rng(6), 120, 160))[name]
    assert kind_of(content[: int(share * len(content))])[0] == "truncated"


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_jpeg_closed_again_after_the_cut_is_truncated(share):
    content = encoded(photo(np.random.default_rng(7), 120, 160))["plain.jpg"]
    assert kind_of(content[: int(share * len(content))] + b"\xff\xd9")[0] == "truncated"


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}])
def test_a_whole_mid_grey_jpeg_is_not_taken_for_a_cut_one(mode, options):
    grey = Image.new(mode, (100, 77), 128 if mode == "L" else (128, 128, 128))
    assert (decode(save(grey, ".jpg", **options), max_pixels=LIMIT) == 128).all()


@pytest.mark.parametrize(
    ("name", "word"),
    [("photo.heic", "HEIC"), ("photo.dng", "DNG"), ("photo.nef", "NEF"), ("photo.cr2", "CR2"), ("page.pdf", "PDF")],
)
def test_formats_that_are_not_read_are_named_with_a_way_out(odd_files, name, word):
    kind, message = kind_of(Path(odd_files[0], name).read_bytes())
    assert kind == "unsupported" and word in message and f"magick photo.{word.lower()}" in message


# Complete pixels, whatever else the file holds

JUNK = b"\x99\xff\0\x01" * 20


def same_pixels(content: bytes, plain: bytes) -> bool:
    return np.array_equal(decode(content, max_pixels=LIMIT), decode(plain, max_pixels=LIMIT))


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def png_chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def in_png(chunk: bytes, plain: bytes, place: str) -> bytes:
    at = 33 if place == "before" else plain.rindex(b"IEND") - 4  # behind IHDR; before IEND
    return plain[:at] + chunk + plain[at:]


@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xc0", b"\xff\xda", b"\xff\xd9"])
def test_fill_bytes_may_stand_before_any_marker_of_a_jpeg(marker, image):
    plain = encoded(image)["plain.jpg"]
    at = plain.rindex(marker) if marker == b"\xff\xd9" else plain.index(marker)
    assert same_pixels(plain[:at] + b"\xff" * 3 + plain[at:], plain)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("tail", [b"", b"\xff", bytes(700), b"\xff" * 700])
def test_a_jpeg_without_an_end_marker_is_read_if_it_has_all_pixels(tail, options, image):
    plain = save(Image.fromarray(image), ".jpg", quality=90, **options)
    assert same_pixels(plain[:-2] + tail, plain)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"restart_marker_blocks": 1}]
)
@pytest.mark.parametrize("tail", [b"", bytes(700), b"\xff" * 700])
def test_a_jpeg_without_its_last_pixels_is_truncated(tail, options, image):
    plain = save(Image.fromarray(image), ".jpg", quality=90, **options)
    for cut in (40, 15):
        assert kind_of(plain[:-cut] + tail)[0] == "truncated"
    if "restart_marker_blocks" in options:
        markers = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", plain)]
        for at in markers[-4:]:
            assert kind_of(plain[:at] + tail)[0] == "truncated"


def test_a_jpeg_that_begins_twice_is_read(image):
    plain = encoded(image)["plain.jpg"]
    assert same_pixels(plain[:2] + plain, plain)


def test_a_cut_jpeg_in_front_of_other_data_is_not_taken_for_a_whole_one(image):
    plain = encoded(image)["plain.jpg"]
    for tail in (b"\xff\xe5" + JUNK, b"\x12\xff\x42" + JUNK + b"\xff\xd9", b"\xff\xfe\xff\xd9"):
        assert kind_of(plain[: len(plain) * 3 // 4] + tail)[0] in ("truncated", "corrupt")
        assert same_pixels(plain[:-2] + tail, plain)


def test_a_progressive_jpeg_without_its_last_scans_is_truncated(image):
    plain = encoded(image)["progressive.jpg"]
    scans = [match.start() for match in re.finditer(rb"\xff\xc4|\xff\xda", plain)]
    for at in scans[-3:]:
        assert kind_of(plain[:at])[0] == "truncated"


@pytest.mark.parametrize("name", ["plain.jpg", "plain.png", "plain.webp", "plain.bmp", "plain.tif", "plain.gif"])
@pytest.mark.parametrize("tail", [b"\n", bytes(5000), JUNK * 100, b"\xff\xd8\xff\xe0" + JUNK])
def test_what_stands_behind_a_picture_decides_nothing(tail, name, image):
    plain = encoded(image)[name]
    assert same_pixels(plain + tail, plain)


@pytest.mark.parametrize("damage", ["none", "index", "second picture"])
def test_of_several_pictures_in_a_jpeg_the_first_is_read(damage, image):
    first, file = Image.fromarray(image), io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[first.rotate(180)], quality=90)
    content = file.getvalue()
    if damage == "index":
        at = content.index(b"MPF\0") + 4
        content = content[:at] + JUNK[:40] + content[at + 40 :]
    if damage == "second picture":
        content = content[: len(content) * 3 // 4]
    assert same_pixels(content, save(first, ".jpg", quality=90))


EXIF = {
    "empty": b"",
    "junk": JUNK,
    "only a header": b"II*\0",
    "a directory far away": b"II*\0\xff\xff\xff\x7f",
    "a directory in itself": b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("name", EXIF)
def test_broken_exif_decides_nothing(name, image):
    pictures = encoded(image)
    jpeg, png = pictures["plain.jpg"], pictures["plain.png"]
    assert same_pixels(jpeg[:2] + jpeg_segment(0xE1, b"Exif\0\0" + EXIF[name]) + jpeg[2:], jpeg)
    assert same_pixels(in_png(png_chunk(b"eXIf", EXIF[name]), png, "before"), png)


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xE0, b"JFIF\0"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='zzz'"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\x09\x03" + JUNK),
        (0xE2, b"MPF\0II*\0"),
        (0xED, b"Photoshop 3.0\0008BIM\x03\xed\0\0\0\0\0\x10ab"),
        (0xEE, b"Adobe"),
        (0xFE, b"\xff\xd9\xff\xda\xff\xd9"),
    ],
)
def test_broken_segments_without_pixels_decide_nothing(marker, content, image):
    plain = encoded(image)["plain.jpg"]
    assert same_pixels(plain[:2] + jpeg_segment(marker, content) + plain[2:], plain)


def test_the_orientation_counts_beside_broken_metadata(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(image)
    jpeg, png = save(picture, ".jpg", exif=exif), save(picture, ".png", exif=exif)
    assert same_pixels(jpeg[:2] + jpeg_segment(0xEE, b"Adobe") + jpeg[2:], jpeg)
    assert same_pixels(in_png(png_chunk(b"pHYs", b"\0"), png, "before"), png)
    assert decode(png, max_pixels=LIMIT).shape == (47, 33, 3)


LARGE = zlib.compress(b" " * 2_000_000)
CHUNKS = {
    "large text": png_chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "large XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    "large profile": png_chunk(b"iCCP", b"wide\0\0" + LARGE),
    "bomb of text": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(300_000_000), 1)),
    "profile of an unknown kind": png_chunk(b"iCCP", b"x\0\7zzzz"),
    "short resolution": png_chunk(b"pHYs", b"\0"),
    "short transparency": png_chunk(b"tRNS", b""),
    "short animation": png_chunk(b"acTL", b"\0"),
    "checksum of a text": png_chunk(b"tEXt", b"a\0b", 7),
    "checksum of an orientation": png_chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0", 7),
    "unknown, with a wrong checksum": png_chunk(b"abCd", b"zz", 7),
    "no name": png_chunk(b"a\0Cd", b"z"),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", CHUNKS)
def test_what_a_png_holds_beside_pixels_decides_nothing(name, place, image):
    plain = encoded(image)["plain.png"]
    assert same_pixels(in_png(CHUNKS[name], plain, place), plain)


@pytest.mark.parametrize("name", ["plain.png", "several chunks"])
@pytest.mark.parametrize("damage", ["chunk", "stream", "header", "no end", "half an end", "text between"])
def test_a_png_s_checksums_and_end_decide_nothing(damage, name, image):
    import cv2

    plain = cv2.imencode(".png", image)[1].tobytes() if name == "several chunks" else encoded(image)[name]
    at, end = plain.index(b"IDAT"), plain.rindex(b"IEND") - 4
    stream = b"".join(re.findall(rb"IDAT(.*?)....(?:....IDAT|....IEND)", plain, re.DOTALL))
    content = {
        "chunk": plain[:33] + png_chunk(b"IDAT", stream, 7) + plain[end:],
        "stream": plain[:33] + png_chunk(b"IDAT", stream[:-4] + b"zzzz") + plain[end:],
        "header": plain[:29] + b"zzzz" + plain[33:],
        "no end": plain[:end],
        "half an end": plain[:-6],
        "text between": plain[: at - 4]
        + png_chunk(b"IDAT", stream[:99])
        + png_chunk(b"tEXt", b"a\0b")
        + png_chunk(b"IDAT", stream[99:])
        + plain[end:],
    }[damage]
    assert same_pixels(content, plain)


def test_a_png_whose_header_or_stream_was_changed_is_corrupt(image):
    plain = encoded(image)["plain.png"]
    assert kind_of(plain[:23] + b"\x20" + plain[24:])[0] == "corrupt"  # 32 rows, not 33
    at = plain.index(b"IDAT") + 2000
    assert kind_of(plain[:at] + bytes([plain[at] ^ 1]) + plain[at + 1 :])[0] in ("corrupt", "truncated")


def test_a_webp_s_metadata_and_sizes_decide_nothing(image):
    plain = encoded(image)["lossless.webp"]

    def riff(*chunks: tuple[bytes, bytes]) -> bytes:
        parts = [kind + struct.pack("<I", len(each)) + each + b"\0" * (len(each) % 2) for kind, each in chunks]
        return b"RIFF" + struct.pack("<I", 4 + sum(map(len, parts))) + b"WEBP" + b"".join(parts)

    pixels = plain[20 : 20 + int.from_bytes(plain[16:20], "little")]
    size = struct.pack("<I", 46)[:3] + struct.pack("<I", 32)[:3]
    extended = (b"VP8X", bytes([0x2C, 0, 0, 0]) + size)
    assert same_pixels(riff(extended, (b"ICCP", JUNK), (b"VP8L", pixels), (b"EXIF", JUNK), (b"XMP ", JUNK)), plain)
    assert same_pixels(riff(extended, (b"VP8L", pixels), (b"EXIF", JUNK * 9))[:-60], plain)
    for wrong in (0, 50, 10**6):
        assert same_pixels(plain[:4] + struct.pack("<I", wrong) + plain[8:], plain)


def test_the_first_picture_of_an_animation_that_was_cut_is_read(image):
    frames = [Image.fromarray(image), Image.fromarray(image[::-1])]
    for suffix, options in ((".gif", {}), (".webp", {"lossless": True}), (".tif", {})):
        content = save(frames[0], suffix, save_all=True, append_images=frames[1:], **options)
        assert same_pixels(content[: len(content) * 9 // 10], content)


# Which page of a TIFF, and what the others are


def tiff(*pages: tuple[np.ndarray, dict[int, int]]) -> bytes:
    """Uncompressed pages with their tags, by hand: those that no library writes."""
    content = b"II*\0" + struct.pack("<I", 8)
    for number, (pixels, extra) in enumerate(pages, 1):
        height, width = pixels.shape[:2]
        bands = pixels[0, 0].size
        tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1 if bands < 3 else 2, 273: 0, 277: bands, 278: height}
        tags |= {279: pixels.size} | extra
        start = len(content) + 2 + 12 * len(tags) + 4
        tags[273] = start
        entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
        following = 0 if number == len(pages) else start + pixels.size
        content += struct.pack("<H", len(tags)) + b"".join(entries) + struct.pack("<I", following) + pixels.tobytes()
    return content


@pytest.mark.parametrize("flag", [1, 4, 5])
def test_of_a_tiff_the_first_page_in_full_size_is_read(flag):
    full = photo(np.random.default_rng(8), 96, 128)[..., :1]
    small = np.ascontiguousarray(full[::4, ::4])
    expected = np.repeat(full, 3, axis=2)
    for pages in (
        [(small, {254: flag}), (full, {})],
        [(small, {254: flag}), (small, {254: flag}), (full, {254: 2}), (full[::-1], {})],
        [(full, {}), (small, {254: flag})],
        [(full, {254: flag})],  # all there is
    ):
        np.testing.assert_array_equal(decode(tiff(*pages), max_pixels=LIMIT), expected)
    with pytest.raises(BadImage, match=r"128 x 96 pixels, the limit is 5000 \(--max-pixels\)"):
        decode(tiff((small, {254: flag}), (full, {})), max_pixels=5000)


@pytest.mark.parametrize("tag", [270, 271, 305, 700, 33723, 34377, 34665, 34675])
@pytest.mark.parametrize("place", [9, 10**9])
def test_tags_of_a_tiff_that_lead_nowhere_decide_nothing(tag, place):
    pixels = photo(np.random.default_rng(11), 24, 33)
    content = tiff((pixels, {tag: 7777777, 274: 6}))
    entry = struct.pack("<HHII", tag, 4, 1, 7777777)
    for kind in (1, 2, 4, 7, 99):
        broken = content.replace(entry, struct.pack("<HHII", tag, kind, 5000, place))
        assert broken != content
        np.testing.assert_array_equal(decode(broken, max_pixels=LIMIT), np.rot90(pixels, -1))


def test_16_bits_are_rounded_whatever_other_tags_of_a_tiff_say():
    deep = np.random.default_rng(12).integers(0, 65536, (24, 33), dtype=np.uint16)
    file = io.BytesIO(save(Image.fromarray(deep), ".tif", tiffinfo={270: "x" * 50, 305: "y" * 50}))
    content = bytearray(file.getvalue())
    start = int.from_bytes(content[4:8], "little")
    for number in range(int.from_bytes(content[start : start + 2], "little")):
        at = start + 2 + 12 * number
        if int.from_bytes(content[at : at + 2], "little") in (270, 305):
            content[at + 2 : at + 12] = b"\x0d\0" + b"\xff\xff\0\0" + b"\xf0\xff\xff\x7f"
    np.testing.assert_array_equal(decode(bytes(content), max_pixels=LIMIT)[..., 0], np.rint(deep / 257))


def test_pillow_s_limits_do_not_stand_in_for_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    content = save(Image.new("RGB", (100, 50)), ".webp")
    assert decode(content, max_pixels=5000).shape == (50, 100, 3)
    with pytest.raises(BadImage, match=r"100 x 50 pixels, the limit is 4999 \(--max-pixels\)"):
        decode(content, max_pixels=4999)


def test_camera_raw_is_what_has_sensor_data():
    full = photo(np.random.default_rng(9), 48, 64)[..., :1]
    small = np.ascontiguousarray(full[::4, ::4])
    for photometric in (32803, 34892):
        assert "RAW" in kind_of(tiff((full, {262: photometric})))[1]
        assert "RAW" in kind_of(tiff((small, {254: 1}), (full, {262: photometric})))[1]


@pytest.mark.parametrize("bands", [2, 5, 7])
def test_a_tiff_of_other_bands_is_unsupported_and_says_how_many(bands):
    pixels = np.zeros((20, 30, bands), np.uint8)
    kind, message = kind_of(tiff((pixels, {262: 1, 284: 2})))
    assert kind == "unsupported" and f"TIFF of {bands} bands of 8 bits" in message and "magick" in message


# Diagnoses


@pytest.mark.parametrize(
    ("head", "name", "advice"),
    [
        (b"RIFF\0\0\0\0AVI LIST", "AVI", "video.avi"),
        (b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1fB\x86\x81\x01B\x82\x84webm", "WebM", "video.webm"),
        (b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1fB\x86\x81\x01B\x82\x88matroska", "MKV", "video.mkv"),
        (b"\0\0\0\x14ftypqt  ", "MOV", "video.mov"),
        (b"\0\0\0\x14ftypisom", "MP4", "video.mp4"),
        (b"\0\0\0\x14ftypzzzz", "ISO media", "if it is a video"),
        (b"\0\0\x01\xba", "MPG", "video.mpg"),
        (b"RIFF\0\0\0\0WAVE", "sound", "remove"),
        (b"<!DOCTYPE HTML PUBLIC", "HTML", "fetch the picture again"),
        (b"\n<?xml version='1.0'?>\n<!-- x --> <html>", "HTML", "fetch the picture again"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "XML", "fetch the picture again"),
        (b"<?xml version='1.0'?><!-- x --><svg width='9'>", "SVG", "magick photo.svg"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs", "git lfs pull"),
        (b"/annex/objects/SHA256E-s1--0.jpg\n", "git-annex", "git annex get"),
        (b"{'error': 'too many requests'}", "plain text", "too many requests"),
        (b"\x89PNG\n\x1a\n\0\0\0\x0dIHDR", "garbled PNG", "binary"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\x04CgBI", "CgBI", "convert"),
        (b"\xff\xd8\xff\xf7", "JPEG-LS", "convert"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "OLE", "thumbnail cache"),
        (b"\0\5\x16\7", "AppleDouble", "remove"),
        (b"Salted__", "encrypted", "decrypt"),
        (b"%PDF-1.4", "PDF", "magick"),
    ],
)
def test_files_that_are_no_readable_pictures_are_called_what_they_are(head, name, advice):
    kind, message = kind_of(head + (b"" if name == "git-annex" else b" 0123456789abcdef" * 40))
    assert kind == "unsupported" and message.startswith(name) and advice in message


def test_a_file_of_zeros_is_said_to_have_lost_its_content():
    assert kind_of(bytes(5000)) == ("not_an_image", "all of its 5000 bytes are zero: its content is lost")


# 16 bits


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_narrow_range_is_noticed(suffix):
    grey = photo(np.random.default_rng(10), 48, 64)[..., 0]
    deep = grey.astype(np.uint16)
    for values, expected in ((deep + 800, True), (deep * 16, True), (deep * 64, True), (deep * 257, False)):
        values[0, 0] = 65535  # a hot pixel
        content = save(Image.fromarray(values), suffix)
        pixels = decode(content, max_pixels=LIMIT)
        np.testing.assert_array_equal(pixels[..., 0], np.rint(values / 257))
        assert has_narrow_range(content, pixels) == expected
    dark = save(Image.fromarray(grey // 64), suffix)
    assert not has_narrow_range(dark, decode(dark, max_pixels=LIMIT))  # 8 bits lose nothing


def test_running_out_of_memory_is_not_blamed_on_the_file(monkeypatch, image):
    def exhausted(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", exhausted)
    with pytest.raises(MemoryError):
        decode(encoded(image)["plain.bmp"], max_pixels=LIMIT)
