"""Parquet whose columns ask for Ray's extension types, which run code from the file as soon as someone lets them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.run import seal
from raypipe.storage import parquet_bytes


class _Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bomb(canary: Path) -> bytes:
    """A pickle that makes the folder `canary`."""
    return pickle.dumps(_Canary(canary))


def objects(count: int, canary: Path) -> pa.Array:
    """A column of Ray's Python objects, each a bomb. Registers Ray's types in this process."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    kind = ArrowPythonObjectType()
    return pa.ExtensionArray.from_storage(kind, pa.array([bomb(canary)] * count, kind.storage_type))


def write_with_objects(path: Path, table: pa.Table, column: str, canary: Path) -> None:
    """Write a table with one of its columns replaced by `objects`."""
    index = table.schema.get_field_index(column)
    hostile = table.set_column(index, column, objects(len(table), canary))
    pq.write_table(hostile.replace_schema_metadata(table.schema.metadata), path)


def arm(run: Path, canary: Path, column: str) -> None:
    """Replace a column in all parts of a finished run, and in its commit records, by `objects`."""
    for path in Path(run).glob("masks/*/part-*.parquet"):
        write_with_objects(path, pq.read_table(path, partitioning=None), column, canary)
        content, record = path.read_bytes(), Path(run, "_commits", path.name)
        rows = pq.read_table(record)
        about = json.loads(rows.schema.metadata[b"raypipe.part"])
        about |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if column in rows.column_names:
            rows = rows.set_column(rows.schema.get_field_index(column), column, objects(len(rows), canary))
        record.write_bytes(seal(parquet_bytes(rows.replace_schema_metadata({"raypipe.part": json.dumps(about)}))))
