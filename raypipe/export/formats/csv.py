"""CSV: one line per image for a spreadsheet, also for images that failed."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

from raypipe.export.about import About, csv_line
from raypipe.export.target import Target

ORIGINALS, CATEGORIES = None, False
FAILED = True  # failed images have their line, with the error
MARK = "\ufeff".encode()  # without it Excel takes UTF-8 for the local code page; pandas and R leave it out
MOST = 100  # segments of an image that have columns; spreadsheets end at 16,384 columns
COLUMNS = "key width height segments area share_of_image foreground_area share_of_foreground".split()
LAST_COLUMNS = "labels mean_score mean_stability note seconds error image_id uri".split()


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write images.csv: UTF-8 with byte order mark, commas, decimal points; sorted by key.

    Each segment has its columns, area_0, share_0, area_1, ...: the same ones whatever the condition. Embeddings are
    left out: hundreds of numbers a segment are for the run's Parquet, or --format hf.
    """
    names = [f"{what}_{i}" for i in range(min(about.most, MOST)) for what in ("area", "share")]
    columns, remarks = [*COLUMNS, *names, *LAST_COLUMNS], Counter()

    def lines() -> Iterator[tuple[str, bytes]]:
        for row in images:
            remarks[f"images have more than {MOST} segments: the others have no columns"] += any(
                segment["segment"] >= MOST for segment in row["segments"]
            )
            found = cells(row)
            yield row["key"], csv_line(found.get(name) for name in columns)

    with closing(sqlite3.connect("")) as database, target.stream("images.csv") as file:  # a file that deletes itself
        database.execute("CREATE TABLE lines (key TEXT, line BLOB)")
        database.executemany("INSERT INTO lines VALUES (?, ?)", lines())
        file.write(MARK + csv_line(columns))
        file.writelines(line for (line,) in database.execute("SELECT line FROM lines ORDER BY key, rowid"))
    return remarks


def cells(row: dict) -> dict:
    """The cells of an image by column. None where there is no answer: a failed image, no foreground, no score.

    `area` counts the pixels in any segment, `area_0` those of segment 0, `share_0` is its share of the foreground, or
    of the image in a run without foregrounds. Shares are in [0, 1].
    """
    from pycocotools import mask as coco

    found = {name: row.get(name) for name in (*COLUMNS, *LAST_COLUMNS)} | {"segments": None}
    if row["error"]:
        return found
    segments, foreground = row["segments"], row["foreground"]
    union = int(coco.area(coco.merge([_rle(segment) for segment in segments]))) if segments else 0
    pixels = row["height"] * row["width"]
    inside = None if foreground is None else int(coco.area(_rle(foreground)))
    whole = pixels if inside is None else inside
    for segment in segments:
        found[f"area_{segment['segment']}"] = segment["area"]
        found[f"share_{segment['segment']}"] = _share(segment["area"], whole)
    return found | {
        "segments": len(segments),
        "area": union,
        "share_of_image": _share(union, pixels),
        "foreground_area": inside,
        "share_of_foreground": None if inside is None else _share(union, inside),
        "labels": "; ".join(dict.fromkeys(segment["label"] for segment in segments if segment["label"] is not None)),
        "mean_score": _mean(segments, "score"),
        "mean_stability": _mean(segments, "stability"),
    }


def _mean(segments: list[dict], name: str) -> float | None:
    values = [segment[name] for segment in segments if segment.get(name) is not None]
    return round(sum(values) / len(values), 6) if values else None


def _share(area: int, whole: int) -> float | None:
    return round(area / whole, 6) if whole else None


def _rle(mask: dict) -> dict:
    return {"size": mask["size"], "counts": mask["counts"].encode()}
