"""Lists of addresses: which rows they give, under which keys."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.sources import contents, keys, listed, write

from raypipe.inputs.manifest import fetch, list_inputs


def test_a_text_list(tmp_path, caplog):
    write(tmp_path, "photos/a b.jpg", "photos/sub/c#d.jpg", "lists/x")
    lines = [
        "# comment",
        "",
        "../photos/a b.jpg",
        f"  {tmp_path}/photos/sub/c#d.jpg ",
        f"file://{tmp_path}/photos/a%20b.jpg",
    ]
    (tmp_path / "lists" / "all.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    rows = listed(tmp_path / "lists" / "all.txt")
    assert [row["key"] for row in rows] == ["photos/a b.jpg", f"{tmp_path}/photos/sub/c#d.jpg".lstrip("/")]
    assert "1 entry is listed twice and labelled once" in caplog.text
    assert list(fetch(rows, max_bytes=100)) == [b"photos/a b.jpg", b"photos/sub/c#d.jpg"]
    assert {row["image_id"] for row in rows} == {row["image_id"] for row in listed(tmp_path / "photos")}


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("a.jpg", "a.jpg"),
        ("./x/../a.jpg", "a.jpg"),
        ("../../up/a.jpg", "up/a.jpg"),
        ("/abs/a.jpg", "abs/a.jpg"),
        ("file:///abs/a%20b.jpg", "abs/a b.jpg"),
        ("s3://key:secret@bucket/set/a.jpg?region=eu-west-1", "bucket/set/a.jpg"),
        ("https://u:p@host.org/p/a.jpg?token=1#f", "host.org/p/a.jpg"),
        ("hf://datasets/some/one/a.jpg", "datasets/some/one/a.jpg"),
    ],
)
def test_the_key_of_an_entry_depends_on_nothing_but_the_entry(entry, key, tmp_path):
    (tmp_path / "list.txt").write_text(f"{entry}\n")
    assert keys(tmp_path / "list.txt") == [key]
    (tmp_path / "list.txt").write_text(f"{entry}\nmore/b.jpg\n/elsewhere/c.jpg\ns3://other/d.jpg\n")
    assert keys(tmp_path / "list.txt") == [key, "more/b.jpg", "elsewhere/c.jpg", "other/d.jpg"]
    pq.write_table(pa.table({"uri": [entry, "more/b.jpg"]}), tmp_path / "table.parquet")
    assert keys(tmp_path / "table.parquet") == [key, "more/b.jpg"]


def test_a_list_may_have_very_long_cells(tmp_path, monkeypatch):
    path = tmp_path / "list.csv"
    path.write_text(f"caption,file_name\n{'x' * 200_000},a.jpg\n")
    assert keys(path) == ["a.jpg"]
    monkeypatch.setattr("raypipe.inputs.records.FIELD_CHARACTERS", 1000)
    with pytest.raises(ValueError, match=r"list\.csv cannot be read as \.csv: field larger"):
        list_inputs(str(path))


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
