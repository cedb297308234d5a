"""FiftyOne: a dataset folder with pictures and a mask file per segment, opened by `fo.Dataset.from_dir`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator

import numpy as np

from raypipe import masks
from raypipe.export.about import About
from raypipe.export.formats.coco import EMPTY
from raypipe.export.target import Target
from raypipe.images import encode_png
from raypipe.inputs.originals import portable

ORIGINALS, CATEGORIES = portable, True
VERSION = "1.2.0"  # of the layout: this FiftyOne, the first whose detections have mask files, and later ones open it
MASKS = "fields/segments.detections"  # FiftyOne finds the files of a field in a folder with its name
MIME = {".jpg": "image/jpeg", ".png": "image/png"}
DOCUMENTS = "fiftyone.core"
SAMPLE_FIELDS = {
    "id": "ObjectIdField",
    "filepath": "StringField",
    "tags": "ListField StringField",
    "metadata": "EmbeddedDocumentField",
    "created_at": "DateTimeField",
    "last_modified_at": "DateTimeField",
    "key": "StringField",
    "image_id": "StringField",
    "note": "StringField",
    "segments": "EmbeddedDocumentField",
}
METADATA_FIELDS = {
    "size_bytes": "IntField",
    "mime_type": "StringField",
    "width": "IntField",
    "height": "IntField",
    "num_channels": "IntField",
}
DETECTION_FIELDS = {
    "id": "ObjectIdField",
    "tags": "ListField StringField",
    "attributes": "DictField",
    "label": "StringField",
    "bounding_box": "ListField FloatField",
    "mask": "ArrayField",
    "mask_path": "StringField",
    "confidence": "FloatField",
    "index": "IntField",
}


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write data/ with the pictures, a mask per segment below fields/, samples.json, streamed, and metadata.json.

    Each sample's `segments` are Detections: label, box, `index` (of the segment), `confidence` (its score) and
    `mask_path`, a PNG of the box, 255 inside the mask, so overlaps and holes stay and a mask is read when it is shown.
    Masks without pixels, which have no box, soft masks and embeddings are left out. Opened by:
    `fo.Dataset.from_dir(FOLDER, dataset_type=fo.types.FiftyOneDataset)`.
    """
    remarks = Counter()
    with target.stream("samples.json") as file:
        file.write(b'{"samples": [')
        for i, row in enumerate(images):
            remarks[EMPTY] += sum(not segment["area"] for segment in row["segments"])
            file.write((b",\n" if i else b"\n") + json.dumps(_sample(row, target, about)).encode())
        file.write(b"\n]}\n")
    target.put(json.dumps(_metadata(about), default=str).encode(), "metadata.json")
    return remarks


def _sample(row: dict, target: Target, about: About) -> dict:
    content, suffix = row["picture"]
    path = target.name(row, suffix, folder="data")
    target.put(content, path)
    channels = 3 if suffix == ".jpg" else None  # a PNG may have four
    told = {"size_bytes": len(content), "mime_type": MIME[suffix], "num_channels": channels}
    found = [_detection(row, segment, target, about) for segment in row["segments"] if segment["area"]]
    number = _number(row["image_id"])
    return {
        "_id": {"$oid": number},
        "_media_type": "image",
        "_rand": int(number[:12], 16) / (1 << 48),
        "filepath": path,
        "tags": [],
        "metadata": {"_cls": "ImageMetadata", "width": row["width"], "height": row["height"]} | told,
        "segments": {"_cls": "Detections", "detections": found},
    } | {name: row[name] for name in ("key", "image_id", "note")}


def _detection(row: dict, segment: dict, target: Target, about: About) -> dict:
    x, y, width, height = map(int, segment["bbox"])
    path = target.name(row, f"_{segment['segment']}.png", folder=MASKS)
    inside = masks.decode_rle(segment)[y : y + height, x : x + width]
    target.put(encode_png(inside * np.uint8(255)), path)
    return {
        "_id": {"$oid": _number(f"{row['image_id']} {segment['segment']}")},
        "_cls": "Detection",
        "attributes": {},
        "tags": [],
        "label": about.name(segment),
        "bounding_box": [x / row["width"], y / row["height"], width / row["width"], height / row["height"]],
        "mask_path": path,
        "confidence": segment["score"],
        "index": segment["segment"],
    }


def _number(text: str) -> str:
    """An ObjectId, 24 hexadecimal digits: the same for the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _metadata(about: About) -> dict:
    """The dataset's document. What is known of the run is text, since keys of MongoDB cannot have every letter."""
    fields = {field["name"]: field for field in _fields(SAMPLE_FIELDS)}
    fields["metadata"] |= {
        "embedded_doc_type": f"{DOCUMENTS}.metadata.ImageMetadata",
        "fields": _fields(METADATA_FIELDS),
    }
    (detections,) = _fields({"detections": "ListField EmbeddedDocumentField"})
    detections |= {"embedded_doc_type": f"{DOCUMENTS}.labels.Detection", "fields": _fields(DETECTION_FIELDS)}
    fields["segments"] |= {"embedded_doc_type": f"{DOCUMENTS}.labels.Detections", "fields": [detections]}
    made = {name: getattr(about, name) for name in ("method", "settings", "provenance", "licence", "where")}
    return {
        "name": f"raypipe-{about.method}",
        "version": VERSION,
        "media_type": "image",
        "persistent": False,
        "tags": [],
        "info": {"source": about.text(), "made": json.dumps(made, default=str)},
        "default_classes": about.categories,
        "sample_fields": list(fields.values()),
    }


def _contain(field: dict, document: str, fields: list[dict]) -> None:
    field |= {"embedded_doc_type": f"{DOCUMENTS}.{document}", "fields": fields}


def _fields(kinds: dict[str, str]) -> list[dict]:
    """Fields as FiftyOne stores them. kinds: names -> its class, and after a space that of a list's entries."""
    found = []
    for name, kind in kinds.items():
        ftype, _, subfield = kind.partition(" ")
        found.append(
            {
                "name": name,
                "ftype": f"{DOCUMENTS}.fields.{ftype}",
                "embedded_doc_type": None,
                "subfield": f"{DOCUMENTS}.fields.{subfield}" if subfield else None,
                "fields": [],
                "db_field": "_id" if name == "id" else name,
                "description": None,
                "info": None,
                "read_only": name in ("created_at", "last_modified_at"),
            }
        )
    return found
