"""Sources on an object store, through a real S3 API on loopback."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs as pafs

import raypipe
from raypipe import storage
from raypipe.inputs.manifest import fetch, list_inputs
from raypipe.storage import Folder, Locked, hold
from raypipe.types import BadImage

NAMES = ["a b.jpg", "a%20b.jpg", "a#b.jpg", "what?x=1.jpg", "ünï 📷.jpg", "plus+and&.jpg", "deep/er/x.png"]


def upload(filesystem, content: dict[str, bytes]) -> None:
    for key, value in content.items():
        storage.put(filesystem, f"photos/{key}", value)


def read(source: str, **options) -> dict[str, bytes | BadImage]:
    rows = list_inputs(source, **options).to_pylist()
    assert not any("endpoint_override" in row["uri"] for row in rows)
    return dict(zip((row["key"] for row in rows), fetch(rows, max_bytes=1000), strict=True))


def test_a_folder_with_odd_keys(bucket):
    filesystem, uri = bucket
    names = [*NAMES, "_set/_MG_1.jpg"]
    beside = [
        "notes.txt",
        ".hidden.jpg",
        "@eaDir/1.jpg/L.jpg",
        "1.THM",
        "run/run.json",
        "run/_commits/1.parquet",
        "run/a.png",
    ]
    upload(filesystem, {f"set 1/{name}": name.encode() for name in names + beside})
    for source in (uri("set 1"), uri("set 1/")):
        assert read(source) == {name: name.encode() for name in sorted(names)}
    assert len(read(uri())) == len(names)


def test_one_object_and_its_id(bucket):
    filesystem, uri = bucket
    upload(filesystem, {name: name.encode() for name in NAMES})
    for name in NAMES:
        assert list(read(uri(name)).values()) == [name.encode()]
        assert storage.normalise(uri(name)) == f"s3://photos/{name}"


def test_globs_and_keys_that_look_like_one(bucket):
    filesystem, uri = bucket
    names = ["2024/05/img_1.png", "2024/05/img_2.png", "2024/06/img_10.png", "2024/img_3.png", "2024/05/img_[1].png"]
    upload(filesystem, {name: name.encode() for name in names})
    assert list(read(uri("2024/*/img_?.png"))) == ["05/img_1.png", "05/img_2.png"]
    assert len(read(uri("2024/**/*.png"))) == 5
    assert list(read(uri("2024/05/img_[1].png")).values()) == [b"2024/05/img_[1].png"]


def test_braces_and_a_key_that_has_some(bucket):
    filesystem, uri = bucket
    names = [f"shards/{kind}-{i:03d}.png" for kind in ("train", "val") for i in range(3)]
    upload(filesystem, {name: name.encode() for name in [*names, "odd/{1,2}.png"]})
    found = read(uri("shards/{train,val}-{000..002}.png"))
    assert found == read(uri("shards/*.png")) and len(found) == 6
    assert list(read(uri("odd/{1,2}.png"))) == ["{1,2}.png"]
    with pytest.raises(ValueError, match="2 of 4 names do not exist, such as 'train-003.png'"):
        read(uri("shards/train-{001..004}.png"))


def test_a_list_with_relative_and_absolute_entries(bucket, tmp_path):
    filesystem, uri = bucket
    upload(filesystem, {name: name.encode() for name in NAMES})
    (tmp_path / "local.jpg").write_bytes(b"local")
    lines = [
        "../a b.jpg",
        "s3://photos/a%20b.jpg",
        "../deep/er/x.png",
        str(tmp_path / "local.jpg"),
        "s3://photos/gone.jpg",
    ]
    upload(filesystem, {"lists/all.txt": "\n".join(lines).encode()})
    *found, gone = read(uri("lists/all.txt")).values()
    assert found == [b"a b.jpg", b"a%20b.jpg", b"deep/er/x.png", b"local"]
    assert gone.kind == "missing"


def test_tars_and_tables(bucket):
    filesystem, uri = bucket
    file, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = 700
            archive.addfile(member, io.BytesIO(bytes([i]) * 700))
    cells = pa.array([{"bytes": b"one", "path": "1.jpg"}, {"bytes": b"two", "path": "2.jpg"}])
    pq.write_table(pa.table({"image": cells}), table)
    upload(filesystem, {"tars/a b.tar": file.getvalue(), "tables/t.parquet": table.getvalue()})
    assert read(uri("tars")) == {f"a b/{i}.jpg": bytes([i]) * 700 for i in range(3)}
    assert read(uri("tables")) == {"1.jpg": b"one", "2.jpg": b"two"}
    upload(filesystem, {"tars/a b.tar": file.getvalue()[:2300]})
    assert [getattr(content, "kind", "good") for content in read(uri("tars")).values()] == [
        "good",
        "truncated",
        "damaged",
    ]


def test_many_objects_come_in_order_and_bad_ones_in_their_place(bucket):
    filesystem, uri = bucket
    upload(filesystem, {f"{i:03}.jpg": str(i).encode() for i in range(60)})
    rows = list_inputs(uri()).to_pylist()
    filesystem.delete_file("photos/030.jpg")
    found = list(fetch(rows, max_bytes=1000))
    assert found.pop(30).kind == "missing"
    assert found == [str(i).encode() for i in range(60) if i != 30]


def test_a_reader_may_stop_early(bucket):
    filesystem, uri = bucket
    upload(filesystem, {f"{i:03}.jpg": str(i).encode() for i in range(60)})
    rows = list_inputs(uri()).to_pylist()
    reader = fetch(rows, max_bytes=1000)
    assert next(reader) == b"0"
    reader.close()


@pytest.mark.parametrize("key", ["nothing/here", "nothing/*.jpg"])
def test_what_is_not_there_is_an_error(key, bucket):
    _, uri = bucket
    with pytest.raises((FileNotFoundError, ValueError), match="nothing"):
        list_inputs(uri(key))


@pytest.mark.parametrize("key", ["", "x.jpg", "*.jpg"])
def test_a_bucket_that_does_not_exist_is_an_error(key, bucket):
    _, uri = bucket
    with pytest.raises((FileNotFoundError, ValueError), match="s3://other"):
        list_inputs(uri(key).replace("s3://photos/", "s3://other/"))


@pytest.mark.parametrize("local", [True, False], ids=["loop", "ray"])
def test_a_whole_run_from_bucket_to_bucket(bucket, local):
    filesystem, uri = bucket
    for name in NAMES:
        buffer = io.BytesIO()
        Image.new("RGB", (12, 9), (200, 10, 10)).save(buffer, "PNG")
        upload(filesystem, {f"in/{name}": buffer.getvalue()})
    upload(filesystem, {"in/bad.jpg": b"nothing"})
    options = {"foreground": "whole", "local": local, "max_bad_fraction": 1.0}
    summary = raypipe.label("kmeans", uri("in"), uri("runs/1"), sheet=True, **options)
    assert (summary.labelled, summary.failed) == (len(NAMES) + 1, 1)
    assert "endpoint_override" not in summary.output
    rows = raypipe.load(uri("runs/1"))
    assert sorted(rows["key"].to_pylist()) == sorted([*NAMES, "bad.jpg"])
    upload(filesystem, {"in/new.png": buffer.getvalue()})
    again = raypipe.label("kmeans", uri("in"), uri("runs/1"), retry_errors=True, **options)
    assert (again.labelled, again.failed) == (2, 1)
    assert len(raypipe.load(uri("runs/1"))) == len(NAMES) + 2
    held = [info.path for info in filesystem.get_file_info(pafs.FileSelector("photos/runs/1", recursive=True))]
    assert "photos/runs/1/sheet.png" in held and not any("LOCK" in path or "pending" in path for path in held)


def test_a_run_held_on_a_bucket_is_refused_to_another_host(bucket):
    filesystem, uri = bucket
    place = Folder(uri("runs/2"))
    with hold(place, "first"):
        claim = json.loads(place.read("_runs", "LOCK")) | {"host": "elsewhere"}
        place.write(json.dumps(claim).encode(), "_runs", "LOCK")
        with pytest.raises(Locked, match="on elsewhere"), hold(place, "second"):
            raise AssertionError("two holders")
    with hold(place, "third"):
        pass
