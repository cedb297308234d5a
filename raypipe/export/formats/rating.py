"""Rating: pages on which people say how well names describe their segments; `evaluate --task rating` reads the answers.

The user study of zero-guidance segmentation (ICCV 2023, supplement) as a tool: every batch has the same questions in
an order of its own, and one person answers a task of it.
"""

from __future__ import annotations

import hashlib
import heapq
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from raypipe import masks
from raypipe.export.about import About, csv_line
from raypipe.export.formats.csv import MARK
from raypipe.export.target import Target
from raypipe.inputs.originals import decode
from raypipe.pages import html
from raypipe.pictures.overlay import COLOURS, jpeg, overlay, resized, scaled, shrunk

ORIGINALS, CATEGORIES = decode, False
OPTIONS = ("raters", "questions", "sample", "seed")
COLUMNS = ("batch", "task", "question", "image_id", "segment", "label", "score")
SIDE, QUALITY = 512, 80  # of a picture: px of its longer side
GREEN = 3  # in COLOURS


class Question(NamedTuple):
    """What people are asked: does the label describe this segment."""

    image_id: str
    segment: int
    label: str


def choose(images: Iterator[dict], about: About, *, sample: int | None = None, seed: int = 0, **_) -> Iterator[dict]:
    """Rows with the segments that are asked about; of a sample only its own images, the same for the same seed.

    Raises ValueError for a run without names.
    """
    if not any(about.labels):
        text = "no segment of the run has a name to ask about; label by a method that names them, such as zero_guidance"
        raise ValueError(f"rating: {text}")
    return images if sample is None else _sampled(images, sample, seed)


def _sampled(images: Iterator[dict], sample: int, seed: int) -> Iterator[dict]:
    each = (row | {"segments": [one]} for row in images for one in row["segments"] if _can_be_asked(one))
    rows: dict[str, dict] = {}
    for row in heapq.nsmallest(
        sample, each, key=lambda row: _draw(seed, row["image_id"], row["segments"][0]["segment"])
    ):
        rows.setdefault(row["image_id"], row | {"segments": []})["segments"] += row["segments"]
    yield from sorted(rows.values(), key=lambda row: row["key"])


def write(
    images: Iterator[dict], target: Target, about: About, *, raters: int = 3, questions: int = 30, seed: int = 0, **_
) -> Counter:
    """Write batch-B/task-T.html for `raters` batches, `questions` on a page, and template.csv with a line for each.

    The order of a batch depends on the questions and on the seed alone. Pictures wait on the disk.
    """
    asked, remarks = [], Counter()
    with closing(sqlite3.connect("")) as database, target.stream("template.csv") as file:
        database.execute("CREATE TABLE pictures (place INTEGER PRIMARY KEY, original TEXT, marked TEXT)")
        database.executemany("INSERT INTO pictures VALUES (?, ?, ?)", _pictures(images, asked, remarks))
        file.write(MARK + csv_line(COLUMNS))
        for batch in range(1, raters + 1):
            order = sorted(range(len(asked)), key=lambda place: _draw(seed, batch, *asked[place][:2]))
            tasks = [order[i : i + questions] for i in range(0, len(order), questions)]
            for task, places in enumerate(tasks, 1):
                shown = [_shown(database, place, asked[place], batch, task, i) for i, place in enumerate(places, 1)]
                file.writelines(f"{each['line']},\r\n".encode() for each in shown)
                page = _page(shown, batch=batch, task=task, tasks=len(tasks), caution=about.caution)
                target.put(page.encode("utf-8", "replace"), f"batch-{batch}/task-{task:0{len(str(len(tasks)))}}.html")
    return remarks


def _can_be_asked(segment: dict) -> bool:
    return bool(segment["label"] and segment["area"])


def _draw(*of: object) -> bytes:
    """What puts questions in a random order that neither the run's files nor other questions change."""
    return hashlib.sha256(" ".join(map(str, of)).encode()).digest()


def _pictures(images: Iterator[dict], asked: list[Question], remarks: Counter) -> Iterator[tuple[int, str, str]]:
    """Place, image and image with the segment in green, of each question, as data URIs. Adds to `asked`."""
    for row in images:
        image = resized(row["picture"], scaled(row["picture"].shape[:2], SIDE))
        original = jpeg(image, QUALITY)
        for segment in row["segments"]:
            if not _can_be_asked(segment):
                remarks["segments have no name or no pixel: nobody is asked about them"] += 1
                continue
            yield len(asked), original, jpeg(marked(image, masks.decode_rle(segment)), QUALITY)
            asked.append(Question(row["image_id"], segment["segment"], segment["label"]))


def marked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image in grey with a mask in green and a line around it. image: RGB uint8 (h, w, 3). mask: bool (H, W).

    A mask of which no pixel is left at that size is shown wherever it was.
    """
    import cv2

    small = shrunk(mask, image.shape[:2])
    if not small.any():
        small = resized(mask.astype(np.float32), image.shape[:2]) > 0
    picture = overlay(image, [small], places=[GREEN])
    around = cv2.dilate(small.astype(np.uint8), np.ones((3, 3), np.uint8)) > small
    picture[around] = COLOURS[GREEN]
    return picture


def _shown(database: sqlite3.Connection, place: int, question: Question, batch: int, task: int, number: int) -> dict:
    """One question as the page shows it. Its `line` of the CSV lacks the score only: the page need not know CSV."""
    original, marked = database.execute("SELECT original, marked FROM pictures WHERE place = ?", (place,)).fetchone()
    line = csv_line((batch, task, number, *question)).decode().removesuffix("\r\n")
    return {"label": question.label, "line": line, "original": original, "marked": marked}


def _page(shown: Sequence[dict], *, batch: int, task: int, tasks: int, caution: str) -> str:
    texts = [each["line"] for each in shown]
    return html.render(
        "rating.html.j2",
        "rating.js",
        questions=shown,
        batch=batch,
        task=task,
        tasks=tasks,
        caution=caution,
        head=",".join(COLUMNS),
        name=hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
        version=version("raypipe"),
    )
