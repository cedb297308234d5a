"""COCO: `annotations.json` with run-length masks, as pycocotools, CVAT and FiftyOne read it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator

from raypipe import classes
from raypipe.export.about import About
from raypipe.export.target import Target

ORIGINALS, CATEGORIES = None, True
EMPTY = "masks have no pixels and are left out"


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write one JSON file, streamed: annotations at once, the shorter image entries by way of a temporary file.

    Masks are run lengths, which are exact where polygons are not. `iscrowd` is 0 all the same: trainers leave crowds
    out, and stumble over masks without pixels, so these are not there. `file_name` is the image's key; `segment` the
    index of the segment in its row. Areas and boxes are the masks'. Embeddings, for which COCO has no field, are left
    out.
    """
    remarks, annotation_id, info = Counter(), 0, {"description": about.text(), "date_created": about.provenance["time"]}
    info |= {name: getattr(about, name) for name in ("method", "settings", "provenance", "licence", "where")}
    with target.stream("annotations.json") as file, tempfile.TemporaryFile() as entries:
        file.write(b'{"info": ' + _json(info) + b',\n"licenses": [],\n"categories": ')
        file.write(_json([{"id": _id(i, about), "name": name} for i, name in enumerate(about.categories, 1)]))
        file.write(b',\n"annotations": [')
        for image_id, row in enumerate(images, 1):
            entry = {"id": image_id, "file_name": row["key"], "width": row["width"], "height": row["height"]}
            entries.write((b",\n" if image_id > 1 else b"\n") + _json(entry))
            for segment in row["segments"]:
                if not segment["area"]:
                    remarks[EMPTY] += 1
                    continue
                annotation_id += 1
                annotation = _annotation(segment, annotation_id, image_id, about)
                file.write((b",\n" if annotation_id > 1 else b"\n") + _json(annotation))
        file.write(b'\n],\n"images": [')
        entries.seek(0)
        shutil.copyfileobj(entries, file)
        file.write(b"\n]}\n")
    return remarks


def _annotation(segment: dict, annotation_id: int, image_id: int, about: About) -> dict:
    known = {name: segment[name] for name in ("score", "stability") if segment.get(name) is not None}
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": _id(about.number(segment), about),
        "segmentation": {"size": segment["size"], "counts": segment["counts"]},
        "area": segment["area"],
        "bbox": segment["bbox"],
        "iscrowd": 0,
        "segment": segment["segment"],
    } | known


def _id(number: int, about: About) -> int:
    """The id of a category: COCO's own, which has gaps, where categories are numbered as COCO's."""
    is_coco = about.classes is not None and about.classes.source == "coco2017"
    return classes.facts("coco2017")["source_ids"][number - 1] if is_coco else number


def _json(content) -> bytes:
    return json.dumps(content, default=str).encode()
