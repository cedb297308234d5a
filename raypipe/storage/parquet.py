"""Parquet files: written whole, and read without running what they hold."""

from __future__ import annotations

import base64
import binascii
import io

import pyarrow as pa
import pyarrow.parquet as pq

GROUP_ROWS = 1000  # rows of a Parquet row group: few, since they hold masks
TAIL_BYTES = 1 << 16  # read first: it holds most footers whole
MAGIC = b"PAR1"
SCHEMA, HIDDEN_SCHEMA = b"ARROW:schema", b"ARROW-schema"  # the key of Arrow's own types in a footer, of one length
EXTENSION = b"ARROW:extension:"  # begins the keys that make a field one of an extension type


def open_table(
    file: pa.NativeFile | bytes, footer: pq.FileMetaData | None = None, *, checked: bool = False
) -> pq.ParquetFile:
    """A Parquet file, without any of Arrow's extension types: their columns have the types that they are stored as.

    Some extension types, such as Ray's for Python objects, run code from the file when they are read. footer: what
    `read_footer` gave for the file, to read it once only. checked: compare pages with their checksums, where they have
    any. Raises pa.ArrowInvalid for what is no Parquet, and OSError.
    """
    file = _in_arrows_memory(file) if isinstance(file, bytes) else file
    options = {"arrow_extensions_enabled": False, "page_checksum_verification": checked}
    return pq.ParquetFile(file, metadata=footer or read_footer(file), **options)


def read_footer(file: pa.NativeFile) -> pq.FileMetaData:
    """The footer of a Parquet file; its columns have no extension types. Raises as `open_table` does."""
    size = file.size()
    tail = file.read_at(min(size, TAIL_BYTES), max(0, size - TAIL_BYTES))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != MAGIC or length > size - len(MAGIC):
        raise pa.ArrowInvalid("it does not end as a Parquet file does: it is none, or was cut")
    footer = tail[-length:] if length <= len(tail) else file.read_at(length, size - length)
    plain = _parsed(footer.replace(SCHEMA, HIDDEN_SCHEMA))
    stored = (plain.metadata or {}).get(HIDDEN_SCHEMA, b"")
    return _parsed(footer) if footer.count(SCHEMA) == 1 and _is_harmless(stored) else plain


def _parsed(footer: bytes) -> pq.FileMetaData:
    return pq.ParquetFile(_in_arrows_memory(MAGIC + footer), arrow_extensions_enabled=False).metadata


def _in_arrows_memory(content: bytes) -> pa.BufferReader:
    """A copy of bytes that no thread needs Python for to let go of.

    Arrow's threads hold on to what they read for some microseconds after it was handed over. If the interpreter ends in
    these and the memory is Python's, the process aborts: "terminate called without an active exception", exit code 134.
    """
    sink = pa.BufferOutputStream()
    sink.write(content)
    return pa.BufferReader(sink.getvalue())


def _is_harmless(stored: bytes) -> bool:
    """Whether Arrow's own description of the columns, in base64, names no extension type."""
    try:
        return EXTENSION not in base64.b64decode(stored, validate=True)
    except binascii.Error:
        return False


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as one Parquet file: row groups of 1,000 rows, since they may hold masks; see `parquet_options`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=GROUP_ROWS, **parquet_options(table.schema))
    return buffer.getvalue()


def parquet_options(schema: pa.Schema) -> dict:
    """How Parquet files are written: pages with checksums; no statistics of masks, which would hold two in full."""
    plain = [field.name for field in schema if not pa.types.is_nested(field.type)]
    return {"compression": "zstd", "write_page_checksum": True, "write_statistics": plain or False}
