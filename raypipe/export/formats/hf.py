"""Hugging Face: Parquet with images and label maps that `datasets.load_dataset` reads, a card, and croissant.json."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.export import croissant
from raypipe.export.about import About
from raypipe.export.formats.png import label_map, value_names, value_of
from raypipe.export.target import Target
from raypipe.images import encode_png
from raypipe.inputs.originals import portable
from raypipe.schema import MASKS
from raypipe.schema import SEGMENT as STORED_SEGMENT

ORIGINALS, CATEGORIES, EMBEDDINGS = portable, True, True
GROUP_ROWS, GROUP_BYTES = 100, 64_000_000  # of a row group: what a reader with random access has to fetch
SHARD_BYTES = 500_000_000  # a file is closed once it has this size
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SEGMENT = pa.struct(
    [("size", pa.list_(pa.int32())), ("counts", pa.string()), ("bbox", pa.list_(pa.float32())), ("area", pa.int64())]
    + [("score", pa.float32()), ("category", pa.string()), ("segment", pa.int32())]
)
STORED = [MASKS.field(name) for name in ("key", "image_id", "sha256", "height", "width", "note")]


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write data/train-00000.parquet, ..., README.md and croissant.json.

    `mask` is `png.label_map`, `segments` the exact masks. Of a run that keeps embeddings each segment has its
    `embedding`, of one with views its `stability`, as they are stored.
    """
    remarks, count, size, schema = Counter(), 0, 0, _columns(about)
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": _features(schema)}})})
    with ExitStack() as stack:
        for group in _groups(_cells(row, about, remarks) for row in images):
            if not count or (group and size >= SHARD_BYTES):  # there is always one, if only to hold the columns
                stack.close()
                file = stack.enter_context(target.stream(f"data/train-{count:05d}.parquet"))
                shard = stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
                count, size = count + 1, 0
            shard.write_table(pa.Table.from_pylist(group, schema=schema))
            size += sum(len(cells["image"]["bytes"]) for cells in group)
    target.put(_card(about).encode(), "README.md")
    told = croissant.describe(schema, about, pattern="data/*.parquet", picture=IMAGE)
    target.put(json.dumps(told, indent=1, default=str).encode(), "croissant.json")
    return remarks


def _groups(rows: Iterator[dict]) -> Iterator[list[dict]]:
    """Row groups, closed by number of rows and by size; the last one may be empty."""
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += len(row["image"]["bytes"])
        if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    yield group


def _cells(row: dict, about: About, remarks: Counter) -> dict:
    values = label_map(row, about, remarks)
    content, suffix = row["picture"]
    name = row["key"].rpartition("/")[2] + ("" if row["key"].endswith(suffix) else suffix)
    return row | {
        "image": {"bytes": content, "path": name},
        "mask": {"bytes": encode_png(values), "path": None},
        "segments": [each | {"category": about.name(each)} for each in row["segments"]],
    }


def _columns(about: About) -> pa.Schema:
    kept = {"stability": bool(about.settings.get("jitter")), "embedding": about.embeddings}
    segment = pa.struct([*SEGMENT, *(STORED_SEGMENT.field(name) for name, is_kept in kept.items() if is_kept)])
    return pa.schema([("image", IMAGE), ("mask", IMAGE), ("segments", pa.list_(segment)), *STORED])


def _features(columns: pa.Schema) -> dict:
    """The columns in the words of `datasets`, which otherwise takes the pictures for structs."""
    return {field.name: {"_type": "Image"} if field.type == IMAGE else _feature(field.type) for field in columns}


def _feature(kind: pa.DataType) -> dict | list:
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": {"float": "float32", "halffloat": "float16"}.get(str(kind), str(kind)), "_type": "Value"}


def _card(about: About) -> str:
    import yaml

    head = {
        "task_categories": ["image-segmentation"],
        "tags": ["raypipe", about.method],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    names = (html.escape(" ".join(name.split()), quote=False).replace("|", "&#124;") for name in value_names(about))
    values = "\n".join(f"| {value_of(i, about)} | {name} |" for i, name in enumerate(islice(names, 1000), 1))
    caution = about.caution and f"{about.caution}\n\n"
    settings = json.dumps({"settings": about.settings, **about.provenance}, indent=2, default=str)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# Segmentation masks by {about.method}\n\n"
        f"Made without labels, by {about.text().removeprefix('masks by ')}"
        f"{'' if about.where is None else f'; of its segments those where `{about.where}`'}.\n\n"
        f"Licence of the method or its weights: {about.licence or 'not known'}. "
        f"The images keep the licence of their owners.\n\n{caution}"
        "`segments` holds the exact masks (COCO run lengths, `[height, width]`)"
        f"{' and embeddings, not normalised' * about.embeddings}, `mask` a label map of them:\n\n"
        f"| value | meaning |\n|---|---|\n| 0 | background |\n{values}\n\n```json\n{settings}\n```\n"
    )
