"""What the entries of lists mean: names as other programs and systems spell them lead to the files on this disk."""

import os
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.sources import contents, keys, listed, write

from raypipe.types import BadImage


def entries(folder, *lines: str):
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    return folder / "list.txt"


@pytest.mark.parametrize(
    ("file", "entry", "key"),
    [
        ("img/0.jpg", r"img\0.jpg", "img/0.jpg"),
        ("img/0.jpg", r".\img\0.jpg", "img/0.jpg"),
        ("img/0.jpg", '"img/0.jpg"', "img/0.jpg"),
        ("img/a b.jpg", r'".\img\a b.jpg"', "img/a b.jpg"),
        ("img/0.jpg", "'img/0.jpg'", "img/0.jpg"),
        ("img/a b.jpg", "img/a%20b.jpg", "img/a%20b.jpg"),
        ("img/a%20b.jpg", "img/a%20b.jpg", "img/a%20b.jpg"),
        ("img/a%20b.jpg", "file://HERE/img/a%20b.jpg", None),
        ("a#1?x=2 100%.jpg", "a#1?x=2 100%.jpg", "a#1?x=2 100%.jpg"),
        (r"img\0.jpg", r"img\0.jpg", r"img\0.jpg"),
        ("img/0.jpg", "img/0.jpg 17", "img/0.jpg"),
        ("img/a 1", "img/a 1", "img/a 1"),
        ('"quoted".jpg', '"quoted".jpg', '"quoted".jpg'),
        ("dir#1/ä?.jpg", r"dir#1\ä?.jpg", "dir#1/ä?.jpg"),
    ],
)
def test_a_file_is_found_by_an_entry(file, entry, key, tmp_path):
    write(tmp_path, file)
    path = entries(tmp_path, entry.replace("HERE", str(tmp_path)))
    assert contents(path) == [file.encode()]
    assert key is None or keys(path) == [key]
    assert [row["image_id"] for row in listed(path)] == [row["image_id"] for row in listed(tmp_path / "**" / "*[1g]")]
    pq.write_table(pa.table({"path": [entry.replace("HERE", str(tmp_path))]}), tmp_path / "t.parquet")
    assert contents(tmp_path / "t.parquet") == [file.encode()]


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_names_are_found_in_another_unicode_form(on_disk, tmp_path):
    name, other = (unicodedata.normalize(form, "Zürich/Ångström é.jpg") for form in ("NFC", "NFD"))
    if on_disk == "NFD":
        name, other = other, name
    write(tmp_path, name)
    assert contents(entries(tmp_path, other)) == [name.encode()]
    assert listed(entries(tmp_path, other))[0]["image_id"] == listed(tmp_path / "**" / "*.jpg")[0]["image_id"]


def test_a_name_that_two_files_may_mean_is_no_one_s(tmp_path):
    write(tmp_path, "a b%2C.jpg", "a%20b,.jpg")
    (error,) = contents(entries(tmp_path, "a%20b%2C.jpg"))
    assert isinstance(error, BadImage) and error.kind == "missing"
    write(tmp_path, "a%20b%2C.jpg")
    assert contents(entries(tmp_path, "a%20b%2C.jpg")) == [b"a%20b%2C.jpg"]


@pytest.mark.parametrize("entry", [r"C:\Users\anna\a.jpg", "D:/photos/a.jpg", r'"\\nas\photos\a.jpg"'])
def test_a_path_of_windows_is_an_error_row_that_says_so(entry, tmp_path):
    (error,) = contents(entries(tmp_path, entry))
    assert error.kind == "missing" and "is a path of Windows" in error.message
    assert keys(entries(tmp_path, entry))[0].endswith("a.jpg") and "\\" not in keys(entries(tmp_path, entry))[0]


def test_addresses_in_quotes_are_addresses(tmp_path):
    assert listed(entries(tmp_path, '"https://host.org/a b.jpg"')) == listed(
        entries(tmp_path, "https://host.org/a b.jpg")
    )


def test_a_folder_that_cannot_be_read_holds_nothing(tmp_path):
    os.mkdir(tmp_path / "closed")
    (tmp_path / "closed").chmod(0)
    (error,) = contents(entries(tmp_path, "closed/ä.jpg"))
    assert error.kind in ("missing", "permission")
