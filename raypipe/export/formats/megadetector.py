"""MegaDetector results, format 1.6: `megadetector.json` with a box for each segment, for Timelapse and AddaxAI."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from raypipe.export.about import About
from raypipe.export.formats.coco import EMPTY
from raypipe.export.target import Target

ORIGINALS, CATEGORIES = None, True
FAILED = True  # the format has a place for files that failed
CLIPPED = "scores lie outside [0, 1], where confidences end, and are clipped"


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write one JSON file, streamed. `file` is the image's key; sizes are those after EXIF rotation.

    The format holds boxes, relative to the image, and no masks: those are lost but for their box, and the index of the
    segment beside it finds them again. `conf` is the segment's score, 1 without one. A failed image has its error as
    `failure` and null as `detections`. Embeddings are left out.
    """
    remarks = Counter()
    info = {"format_version": "1.6", "detector": about.text()}
    info["detector_metadata"] = {
        "settings": about.settings,
        "weights": about.provenance["weights"],
        "where": about.where,
    }
    names = {str(i): " ".join(name.split()) or f"category {i}" for i, name in enumerate(about.categories, 1)}
    with target.stream("megadetector.json") as file:
        file.write(b'{"info": ' + _json(info) + b',\n"detection_categories": ' + _json(names) + b',\n"images": [')
        for i, row in enumerate(images):
            file.write((b",\n" if i else b"\n") + _json(_entry(row, about, remarks)))
        file.write(b"\n]}\n")
    return remarks


def _entry(row: dict, about: About, remarks: Counter) -> dict:
    if row["error"]:
        return {"file": row["key"], "failure": row["error"], "detections": None}
    remarks[EMPTY] += sum(not segment["area"] for segment in row["segments"])
    found = [_detection(row, segment, about, remarks) for segment in row["segments"] if segment["area"]]
    return {"file": row["key"], "detections": found}


def _detection(row: dict, segment: dict, about: About, remarks: Counter) -> dict:
    score = 1.0 if segment["score"] is None else segment["score"]
    remarks[CLIPPED] += not 0 <= score <= 1
    x, y, width, height = segment["bbox"]
    box = [x / row["width"], y / row["height"], width / row["width"], height / row["height"]]
    category, conf = str(about.number(segment)), min(1.0, max(0.0, score))  # a confidence has to be a float
    return {"category": category, "conf": conf, "bbox": box, "segment": segment["segment"]}


def _json(content) -> bytes:
    return json.dumps(content, default=str).encode()
