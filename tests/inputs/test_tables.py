"""Rows of tables: what is listed, under which keys, and the bytes that come back for it."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.sources import contents, huggingface, keys, listed, write

from raypipe.inputs.manifest import fetch, list_inputs
from raypipe.types import BadImage


def test_a_column_of_uris(tmp_path):
    write(tmp_path, "x/a.jpg", "x/b.jpg")
    pq.write_table(pa.table({"n": [1, 2, 3], "path": ["x/a.jpg", None, "x/b.jpg"]}), tmp_path / "t.parquet")
    assert contents(tmp_path / "t.parquet") == [b"x/a.jpg", b"x/b.jpg"]
    assert keys(tmp_path / "t.parquet") == ["x/a.jpg", "x/b.jpg"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_a_column_of_bytes_over_several_row_groups(kind, tmp_path):
    cells = [f"content {i}".encode() for i in range(10)]
    pq.write_table(pa.table({"jpg": pa.array(cells, kind)}), tmp_path / "t.parquet", row_group_size=3)
    rows = listed(tmp_path / "t.parquet")
    assert [row["key"] for row in rows] == [f"t/{i}" for i in range(10)]
    assert rows[4]["uri"].endswith("t.parquet#row=4") and rows[4]["column"] == "jpg"
    order = np.random.default_rng(0).permutation(10)
    assert list(fetch([rows[i] for i in order], max_bytes=100)) == [cells[i] for i in order]
    assert {error.kind for error in fetch(rows, max_bytes=5)} == {"too_large"}


def test_a_folder_of_huggingface_tables(tmp_path):
    write(tmp_path, "README.md", "data/.hidden")
    cells = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": b"two", "path": None}, {"bytes": None, "path": "3.jpg"}]
    huggingface(tmp_path / "data" / "train-00000-of-00002.parquet", cells)
    huggingface(tmp_path / "data" / "train-00001-of-00002.parquet", [{"bytes": b"four", "path": "1.jpg"}])
    rows = listed(tmp_path)
    assert [row["column"] for row in rows] == ["image.bytes"] * 4
    assert [row["key"] for row in rows][:3] == ["1.jpg", "data/train-00000-of-00002/1", "3.jpg"]
    assert rows[3]["key"] == f"1-{rows[3]['image_id'][:8]}.jpg"  # the same path once more
    one, two, three, four = fetch(rows, max_bytes=100)
    assert (one, two, four) == (b"one", b"two", b"four")
    assert isinstance(three, BadImage) and three.kind == "missing"


def test_huggingface_rows_without_any_bytes_are_files_beside_the_table(tmp_path):
    write(tmp_path, "images/1.jpg", "images/2.jpg")
    cells = [{"bytes": None, "path": "images/1.jpg"}, {"bytes": None, "path": "images/2.jpg"}]
    huggingface(tmp_path / "t.parquet", cells)
    assert contents(tmp_path / "t.parquet") == [b"images/1.jpg", b"images/2.jpg"]


def test_listing_a_table_reads_no_pixels(tmp_path):
    cells = [{"bytes": os.urandom(100_000), "path": f"{i}.jpg"} for i in range(20)]
    huggingface(tmp_path / "t.parquet", cells, compression="none", use_dictionary=False)
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    at = content.index(cells[7]["bytes"])
    content[at - 200 : at + 100_000] = bytes(100_200)  # ruins the page, not the footer
    (tmp_path / "t.parquet").write_bytes(content)
    rows = listed(tmp_path / "t.parquet")
    assert len(rows) == 20
    assert all(isinstance(cell, bytes | BadImage) for cell in fetch(rows, max_bytes=10**6))


def test_tables_that_leave_the_column_open_ask_for_it(tmp_path):
    pq.write_table(pa.table({"left": [b"1"], "right": [b"2"], "n": [3]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="left, right.*--column"):
        list_inputs(str(tmp_path / "t.parquet"))
    assert contents(tmp_path / "t.parquet", column="right") == [b"2"]
    with pytest.raises(ValueError, match="'n' .int64"):
        list_inputs(str(tmp_path / "t.parquet"), column="n")


def test_a_damaged_table_among_others_becomes_one_error_row(tmp_path):
    huggingface(tmp_path / "a.parquet", [{"bytes": b"one", "path": "1.jpg"}])
    write(tmp_path, "b.parquet")
    one, error = contents(tmp_path)[::-1] if keys(tmp_path)[0].startswith("b") else contents(tmp_path)
    assert one == b"one" and error.kind == "damaged"
    with pytest.raises(ValueError, match="b.parquet"):
        list_inputs(str(tmp_path / "b.parquet"))


def test_a_table_that_vanishes_gives_error_rows(tmp_path):
    huggingface(tmp_path / "gone.parquet", [{"bytes": b"one", "path": "1.jpg"}] * 2)
    rows = listed(tmp_path / "gone.parquet")
    os.remove(tmp_path / "gone.parquet")
    assert [error.kind for error in fetch(rows, max_bytes=10)] == ["missing", "missing"]
