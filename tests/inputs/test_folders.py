"""Which files a folder, a glob or braces stand for: odd names, machines' leftovers, links, other file systems."""

import os
import unicodedata
from collections import Counter

import pytest
from support.sources import contents, keys, left_out, listed, tar_of, write

from raypipe.inputs.folders import expand, walk
from raypipe.inputs.manifest import list_inputs


def test_walking_follows_links_once_and_ends_on_loops(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for path in (
        inside / "b" / "1.jpg",
        inside / "b.jpg",
        inside / "_ours" / "2.jpg",
        inside / ".h.jpg",
        outside / "3.jpg",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (inside / "b" / "up").symlink_to(inside)
    (outside / "back").symlink_to(inside)
    (outside / "self").symlink_to(outside)
    (inside / "linked").symlink_to(outside)
    (inside / "twice").symlink_to(outside)
    (inside / "file.jpg").symlink_to(outside / "3.jpg")
    (inside / "broken.jpg").symlink_to("nowhere")
    (inside / "itself.jpg").symlink_to("itself.jpg")
    os.mkfifo(inside / "fifo")
    skipped = Counter()
    assert list(walk(str(inside), skipped)) == ["_ours/2.jpg", "b.jpg", "b/1.jpg", "file.jpg", "linked/3.jpg"]
    links = {"link{s} to folders listed elsewhere": 4, "broken link{s} or special file{s}": 3}
    assert skipped == {"hidden name{s}": 1} | links


def test_walking_works_through_fsspec():
    import fsspec

    keys = ("b/c.jpg", "a b.jpg", "_d.jpg", ".hidden.jpg", "b/@eaDir/c.jpg/L.jpg", "b/@eaDir/c.jpg/M.jpg", "e.THM")
    runs = ("b/run/run.json", "b/run/_commits/1.parquet", "b/run/sheet.png")
    for key in keys + runs:
        fsspec.filesystem("memory").pipe(f"/walked/{key}", b"x")
    skipped = Counter()
    assert list(walk("memory://walked", skipped)) == ["_d.jpg", "a b.jpg", "b/c.jpg"]
    assert skipped == {
        "hidden name{s}": 1,
        "folder{s} @eaDir": 1,
        "thumbnail{s} of a camera": 1,
        "folder{s} of a run of raypipe": 1,
    }


def test_what_machines_put_beside_photographs_is_left_out_and_counted(tmp_path, caplog):
    photographs = ["IMG_1.jpg", "_MG_0001.JPG", "_DSC0002.JPG", "_selected/a.jpg", "Trash cans/b.jpg", "Thumbs.jpg"]
    folders = ["@eaDir/IMG_1.jpg/THUMB_L.jpg", "#recycle/a.jpg", "$RECYCLE.BIN/$R.jpg", "lost+found/a.jpg"]
    folders += ["sub/__MACOSX/a.jpg", "System Volume Information/a.jpg", ".@__thumb/a.jpg", ".Trash-1000/files/a.jpg"]
    leftovers = ["Icon\r", "Thumbs.db", "Desktop.ini", "IMG_1.jpg@SynoEAStream", "IMG_1.jpg:Zone.Identifier"]
    write(
        tmp_path,
        *photographs,
        *folders,
        *leftovers,
        "MVI_1.THM",
        "GOPR1.lrv",
        "._IMG_1.jpg",
        ".nomedia",
        ".b.jpg.icloud",
    )
    assert sorted(keys(tmp_path)) == sorted(photographs)
    machines = {f"1 folder {name}" for name in ("@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX")}
    assert left_out(caplog) == machines | {
        "1 folder System Volume Information",
        "2 hidden folders",
        "2 hidden names",
        "2 thumbnails of a camera",
        "1 file that iCloud has not downloaded",
        "5 leftovers of a system",
    }


def test_a_pattern_that_spells_a_machine_folder_asks_for_it(tmp_path):
    write(tmp_path, "a/@eaDir/1.jpg", "b/@eaDir/2.jpg", "b/3.jpg")
    assert keys(tmp_path / "*" / "@eaDir" / "*.jpg") == ["a/@eaDir/1.jpg", "b/@eaDir/2.jpg"]
    assert keys(tmp_path / "**" / "*.jpg") == ["b/3.jpg"]


def test_nothing_but_machine_files_is_no_images_and_says_why(tmp_path):
    write(tmp_path, "@eaDir/1.jpg", "a.THM", ".a.jpg", "x.tar.gz", "y.tgz")
    with pytest.raises(ValueError, match=r"2 compressed tars \(unpack to .tar first\), 1 ") as caught:
        list_inputs(str(tmp_path))
    for reason in ("1 folder @eaDir", "1 thumbnail of a camera", "1 hidden name"):
        assert reason in str(caught.value)


def test_runs_inside_the_input_are_recognised_and_left_out(tmp_path, caplog):
    write(tmp_path, "1.jpg", "runs/x/run.json", "runs/x/_commits/1.parquet", "runs/x/sheet.png", "runs/x/export/1.png")
    write(tmp_path, "not/run.json", "not/2.jpg", "_runs/3.jpg")
    assert keys(tmp_path) == ["1.jpg", "_runs/3.jpg", "not/2.jpg"]
    assert left_out(caplog) == {"1 folder of a run of raypipe", "1 .json"}
    assert keys(tmp_path / "runs" / "x") == ["export/1.png", "sheet.png"]


def test_odd_names_in_a_folder_keep_their_keys_and_contents(tmp_path):
    names = [
        "a#b.jpg",
        "a?b.jpg",
        "50%25.jpg",
        " a b .jpg",
        "new\nline.jpg",
        "a.jpg.jpg",
        "a.tar.jpg",
        "{a,b}.jpg",
        "Å.JPG",
    ]
    names += [unicodedata.normalize("NFD", "Süd/Ä.jpg"), "UPPER.TIFF", "[1]*.png", "~tilde.jpg", "a;b.jpg", "C:\\a.jpg"]
    write(tmp_path, *names)
    assert sorted(keys(tmp_path)) == sorted(names)
    assert sorted(contents(tmp_path)) == sorted(name.encode() for name in names)
    for name in names:
        assert contents(tmp_path / name) == [name.encode()]


def test_hard_links_are_files_of_their_own(tmp_path):
    write(tmp_path, "a.jpg")
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert contents(tmp_path) == [b"a.jpg", b"a.jpg"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, caplog, monkeypatch):
    write(tmp_path, "1.jpg")
    monkeypatch.chdir(tmp_path)
    for _ in range(20):  # deeper than a path may be long, which stops root too
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    assert keys(tmp_path) == ["1.jpg"]
    assert "1 unreadable folder 'ddd" in caplog.text


def test_names_match_in_any_unicode_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Süd Ä") for form in ("NFC", "NFD"))
    write(tmp_path, f"{decomposed}/Ö.jpg".replace("Ö", "O\u0308"))
    assert keys(tmp_path / composed) == keys(tmp_path / composed / "*") == ["O\u0308.jpg"]
    assert keys(tmp_path / "*" / "Ö.*") == [f"{decomposed}/O\u0308.jpg"]


def test_a_pattern_in_other_capitals_says_so(tmp_path, caplog):
    write(tmp_path, "a/1.JPG", "a/2.jpg", "a/3.JPG")
    assert keys(tmp_path / "**" / "*.jpg") == ["a/2.jpg"]
    assert left_out(caplog) == {"2 names in other capitals than the pattern"}
    with pytest.raises(ValueError, match="left out: 1 name in other capitals"):
        list_inputs(str(tmp_path / "a" / "2.JPG*"))


def test_a_folder_whose_name_looks_like_a_pattern_is_meant_as_it_is(tmp_path):
    write(tmp_path, "[2024] a/b.jpg", "[2024] a/c/d.jpg", "{x,y}/b.jpg", "2 a/b.jpg")
    assert keys(tmp_path / "[2024] a" / "*.jpg") == ["b.jpg"]
    assert keys(tmp_path / "[2024] a" / "**" / "*.jpg") == ["b.jpg", "c/d.jpg"]
    assert keys(tmp_path / "{x,y}" / "?.jpg") == ["b.jpg"]
    assert keys(tmp_path / "[1-3] a" / "*.jpg") == ["2 a/b.jpg"]


# Braces


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{8..10}", "8 9 10"),
        ("x-{000..002}.tar", "x-000.tar x-001.tar x-002.tar"),
        ("{08..10}", "08 09 10"),
        ("{2..0}", "2 1 0"),
        ("{00..10..5}-{4..1..2}", "00-4 00-2 05-4 05-2 10-4 10-2"),
        ("{a,b}{0..1}", "a0 a1 b0 b1"),
        ("{a,b{1,2}}", "a b1 b2"),
        ("{a,}.jpg", "a.jpg .jpg"),
        ("{a}{..}{}", "{a}{..}{}"),
    ],
)
def test_braces_stand_for_what_they_do_in_shells(pattern, expected):
    assert list(dict.fromkeys(expand(pattern))) == expected.split()


@pytest.mark.parametrize("pattern", ["s/train-{000000..000002}.tar", "s/train-00000{0,1,2}.tar", "s/{train-*,x-*}.tar"])
def test_shards_in_brace_notation_have_the_keys_that_a_glob_gives(pattern, tmp_path):
    os.mkdir(tmp_path / "s")
    for i in range(3):
        tar_of(tmp_path / "s" / f"train-{i:06d}.tar", {f"{i}.jpg": bytes([i])})
    rows = listed(tmp_path / pattern)
    assert rows == listed(tmp_path / "s" / "*.tar") and len(rows) == 3


def test_braces_stand_for_folders_and_globs_too(tmp_path):
    write(tmp_path, "2023/a.jpg", "2023/@eaDir/t.jpg", "2024/b.jpg", "2024/c.txt", "x/y/d.jpg", "x/y/e.png")
    assert keys(tmp_path / "{2023,x/y}") == ["2023/a.jpg", "x/y/d.jpg", "x/y/e.png"]
    assert keys(tmp_path / "{2023,x}" / "**" / "*.jpg") == ["2023/a.jpg", "x/y/d.jpg"]


def test_a_file_whose_name_has_braces_wins(tmp_path):
    write(tmp_path, "{a,b}.jpg", "a.jpg", "b.jpg", "{1..2}/c.jpg", "1/d.jpg")
    assert keys(tmp_path / "{a,b}.jpg") == ["{a,b}.jpg"]
    assert keys(tmp_path / "{1..2}") == ["c.jpg"]


def test_names_from_braces_that_are_missing_are_an_error(tmp_path):
    write(tmp_path, "1.tar")
    with pytest.raises(ValueError, match=r"2 of 3 names do not exist, such as '2.tar'"):
        list_inputs(str(tmp_path / "{1..3}.tar"))
    with pytest.raises(ValueError, match="at most"):
        list_inputs(str(tmp_path / "{1..999999999}.tar"))


def test_braces_in_web_addresses_stand_for_addresses_without_secrets_in_keys():
    rows = listed("https://u:p@host.org/set/{0..1}/{a,b}.jpg?token=1")
    assert [row["key"] for row in rows] == ["0/a.jpg", "0/b.jpg", "1/a.jpg", "1/b.jpg"]
    assert rows[0]["location"] == "https://u:p@host.org/set/0/a.jpg?token=1"


def test_braces_work_through_fsspec():
    import fsspec

    for i in range(2):
        fsspec.filesystem("memory").pipe(f"/braces/{i}.jpg", b"x")
    assert keys("memory://braces/{0..1}.jpg") == ["0.jpg", "1.jpg"]
