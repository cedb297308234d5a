"""Members of tars: what is listed, under which keys, and the bytes that come back for it."""

import gzip
import io
import os
import tarfile

import pytest
from support.sources import contents, keys, left_out, listed, tar_of, write

from raypipe.inputs.manifest import fetch, list_inputs
from raypipe.types import BadImage


def test_tars_list_their_pictures_by_range(tmp_path, caplog):
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
    rows = listed(tmp_path)
    names = ["00001/" + "a" * 150 + "/ü.webp", "00001/0004.heic", "train/00000/0001.jpg", "train/00000/d/0002.PNG"]
    assert [row["key"] for row in rows] == names
    assert rows[2]["uri"] == f"{tmp_path}/train/00000.tar#0001.jpg"
    assert list(fetch(rows, max_bytes=100)) == [b"picture 3", b"picture 4", b"picture 1", b"picture 2"]
    assert left_out(caplog) == {"1 .json", "1 .cls", "1 hidden name"}


def test_links_and_folders_in_tars_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("f.jpg", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("good.jpg"))
    assert keys(tmp_path / "x.tar") == ["x/good.jpg"]


@pytest.mark.parametrize(
    "damage", ["cut in a picture", "cut in a header", "broken header", "zeros for a header", "no end marker"]
)
def test_what_a_damaged_tar_loses_is_one_error_row(damage, tmp_path):
    tar_of(tmp_path / "x.tar", {f"{i}.jpg": bytes([i]) * 2000 for i in range(5)})
    content = bytearray((tmp_path / "x.tar").read_bytes())
    member = 512 + 2048
    if damage in ("broken header", "zeros for a header"):
        content[3 * member : 3 * member + 512] = os.urandom(512) if damage == "broken header" else bytes(512)
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>", "it holds HTML"),
        (b"\1\2\3\4" * 300, "it starts with"),
        (b"", "zero bytes"),
    ],
)
def test_what_is_given_in_place_of_a_tar_is_named(content, words, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        list_inputs(str(tmp_path / "x.tar"))


def test_a_leading_underscore_is_a_camera_s(tmp_path):
    tar_of(
        tmp_path / "x.tar",
        {"_MG_0001.JPG": b"1", "_set/_DSC2.jpg": b"2", "__MACOSX/a.jpg": b"3", "a/@eaDir/b.jpg": b"4"},
    )
    assert keys(tmp_path / "x.tar") == ["x/_MG_0001.JPG", "x/_set/_DSC2.jpg"]


@pytest.mark.parametrize("label", ["seg.png", "mask.png", "SEG.PNG", "mask_0.png", "depth.tif", "label.ids.png"])
def test_of_a_picture_and_its_label_the_picture_is_taken(label, tmp_path, caplog):
    samples = {f"d/000{i}.{ending}": bytes([i]) for i in range(3) for ending in (label, "jpg", "json")}
    tar_of(tmp_path / "x.tar", samples)
    assert keys(tmp_path / "x.tar") == [f"x/d/000{i}.jpg" for i in range(3)]
    assert left_out(caplog) == {"3 .json", f"3 .{label.lower()} (beside a picture)"}
    assert keys(tmp_path / "x.tar", column=label.lower()) == [f"x/d/000{i}.{label}" for i in range(3)]


def test_labels_alone_are_pictures(tmp_path):
    tar_of(tmp_path / "x.tar", {"1.seg.png": b"1", "2.seg.png": b"2"})
    assert keys(tmp_path / "x.tar") == ["x/1.seg.png", "x/2.seg.png"]


@pytest.mark.parametrize("endings", [("jpg", "png"), ("left.jpg", "right.jpg")])
def test_several_pictures_in_most_samples_ask_for_a_choice(endings, tmp_path):
    tar_of(tmp_path / "x.tar", {f"{i}.{ending}": ending.encode() for i in range(3) for ending in endings})
    with pytest.raises(ValueError, match=rf"3 \.{endings[0]}, 3 \.{endings[1]}; choose such as --column {endings[0]}"):
        list_inputs(str(tmp_path / "x.tar"))
    for ending in endings:
        assert contents(tmp_path / "x.tar", column=ending) == [ending.encode()] * 3
    assert len(keys(tmp_path / "x.tar", column=";".join(endings))) == 6
    with pytest.raises(ValueError, match=rf"--column 'image': .* 3 \.{endings[0]}"):
        list_inputs(str(tmp_path / "x.tar"), column="image")


def test_dots_in_ordinary_names_make_no_samples(tmp_path):
    names = ["Screen 10.30.png", "Screen 10.31.png", "2023.01.05.jpg", "2023.01.06.jpg", "cat.0.jpg", "cat.1.jpg"]
    names += ["a.jpg.jpg", "raw/b.jpg", "raw/b.cr2", "twice/c.jpg", "twice/c.png"]
    tar_of(tmp_path / "x.tar", dict.fromkeys(names, b"1"))
    assert keys(tmp_path / "x.tar") == [f"x/{name}" for name in names]


@pytest.mark.parametrize(
    "names", ["Felis.catus Felis.silvestris Canis.lupus Canis.aureus", "Dr.Who Dr.No", "a.b a.c b.b"]
)
def test_names_of_several_words_make_no_samples(names, tmp_path):
    names = [f"{name}.jpg" for name in names.split()]
    tar_of(tmp_path / "x.tar", dict.fromkeys(names, b"1"))
    assert keys(tmp_path / "x.tar") == [f"x/{name}" for name in names]


def test_an_ending_that_is_no_picture_s_can_be_asked_for(tmp_path):
    tar_of(tmp_path / "x.tar", {"1.img": b"1", "1.cls": b"2"})
    assert contents(tmp_path / "x.tar", column="img") == [b"1"]


def test_the_last_member_of_a_name_counts_as_when_unpacking(tmp_path, caplog):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in (("a.jpg", b"old"), ("b.jpg", b"b"), ("./a.jpg", b"new")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert contents(tmp_path / "x.tar") == [b"new", b"b"] and keys(tmp_path / "x.tar") == ["x/a.jpg", "x/b.jpg"]
    assert "1 member replaced by a later one of the same name" in caplog.text


def test_links_in_tars_are_what_they_link_to(tmp_path, caplog):
    content = b"picture" * 100
    links = [
        ("hard.jpg", tarfile.LNKTYPE, "./d/blob"),  # a target without an ending
        ("soft.jpg", tarfile.SYMTYPE, "d/late.jpg"),
        ("d/up.jpg", tarfile.SYMTYPE, "../hard.jpg"),
        ("gone.jpg", tarfile.LNKTYPE, "gone"),
        ("out.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        ("up.jpg", tarfile.SYMTYPE, "../../etc/passwd"),
        ("loop.jpg", tarfile.SYMTYPE, "loop.jpg"),
    ]
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("d/blob")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        member = tarfile.TarInfo("d/late.jpg")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"late"))
    assert keys(tmp_path / "x.tar") == ["x/hard.jpg", "x/soft.jpg", "x/d/up.jpg", "x/d/late.jpg"]
    assert contents(tmp_path / "x.tar") == [content, b"late", content, b"late"]
    for name in ("gone", "out", "up", "loop"):
        assert f"1 link to nothing in the tar, '{name}.jpg'" in caplog.text


def test_members_with_holes_are_left_out_and_counted(tmp_path, caplog):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (("a.jpg", {}), ("b.jpg", {"GNU.sparse.size": "9999", "GNU.sparse.map": "0,1"})):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 1, headers
            archive.addfile(member, io.BytesIO(b"1"))
    assert keys(tmp_path / "x.tar") == ["x/a.jpg"]
    assert left_out(caplog) == {"1 sparse file"}


def test_our_own_webdataset_export_is_labelled_again_without_its_masks(tmp_path):
    samples = {f"a_{i}{ending}": b"1" for i in range(2) for ending in ((".png", ".jpg")[i], ".mask.png", ".json")}
    tar_of(tmp_path / "shard-000000.tar", samples)
    assert keys(tmp_path / "shard-000000.tar") == ["shard-000000/a_0.png", "shard-000000/a_1.jpg"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_one_behind_the_other_are_read_to_the_end(format, tmp_path):
    for name in ("a", "b"):
        tar_of(
            tmp_path / f"{name}.part",
            {f"{name}{'x' * 120}.jpg": name.encode(), "both.jpg": name.encode()},
            format=format,
        )
    content = (tmp_path / "a.part").read_bytes() + (tmp_path / "b.part").read_bytes()
    (tmp_path / "x.tar").write_bytes(content)
    assert sorted(contents(tmp_path / "x.tar")) == [b"a", b"b", b"b"]
    (tmp_path / "x.tar").write_bytes(content + b"a signature, which is no tar")
    assert sorted(contents(tmp_path / "x.tar")) == [b"a", b"b", b"b"]
