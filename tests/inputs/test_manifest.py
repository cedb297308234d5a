"""What is listed from every kind of source, under which ids and keys, and the bytes that come back for it."""

import hashlib
import os

import pytest
from support.malformed import malformed
from support.sources import huggingface, keys, left_out, listed, tar_of, write

from raypipe import schema
from raypipe.inputs.manifest import fetch, list_inputs

# Folders


def test_a_folder_is_listed_in_order_with_ids_from_absolute_paths(tmp_path, monkeypatch):
    write(tmp_path, "b.jpg", "a/z.png", "a/no_extension", "a.jpg", "a/deep/er/x.weird")
    monkeypatch.chdir(tmp_path.parent)
    rows = listed(tmp_path.name)
    assert [row["key"] for row in rows] == ["a.jpg", "a/deep/er/x.weird", "a/no_extension", "a/z.png", "b.jpg"]
    path = str(tmp_path / "a.jpg")
    image_id = hashlib.blake2b(path.encode(), digest_size=16).hexdigest()
    nothing = dict.fromkeys(("start", "length", "row", "column")) | {"public": False}
    assert rows[0] == {"image_id": image_id, "uri": path, "key": "a.jpg", "location": path} | nothing
    assert rows == listed(f"{tmp_path}/") == listed(f"file://{tmp_path}")


def test_hidden_names_and_sidecars_are_left_out_and_counted(tmp_path, caplog):
    write(
        tmp_path,
        "1.jpg",
        ".DS_Store",
        "_ours/2.jpg",
        "labels.csv",
        "1.txt",
        "2.txt",
        "LICENSE",
        "part.tar",
        "t.parquet",
    )
    assert keys(tmp_path) == ["1.jpg", "_ours/2.jpg"]
    beside = {"1 .tar (beside images)", "1 .parquet (beside images)"}
    assert left_out(caplog) == {"1 hidden name", "1 .csv", "2 .txt", "1 LICENSE"} | beside


def test_chunks_have_the_schema_and_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("raypipe.inputs.items.CHUNK_ROWS", 4)
    write(tmp_path, *(f"{i}.jpg" for i in range(10)))
    found = list_inputs(str(tmp_path))
    assert [len(chunk) for chunk in found["key"].chunks] == [4, 4, 2]
    assert found.schema == schema.MANIFEST


def test_hostile_names_are_listed_and_read(tmp_path):
    names = malformed(tmp_path)
    rows = listed(tmp_path)
    assert len(rows) == len({row["image_id"] for row in rows}) == len({row["key"] for row in rows}) == len(names)
    read = sorted(fetch(rows, max_bytes=10**7))
    assert read == sorted((tmp_path / name).read_bytes() for name in names)


@pytest.mark.parametrize("source", ["none", "none/*.jpg", "empty", "only_text"])
def test_nothing_to_label_is_an_error_with_the_place(source, tmp_path):
    os.mkdir(tmp_path / "empty")
    write(tmp_path, "only_text/1.txt", "only_text/2.txt")
    with pytest.raises((FileNotFoundError, ValueError), match=source.partition("/")[0]) as caught:
        list_inputs(str(tmp_path / source))
    assert source != "only_text" or "2 .txt" in str(caught.value)


@pytest.mark.parametrize("source", ["nonsense://x/y", "/dev/null", "/dev/zero"])
def test_places_that_cannot_hold_images_are_errors(source):
    with pytest.raises(ValueError):
        list_inputs(source)


def test_a_packed_file_is_to_be_unpacked(tmp_path):
    write(tmp_path, "photos.zip")
    with pytest.raises(ValueError, match="photos.zip is packed; unpack it"):
        list_inputs(str(tmp_path / "photos.zip"))


def test_tars_and_tables_together_ask_for_a_choice(tmp_path):
    tar_of(tmp_path / "a.tar", {"1.jpg": b"1"})
    huggingface(tmp_path / "b.parquet", [{"bytes": b"one", "path": "1.jpg"}])
    with pytest.raises(ValueError, match="glob"):
        list_inputs(str(tmp_path))
    assert keys(tmp_path / "*.tar") == ["a/1.jpg"]


def test_a_stray_file_beside_tables_or_tars_is_left_out_and_counted(tmp_path, caplog):
    write(tmp_path, "CITATION.cff", "0.parquet.crc", "DATASHEET")
    huggingface(tmp_path / "b.parquet", [{"bytes": b"one", "path": "1.jpg"}])
    assert keys(tmp_path) == ["1.jpg"]
    assert left_out(caplog) == {f"1 {what} (beside .parquet)" for what in (".cff", ".crc", "without extension")}
    assert keys(tmp_path, column="image") == keys(tmp_path / "*") == ["1.jpg"]
    os.remove(tmp_path / "b.parquet")
    tar_of(tmp_path / "a.tar", {"2.jpg": b"2"})
    assert keys(tmp_path) == ["a/2.jpg"]
    os.remove(tmp_path / "a.tar")
    assert keys(tmp_path) == ["0.parquet.crc", "CITATION.cff", "DATASHEET"]


# Globs


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["1.jpg", "2.jpg"]),
        ("**/*.jpg", ["1.jpg", "2.jpg", "a/1.jpg", "a/b/1.jpg"]),
        ("**", ["1.jpg", "2.jpg", "3.txt", "a/1.jpg", "a/b/1.jpg", "a/b/2.png"]),
        ("a/*/?.???", ["1.jpg", "2.png"]),
        ("a/**/1.*", ["1.jpg", "b/1.jpg"]),
        ("[!1].*", ["2.jpg", "3.txt"]),
        ("[12].jpg", ["1.jpg", "2.jpg"]),
        (".hid*/*", ["1.jpg"]),
    ],
)
def test_globs(pattern, expected, tmp_path):
    write(tmp_path, "1.jpg", "2.jpg", "3.txt", "a/1.jpg", "a/b/1.jpg", "a/b/2.png", ".hidden/1.jpg")
    found = [
        key.removeprefix(".hidden/").removeprefix("b/" if pattern == "a/*/?.???" else "")
        for key in keys(tmp_path / pattern)
    ]
    assert found == expected


def test_an_existing_name_wins_over_the_glob(tmp_path):
    write(tmp_path, "set [1]/a*.jpg", "set [1]/ab.jpg", "set 1/c.jpg")
    assert keys(tmp_path / "set [1]") == ["a*.jpg", "ab.jpg"]
    assert keys(tmp_path / "set [1]" / "a*.jpg") == ["a*.jpg"]


# Keys and columns


def test_keys_never_lead_out_of_a_folder(tmp_path):
    tar_of(tmp_path / "x.tar", {"../../etc/a.jpg": b"1", "/abs/b.jpg": b"2", "./c.jpg": b"3"})
    assert keys(tmp_path / "x.tar") == ["x/etc/a.jpg", "x/abs/b.jpg", "x/c.jpg"]


@pytest.mark.parametrize("name", ["one.jpg", "all.txt"])
def test_a_column_without_a_table_is_an_error(name, tmp_path):
    write(tmp_path, "one.jpg", "all.txt")
    with pytest.raises(ValueError, match="no effect"):
        list_inputs(str(tmp_path / name), column="image")


# Bytes


def test_bad_files_are_yielded_in_their_place(tmp_path):
    write(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    rows = listed(tmp_path)
    os.remove(tmp_path / "2.jpg")
    (tmp_path / "3.jpg").write_bytes(bytes(101))
    first, second, third, fourth = fetch(rows, max_bytes=100)
    assert (first, second.kind, third.kind, fourth) == (b"1.jpg", "missing", "too_large", b"4.jpg")


def test_files_are_read_only_when_they_are_asked_for(tmp_path):
    write(tmp_path, "1.jpg", "2.jpg")
    read = fetch(listed(tmp_path), max_bytes=100)
    next(read)
    (tmp_path / "2.jpg").write_bytes(b"changed")
    assert next(read) == b"changed"
