"""Odd files of every kind that a large photo collection brings: cut, flipped, misnamed, huge, in odd modes, hostile."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

Outcome = str | set[str]  # "ok", a kind of BadImage, or all that are right
DAMAGED: Outcome = {"ok", "truncated", "corrupt", "unsupported", "too_large", "not_an_image", "empty"}
CUT: Outcome = {"truncated", "corrupt"}


def malformed(folder: str | Path, seed: int = 0) -> dict[str, Outcome]:
    """Write at least 220 odd files into a folder. Returns what decoding each name must give with 50 MP as the limit.

    Names with undecodable bytes are given as os.fsdecode makes them. The same seed writes the same files.
    """
    rng = np.random.default_rng(seed)
    pictures = encoded(photo(rng, 48, 64))
    files: dict[str, tuple[bytes, Outcome]] = {}
    for make in (_modes, _orientations, _cuts, _flips, _disguises, _bombs, _foreign, _names):
        made = make(pictures, rng)
        assert not files.keys() & made.keys()
        files |= made
    os.makedirs(folder, exist_ok=True)
    for name, (content, _) in files.items():
        Path(folder, name).write_bytes(content)
    return {name: outcome for name, (_, outcome) in files.items()}


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth picture with some noise, so that encoders have something to do: uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9) + np.cos(y / 7), np.sin((x + y) / 11), np.cos((x - y) / 5)], axis=-1)
    return np.clip(128 + 55 * waves + rng.normal(0, 4, waves.shape), 0, 255).astype(np.uint8)


def encoded(image: np.ndarray) -> dict[str, bytes]:
    """The picture in every format that is read, by file name."""
    options = {
        "plain.jpg": {"quality": 90},
        "progressive.jpg": {"quality": 90, "progressive": True},
        "plain.png": {},
        "plain.webp": {"quality": 90},
        "lossless.webp": {"lossless": True},
        "plain.bmp": {},
        "plain.tif": {},
        "packed.tif": {"compression": "tiff_adobe_deflate"},
        "plain.gif": {},
    }
    return {name: save(Image.fromarray(image), name, **kwargs) for name, kwargs in options.items()}


def save(image: Image.Image, name: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()["." + name.rpartition(".")[2]], **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"") -> bytes:
    """A PNG by hand: depths and sizes that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def deep_png(values: np.ndarray) -> bytes:
    """uint16 (H, W), (H, W, 2), (H, W, 3) or (H, W, 4) as a 16-bit PNG."""
    height, width = values.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values[0, 0].size]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, colour, rows)


def _modes(pictures: dict, rng: np.random.Generator) -> dict:
    image = Image.fromarray(photo(rng, 30, 40))
    alpha = Image.fromarray(rng.integers(0, 256, (30, 40), dtype=np.uint8))
    deep = rng.integers(0, 65536, (30, 40, 4), dtype=np.uint16)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    with_alpha = image.copy()
    with_alpha.putalpha(alpha)
    grey_alpha = image.convert("L")
    grey_alpha.putalpha(alpha)
    frames = [Image.fromarray(photo(rng, 30, 40)) for _ in range(3)]
    made = {
        "grey.jpg": save(image.convert("L"), ".jpg"),
        "grey.png": save(image.convert("L"), ".png"),
        "cmyk.jpg": save(image.convert("CMYK"), ".jpg"),
        "cmyk.tif": save(image.convert("CMYK"), ".tif"),
        "bit.png": save(image.convert("1"), ".png"),
        "bit.tif": save(image.convert("1"), ".tif", compression="group4"),
        "palette.png": save(palette, ".png"),
        "palette_transparent.png": save(palette, ".png", transparency=3),
        "grey_alpha.png": save(grey_alpha, ".png"),
        "alpha.png": save(with_alpha, ".png"),
        "alpha.webp": save(with_alpha, ".webp"),
        "alpha.tif": save(with_alpha, ".tif"),
        "deep_grey.png": deep_png(deep[..., 0]),
        "deep_grey_alpha.png": deep_png(deep[..., :2]),
        "deep_colour.png": deep_png(deep[..., :3]),
        "deep_alpha.png": deep_png(deep),
        "deep_grey.tif": save(Image.fromarray(deep[..., 0]), ".tif"),
        "animated.gif": save(frames[0], ".gif", save_all=True, append_images=frames[1:]),
        "animated.webp": save(frames[0], ".webp", save_all=True, append_images=frames[1:]),
        "animated.png": save(frames[0], ".png", save_all=True, append_images=frames[1:]),
        "pages.tif": save(frames[0], ".tif", save_all=True, append_images=frames[1:]),
        "one_pixel.png": save(image.resize((1, 1)), ".png"),
        "one_row.jpg": save(image.resize((40, 1)), ".jpg"),
        "mid_grey.jpg": save(Image.new("RGB", (40, 30), (128, 128, 128)), ".jpg"),
        "padded.jpg": pictures["plain.jpg"] + bytes(512),
    }
    integers = Image.fromarray(rng.integers(0, 2**31, (30, 40), dtype=np.int32), "I")
    floats = Image.fromarray(rng.random((30, 40), dtype=np.float32), "F")
    unknown = {"integers.tif": save(integers, ".tif"), "floats.tif": save(floats, ".tif")}
    good = {name: (content, "ok") for name, content in (pictures | made).items()}
    return good | {name: (content, "unsupported") for name, content in unknown.items()}


def _orientations(pictures: dict, rng: np.random.Generator) -> dict:
    image, made = Image.fromarray(photo(rng, 20, 32)), {}
    for value in (*range(9), 9, 4242):
        exif = Image.Exif()
        exif[0x0112] = value
        for suffix in (".jpg", ".png", ".webp"):
            made[f"turned_{value}{suffix}"] = (save(image, suffix, exif=exif), "ok")
    return made


def _cuts(pictures: dict, rng: np.random.Generator) -> dict:
    made = {}
    for name, content in pictures.items():
        for share in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9):
            made[f"cut_{share}_{name}"] = (content[: max(4, int(share * len(content)))], CUT | {"not_an_image"})
        made[f"cut_2_bytes_{name}"] = (content[:2], {"not_an_image", "unsupported", "truncated", "corrupt"})
    jpeg = pictures["plain.jpg"]
    half = jpeg[: len(jpeg) * 3 // 4]
    made["zeros_instead_of_the_rest.jpg"] = (half + bytes(len(jpeg)), "truncated")
    made["end_marker_too_early.jpg"] = (half + b"\xff\xd9", "truncated")
    made["no_end_marker.jpg"] = (jpeg[:-2], "ok")
    return made


def _flips(pictures: dict, rng: np.random.Generator) -> dict:
    made = {}
    for name, content in pictures.items():
        for number in range(6):
            flipped = bytearray(content)
            for _ in range(1 + number):
                flipped[rng.integers(len(flipped))] ^= 1 << int(rng.integers(8))
            made[f"flipped_{number}_{name}"] = (bytes(flipped), DAMAGED)
        noise = bytearray(content)
        noise[len(noise) // 2 :] = rng.bytes(len(noise) - len(noise) // 2)
        made[f"noise_{name}"] = (bytes(noise), DAMAGED)
    return made


def _disguises(pictures: dict, rng: np.random.Generator) -> dict:
    return {
        "jpeg_named.png": (pictures["plain.jpg"], "ok"),
        "png_named.jpg": (pictures["plain.png"], "ok"),
        "webp_named.dat": (pictures["plain.webp"], "ok"),
        "no_extension": (pictures["plain.jpg"], "ok"),
        "UPPER.JPG": (pictures["plain.jpg"], "ok"),
        "two.dots.jpeg.jpg": (pictures["plain.jpg"], "ok"),
        "zero_bytes.jpg": (b"", "empty"),
        "one_byte.jpg": (b"\xff", "not_an_image"),
        "zeros.jpg": (bytes(5000), "not_an_image"),
        "noise.jpg": (b"\x01\x02\x03\x00" + rng.bytes(4000), "not_an_image"),
        "text.jpg": (b"not an image at all\n" * 20, "unsupported"),
        "markup.png": ("<!DOCTYPE html>\n<html><body>404 Not Found – ü</body></html>".encode(), "unsupported"),
        "only_the_signature.png": (b"\x89PNG\r\n\x1a\n", CUT),
        "only_the_signature.jpg": (b"\xff\xd8\xff", CUT),
        "only_the_signature.gif": (b"GIF89a", CUT),
        "only_the_signature.tif": (b"II*\0", CUT),
        "only_the_signature.webp": (b"RIFF\x00\x10\x00\x00WEBP", CUT),
    }


def _bombs(pictures: dict, rng: np.random.Generator) -> dict:
    gif = bytearray(pictures["plain.gif"])
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(pictures["plain.bmp"])
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    tags = [(256, 4, 1, 200_000), (257, 4, 1, 200_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    webp = bytearray(save(Image.new("RGBA", (64, 64), (1, 2, 3, 4)), ".webp", lossless=True))
    webp[21:25] = struct.pack("<I", 16382 | 16382 << 14)
    return {
        "bomb_one_bit.png": (png(30_000, 30_000, 1, 0, bytes(30_000 * 3751)), "too_large"),
        "bomb_header.png": (png(2**31 - 1, 2**31 - 1, 8, 2), "too_large"),
        "bomb.gif": (bytes(gif), "too_large"),
        "bomb.bmp": (bytes(bmp), "too_large"),
        "bomb.tif": (tiff, "too_large"),
        "bomb.webp": (bytes(webp), {"too_large", "corrupt"}),
    }


def _foreign(pictures: dict, rng: np.random.Generator) -> dict:
    tail = rng.bytes(600)
    heads = {
        "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "photo.avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1",
        "clip.mp4": b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2",
        "photo.cr3": b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom",
        "photo.cr2": b"II*\0\x10\0\0\0CR\x02\0",
        "photo.orf": b"IIRO\x08\0\0\0",
        "photo.rw2": b"IIU\0\x18\0\0\0",
        "photo.raf": b"FUJIFILMCCD-RAW 0201",
        "page.pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "layers.psd": b"8BPS\0\x01",
        "photo.jxl": b"\xff\x0a\xfa\x1f",
        "photo.jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
        "light.exr": b"\x76\x2f\x31\x01\x02\0\0\0",
        "scan.dcm": bytes(128) + b"DICM\x02\0",
        "favicon.ico": b"\0\0\1\0\1\0\x10\x10",
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "archive_named.jpg": b"PK\x03\x04\x14\0",
        "packed_named.jpg": b"\x1f\x8b\x08\0",
        "table_named.jpg": b"PAR1\x15\x04",
    }
    made = {name: (head + tail, "unsupported") for name, head in heads.items()}
    svg = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    made["drawing.svg"] = (svg, "unsupported")
    image = Image.fromarray(photo(rng, 24, 24))
    for name, tags in {"photo.dng": {50706: b"\x01\x04\0\0"}, "photo.nef": {254: 1, 271: "NIKON CORPORATION"}}.items():
        made[name] = (save(image, ".tif", tiffinfo=tags), "unsupported")
    return made


def _names(pictures: dict, rng: np.random.Generator) -> dict:
    names = [
        "new\nline.jpg",
        "tab\there.jpg",
        "quote'and\"quote.jpg",
        "<script>alert(1)</script>.jpg".replace("/", "\u2215"),
        "-rf.jpg",
        "--help",
        "a" * 240 + ".jpg",
        "ünïcödé 日本語.jpg",
        "emoji 📷🦒.jpg",
        "percent%20and%zz.jpg",
        "hash#mark.jpg",
        "question?mark=1&x=2.jpg",
        "star*and[bracket].jpg",
        "back\\slash.jpg",
        "  spaces around  .jpg",
        "dollar$(id)`id`;.jpg",
        "comma,semicolon;.jpg",
        "con.jpg",
        "trailing dot.",
        os.fsdecode(b"latin1-\xe9\xff.jpg"),
    ]
    return {name: (pictures["plain.jpg"], "ok") for name in names}
