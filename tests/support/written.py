"""Runs made of given masks, without a method, as the pipeline commits them; and a run's rows as tests compare them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

import raypipe
from raypipe import masks, schema
from raypipe.run import Run, new_attempt
from raypipe.storage import hold, parquet_bytes

UNSTABLE = ("seconds", "attempt")  # columns that differ between equal runs


def random_masks(rng, size: tuple[int, int], count: int) -> np.ndarray:
    """Blobs with holes and single pixels, (count, H, W) bool; they overlap."""
    found = rng.random((count, *size)) > 0.6
    for mask in found:
        mask[: size[0] // 2, : size[1] // 2] |= True
    return found


def masks_row(key: str, found: np.ndarray, *, uri: str = "", sha256: str = "", error: str = "", **cells) -> dict:
    """A row of schema.MASKS with these masks."""
    return {
        "image_id": hashlib.md5(key.encode()).hexdigest(),
        "uri": uri or f"/photos/{key}",
        "key": key,
        "sha256": sha256,
        "height": 0 if error else found.shape[1],
        "width": 0 if error else found.shape[2],
        "segments": [] if error else masks.encode_segments(found, **cells),
        "foreground": None if error else masks.encode_rle(np.ones(found.shape[1:], bool)),
        "note": "",
        "seconds": 0.5,
        "attempt": "a",
        "error": error,
    }


def write_run(
    place: str, table: list[dict], *, method: str = "kmeans", per_part: int = 4, settings: dict | None = None
) -> Run:
    """A run of these rows, made as the pipeline makes it."""
    run, attempt = Run(place, method), new_attempt()
    with hold(run.folder, attempt):
        run.freeze(
            settings or {"k": 2}, {"weights": {}, "time": "2026-01-01T00:00:00+00:00", "packages": {"raypipe": "0.1.0"}}
        )
        for task, start in enumerate(range(0, len(table), per_part)):
            run.commit(attempt, task, pa.Table.from_pylist(table[start : start + per_part], schema=schema.MASKS))
        run.finish(attempt)
    return run


def rows_of(run: Path) -> list[dict]:
    """Rows without what differs between equal runs, in the order of their keys."""
    table = raypipe.load(str(run)).drop_columns(list(UNSTABLE))
    return sorted(table.to_pylist(), key=lambda row: row["key"])


NEW_SETTINGS = {"keep_embeddings": 2, "jitter": 3}  # and the version that they came with


def as_version(run: Run, version: int, *, stamp: int | None = None) -> None:
    """Rewrite a run as raypipe did it when its tables were of a version. stamp: the one that parts name, if another."""
    frozen, attempt = run.configuration() | {"schema": version}, new_attempt()
    for name, since in NEW_SETTINGS.items():
        if since > version:
            frozen["settings"].pop(name, None)
    metadata = {"raypipe.schema": str(stamp or version), "raypipe.run": json.dumps(frozen)}
    columns = schema.as_of(version, schema.MASKS).with_metadata(metadata)
    with hold(run.folder, attempt):
        for name in run.parts():
            with run.part(name) as part:
                rows = part.read().cast(columns)
            run.write_record(attempt, name, run.write_part(name, parquet_bytes(rows), rows))
    run.folder.write_json(frozen, "run.json")
