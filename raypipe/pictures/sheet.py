"""The picture sheet: a sample of a run's originals beside their masks, as one PNG that explains itself."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from heapq import nsmallest
from itertools import chain, cycle
from statistics import median
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import images, masks
from raypipe.inputs.manifest import fetch
from raypipe.pictures import legend, names, text
from raypipe.pictures.overlay import COLOURS, overlay, resized, scaled, shrunk
from raypipe.run import Ids, Run, rows
from raypipe.runtime.progress import count_of_images
from raypipe.storage import Spool
from raypipe.types import BadImage, Segmenter

log = logging.getLogger("raypipe")
SAMPLE = 12  # images on a sheet
COLUMNS = 3
TILE = 260  # pixels across of one picture
SHAPES = (0.6, 1.25)  # least and largest height of a tile over its width
CAPTION = 26  # pixels of text below
LINE = 12  # of a name on its mask
GAP = 24  # between pairs, and around all
SLIT = 4  # between an original and its masks
MAT = (236, 236, 233)  # behind pictures of another shape
MOST_NAMES = 3 * len(COLOURS)  # of classes in the heading
MOST_LINES = 3  # of one fact in the heading
HEAD = 1200  # pixels that the heading takes at most
# settings that are no method's own
SHARED = {"threshold", "seed", "foreground", "fg_alpha_min", "refine", "keep_soft", "keep_embeddings", "jitter"}


class Tile(NamedTuple):
    """One image of the sheet. The pictures are RGB uint8 of one size, which fits the sheet's tiles."""

    original: np.ndarray
    overlay: np.ndarray
    name: str


class Heading(NamedTuple):
    """What stands above the pictures."""

    title: str
    lines: list[str]
    colours: list[str]  # what each stands for, in the order of COLOURS, which repeat
    is_dark_outside: bool  # outside the foreground


def write_sheet(
    run: Run, manifest: Spool | pa.Table, segmenter: type[Segmenter], *, max_bytes: int, max_pixels: int
) -> str | None:
    """Write sheet.png into a run's folder: up to 12 good rows, the same ones each time. Returns its location.

    manifest: the input's listing, which tells where the originals are. segmenter: what found the masks. None when there
    is no good row.
    """
    from PIL import Image

    commits = run.commits()
    good = Ids(batch.filter(pc.equal(batch["error"], "")) for batch in commits.to_batches()).among(manifest)
    # ids are hashes: those with the smallest ones are a random sample
    ids = (batch["image_id"].to_pylist() for batch in manifest.filter(good).to_batches())
    chosen = nsmallest(SAMPLE, chain.from_iterable(ids))
    sample = {row["image_id"]: row for row in rows.take(run, chosen)}
    shown = (each.filter(pc.is_in(each["image_id"], pa.array(sample, pa.string()))) for each in manifest.to_batches())
    entries = [entry for batch in shown for entry in batch.to_pylist()]
    shape = median([row["height"] / row["width"] for row in sample.values()] or [1])
    box = (round(TILE * min(max(shape, SHAPES[0]), SHAPES[1])), TILE)
    for row in sample.values():
        row["segments"] = [segment for segment in row["segments"] if segment["area"] or not segmenter.exclusive]
    found = [row["segments"] for row in sample.values()]
    labels = legend.by_label(found) if legend.has_names(found) else []
    tiles = []
    for entry, content in zip(entries, fetch(entries, max_bytes=max_bytes), strict=True):
        try:
            tiles.append(_tile(content, sample[entry["image_id"]], box, labels, max_pixels))
        except BadImage as error:  # it was readable when it was labelled
            log.warning("sheet: %s is left out: %s", entry["key"], error)
    if not tiles:
        return None
    counts = {"shown": len(tiles), "good": good.true_count, "all_": len(commits)}
    heading = _heading(run, segmenter, [*sample.values()], labels, **counts)
    buffer = io.BytesIO()
    Image.fromarray(draw_sheet(heading, tiles, box)).save(buffer, "PNG", optimize=True)
    run.folder.write(buffer.getvalue(), "sheet.png")
    return run.folder.location("sheet.png")


def draw_sheet(heading: Heading, tiles: list[Tile], box: tuple[int, int]) -> np.ndarray:
    """Pairs of pictures in even rows below what explains them: RGB uint8. box: (height, width) of a tile."""
    columns = 4 if len(tiles) in (4, 8) else min(COLUMNS, len(tiles))  # where three would leave a gap
    pair, line = 2 * box[1] + SLIT, box[0] + CAPTION
    width = columns * (pair + GAP) + GAP
    head = _draw_heading(heading, width)
    sheet = np.full((-(-len(tiles) // columns) * (line + GAP), width, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        x, y = GAP + (i % columns) * (pair + GAP), (i // columns) * (line + GAP)
        for j, picture in enumerate((tile.original, tile.overlay)):
            place = sheet[y : y + box[0], x + j * (box[1] + SLIT) :][:, : box[1]]
            place[:] = MAT
            height, across = picture.shape[:2]
            top, left = (box[0] - height) // 2, (box[1] - across) // 2
            place[top : top + height, left : left + across] = picture
        text.write(sheet, text.shortened(tile.name, pair, size=15), (x, y + box[0] + 19), size=15, colour=text.MUTED)
    return np.concatenate([head, sheet])


def _draw_heading(heading: Heading, width: int) -> np.ndarray:
    """Title, lines and legend: RGB uint8 (H, width, 3)."""
    inside, y = width - 2 * GAP, GAP + 24
    head = np.full((HEAD, width, 3), 255, np.uint8)
    for line in text.wrapped(heading.title, inside, size=24):
        text.write(head, line, (GAP, y), size=24, colour=text.INK, weight=text.BOLD)
        y += 32
    for each in heading.lines:
        broken = text.wrapped(each, inside - 20, size=16)
        if len(broken) > MOST_LINES:
            broken = [*broken[: MOST_LINES - 1], f"{broken[MOST_LINES - 1]} …"]
        for line in broken:
            text.write(head, line, (GAP, y - 4), size=16, colour=text.MUTED)
            y += 24
    entries = [(tuple(map(int, colour)), name) for colour, name in zip(cycle(COLOURS), heading.colours, strict=False)]
    if heading.is_dark_outside:
        entries.append(((60, 60, 60), "dark: outside the foreground"))
    x, y = GAP, y + 6
    for colour, name in entries:
        name = text.begun(name, inside - 22, size=16)
        long = 22 + text.width(name, size=16)
        if x > GAP and x + long > width - GAP:
            x, y = GAP, y + 26
        head[y - 13 : y + 2, x : x + 15] = colour
        text.write(head, name, (x + 22, y), size=16, colour=text.INK)
        x += long + 26
    return head[: y + 22]


def _heading(
    run: Run, segmenter: type[Segmenter], sample: list[dict], labels: Sequence[str] = (), *, shown: int, good: int,
    all_: int,
) -> Heading:  # fmt: skip
    """What a run's sheet is about. shown, good, all_: numbers of images on the sheet, without error, and of all.

    labels: what colours stand for, where that is not a mask's place in its image.
    """
    configuration = run.configuration()
    settings, made = configuration["settings"], configuration["provenance"]["time"]
    title, foreground = configuration["method"], settings.get("foreground")
    if foreground:
        kind, colon, place = foreground.partition(":")
        title += " on whole images" if kind == "whole" else f" inside {kind}{colon}{_last(place)}"
    if settings.get("refine"):
        title += f", refined by {settings['refine']}"
    count = f"{shown} of {good:,} images, drawn at random" if shown < good else count_of_images(good)
    failed = f" ({all_ - good:,} more failed)" if all_ > good else ""
    own = [f"{key} {value}" for key, value in settings.items() if key not in SHARED and value is not None]
    lines = [f"run {_last(str(run))} of {made[:10]}: {count}{failed}", ", ".join(own), segmenter.finds()]
    lines += [segmenter.caution] if segmenter.caution else []
    found = [row["segments"] for row in sample]
    shown_names = [label or "without a name" for label in labels[:MOST_NAMES]] or legend.names(segmenter, found)
    if (len(labels) or max(map(len, found))) > len(COLOURS):
        where = "names, which are written on the masks" if labels else "masks"
        lines.append(f"The colours repeat after {len(COLOURS)} {where}.")
    if len(labels) > MOST_NAMES:
        lines.append(f"Of {len(labels)} names those {MOST_NAMES} that cover most are told.")
    return Heading(title, lines, shown_names, foreground not in (None, "whole"))


def _last(place: str) -> str:
    """The last name of a path or URI: a sheet is passed on, and the rest is nobody's business."""
    return place.rstrip("/").rpartition("/")[2]


def _tile(
    content: bytes | BadImage, row: dict, box: tuple[int, int], labels: list[str], max_pixels: int
) -> Tile:  # fmt: skip
    """One image and its masks, drawn at the size it is shown in. Raises BadImage if the original changed.

    labels: of masks in the order of their colours; [] where these follow their place in the image.
    """
    if isinstance(content, BadImage):
        raise content
    if hashlib.sha256(content).hexdigest() != row["sha256"]:
        raise BadImage("fetch", "changed", "the file is another one than when it was labelled")
    image = images.decode(content, max_pixels=max_pixels)
    height, width = image.shape[:2]
    size = scaled((height, width), max(height, width) * min(box[0] / height, box[1] / width))
    found, foreground = map(masks.decode_rle, row["segments"]), row["foreground"]
    picture, foreground = resized(image, size), foreground and masks.decode_rle(foreground)
    places = [labels.index(segment.get("label") or "") for segment in row["segments"]] if labels else None
    drawn = overlay(picture, found, foreground, places=places)
    if len(labels) > len(COLOURS):
        _write_names(drawn, row["segments"])
    return Tile(picture, drawn, row["key"])


def _write_names(picture: np.ndarray, segments: list[dict]) -> None:
    """Write each mask's label on it, into RGB uint8 (H, W, 3)."""
    found = [(each["label"] or "", shrunk(masks.decode_rle(each), picture.shape[:2])) for each in segments]
    for name in names.written(found, LINE):
        x, y = round(name.x - text.width(name.text, size=LINE) / 2), round(name.y + LINE / 3)
        for right, down in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            text.write(picture, name.text, (x + right, y + down), size=LINE, colour=text.INK)
        text.write(picture, name.text, (x, y), size=LINE, colour=(255, 255, 255))
