"""The masks that SelfMask is to learn: those that a labelling run of any method found, the first one of each image."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pyarrow as pa
from PIL import Image

from raypipe import schema
from raypipe.inputs.manifest import fetch
from raypipe.masks import decode_rle, decode_soft, encode_rle
from raypipe.run import Run, rows
from raypipe.runtime.progress import count_of_images
from raypipe.storage import map_ahead
from raypipe.types import BadImage

log = logging.getLogger("raypipe")

ADDED = pa.schema([("sha256", pa.string()), ("mask", pa.string())])  # columns: of the labelled file; COCO's counts
LEAVES = ("size", "counts", "soft")  # of a segment, read
DECODED_AHEAD = 8  # masks at the same time
PROBED = 3  # images that are looked for before a run is taken for one whose images lie elsewhere
PROBE_BYTES = 1 << 34


def read(run: Run, manifest: pa.Table | None, *, size: int) -> pa.Table:
    """Rows of schema.MANIFEST and ADDED: the images of a run whose first mask is neither empty nor everything.

    manifest: where the images are, matched by id, then by key; None = where they were when the run labelled them. size:
    side of the square that `mask` is given in. What is left out is counted in the log. Raises ValueError where nothing
    is left, and FileNotFoundError where the folder is no run.
    """
    if not run.parts():
        raise ValueError(f"selfmask: {run} has no rows; label images into it first")
    threshold = run.configuration()["settings"].get("threshold")
    labelled = (row for batch in rows.batches(run, leaves=LEAVES) for row in batch.to_pylist())
    known = list(map_ahead(lambda row: summary(row, size, threshold), labelled, depth=DECODED_AHEAD))
    wanted = known if manifest is None else matched(known, manifest, run)
    left_out = Counter(row["why"] for row in wanted if row["why"])
    found = [row for row in wanted if not row["why"]]
    reasons = ", ".join(f"{count:,} {why}" for why, count in sorted(left_out.items()))
    if not found:
        raise ValueError(f"selfmask: {run} has no mask to learn from: {reasons}")
    if left_out:
        log.warning("selfmask: %s left out: %s", count_of_images(left_out.total()), reasons)
    if manifest is None:
        probe(found)
    return pa.Table.from_pylist(found, schema=pa.schema([*schema.MANIFEST, *ADDED]))


def summary(row: dict, size: int, threshold: float | None) -> dict:
    """What is kept of a run's row: its manifest row, ADDED, and `why` it is of no use, "" where it is.

    Addresses on the web are to be public ones, for the list that named them may have been anybody's.
    """
    known = {name: row[name] for name in ("image_id", "uri", "key", "sha256")} | {"location": row["uri"]}
    mask = first_mask(row, size, threshold)
    if mask is None:
        why = "failed in the run" if row["error"] else "without a mask"
    else:
        why = "" if mask.any() and not mask.all() else "of a full mask" if mask.any() else "of an empty mask"
    counts = None if why else encode_rle(mask)["counts"]
    return dict.fromkeys(schema.MANIFEST.names) | known | {"public": True, "mask": counts, "why": why}


def first_mask(row: dict, size: int, threshold: float | None) -> np.ndarray | None:
    """The first mask of a row as a square, bool (size, size); None without one.

    Its probabilities where they are kept, else 0 and 1, are resized bilinearly, as Pillow does it with the photograph:
    over all that a pixel covers. threshold: the run's, of probabilities; None = 0.5.
    """
    if not row["segments"]:
        return None
    segment = row["segments"][0]
    is_soft = segment["soft"] is not None
    values = decode_soft(segment["soft"]) if is_soft else decode_rle(segment).astype(np.float32)
    resized = Image.fromarray(values).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized) > (threshold if is_soft and threshold is not None else 0.5)


def matched(known: list[dict], manifest: pa.Table, run: Run) -> list[dict]:
    """A row for each image of a manifest, with what the run knows of it. Raises ValueError where it knows none."""
    by_id, by_key = ({row[name]: row for row in known} for name in ("image_id", "key"))
    unknown, found = {name: None for name in ADDED.names} | {"why": "not in the run"}, []
    for row in manifest.to_pylist():
        its = by_id.get(row["image_id"]) or by_key.get(row["key"]) or unknown
        found.append(row | {name: its[name] for name in unknown})
    if all(row["why"] == unknown["why"] for row in found):
        text = f"{run} has none of the {count_of_images(len(found))} of --input, by id or by key"
        raise ValueError(f"selfmask: {text}; give those that it labelled, such as {known[0]['uri']!r}")
    return found


def probe(found: list[dict]) -> None:
    """Raise ValueError where the first images are not where the run says: then the input has to be given.

    A run's rows hold no credentials, queries or byte ranges, so that images in tars and tables are never found by them.
    """
    contents = list(fetch(found[:PROBED], max_bytes=PROBE_BYTES))
    if all(isinstance(content, BadImage) for content in contents):
        raise ValueError(f"selfmask: {contents[0]}; give the images that were labelled with --input")
