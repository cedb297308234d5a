"""The picture sheet: a sample of a run's originals beside their masks, as one PNG."""

from __future__ import annotations

import io
import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import images, inputs, masks
from raypipe.runs import Run
from raypipe.types import BadImage

log = logging.getLogger("raypipe")
SAMPLE = 12  # images on a sheet
COLUMNS = 3
TILE = 260  # pixels a side of one picture
CAPTION = 22  # pixels of text below
GAP = 10
# Okabe & Ito's palette, readable by colour-blind people (https://jfly.uni-koeln.de/color/), vermilion first.
COLOURS = np.array(
    [(213, 94, 0), (0, 114, 178), (240, 228, 66), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0)],
    np.uint8,
)


def write_sheet(run: Run, manifest: pa.Table, *, max_bytes: int, max_pixels: int) -> str | None:
    """Write sheet.png into a run's folder: up to 12 good rows, the same ones each time. Returns its place.

    manifest: the input's listing, which tells where the originals are. None when there is no good row.
    """
    from PIL import Image

    rows = _sample(run, manifest)
    places = manifest.filter(pc.is_in(manifest["image_id"], value_set=pa.array([row["image_id"] for row in rows])))
    tiles = []
    by_id = {row["image_id"]: row for row in rows}
    for place, content in zip(places.to_pylist(), inputs.fetch(places.to_pylist(), max_bytes=max_bytes), strict=True):
        if isinstance(content, BadImage):  # it was readable when it was labelled
            log.warning("sheet: %s left out: %s", place["key"], content)
            continue
        image = images.decode(content, max_pixels=max_pixels)
        tiles.append((image, overlay(image, by_id[place["image_id"]]), place["key"]))
    if not tiles:
        return None
    buffer = io.BytesIO()
    Image.fromarray(draw_sheet(tiles)).save(buffer, "PNG", optimize=True)
    run.folder.write(buffer.getvalue(), "sheet.png")
    return run.folder.location("sheet.png")


def overlay(image: np.ndarray, row: dict) -> np.ndarray:
    """An image with its masks in colour and what lies outside the foreground darkened.

    image: RGB uint8 (H, W, 3). row: a masks row with `segments` and `foreground`. Returns RGB uint8 (H, W, 3). Large
    segments are drawn first, so that small ones stay visible.
    """
    import cv2

    picture = image.astype(np.float32)
    if row["foreground"]:
        picture[~masks.decode_rle(row["foreground"])] *= 0.35
    found = masks.decode_segments(row["segments"], image.shape[:2])
    width = max(1, round(max(image.shape) / 400))
    outlines = []
    for i in sorted(range(len(found)), key=lambda i: -found[i].sum()):
        colour = COLOURS[i % len(COLOURS)]
        picture[found[i]] = 0.45 * picture[found[i]] + 0.55 * colour
        outlines.append((cv2.findContours(found[i].astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0], colour))
    picture = np.ascontiguousarray(picture.round().astype(np.uint8))
    for contours, colour in outlines:
        cv2.drawContours(picture, contours, -1, [int(c) for c in colour], width)
    return picture


def draw_sheet(tiles: list[tuple[np.ndarray, np.ndarray, str]]) -> np.ndarray:
    """Pairs (original, overlay, caption) in a grid: RGB uint8."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS, len(tiles))
    lines = -(-len(tiles) // columns)
    cell = (2 * TILE + GAP // 2 + 2 * GAP, TILE + CAPTION + GAP)
    sheet = Image.new("RGB", (columns * cell[0], lines * cell[1] + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (original, drawn, caption) in enumerate(tiles):
        x, y = (i % columns) * cell[0] + GAP, (i // columns) * cell[1] + GAP
        for j, picture in enumerate((original, drawn)):
            thumbnail = Image.fromarray(picture)
            thumbnail.thumbnail((TILE, TILE))
            left = x + j * (TILE + GAP // 2) + (TILE - thumbnail.width) // 2
            sheet.paste(thumbnail, (left, y + TILE - thumbnail.height))
        draw.text((x, y + TILE + 2), _shortened(caption, draw, font, 2 * TILE), fill=(70, 70, 70), font=font)
    return np.asarray(sheet)


def _sample(run: Run, manifest: pa.Table) -> list[dict]:
    """Good rows with the smallest ids: ids are hashes, so that is a random sample, and the same each time."""
    commits = run.commits()
    good = pc.and_(
        pc.equal(commits["error"], ""), pc.is_in(commits["image_id"], value_set=manifest["image_id"].combine_chunks())
    )
    chosen = commits.filter(good).sort_by("image_id").slice(0, SAMPLE)
    ids = pc.field("image_id").isin(chosen["image_id"].combine_chunks())
    rows = []
    for part in sorted(set(chosen["part"].to_pylist())):
        path = run.folder.path(run.masks, part)
        rows += pq.read_table(path, filesystem=run.folder.fs, filters=ids, partitioning=None).to_pylist()
    return rows


def _shortened(text: str, draw, font, width: int) -> str:
    """The end of a long name, which tells files apart better than its beginning; control characters made visible."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if draw.textlength(text, font=font) <= width:
        return text
    while draw.textlength("..." + text, font=font) > width:
        text = text[1:]
    return "..." + text
