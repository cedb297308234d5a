"""What is listed from every kind of source, under which ids and keys, and the bytes that come back for it."""

import csv
import gzip
import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from malformed import malformed

from raypipe import schema
from raypipe.inputs import fetch, list_inputs
from raypipe.types import BadImage


def write(folder, *names: str) -> None:
    """Files whose content is their own name."""
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(os.fsencode(name))


def listed(source, **options) -> list[dict]:
    return [row for chunk in list_inputs(str(source), **options).chunks for row in chunk.to_pylist()]


def keys(source, **options) -> list[str]:
    return [row["key"] for row in listed(source, **options)]


def contents(source, *, max_bytes: int = 1000, **options) -> list:
    return list(fetch(listed(source, **options), max_bytes=max_bytes))


def tar_of(path, members: dict[str, bytes], **options) -> None:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def huggingface(path, cells: list[dict], **options) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"label": range(len(cells)), "image": pa.array(cells, image)}), path, **options)


# Folders


def test_a_folder_is_listed_in_order_with_ids_from_absolute_paths(tmp_path, monkeypatch):
    write(tmp_path, "b.jpg", "a/z.png", "a/no_extension", "a.jpg", "a/deep/er/x.weird")
    monkeypatch.chdir(tmp_path.parent)
    rows = listed(tmp_path.name)
    assert [row["key"] for row in rows] == ["a.jpg", "a/deep/er/x.weird", "a/no_extension", "a/z.png", "b.jpg"]
    path = str(tmp_path / "a.jpg")
    image_id = hashlib.blake2b(path.encode(), digest_size=16).hexdigest()
    nothing = dict.fromkeys(("start", "length", "row", "column"))
    assert rows[0] == {"image_id": image_id, "uri": path, "key": "a.jpg", "location": path} | nothing
    assert rows == listed(f"{tmp_path}/") == listed(f"file://{tmp_path}")


def test_hidden_names_and_sidecars_are_left_out_and_counted(tmp_path):
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
    listing = list_inputs(str(tmp_path))
    assert pa.concat_tables(listing.chunks)["key"].to_pylist() == ["1.jpg"]
    beside = {".tar (beside images)": 1, ".parquet (beside images)": 1}
    assert listing.skipped == {"hidden names": 2, ".csv": 1, ".txt": 2, "LICENSE": 1} | beside
    assert any("2 .txt" in remark for remark in listing.remarks())


def test_chunks_have_the_schema_and_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("raypipe.inputs.CHUNK_ROWS", 4)
    write(tmp_path, *(f"{i}.jpg" for i in range(10)))
    chunks = list(list_inputs(str(tmp_path)).chunks)
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    assert all(chunk.schema == schema.MANIFEST for chunk in chunks)


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


# Lists


def test_a_text_list(tmp_path):
    write(tmp_path, "photos/a b.jpg", "photos/sub/c#d.jpg", "lists/x")
    lines = [
        "# comment",
        "",
        "../photos/a b.jpg",
        f"  {tmp_path}/photos/sub/c#d.jpg ",
        f"file://{tmp_path}/photos/a%20b.jpg",
    ]
    (tmp_path / "lists" / "all.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    listing = list_inputs(str(tmp_path / "lists" / "all.txt"))
    rows = pa.concat_tables(listing.chunks).to_pylist()
    assert [row["key"] for row in rows] == ["a b.jpg", "sub/c#d.jpg"]
    assert listing.duplicates == 1 and any("twice" in remark for remark in listing.remarks())
    assert list(fetch(rows, max_bytes=100)) == [b"photos/a b.jpg", b"photos/sub/c#d.jpg"]
    assert {row["image_id"] for row in rows} == {row["image_id"] for row in listed(tmp_path / "photos")}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_lists_with_columns(suffix, tmp_path):
    write(tmp_path, "a,b.jpg", "c.jpg")
    rows = [{"label": "x", "URL" if suffix == ".csv" else "file_name": name} for name in ("a,b.jpg", "c.jpg")]
    path = tmp_path / f"list{suffix}"
    with open(path, "w", newline="") as file:
        if suffix == ".jsonl":
            file.write("\n".join(map(json.dumps, rows)) + "\n\n")
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    assert contents(path) == [b"a,b.jpg", b"c.jpg"]
    assert keys(path) == keys(path, column=list(rows[0])[1]) == ["a,b.jpg", "c.jpg"]
    with pytest.raises(ValueError, match="'label'"):
        list_inputs(str(path), column="other")


def test_a_list_without_a_fitting_column_names_those_it_has(tmp_path):
    (tmp_path / "list.csv").write_text("name,size\na.jpg,1\n")
    with pytest.raises(ValueError, match="'name', 'size'.*--column"):
        list_inputs(str(tmp_path / "list.csv"))
    assert keys(tmp_path / "list.csv", column="name") == ["a.jpg"]


def test_web_addresses_keep_their_query_in_the_id_but_not_in_tables(tmp_path):
    lines = ["https://u:p@host.org/i.jpg?id=1", "https://host.org/i.jpg?id=2", "https://host.org/other/k.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    rows = listed(tmp_path / "list.txt")
    assert [row["uri"] for row in rows] == ["https://host.org/i.jpg"] * 2 + ["https://host.org/other/k.jpg"]
    assert [row["location"] for row in rows] == lines
    assert len({row["image_id"] for row in rows}) == len({row["key"] for row in rows}) == 3


def test_keys_never_lead_out_of_a_folder(tmp_path):
    tar_of(tmp_path / "x.tar", {"../../etc/a.jpg": b"1", "/abs/b.jpg": b"2", "./c.jpg": b"3"})
    assert keys(tmp_path / "x.tar") == ["x/etc/a.jpg", "x/abs/b.jpg", "x/c.jpg"]


@pytest.mark.parametrize("name", ["one.jpg", "all.txt", "some.tar"])
def test_a_column_without_a_table_is_an_error(name, tmp_path):
    write(tmp_path, "one.jpg", "all.txt")
    tar_of(tmp_path / "some.tar", {"a.jpg": b"1"})
    with pytest.raises(ValueError, match="no effect"):
        list_inputs(str(tmp_path / name), column="image")


# Parquet tables


def test_a_column_of_uris(tmp_path):
    write(tmp_path, "x/a.jpg", "x/b.jpg")
    pq.write_table(pa.table({"n": [1, 2, 3], "path": ["x/a.jpg", None, "x/b.jpg"]}), tmp_path / "t.parquet")
    assert contents(tmp_path / "t.parquet") == [b"x/a.jpg", b"x/b.jpg"]
    assert keys(tmp_path / "t.parquet") == ["a.jpg", "b.jpg"]


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


# Tars


def test_tars_list_their_pictures_by_range(tmp_path):
    sample = {
        "0001.jpg": b"picture 1",
        "0001.json": b"{}",
        "0001.cls": b"3",
        "d/0002.PNG": b"picture 2",
        "._x.jpg": b"no",
    }
    os.mkdir(tmp_path / "train")
    tar_of(tmp_path / "train" / "00000.tar", sample)
    tar_of(
        tmp_path / "00001.tar",
        {"a" * 150 + "/ü.webp": b"picture 3", "0004.heic": b"picture 4"},
        format=tarfile.PAX_FORMAT,
    )
    listing = list_inputs(str(tmp_path))
    rows = pa.concat_tables(listing.chunks).to_pylist()
    names = ["00001/" + "a" * 150 + "/ü.webp", "00001/0004.heic", "train/00000/0001.jpg", "train/00000/d/0002.PNG"]
    assert [row["key"] for row in rows] == names
    assert rows[2]["uri"] == f"{tmp_path}/train/00000.tar#0001.jpg"
    assert list(fetch(rows, max_bytes=100)) == [b"picture 3", b"picture 4", b"picture 1", b"picture 2"]
    assert listing.skipped == {".json": 1, ".cls": 1, "hidden names": 1}


def test_links_and_folders_in_tars_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("f.jpg", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("good.jpg"))
    assert keys(tmp_path / "x.tar") == ["x/good.jpg"]


@pytest.mark.parametrize("damage", ["cut in a picture", "cut in a header", "broken header", "no end marker"])
def test_what_a_damaged_tar_loses_is_one_error_row(damage, tmp_path):
    tar_of(tmp_path / "x.tar", {f"{i}.jpg": bytes([i]) * 2000 for i in range(5)})
    content = bytearray((tmp_path / "x.tar").read_bytes())
    member = 512 + 2048
    if damage == "broken header":
        content[3 * member : 3 * member + 512] = os.urandom(512)
    else:
        end = {"cut in a picture": 3 * member - 100, "cut in a header": 3 * member + 100, "no end marker": 3 * member}
        del content[end[damage] :]
    if damage == "cut in a picture":
        del content[3 * member - 1000 :]
    (tmp_path / "x.tar").write_bytes(content)
    *good, rest = contents(tmp_path / "x.tar", max_bytes=5000)
    assert isinstance(rest, BadImage) and rest.kind == "damaged" and "repair" in rest.message
    if damage == "cut in a picture":
        assert good.pop().kind == "truncated"
    assert good == [bytes([i]) * 2000 for i in range(len(good))] and len(good) == (2 if "picture" in damage else 3)


def test_a_file_that_is_no_tar_is_an_error_alone_and_a_row_among_others(tmp_path):
    write(tmp_path, "a.tar")
    with pytest.raises(ValueError, match="a.tar"):
        list_inputs(str(tmp_path / "a.tar"))
    tar_of(tmp_path / "b.tar", {"1.jpg": b"1"})
    error, good = contents(tmp_path)
    assert error.kind == "damaged" and good == b"1"


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_a_compressed_tar_is_refused(name, tmp_path):
    tar_of(tmp_path / "plain.tar", {"1.jpg": b"1"})
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
    with pytest.raises(ValueError, match="compressed"):
        list_inputs(str(tmp_path / name))


def test_tars_and_tables_together_ask_for_a_choice(tmp_path):
    tar_of(tmp_path / "a.tar", {"1.jpg": b"1"})
    huggingface(tmp_path / "b.parquet", [{"bytes": b"one", "path": "1.jpg"}])
    with pytest.raises(ValueError, match="glob"):
        list_inputs(str(tmp_path))
    assert keys(tmp_path / "*.tar") == ["a/1.jpg"]


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
