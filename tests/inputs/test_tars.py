"""Members of tars: what is listed, under which keys, and the bytes that come back for it."""

import gzip
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
    assert left_out(caplog) == {"1 .json", "1 .cls", "1 hidden names"}


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
