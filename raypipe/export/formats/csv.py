"""CSV: one line per image for a spreadsheet, also for images that failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from raypipe.export.about import About, csv_line
from raypipe.export.target import Target

ORIGINALS, CATEGORIES = False, False
FAILED = True  # failed images have their line, with the error
MARK = "\ufeff".encode()  # without it Excel takes UTF-8 for the local code page; pandas and R leave it out
COLUMNS = (
    "key width height segments area share_of_image foreground_area share_of_foreground areas labels mean_score note "
    "seconds error image_id uri"
).split()


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write images.csv: UTF-8 with byte order mark, commas, decimal points."""
    with target.stream("images.csv") as file:
        file.write(MARK + csv_line(COLUMNS))
        file.writelines(csv_line(line(row).values()) for row in images)
    return Counter()


def line(row: dict) -> dict:
    """The cells of an image. None where there is no answer: a failed image, no foreground, no score.

    `area` counts the pixels in any segment, `areas` those of each segment. Shares are in [0, 1].
    """
    from pycocotools import mask as coco

    cells = {name: row.get(name) for name in COLUMNS} | {"segments": None}
    if row["error"]:
        return cells
    found, foreground = row["segments"], row["foreground"]
    union = int(coco.area(coco.merge([_rle(segment) for segment in found]))) if found else 0
    inside = None if foreground is None else int(coco.area(_rle(foreground)))
    scores = [segment["score"] for segment in found if segment["score"] is not None]
    return cells | {
        "segments": len(found),
        "area": union,
        "share_of_image": round(union / (row["height"] * row["width"]), 6),
        "foreground_area": inside,
        "share_of_foreground": round(union / inside, 6) if inside else None,
        "areas": " ".join(str(segment["area"]) for segment in found),
        "labels": "; ".join(dict.fromkeys(segment["label"] for segment in found if segment["label"] is not None)),
        "mean_score": round(sum(scores) / len(scores), 6) if scores else None,
    }


def _rle(mask: dict) -> dict:
    return {"size": mask["size"], "counts": mask["counts"].encode()}
