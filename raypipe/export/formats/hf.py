"""Hugging Face: Parquet with images and label maps that `datasets.load_dataset` reads, and a dataset card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.export.about import About
from raypipe.export.formats.png import OVERLAP, label_map, value_names
from raypipe.export.target import Target
from raypipe.images import encode_png
from raypipe.inputs.originals import portable

ORIGINALS, CATEGORIES = True, True
GROUP_ROWS, GROUP_BYTES = 100, 64_000_000  # of a row group: what a reader with random access has to fetch
SHARD_BYTES = 500_000_000  # a file is closed once it has this size
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SEGMENT = pa.struct(
    [
        ("size", pa.list_(pa.int32())),
        ("counts", pa.string()),
        ("bbox", pa.list_(pa.float32())),
        ("area", pa.int64()),
        ("score", pa.float32()),
        ("category", pa.string()),
        ("segment", pa.int32()),
    ]
)
COLUMNS = pa.schema(
    [
        ("image", IMAGE),
        ("mask", IMAGE),
        ("segments", pa.list_(SEGMENT)),
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("sha256", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("note", pa.string()),
    ]
)


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write data/train-00000.parquet, ... and README.md. `mask` is `png.label_map`, `segments` the exact masks."""
    remarks = Counter()
    with ExitStack() as stack:
        shards = Shards(target, stack)
        for row in images:
            values, hidden = label_map(row, about)
            remarks[OVERLAP] += hidden > 0
            shards.add(_cells(row, encode_png(values), about))
        shards.flush()
    target.put(_card(about).encode(), "README.md")
    return remarks


class Shards:
    """The Parquet files, one open at a time. There is always one, if only to hold the columns of no rows."""

    def __init__(self, target: Target, stack: ExitStack):
        self._target, self._stack = target, stack  # leaving the stack closes the open file
        self._count = self._shard_bytes = self._held_bytes = 0
        self._held: list[dict] = []
        self._open()

    def add(self, cells: dict) -> None:
        """Take one row. Row groups and files are closed by number of rows and by size."""
        if self._shard_bytes >= SHARD_BYTES:
            self.flush()
            self._stack.close()
            self._open()
        self._held.append(cells)
        self._held_bytes += len(cells["image"]["bytes"])
        if len(self._held) == GROUP_ROWS or self._held_bytes >= GROUP_BYTES:
            self.flush()

    def _open(self) -> None:
        schema = COLUMNS.with_metadata({"huggingface": json.dumps({"info": {"features": _features()}})})
        file = self._stack.enter_context(self._target.stream(f"data/train-{self._count:05d}.parquet"))
        self._table = self._stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
        self._count, self._shard_bytes = self._count + 1, 0

    def flush(self) -> None:
        """Write the rows that are held as one row group."""
        self._table.write_table(pa.Table.from_pylist(self._held, schema=self._table.schema))
        self._shard_bytes += self._held_bytes
        self._held_bytes = 0
        self._held.clear()


def _cells(row: dict, mask: bytes, about: About) -> dict:
    content, suffix = portable(row, row["content"])
    segments = [each | {"category": about.name(each)} for each in row["segments"]]
    return row | {
        "image": {
            "bytes": content,
            "path": row["key"].rpartition("/")[2] + ("" if row["key"].endswith(suffix) else suffix),
        },
        "mask": {"bytes": mask, "path": None},
        "segments": segments,
    }


def _features() -> dict:
    """The columns in the words of `datasets`, which otherwise takes the pictures for structs."""
    kinds = {field.name: {"dtype": str(field.type), "_type": "Value"} for field in COLUMNS}
    kinds |= {"image": {"_type": "Image"}, "mask": {"_type": "Image"}}
    cells = {field.name: {"dtype": _value(field.type), "_type": "Value"} for field in SEGMENT}
    for name in ("size", "bbox"):
        cells[name] = [{"dtype": _value(SEGMENT.field(name).type.value_type), "_type": "Value"}]
    return kinds | {"segments": [cells]}


def _value(kind: pa.DataType) -> str:
    return {"float": "float32"}.get(str(kind), str(kind))


def _card(about: About) -> str:
    import yaml

    head = {
        "task_categories": ["image-segmentation"],
        "tags": ["raypipe", about.method],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    values = "\n".join(f"| {i if i < 255 else i + 1} | {name} |" for i, name in enumerate(value_names(about)[:1000], 1))
    settings = json.dumps({"settings": about.settings, **about.provenance}, indent=2, default=str)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# Segmentation masks by {about.method}\n\n"
        f"Made without labels, by {about.text().removeprefix('masks by ')}"
        f"{'' if about.where is None else f'; of its segments those where `{about.where}`'}.\n\n"
        f"Licence of the method or its weights: {about.licence or 'not known'}. "
        "The images keep the licence of their owners.\n\n"
        "`segments` holds the exact masks (COCO run lengths, `[height, width]`), `mask` a label map of them:\n\n"
        f"| value | meaning |\n|---|---|\n| 0 | background |\n{values}\n\n```json\n{settings}\n```\n"
    )
