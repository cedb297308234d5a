"""`raypipe compact`: a run's many small parts as few large files, sorted by image_id.

An external merge in bounded memory: the parts are read once, sorted chunks go to a temporary folder, cut into ranges of
ids, and range by range into the new files. The same rows give the same files, whatever parts they came from. The new
records are written when all new files are there, and the old parts go after that, so a kill at any moment leaves either
files that do not count or rows twice, which `run.superseded` settles.

Not by DuckDB's ORDER BY: at 200,000 rows of 1.03 GB and a limit of 1 GB it ends out of memory on the nested lists,
where this takes 198 s and 1.1 GB. On 60,000 rows it would be four times faster.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from raypipe import schema
from raypipe.maintenance.integrity import Damage, read_record
from raypipe.run import Run, new_attempt, superseded
from raypipe.run.rows import complete_commits
from raypipe.runtime.interruption import held
from raypipe.runtime.progress import count_of
from raypipe.storage import (
    GROUP_ROWS,
    fence,
    map_ahead,
    open_table,
    parquet_bytes,
    parquet_options,
    temporary_space,
    without_secrets,
)

MEGABYTE = 1_000_000
CHUNK_BYTES = 256 << 20  # of decoded rows sorted at a time
RANGE_BYTES = 64 << 20  # of decoded rows merged at a time
CHUNKS = 500  # at most, since all their files are open at once; a larger run has larger chunks
EXPANSION = 3  # decoded bytes per byte of a part, about
PARTS_AHEAD = 16  # read at a time, fewer when they are large


@dataclass(frozen=True)
class Compact:
    """Rewrite a run's parts as few large files, sorted by image_id. Needs free temporary space of the run's size."""

    run: tyro.conf.Positional[str]  # the run's folder: a path or a URI
    megabytes: int = 256  # size of the new files, about


@dataclass(frozen=True)
class Compacted:
    """What `compact` did."""

    run: str
    rows: int
    parts_before: int
    parts_after: int
    bytes_before: int
    bytes_after: int
    seconds: float

    def text(self) -> str:
        """One line."""
        return (
            f"{count_of(self.rows, 'row')}: from {count_of(self.parts_before, 'part')} of "
            f"{self.bytes_before / 1e6:,.1f} MB to {self.parts_after:,} of {self.bytes_after / 1e6:,.1f} MB "
            f"({self.seconds:.1f} s)"
        )


def compact(options: Compact) -> Compacted:
    """Rewrite a run's parts, sorted, into files of about `megabytes`. A run that is already so is left alone.

    Readers that go by the commit records (raypipe.load) see every row once at any time; plain ones may see rows twice
    while it works. Raises FileNotFoundError when the folder is no run, storage.Locked when a job writes to it, and
    RuntimeError, with all old parts in place, when a part is damaged.
    """
    if options.megabytes <= 0:
        raise ValueError(f"--megabytes must be positive, got {options.megabytes}")
    start, run, attempt = time.monotonic(), Run(options.run), new_attempt()
    complete_commits(run)  # raises when it is no run or lacks rows, before anything is changed
    with held(run.folder, attempt):
        run.clean()
        before = run.sizes()
        if not _is_compact(before, options.megabytes):
            _replace(run, attempt, before, _rewrite(run, attempt, options.megabytes))
        after, rows = run.sizes(), len(run.commits())
    seconds = round(time.monotonic() - start, 3)
    return Compacted(
        without_secrets(options.run), rows, len(before), len(after), sum(before.values()), sum(after.values()), seconds
    )


def _is_compact(parts: Iterable[str], megabytes: int) -> bool:
    """Whether all parts are of one earlier compaction to this size: named `part-<attempt>-compact<megabytes>_<i>`."""
    begins = {name.rpartition("_")[0] for name in parts}
    return not begins or (len(begins) == 1 and begins.pop().endswith(f"-compact{megabytes}"))


def _rewrite(run: Run, attempt: str, megabytes: int) -> dict[str, pa.Table]:
    """Write the new data files; returns their commit records by name."""
    commits, sizes = complete_commits(run), run.sizes()
    lost = defaultdict(list)
    for image_id, part in superseded(commits):
        lost[part].append(image_id)
    ids = commits["image_id"].unique().sort()
    decoded = EXPANSION * sum(sizes.values())
    step = max(1, RANGE_BYTES * len(ids) // max(decoded, 1) // GROUP_ROWS) * GROUP_ROWS  # rows of a range
    bounds = ids.take(pa.array(range(step, len(ids), step), pa.int64()))  # first ids of all ranges but the first
    del commits
    with tempfile.TemporaryDirectory(prefix="raypipe-compact-") as scratch, ExitStack() as stack:
        depth = min(PARTS_AHEAD, 1 + CHUNK_BYTES // max(sizes.values(), default=1))
        contents = zip(sizes, map_ahead(partial(_read_part, run), sizes, depth=depth), strict=True)
        tables = (table for name, content in contents for table in _rows(content, run.columns, lost[name]))
        chunks = _gathered(tables, max(CHUNK_BYTES, decoded // CHUNKS))
        spills = [_spill(_sorted(chunk), bounds, Path(scratch, f"{i}.arrow")) for i, chunk in enumerate(chunks)]
        readers = [pa.ipc.open_file(stack.enter_context(pa.OSFile(str(path)))) for path in spills]
        groups = _merged(readers, len(bounds) + 1)
        records = dict(_write(run, attempt, megabytes, groups))
    written = sum(map(len, records.values()))
    if written != len(ids):
        raise RuntimeError(f"{run}: {written} rows were written for {len(ids)} images; the old parts are kept")
    return records


def _replace(run: Run, attempt: str, old: Iterable[str], records: dict[str, pa.Table]) -> None:
    """Let the new files count, then delete the old parts, oldest first."""
    for name, record in records.items():
        run.write_record(attempt, name, record)
    fence(run.folder, attempt)
    if any(run.folder.size("_commits", name) is None for name in records):  # another attempt took the lock over
        raise RuntimeError(f"{run}: new files have disappeared; the old parts are kept")
    for name in old:
        run.drop(name)
    run.finish(attempt)


def _read_part(run: Run, name: str) -> bytes:
    """A part's data file. Raises RuntimeError when it is not what its record says, FileNotFoundError without one."""
    content, committed = run.folder.read(run.data, name) or b"", run.folder.read("_commits", name)
    if committed is None:  # a listing that lags behind names it all the same
        raise FileNotFoundError(f"{run}: another process has replaced the part {name}; run the same command again")
    try:
        record, expected = read_record(committed)
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise Damage("altered", "it is not what was committed")
        if not open_table(content).read(columns=schema.COMMIT.names).equals(record):
            raise Damage("ids", "it does not hold the images of its record")
    except Damage as damage:
        text = f"part {name} is damaged ({damage.text}); first: raypipe verify {run} --repair"
        raise RuntimeError(f"{run}: {text}") from None
    return content


def _rows(content: bytes, columns: pa.Schema, lost: list[str]) -> Iterator[pa.Table]:
    """A part's row groups, without the superseded ids."""
    file = open_table(content)
    for i in range(file.num_row_groups):
        rows = file.read_row_group(i).cast(columns)
        yield rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=pa.array(lost, pa.string()))))


def _gathered(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """Tables joined to about `size` bytes."""
    held, weight = [], 0
    for table in tables:
        held.append(table)
        weight += table.nbytes
        if weight >= size:
            yield pa.concat_tables(held)
            held, weight = [], 0
    if held:
        yield pa.concat_tables(held)


def _spill(chunk: pa.Table, bounds: pa.Array, path: Path) -> Path:
    """Write a sorted chunk as an Arrow file with one record batch per range of ids."""
    cuts = np.searchsorted(chunk["image_id"].to_numpy(), bounds.to_numpy(zero_copy_only=False), side="left")
    edges = [0, *cuts.tolist(), len(chunk)]
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with temporary_space(), pa.ipc.new_file(str(path), chunk.schema, options=options) as writer:
        for first, last in zip(edges, edges[1:], strict=False):
            rows = chunk.slice(first, last - first).to_struct_array().combine_chunks()  # one batch, also of no rows
            writer.write_batch(pa.RecordBatch.from_struct_array(rows))
    return path


def _sorted(rows: pa.Table) -> pa.Table:
    return rows.replace_schema_metadata().sort_by("image_id")


def _merged(readers: list[pa.ipc.RecordBatchFileReader], ranges: int) -> Iterator[pa.Table]:
    """All rows in the order of their ids, GROUP_ROWS at a time: a range holds a multiple of that, but for the last."""
    for i in range(ranges):
        rows = _sorted(pa.Table.from_batches([reader.get_batch(i) for reader in readers], readers[0].schema))
        for start in range(0, len(rows), GROUP_ROWS):
            yield rows.slice(start, GROUP_ROWS)


def _write(run: Run, attempt: str, megabytes: int, groups: Iterator[pa.Table]) -> Iterator[tuple[str, pa.Table]]:
    """Write row groups into files of about `megabytes`; yields (name, commit record)."""
    for i, groups_of_file in groupby(_files(groups, megabytes * MEGABYTE), key=itemgetter(0)):
        name, ids, sink = f"part-{attempt}-compact{megabytes}_{i:05d}.parquet", [], pa.BufferOutputStream()
        columns = run.columns.with_metadata(run.part_metadata())
        with pq.ParquetWriter(sink, columns, **parquet_options(columns)) as writer:
            for _, group in groups_of_file:
                writer.write_table(group.replace_schema_metadata(run.part_metadata()), row_group_size=GROUP_ROWS)
                ids.append(group.select(schema.COMMIT.names))
        yield name, run.write_part(name, memoryview(sink.getvalue()), pa.concat_tables(ids))


def _files(groups: Iterable[pa.Table], size: int) -> Iterator[tuple[int, pa.Table]]:
    """Each row group with the index of its file, 0, 0, ..., 1, ....

    What belongs into a file is decided by the rows alone, not by bytes written, which differ with the attempts' names:
    decoded, with the compression of the first group, a random sample because ids are hashes.
    """
    file, weight, limit = 0, 0, None
    for group in groups:
        limit = limit or size * _weight(group) / len(parquet_bytes(group.drop_columns("attempt")))
        if weight >= limit:
            file, weight = file + 1, 0
        weight += _weight(group)
        yield file, group


def _weight(rows: pa.Table | pa.ChunkedArray) -> int:
    """Bytes of a row group's values, or of one column's, decoded."""
    if isinstance(rows, pa.Table):
        return sum(map(_weight, rows.columns))
    kind = rows.type
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return _weight(pc.list_flatten(rows))
    if pa.types.is_struct(kind):
        return sum(_weight(pc.struct_field(rows, i)) for i in range(kind.num_fields))
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return pc.sum(pc.binary_length(rows)).as_py() or 0
    return len(rows) * kind.bit_width // 8
