"""Runs of small images whose masks are left parts of them, without a method."""

from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa

from raypipe import masks, schema
from raypipe.run import Run, new_attempt
from raypipe.storage import hold


def row(key: str, shares: list[float] = (0.25,), **values) -> dict:
    """A masks row of a 20 x 10 image whose masks are left parts of it. Values replace columns."""
    found = masks.encode_segments(np.stack([np.arange(200).reshape(10, 20) < 200 * share for share in shares]))
    blank = {"image_id": blake2b(key.encode(), digest_size=16).hexdigest(), "uri": f"/gone/{key}", "key": key}
    blank |= {"sha256": "", "height": 10, "width": 20, "segments": found, "foreground": None, "note": "", "error": ""}
    return blank | {"seconds": 0.01, "attempt": "a"} | values


def write_run(place: Path, rows: list[dict], *, per_part: int = 7, method: str = "kmeans") -> Run:
    run, attempt = Run(str(place), method), new_attempt()
    run.freeze({"k": 2}, {"weights": {}})
    with hold(run.folder, attempt):
        for task, start in enumerate(range(0, len(rows), per_part)):
            run.commit(attempt, task, pa.Table.from_pylist(rows[start : start + per_part], schema=schema.MASKS))
    return Run(str(place))
