"""What Label Studio 1.23 and CVAT 2 give back after people corrected masks, as their own exports write it."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from raypipe.export.formats.cvat import run_lengths
from raypipe.export.formats.labelstudio import brush
from raypipe.masks import encode_rle


def stroke(mask: np.ndarray, name: str = "coat", **more) -> dict:
    """A region that somebody brushed."""
    value = {"format": "rle", "rle": brush(mask), "brushlabels": [name]}
    return region("brushlabels", value, mask.shape) | more


def region(kind: str, value: dict, size: tuple[int, int]) -> dict:
    """One result of an annotation. value: in per cent of the image."""
    known = {"original_width": size[1], "original_height": size[0], "image_rotation": 0}
    ids = {"id": f"r{next(NUMBERS)}", "from_name": "label", "to_name": "image", "origin": "manual"}
    return known | {"value": value, "type": kind} | ids


def annotation(result: Sequence[dict], *, at: str = "2026-11-26T20:00:48.849864Z", cancelled: bool = False) -> dict:
    """What one person submitted. at: when it was changed last."""
    number = next(NUMBERS)
    return {
        "id": number,
        "completed_by": 1,
        "result": list(result),
        "was_cancelled": cancelled,
        "ground_truth": False,
        "created_at": "2026-11-26T20:00:47.487841Z",
        "updated_at": at,
        "draft_created_at": None,
        "lead_time": 2.5,
        "prediction": {"id": number, "result": [stroke(np.ones((2, 2), bool), "another")]},
        "result_count": len(result),
        "task": 1,
        "parent_prediction": None,
    }


def task(data: Mapping, *annotations: dict) -> dict:
    """A task in Label Studio's JSON export. data: as it was imported."""
    number = next(NUMBERS)
    return {
        "id": number,
        "annotations": list(annotations),
        "drafts": [],
        "predictions": [number],
        "data": dict(data),
        "meta": {},
        "created_at": "2026-11-26T20:00:47.487841Z",
        "inner_id": number,
        "total_annotations": len(annotations),
    }


def data(key: str, size: tuple[int, int], category: str | None = "coat") -> dict:
    """The data of a task of our own export."""
    place = {"image": f"/data/local-files/?d=images/{key}", "category": category, "image_id": "x", "key": key}
    return place | {"width": size[1], "height": size[0]}


def write_coco(
    path: Path, images: Mapping[str, Sequence], names: Sequence[str], size: tuple[int, int] = (9, 14)
) -> Path:
    """CVAT's `annotations/instances_default.json`. images: by file name (name, mask, polygon or box in `bbox`), ..."""
    content = {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"contributor": "", "year": ""}}
    content["categories"] = [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(names, 1)]
    content |= {"images": [], "annotations": []}
    for image_id, (file_name, drawn) in enumerate(images.items(), 1):
        height, width = next((shape.shape for _, shape in drawn if isinstance(shape, np.ndarray)), size)
        image = {"id": image_id, "width": width, "height": height, "file_name": file_name, "license": 0}
        content["images"].append(image)
        for name, shape in drawn:
            each = {"id": next(NUMBERS), "image_id": image_id, "category_id": names.index(name) + 1, "area": 1.0}
            if isinstance(shape, np.ndarray):
                counts = next(run_lengths([encode_rle(shape)])) if shape.any() else [shape.size]
                each |= {"segmentation": {"counts": counts, "size": list(shape.shape)}, "iscrowd": 1}
            elif isinstance(shape, dict):
                each |= {"segmentation": [], "iscrowd": 0} | shape
            else:
                each |= {"segmentation": [list(map(float, shape))], "iscrowd": 0}
            attributes = {"trust": "-", "occluded": False, "rotation": 0.0} | each.get("attributes", {})
            content["annotations"].append(each | {"attributes": attributes})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


NUMBERS = itertools.count(1)
