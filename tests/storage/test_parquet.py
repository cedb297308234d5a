"""Parquet is read as it is stored: no type of another library is ever built from a file, since some run its code."""

import base64

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hostile import bomb, objects

from raypipe.storage import open_table, parquet_bytes, read_footer


def with_own_schema(table: pa.Table, edit) -> bytes:
    """A Parquet file whose description of Arrow's types is replaced by edit(its bytes)."""
    content = parquet_bytes(table)
    stored = pq.ParquetFile(pa.BufferReader(content)).metadata.metadata[b"ARROW:schema"]
    return content.replace(stored, edit(stored))


def test_ordinary_types_come_back_as_they_were_written():
    kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary_view(), pa.list_(pa.int32(), 2)]
    table = pa.table({str(i): pa.array([], kind) for i, kind in enumerate(kinds)}, metadata={"a": "b"})
    content = parquet_bytes(table)
    read = open_table(content).read()
    assert read.schema.equals(pq.read_table(pa.BufferReader(content)).schema, check_metadata=True)
    assert read.schema.types == table.schema.types


@pytest.mark.parametrize("nested", [False, True])
def test_a_column_of_pickles_is_read_as_bytes(nested, tmp_path):
    canary = tmp_path / "canary"
    column = objects(3, canary)
    if nested:
        column = pa.StructArray.from_arrays([column], ["path"])
    content = parquet_bytes(pa.table({"image": column, "n": [1, 2, 3]}))
    file = open_table(content)
    values = file.read().to_pylist()
    assert values[0]["image"] == ({"path": bomb(canary)} if nested else bomb(canary))
    assert [value["n"] for value in values] == [1, 2, 3] and not canary.exists()


def test_a_type_that_is_built_from_a_pickle_is_not_built(tmp_path):
    canary, built = tmp_path / "canary", []

    class Watched(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.int64(), "test.watched")

        def __arrow_ext_serialize__(self):
            return bomb(canary)

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, serialized):
            built.append(serialized)
            return cls()

    pa.register_extension_type(Watched())
    try:
        column = pa.ExtensionArray.from_storage(Watched(), pa.array([1, 2]))
        content = parquet_bytes(pa.table({"n": column}))
        assert read_footer(pa.BufferReader(content)).schema.to_arrow_schema().types == [pa.int64()]
        assert open_table(content).read()["n"].to_pylist() == [1, 2]
        assert not built
    finally:
        pa.unregister_extension_type("test.watched")


@pytest.mark.parametrize("trick", ["no base64", "spaces", "twice"])
def test_a_description_of_types_that_is_not_plain_is_left_aside(trick, tmp_path):
    canary = tmp_path / "canary"
    table = pa.table({"n": objects(2, canary)})
    edits = {"no base64": lambda text: b"%" + text[1:], "spaces": lambda text: text[:-4] + b"    "}
    if trick == "twice":
        table = table.replace_schema_metadata({"ARROW:schema": base64.b64encode(b"harmless")})
        content = parquet_bytes(table)
    else:
        content = with_own_schema(table, edits[trick])
    assert open_table(content).read()["n"].to_pylist() == [bomb(canary)] * 2
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"\xff\xff\xff\x7fPAR1", b"PAR1" * 5, b"x" * 100])
def test_what_is_no_parquet_is_an_error(content):
    with pytest.raises(pa.ArrowInvalid):
        open_table(content)


def test_a_footer_longer_than_the_first_read_is_read_whole():
    table = pa.table({f"column {i}": [i] for i in range(2000)})
    assert open_table(parquet_bytes(table)).read().equals(table)
