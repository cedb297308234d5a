"""Which column of a list or table is the image: its values decide, its name among equals, else the user is asked."""

import base64
import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.sources import contents, keys, listed, photographs, write

from raypipe.inputs.manifest import list_inputs

WEB = "https://example.org/photos/1/medium.jpg?size=2"
PAGE = "https://example.org/observations/1"


def table(folder, suffix: str, **columns):
    """A list or table of these columns beside the files a.jpg and b.jpg."""
    write(folder, "a.jpg", "b.jpg", "small/a.jpg", "small/b.jpg")
    path = folder / f"list{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"url": [PAGE, PAGE], "image_url": ["a.jpg", "b.jpg"]}, ["a.jpg", "b.jpg"]),
        ({"url": [PAGE, PAGE + "2"], "image_url": [WEB, WEB.replace("1", "2")]}, None),
        ({"url": [PAGE, PAGE + "2"], "photo url": [PAGE + "3", PAGE + "4"]}, None),
        ({"references": [PAGE, PAGE + ".html"], "identifier": [WEB, WEB.replace("1", "2")]}, None),
        ({"file_name": ["a.jpg", "b.jpg"], "coco_url": [WEB, WEB]}, ["a.jpg", "b.jpg"]),
        ({"path": ["/gone/a.jpg", "/gone/b.jpg"], "image": ["a.jpg", "b.jpg"]}, ["a.jpg", "b.jpg"]),
        ({"path": ["a.jpg", "b.jpg"], "url": [WEB, WEB]}, ["a.jpg", "b.jpg"]),
        ({"image": ["a.jpg", "b.jpg"], "mask": ["small/a.jpg", "small/b.jpg"]}, ["a.jpg", "b.jpg"]),
        ({"thumbnail": ["small/a.jpg", "small/b.jpg"], "img": ["a.jpg", "b.jpg"]}, ["a.jpg", "b.jpg"]),
        ({"image_id": ["17", "18"], "what": ["a.jpg", "b.jpg"]}, ["a.jpg", "b.jpg"]),
        ({"label": ["cat", "dog"], "File Name": ["a.jpg", "b.jpg"]}, ["a.jpg", "b.jpg"]),
        ({"image": ["", "a.jpg"], "text": ["x.jpg", "y"]}, ["a.jpg"]),
    ],
)
def test_the_evident_column_is_taken(columns, expected, suffix, tmp_path):
    path = table(tmp_path, suffix, **columns)
    wanted = list(columns)[1] if expected is None else None
    if wanted:
        assert listed(path) == listed(path, column=wanted)
    else:
        assert keys(path) == expected


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_several_evident_columns_are_asked_about(suffix, tmp_path):
    path = table(tmp_path, suffix, left=["a.jpg", "b.jpg"], right=["small/a.jpg", "small/b.jpg"], n=[1, 2])
    types = r"'left' \(string\)" if suffix == ".parquet" else "'left'"
    with pytest.raises(ValueError, match=rf"left, right; choose one with --column; the columns are {types}"):
        list_inputs(str(path))
    assert keys(path, column="right") == ["small/a.jpg", "small/b.jpg"]


def test_pictures_are_told_from_other_bytes(tmp_path):
    pictures = photographs(tmp_path / "photos", 2)
    path = table(tmp_path, ".parquet", vector=[b"1234", b"5678"], jpg=pictures, text=["a.jpg", "b.jpg"])
    assert contents(path, max_bytes=10**5) == pictures
    path = table(tmp_path, ".parquet", vector=[b"1234", b"5678"], where=["a.jpg", "b.jpg"])
    assert keys(path) == ["a.jpg", "b.jpg"]


def test_pictures_in_base64_are_told_from_names(tmp_path):
    pictures = photographs(tmp_path / "photos", 2)
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    path = table(tmp_path, ".parquet", name=["first", "second"], payload=texts)
    assert contents(path, max_bytes=10**5) == pictures and keys(path) == ["list/0", "list/1"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (("File", "RelativePath"), ["station 0", "station 1\\day 2"]),
        (("filename", "directory"), ["./station 0/", "station 1/day 2/"]),
        (("image", "site"), ["ABS/station 0", "ABS/station 1/day 2"]),
        (("what", "where"), ["station 0", "station 1/day 2"]),
        (("name", "path"), ["station 0", "station 1/day 2"]),
    ],
)
def test_a_name_and_its_folder_may_stand_in_two_columns(names, folders, suffix, tmp_path):
    write(tmp_path, "station 0/IMG_0.jpg", "station 1/day 2/IMG_0.jpg", "root.jpg")
    folders = [folder.replace("ABS", str(tmp_path)) for folder in folders]
    file, folder = names
    if file == "what":  # nothing but the asked-for column says what it is
        options = {"column": "what"}
        path = table(tmp_path, suffix, what=["IMG_0.jpg", "IMG_0.jpg"], where=folders, other=["x", "y"])
    else:
        options = {}
        columns = {file: ["root.jpg", "IMG_0.jpg", "IMG_0.jpg"], "RootFolder": ["p"] * 3, folder: ["", *folders]}
        path = table(tmp_path, suffix, **columns)
    expected = [b"station 0/IMG_0.jpg", b"station 1/day 2/IMG_0.jpg"]
    assert contents(path, **options) == ([] if options else [b"root.jpg"]) + expected


def test_a_web_address_is_no_folder_unless_it_says_so(tmp_path):
    path = table(tmp_path, ".csv", filename=["0.jpg", "1.jpg"], url=[PAGE, PAGE + "2"])
    assert keys(path) == ["0.jpg", "1.jpg"]
    path = table(tmp_path, ".csv", filename=["0.jpg", "1.jpg"], url=[PAGE + "/", PAGE + "2/"])
    assert keys(path) == ["example.org/observations/1/0.jpg", "example.org/observations/12/1.jpg"]


def test_lists_without_headings_have_numbers_for_columns(tmp_path):
    write(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.csv").write_text("cat;a.jpg;x.jpg\ndog;b.jpg;y.jpg\n")
    assert contents(tmp_path / "list.csv") == contents(tmp_path / "list.csv", column="2") == [b"a.jpg", b"b.jpg"]
    assert keys(tmp_path / "list.csv", column="3") == ["x.jpg", "y.jpg"]
