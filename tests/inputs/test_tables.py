"""Rows of tables: what is listed, under which keys, and the bytes that come back for it."""

import base64
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.sources import contents, huggingface, keys, left_out, listed, photographs, write

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


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def put(folder, column, name: str = "image", **options):
    pq.write_table(pa.table({"n": range(len(column)), name: column}), folder / "t.parquet", **options)
    return folder / "t.parquet"


@pytest.mark.parametrize("statistics", [False, True])
def test_objects_without_bytes_are_the_files_of_their_paths_row_by_row(statistics, tmp_path, caplog):
    write(tmp_path, "img/1.jpg", "img/2.jpg", "img/ü.jpg")
    cells = [
        {"bytes": b"zero", "path": "0.jpg"},
        {"bytes": None, "path": "img/1.jpg"},
        {"bytes": b"", "path": "img\\2.jpg"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "img/u\u0308.jpg"},
        {"bytes": None, "path": "img/1.jpg"},
    ]
    path = put(tmp_path, pa.array(cells, STRUCT), write_statistics=statistics, row_group_size=3)
    *found, last = contents(path)
    assert found[:3] == [b"zero", b"img/1.jpg", b"img/2.jpg"] and last == (b"img/1.jpg")
    if statistics:  # the second row group has no bytes: its files are listed, and what is none is counted
        assert found[3:] == ["img/ü.jpg".encode()]
        assert left_out(caplog) == {"2 records without image (first: row 3)"}
    else:
        assert [error.kind for error in found[3:5]] == ["missing", "missing"] and found[5:] == ["img/ü.jpg".encode()]


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(6),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int8(), pa.binary()),
        pa.list_(pa.binary()),
        pa.list_(STRUCT),
        pa.large_list(STRUCT),
        pa.list_(STRUCT, 1),
        pa.struct([("bytes", pa.large_binary())]),
        pa.struct([("path", pa.string()), ("bytes", pa.large_binary()), ("more", pa.int8())]),
    ],
    ids=str,
)
def test_pictures_of_all_types(kind, tmp_path):
    cells = [f"cell {i}".encode() for i in range(5)]
    is_list, kinds = "list" in str(kind), str(kind)
    column = [{"bytes": cell, "path": None} if "struct" in kinds else cell for cell in cells]
    column = [[cell] if is_list else cell for cell in column]
    path = put(tmp_path, pa.array(column, kind), "jpg", row_group_size=2)
    assert contents(path) == contents(path, column="jpg") == cells
    assert keys(path) == [f"t/{i}" for i in range(5)]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.string()),
        pa.struct([("path", pa.string())]),
        pa.struct([("url", pa.string()), ("caption", pa.string())]),
        pa.list_(pa.struct([("url", pa.large_string())])),
    ],
    ids=str,
)
def test_addresses_of_all_types(kind, tmp_path, caplog):
    write(tmp_path, "a.jpg", "b.jpg")
    column = ["a.jpg", None, "b.jpg"]
    if "struct" in str(kind):
        column = [cell and {"path" if "path" in str(kind) else "url": cell} for cell in column]
    if "list" in str(kind):
        column = [[cell] for cell in column]
    path = put(tmp_path, pa.array(column, kind), "photo")
    assert contents(path) == [b"a.jpg", b"b.jpg"]
    assert left_out(caplog) == {"1 record without image (first: row 1)"}


def test_several_pictures_in_a_cell_are_a_row_each(tmp_path, caplog):
    write(tmp_path, "c.jpg")
    of_first = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": b"two", "path": None}, {"bytes": None, "path": "c.jpg"}]
    path = put(tmp_path, pa.array([of_first, [], None, [{"bytes": b"four", "path": None}]], pa.list_(STRUCT)), "images")
    rows = listed(path)
    assert [row["key"] for row in rows] == ["1.jpg", "t/0/1", "c.jpg", "t/3"]
    assert [row["uri"].rpartition("#")[2] for row in rows] == ["row=0.0", "row=0.1", "row=0.2", "row=3"]
    assert list(fetch(rows, max_bytes=100)) == [b"one", b"two", b"c.jpg", b"four"]
    assert left_out(caplog) == {"2 records without image (first: row 1)"}


def test_a_column_of_base64_may_hold_names_too(tmp_path, caplog):
    pictures = photographs(tmp_path, 4)
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    column = [texts[0], "1.jpg", "data:image/jpeg;base64," + texts[2], None, texts[3]]
    path = put(tmp_path, pa.array(column), row_group_size=2)
    good = [content for content in contents(path, max_bytes=10**5) if isinstance(content, bytes)]
    assert good == pictures
    path = put(
        tmp_path, pa.array(column[1:] + column[:1]), row_group_size=2
    )  # the first one is a name: all are looked at
    assert contents(path, max_bytes=10**5) == [*pictures[1:], pictures[0]]
    assert keys(path) == ["1.jpg", "t/1", "t/3", "t/4"]
    struct = pa.array([{"bytes": text, "path": "0.jpg"} for text in texts])
    assert contents(put(tmp_path, struct), max_bytes=10**5) == pictures


def test_what_a_table_holds_instead_is_named_with_types(tmp_path):
    path = put(tmp_path, pa.array([[1.5, 2.5]]), "pixels")
    with pytest.raises(ValueError, match=r"'n' \(int64\), 'pixels' \(list<.*double>\)"):
        list_inputs(str(path))
    with pytest.raises(ValueError, match=r"no column 'pixels' of .* 'pixels' \(list<"):
        list_inputs(str(path), column="pixels")


def test_a_table_that_was_written_anew_is_read_anew(tmp_path):
    assert contents(put(tmp_path, pa.array([b"one"]))) == [b"one"]
    assert contents(put(tmp_path, pa.array([b"two", b"three"]))) == [b"two", b"three"]
