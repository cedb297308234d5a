"""Tables beyond memory: what of pyarrow's Table streams, over a temporary file."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raypipe.storage.temporary import append, temporary_file

MEMORY_BYTES = 256 << 20  # of rows in memory, a million images or so; the others are on the disk
COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")


class Chunk(NamedTuple):
    """Some rows of a spool."""

    stored: pa.RecordBatch | tuple[int, int]  # or where in the file they are: offset and bytes
    count: int  # of the rows that are kept
    kept: pa.BooleanArray | None = None  # which of the stored ones; None = all


class Spool:
    """Rows in the order in which they are written: in memory while they are few, the others in a compressed file.

    Behaves as a `pa.Table` in what is below. What is filtered or sliced shares the rows. The file has no name: it is
    gone with the process.
    """

    def __init__(self, schema: pa.Schema):
        self.schema, self._left, self._file, self._chunks = schema, MEMORY_BYTES, None, []

    @classmethod
    def of(cls, schema: pa.Schema, tables: Iterable[pa.Table]) -> Spool:
        """All rows of tables of one schema."""
        spool = cls(schema)
        for table in tables:
            spool.write(table)
        return spool

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        for batch in table.cast(self.schema).combine_chunks().to_batches():
            self._left -= batch.nbytes
            self._chunks.append(Chunk(batch if self._left >= 0 else self._spilled(batch), len(batch)))

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return self.schema.names

    def __len__(self) -> int:
        return sum(chunk.count for chunk in self._chunks)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """A column, all of it in memory."""
        return pa.chunked_array((batch[name] for batch in self.to_batches()), self.schema.field(name).type)

    def to_batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, as many at a time as were written."""
        return map(self._read, self._chunks)

    def filter(self, kept: pa.BooleanArray) -> Spool:
        """The rows for which `kept` is true. It has no nulls."""
        chosen, start = self._empty(), 0
        for chunk in self._chunks:
            its, start = kept.slice(start, chunk.count), start + chunk.count
            if (count := its.true_count) == chunk.count:
                chosen._chunks.append(chunk)
            elif count:
                if chunk.kept is not None:
                    among = chunk.kept.to_numpy(zero_copy_only=False).copy()
                    among[among] = its.to_numpy(zero_copy_only=False)
                    its = pa.array(among)
                chosen._chunks.append(Chunk(chunk.stored, count, its))
        return chosen

    def slice(self, offset: int = 0, length: int | None = None) -> Spool:
        """Up to `length` rows from one on; None = all."""
        kept = np.zeros(len(self), bool)
        kept[offset : None if length is None else offset + length] = True
        return self.filter(pa.array(kept))

    def take(self, indices: Sequence[int]) -> pa.Table:
        """Some rows, each read by itself."""
        ends = [0, *itertools.accumulate(chunk.count for chunk in self._chunks)]
        places = ((bisect_right(ends, index) - 1, index) for index in indices)
        rows = (self._read(self._chunks[i]).slice(index - ends[i], 1) for i, index in places)
        return pa.Table.from_batches(rows, self.schema)

    def read(self) -> pa.Table:
        """All rows in memory."""
        return pa.Table.from_batches(self.to_batches(), self.schema)

    def to_pylist(self) -> list[dict]:
        """All rows in memory, each as a dict."""
        return self.read().to_pylist()

    def _empty(self) -> Spool:
        other = Spool(self.schema)
        other._file = self._file
        return other

    def _spilled(self, batch: pa.RecordBatch) -> tuple[int, int]:
        self._file = self._file or temporary_file()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema, options=COMPRESSED) as writer:
            writer.write_batch(batch)
        content, offset = sink.getvalue(), self._file.seek(0, os.SEEK_END)
        append(self._file, memoryview(content))
        return offset, content.size

    def _read(self, chunk: Chunk) -> pa.RecordBatch:
        rows = chunk.stored
        if isinstance(rows, tuple):
            offset, size = rows
            rows = pa.ipc.open_stream(os.pread(self._file.fileno(), size, offset)).read_next_batch()
        return rows if chunk.kept is None else rows.filter(chunk.kept)


def portions(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Rows by exactly `size`, but for the last ones."""
    held, count = [], 0
    for batch in batches:
        while len(batch):
            held.append(batch.slice(0, size - count))
            batch, count = batch.slice(len(held[-1])), count + len(held[-1])
            if count == size:
                yield pa.Table.from_batches(held)
                held, count = [], 0
    if held:
        yield pa.Table.from_batches(held)
