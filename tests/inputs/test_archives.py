"""Archives: what is written is read, and listed as an input; those that their authors publish."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import archives as made
from support.sources import listed, photographs

from raypipe import schema
from raypipe.inputs import archives
from raypipe.inputs.manifest import records
from raypipe.storage import Folder


@pytest.fixture
def photos(tmp_path):
    photographs(tmp_path / "photos", 4)
    return sorted((tmp_path / "photos").iterdir())


@pytest.fixture
def folder(tmp_path, photos):
    """An archive of two categories that share a photograph, and of one without any."""
    return made.make(tmp_path / "archive", {"tree frog": [photos[2], photos[0]], "crab": photos[2:], "none": []})


def test_an_archive_has_its_classes_in_label_order_and_each_image_once(folder, photos):
    archive = archives.read(str(folder))
    assert archive.classes.names == ("tree frog", "crab", "none")
    assert [(row["category"], row["rank"], row["key"]) for row in archive.members.to_pylist()] == [
        ("tree frog", 0, "2.jpg"), ("tree frog", 1, "0.jpg"), ("crab", 0, "2.jpg"), ("crab", 1, "3.jpg"),
    ]  # fmt: skip
    assert archive.images["key"].to_pylist() == ["2.jpg", "0.jpg", "3.jpg"]
    assert archive.of("crab")["location"].to_pylist() == [str(photos[2]), str(photos[3])]
    assert len(archive.of("none")) == 0


def test_an_archive_is_an_input_of_the_same_images_as_the_corpus(folder, tmp_path):
    of_corpus = {row["image_id"]: row for row in listed(tmp_path / "photos")}
    of_archive = listed(folder)
    assert [row["key"] for row in of_archive] == ["2.jpg", "0.jpg", "3.jpg"]
    assert all(of_corpus[row["image_id"]] == row for row in of_archive)
    with pytest.raises(ValueError, match="no images in the archive"):
        listed(made.make(tmp_path / "empty", {"none": []}))
    with pytest.raises(ValueError, match="--column 'jpg' has no effect"):
        listed(folder, column="jpg")


def test_a_published_file_is_an_archive_whose_paths_start_beside_it_or_at_a_root(tmp_path, photos):
    text = json.dumps({"crab": ["photos/1.jpg", "photos/0.jpg"], "frog": [str(photos[1])]})
    for place, root in (("archive.json", None), ("elsewhere/archive.json", str(tmp_path))):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
        archive = archives.read(str(tmp_path / place), image_root=root)
        assert archive.classes.names == ("crab", "frog")
        assert archive.of("crab")["location"].to_pylist() == [str(photos[1]), str(photos[0])]
        assert archive.of("frog")["image_id"].to_pylist() == archive.of("crab")["image_id"].to_pylist()[:1]
        assert archive.members["score"].null_count == 3
        assert {row["image_id"] for row in listed(tmp_path / "photos")} >= set(archive.images["image_id"].to_pylist())


@pytest.mark.parametrize("content", ["[]", "{}", '{"crab": "a.jpg"}', '{"crab": [1]}', "{", "\ufeff"])
def test_a_file_that_is_no_archive_is_refused_and_says_what_is_expected(tmp_path, content):
    (tmp_path / "archive.json").write_text(content)
    with pytest.raises(ValueError, match="archive.json: expected"):
        archives.read(str(tmp_path / "archive.json"))


def test_a_folder_that_is_no_archive_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no archive.json there"):
        archives.read(str(tmp_path / "photos"))
    with pytest.raises(FileNotFoundError):
        archives.read(str(tmp_path / "gone.json"))
    with pytest.raises(ValueError, match="has no effect"):
        archives.read(str(folder), image_root=str(tmp_path))


def test_a_published_file_leads_into_no_private_network(tmp_path):
    (tmp_path / "archive.json").write_text('{"crab": ["http://10.0.0.1/a.jpg"]}')
    assert archives.read(str(tmp_path / "archive.json")).images["public"].to_pylist() == [True]
    (tmp_path / "archive.json").write_text('{"crab": ["s3://b/a.jpg?endpoint_override=10.0.0.1"]}')
    with pytest.raises(ValueError, match="archive.json: a path that may lead into a private network"):
        archives.read(str(tmp_path / "archive.json"))


def test_an_archive_that_is_not_finished_is_no_input(folder):
    os.remove(folder / "archive.json")
    for text in ("{}", "[", '{"table": "masks"}'):
        (folder / "run.json").write_text(text)
        assert len(listed(folder)) == 3  # some folder of tables
    (folder / "run.json").write_text('{"table": "embeddings"}')
    with pytest.raises(ValueError, match="its archive is not finished; run raypipe archive again"):
        listed(folder)


def test_an_archive_that_is_made_anew_while_it_is_read_is_refused(folder, monkeypatch):
    of_images = archives._images

    def made_anew(place):
        settings = json.loads((folder / "archive.json").read_text())
        (folder / "archive.json").write_text(json.dumps(settings | {"n": 7}))
        return of_images(place)

    monkeypatch.setattr(archives, "_images", made_anew)
    with pytest.raises(ValueError, match="made anew while it was read; try again"):
        archives.read(str(folder))


def test_damage_is_told_by_name_and_never_read_as_less(folder):
    manifest = pq.read_table(folder / "manifest.parquet")
    pq.write_table(manifest.slice(1), folder / "manifest.parquet")
    with pytest.raises(ValueError, match="damaged: an image of archive.parquet is not in manifest.parquet"):
        archives.read(str(folder))
    (folder / "manifest.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged: its manifest.parquet cannot be read"):
        listed(folder)
    os.remove(folder / "manifest.parquet")
    with pytest.raises(ValueError, match="damaged: its manifest.parquet is gone"):
        listed(folder)
    (folder / "archive.json").write_text("{")
    with pytest.raises(ValueError, match="damaged: its archive.json cannot be read"):
        listed(folder)


def test_locations_are_stored_without_secrets_and_opened_with_those_of_the_archive(tmp_path):
    row = dict.fromkeys(schema.MANIFEST.names) | {"image_id": "1", "uri": "s3://b/a.jpg", "key": "a.jpg"}
    places = ["s3://key:secret@b/a.jpg?region=eu", "https://user:secret@host/a.jpg?id=7", "/photos/a.jpg"]
    rows = pa.Table.from_pylist([row | {"location": place} for place in places], schema=schema.MANIFEST)
    archives.write(Folder(str(tmp_path)), {"classes": []}, archives.MEMBERS.empty_table(), rows, {})
    stored = pq.read_table(tmp_path / "manifest.parquet")["location"].to_pylist()
    assert stored == ["s3://b/a.jpg?region=eu", "https://host/a.jpg?id=7", "/photos/a.jpg"]
    assert [each["location"] for each in listed(tmp_path)] == stored
    assert [each["public"] for each in listed(tmp_path)] == [False, True, False]
    assert not any(each["public"] for each in listed(tmp_path, allow_private=True))


def test_rows_of_a_list_or_table_are_told_by_the_ids_of_their_images(tmp_path, photos, folder):
    cells = {"path": [str(path) for path in photos], "score": [0.5, None, 0.25, 1.0], "vector": [[1.0]] * 4}
    pq.write_table(pa.table(cells), tmp_path / "table.parquet", row_group_size=3)
    pictures = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "score": i} for i, path in enumerate(photos)]
    pq.write_table(pa.Table.from_pylist(pictures), tmp_path / "pictures.parquet")
    lines = [json.dumps({"path": str(path), "score": i}) for i, path in enumerate(photos)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    for name, expected in (("table.parquet", cells["score"]), ("pictures.parquet", range(4)), ("list.jsonl", range(4))):
        found = list(records(str(tmp_path / name), lambda rows: rows["score"].to_pylist()))
        assert found == list(zip([row["image_id"] for row in listed(tmp_path / name)], expected, strict=True))
    lines = [
        json.dumps({"path": str(path)} | ({"flag": [True, "no", 7][i - 1]} if i else {}))
        for i, path in enumerate(photos)
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    found = records(str(tmp_path / "list.jsonl"), lambda rows: rows["flag"].to_pylist())
    assert [value for _, value in found] == [None, "True", "no", "7"]
    names = []
    list(records(str(tmp_path / "pictures.parquet"), lambda rows: names.extend(rows.column_names) or [0] * len(rows)))
    assert names == ["score"]
    (tmp_path / "list.txt").write_text(str(photos[0]))
    for source in (tmp_path / "photos", folder, tmp_path / "list.txt"):
        with pytest.raises(ValueError, match="has no columns"):
            list(records(str(source), lambda rows: []))
