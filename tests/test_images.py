"""Decoding: every format, mode and orientation that is read, and a precise error for all else."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.malformed import deep_png, encoded, malformed, photo, save

from raypipe.images import UPRIGHT, decode
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


def test_running_out_of_memory_is_not_blamed_on_the_file(monkeypatch, image):
    def exhausted(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", exhausted)
    with pytest.raises(MemoryError):
        decode(encoded(image)["plain.bmp"], max_pixels=LIMIT)
