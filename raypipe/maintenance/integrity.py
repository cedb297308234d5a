"""One committed part: whether its data file is what its commit record says, and its masks are what its rows say."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import schema
from raypipe.lookup import one_line
from raypipe.run import Run, is_sealed, refuse_newer, version_of
from raypipe.runtime.progress import count_of
from raypipe.storage import open_table

HASHED_BYTES = 8 << 20  # at a time: few requests to an object store
DEEP_ROWS = 64  # rows decoded at a time
# Kinds of problem for which repair removes the part with its record.
CONDEMNED = {"torn", "altered", "missing", "record", "ids", "schema", "mask", "embedding"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a run.

    kind: torn (shorter than recorded), altered (other bytes than recorded), missing (data file), record (commit record
    unusable), checksum (record without its own checksum, its content is right), ids (record and data file name
    different images), schema, mask and embedding (with deep), doubled (ids), orphan (data file without record), foreign
    (file or folder that is not the run's), leftover (work list or temporary file), attempt (its record), errors
    (errors.parquet), configuration (run.json), unlabelled (images that had a row), twice (photographs that were
    labelled at several places).
    """

    file: str  # relative to the run's folder
    kind: str
    text: str


@dataclass(frozen=True)
class Part:
    """One committed part as it was found."""

    name: str
    bytes: int = 0
    record: pa.Table | None = None  # schema COMMIT with metadata; None when it cannot be read
    stamp: bytes | None = None  # the run.json that a good data file repeats
    problem: Problem | None = None

    @property
    def is_condemned(self) -> bool:
        """Whether its rows must be labelled again."""
        return self.problem is not None and self.problem.kind in CONDEMNED


class Damage(Exception):
    """A part that cannot be trusted: kind of Problem, and what is wrong."""

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)
        self.kind, self.text = kind, text


def check_part(run: Run, name: str, *, deep: bool) -> Part:
    """A part held against its commit record of this name, with its problem if it has one. deep: decode its masks."""
    content = run.folder.read("_commits", name)
    if content is None:
        return Part(name)  # gone since it was listed: a job has rewritten it
    part = Part(name)
    try:
        record, expected = read_record(content)
        part = replace(part, record=record, bytes=expected["bytes"])
        part = replace(part, stamp=_check_file(run, name, record, expected, deep))
    except Damage as damage:
        if damage.kind == "missing" and run.folder.read("_commits", name) is None:
            return Part(name)
        folder = "_commits" if damage.kind == "record" else run.data
        return replace(part, problem=Problem(f"{folder}/{name}", damage.kind, damage.text))
    if is_sealed(content):
        return part
    text = "the commit record has no checksum of its own; its content is right"
    return replace(part, problem=Problem(f"_commits/{name}", "checksum", text))


def read_record(content: bytes) -> tuple[pa.Table, dict]:
    """A commit record and what it says of the data file: `rows`, `bytes`, `sha256`. Raises Damage("record", ...)."""
    if is_sealed(content) is False:
        raise Damage("record", "the commit record's own checksum is wrong")
    try:
        record = open_table(content).read(use_threads=False)  # parts are read in parallel
        expected = json.loads(record.schema.metadata[b"raypipe.part"])
        if not record.schema.equals(schema.COMMIT) or len(record) != expected["rows"]:
            raise ValueError("it has other columns or another number of rows than it should")
        return record, {"bytes": int(expected["bytes"]), "sha256": str(expected["sha256"])}
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        raise Damage("record", f"the commit record cannot be read: {one_line(error)}") from error


def _check_file(run: Run, name: str, record: pa.Table, expected: dict, deep: bool) -> bytes | None:
    """Compare a data file with its record; returns the run.json that it repeats. Raises Damage."""
    try:
        file = run.open(name)
    except FileNotFoundError:
        raise Damage("missing", "the data file is gone, its commit record is there") from None
    with file:
        size = file.size()
        if size < expected["bytes"]:
            raise Damage("torn", f"{size:,} of {expected['bytes']:,} bytes are there")
        if size > expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise Damage("altered", "the bytes are not those that were committed (sha256)")
        file.seek(0)
        try:
            parquet = open_table(file)
        except pa.ArrowInvalid as error:
            raise Damage("schema", f"not a Parquet file: {one_line(error)}") from error
        _check_columns(run, parquet.schema_arrow)
        _check_rows(parquet.read(columns=schema.COMMIT.names, use_threads=False), record)
        if deep:
            (_check_masks if run.table == "masks" else _check_embeddings)(parquet)
        return (parquet.schema_arrow.metadata or {}).get(b"raypipe.run")


def _sha256(file: pa.NativeFile) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(HASHED_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _check_columns(run: Run, stored: pa.Schema) -> None:
    """Raise Damage unless a part has the columns of its run as its version had them; NewerRun for a newer one."""
    refuse_newer(run, version_of(stored))
    expected = list(schema.as_of(version_of(stored), run.columns))
    if list(stored) != expected:
        other = sorted({str(field) for field in stored} ^ {str(field) for field in expected})
        raise Damage("schema", f"other columns than raypipe's: {'; '.join(other) or 'in another order'}"[:300])


def _check_rows(ids: pa.Table, record: pa.Table) -> None:
    """Raise Damage unless a data file holds the record's ids and errors, in order, each id once."""
    there, recorded = set(ids["image_id"].to_pylist()), set(record["image_id"].to_pylist())
    if there != recorded:
        text = f"{len(recorded - there)} recorded images are not in the file, {len(there - recorded)} others are"
        raise Damage("ids", text)
    if len(there) < len(ids):
        raise Damage("ids", f"{count_of(len(ids) - len(there), 'image')} twice in the file")
    if not ids.equals(record):
        raise Damage("ids", "the errors or the order differ from the record's")


def _check_masks(parquet: pq.ParquetFile) -> None:  # noqa: TID251
    """Raise Damage("mask", ...) with the number of rows whose masks do not decode to what the row says."""
    wrong, first = 0, ""
    for batch in parquet.iter_batches(DEEP_ROWS, columns=["key", "height", "width", "segments", "foreground"]):
        for row in batch.to_pylist():
            try:
                check_masks(row)
            except ValueError as error:
                wrong, first = wrong + 1, first or f"{row['key']}: {error}"
    if wrong:
        raise Damage("mask", f"{count_of(wrong, 'row')}; {first}")


def _check_embeddings(parquet: pq.ParquetFile) -> None:  # noqa: TID251
    """Raise Damage("embedding", ...) unless each row has a unit vector or an error."""
    for batch in parquet.iter_batches(DEEP_ROWS, columns=["key", "error", "embedding"]):
        for row in batch.to_pylist():
            length = None if row["embedding"] is None else float(np.linalg.norm(row["embedding"]))
            if (row["error"] != "") != (length is None) or (length is not None and not abs(length - 1) < 0.01):
                raise Damage("embedding", f"{row['key']}: length {length}, error {row['error']!r}")


def check_masks(row: dict) -> None:
    """Raise ValueError when a row's run lengths do not decode, or its size, areas and boxes are not theirs."""
    from pycocotools import mask as coco

    size = [row["height"], row["width"]]
    for rle in [*row["segments"], *([row["foreground"]] if row["foreground"] else [])]:
        if list(rle["size"]) != size:
            raise ValueError(f"the mask's size is {list(rle['size'])}, the image's {size}")
        runs = run_lengths(rle["counts"])
        if runs.sum() != size[0] * size[1] or runs.min(initial=0) < 0:
            raise ValueError(f"the run lengths give {runs.sum()} of {size[0] * size[1]} pixels")
        if "area" not in rle:
            continue  # a foreground
        if rle["area"] != runs[1::2].sum():
            raise ValueError(f"area {rle['area']}, the mask has {runs[1::2].sum()} pixels")
        if not np.isfinite(rle.get("embedding") or ()).all():
            raise ValueError("its embedding has values that are no number")
        box = coco.toBbox({"size": size, "counts": rle["counts"].encode()}).tolist()
        if list(rle["bbox"]) != box:
            raise ValueError(f"bbox {list(rle['bbox'])}, the mask's is {box}")


def run_lengths(counts: str) -> np.ndarray:
    """The lengths of a COCO RLE's runs, background first: int64 (R,). Raises ValueError when it does not decode.

    The code of pycocotools' rleFrString (5 bits a character, lengths as differences to the last but one), which itself
    reads beyond the end of a damaged text and so must not see one.
    """
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:  # 32: more characters follow
        raise ValueError("the run lengths do not decode")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    characters = ends - starts + 1
    if characters.max() > 8:  # 40 bits; a run has no more than 2 ** 32 pixels
        raise ValueError("the run lengths do not decode")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, characters))
    lengths = np.add.reduceat((codes & 31) << shifts, starts)
    lengths -= (codes[ends] & 16 != 0).astype(np.int64) << (5 * characters)  # the sign bit of the last character
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return lengths
