"""The picture sheet: a sample of a run's originals beside their masks, as one PNG."""

from __future__ import annotations

import hashlib
import io
import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import images, masks
from raypipe.inputs.manifest import fetch
from raypipe.pictures.overlay import overlay, resized, scaled
from raypipe.run import Run, rows
from raypipe.types import BadImage

log = logging.getLogger("raypipe")
SAMPLE = 12  # images on a sheet
COLUMNS = 3
TILE = 260  # pixels a side of one picture
CAPTION = 22  # pixels of text below
GAP = 10


def write_sheet(run: Run, manifest: pa.Table, *, max_bytes: int, max_pixels: int) -> str | None:
    """Write sheet.png into a run's folder: up to 12 good rows, the same ones each time. Returns its location.

    manifest: the input's listing, which tells where the originals are. None when there is no good row.
    """
    from PIL import Image

    commits, listed = run.commits(), manifest["image_id"].combine_chunks()
    good = pc.and_(pc.equal(commits["error"], ""), pc.is_in(commits["image_id"], value_set=listed))
    # ids are hashes: those with the smallest ones are a random sample
    chosen = commits.filter(good).sort_by("image_id")["image_id"].slice(0, SAMPLE).to_pylist()
    sample = {row["image_id"]: row for row in rows.take(run, chosen)}
    entries = manifest.filter(pc.is_in(manifest["image_id"], value_set=pa.array(sample, pa.string()))).to_pylist()
    tiles = []
    for entry, content in zip(entries, fetch(entries, max_bytes=max_bytes), strict=True):
        try:
            tiles.append(_tile(content, sample[entry["image_id"]], max_pixels))
        except BadImage as error:  # it was readable when it was labelled
            log.warning("sheet: %s is left out: %s", entry["key"], error)
    if not tiles:
        return None
    buffer = io.BytesIO()
    Image.fromarray(draw_sheet(tiles)).save(buffer, "PNG", optimize=True)
    run.folder.write(buffer.getvalue(), "sheet.png")
    return run.folder.location("sheet.png")


def draw_sheet(tiles: list[tuple[np.ndarray, np.ndarray, str]]) -> np.ndarray:
    """Pairs (original, overlay, caption) in a grid: RGB uint8. The pictures have at most TILE pixels a side."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS, len(tiles))
    lines = -(-len(tiles) // columns)
    cell = (2 * TILE + GAP // 2 + 2 * GAP, TILE + CAPTION + GAP)
    sheet = Image.new("RGB", (columns * cell[0], lines * cell[1] + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (original, drawn, caption) in enumerate(tiles):
        x, y = (i % columns) * cell[0] + GAP, (i // columns) * cell[1] + GAP
        for j, picture in enumerate((original, drawn)):
            height, width = picture.shape[:2]
            left = x + j * (TILE + GAP // 2) + (TILE - width) // 2
            sheet.paste(Image.fromarray(picture), (left, y + TILE - height))
        draw.text((x, y + TILE + 2), _shortened(caption, draw, font, 2 * TILE), fill=(70, 70, 70), font=font)
    return np.asarray(sheet)


def _tile(content: bytes | BadImage, row: dict, max_pixels: int) -> tuple[np.ndarray, np.ndarray, str]:
    """One (original, overlay, caption), drawn at the size it is shown in. Raises BadImage if the original changed."""
    import cv2

    if isinstance(content, BadImage):
        raise content
    if hashlib.sha256(content).hexdigest() != row["sha256"]:
        raise BadImage("fetch", "changed", "the file is another one than when it was labelled")
    image = images.decode(content, max_pixels=max_pixels)
    size = scaled(image.shape[:2], TILE)

    def small(rle: dict) -> np.ndarray:
        mask = masks.decode_rle(rle).astype(np.uint8)
        return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)

    found = np.array([small(segment) for segment in row["segments"]], bool).reshape(-1, *size)
    picture, foreground = resized(image, size), row["foreground"] and small(row["foreground"])
    return picture, overlay(picture, found, foreground), row["key"]


def _shortened(text: str, draw, font, width: int) -> str:
    """The end of a long name, which tells files apart better than its beginning; control characters made visible."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if draw.textlength(text, font=font) <= width:
        return text
    while draw.textlength("..." + text, font=font) > width:
        text = text[1:]
    return "..." + text
