"""raypipe: segmentation masks for large image collections without labels, as one fault-tolerant batch job on Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from raypipe.pipeline.dry_run import Estimate
    from raypipe.pipeline.label import Summary

__all__ = ["decode", "label", "load"]


def label(method: str, input: str, output: str, **options) -> Summary | Estimate:
    """Label images, as `raypipe label METHOD` does, with the same options by the same names.

    options: fields of `pipeline.job.Label`, of the method and of the refiner, for example
    `raypipe.label("kmeans", "photos", "runs/coat", foreground="grabcut", k=3, refine="guided", refine_radius=9)`.
    Paths may be pathlib's. Returns a Summary, or with dry_run an Estimate, which is a dict. Raises what
    `pipeline.label.label` raises, and TypeError, with a suggestion, for an unknown option or a value of another type.
    """
    from raypipe.pipeline import label as verb
    from raypipe.pipeline.options import build

    return verb.label(*build(method, {"input": input, "output": output} | options))


def load(run: str, columns: list[str] | None = None, *, embeddings: bool = False) -> pa.Table:
    """All rows of a run, one per image, as an Arrow table: `schema.MASKS` plus the column `method`.

    run: the output folder of `label`, or of `archive` for its embeddings: a path or a URI. columns: read only these.
    embeddings: read those of segments too, which `label --keep-embeddings` stores. Raises FileNotFoundError when the
    folder is no run. Safe to call while a job writes: only committed rows are read.
    """
    from raypipe.run import Run, rows

    return rows.load(Run(str(run)), columns, embeddings=embeddings)


def decode(row: dict) -> np.ndarray:
    """The masks of one row as bool (N, H, W), at the image's size. row: a dict with `segments`, `height` and `width`.

    N is 0 for an image without segment; a failed image (`error` is not "") has none either. Raises TypeError for
    anything but one row.
    """
    from raypipe.masks import decode_segments

    if not isinstance(row, Mapping):
        text = "expected one row as a dict, such as those of raypipe.load(RUN).to_pylist()"
        raise TypeError(f"decode: {text}, got a {type(row).__name__}")
    return decode_segments(row["segments"], (row["height"], row["width"]))
