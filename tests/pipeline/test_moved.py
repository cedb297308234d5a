"""Photo folders that were moved, renamed, copied or linked since: no photograph gets a second row without a word."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from support.faulty import GOOD, Faulty, write_images

import raypipe
from raypipe.pipeline import moved
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.run import Run
from raypipe.run.attempts import newest_by_input


def run_job(tmp_path: Path, source: str, old: str | None = None, **options):
    """Label what is at tmp_path/source into tmp_path/run."""
    places = {"input": str(tmp_path / source), "moved_from": old and str(tmp_path / old)}
    return label(Label(output=str(tmp_path / "run"), local=True, **places, **options), Faulty())


def keys(tmp_path: Path) -> list[str]:
    return sorted(raypipe.load(str(tmp_path / "run"))["key"].to_pylist())


def test_a_moved_folder_is_refused_with_the_option_that_goes_on(tmp_path):
    write_images(tmp_path / "old", [GOOD] * 3)
    run_job(tmp_path, "old")
    os.rename(tmp_path / "old", tmp_path / "new")
    for options in ({}, {"dry_run": True, "local": False, "timing": False}):
        with pytest.raises(ValueError) as error:
            label(Label(str(tmp_path / "new"), str(tmp_path / "run"), **{"local": True} | options), Faulty())
        text = str(error.value)
        assert (
            f"{tmp_path}/new holds images that {tmp_path}/run has already: 0000.png is {tmp_path}/old/0000.png" in text
        )
        assert "(3 of 3 images compared)" in text and f"add --moved-from {tmp_path}/old;" in text
    assert len(keys(tmp_path)) == 3


def test_where_a_folder_was_keeps_its_rows_now_and_in_every_later_start(tmp_path):
    write_images(tmp_path / "old", [GOOD] * 3)
    run_job(tmp_path, "old")
    before = raypipe.load(str(tmp_path / "run")).to_pylist()
    os.rename(tmp_path / "old", tmp_path / "new")
    assert run_job(tmp_path, "new", "old").labelled == 0
    write_images(tmp_path / "new/more", [GOOD] * 2, seed=1)
    assert run_job(tmp_path, "new", "old").labelled == 2
    assert run_job(tmp_path, "new", "old/").labelled == 0
    with pytest.raises(ValueError, match=f"add --moved-from {tmp_path}/old;"):
        run_job(tmp_path, "new")
    rows = {row["key"]: row for row in raypipe.load(str(tmp_path / "run")).to_pylist()}
    assert len(rows) == 5 and [rows[row["key"]] for row in before] == before
    assert rows["more/0000.png"]["uri"] == f"{tmp_path}/new/more/0000.png"


def test_a_folder_that_was_moved_twice_still_belongs_to_its_first_place(tmp_path):
    write_images(tmp_path / "first", [GOOD] * 2)
    run_job(tmp_path, "first")
    os.rename(tmp_path / "first", tmp_path / "second")
    write_images(tmp_path / "second/more", [GOOD] * 4, seed=1)
    assert run_job(tmp_path, "second", "first").labelled == 4
    shutil.rmtree(tmp_path / "run/_runs")  # what the images themselves tell
    os.rename(tmp_path / "second", tmp_path / "third")
    for old in (None, "second"):
        with pytest.raises(ValueError, match=f"add --moved-from {tmp_path}/first;"):
            run_job(tmp_path, "third", old)
    assert run_job(tmp_path, "third", "first").labelled == 0


@pytest.mark.parametrize("link", [True, False])
def test_a_link_to_the_folder_and_a_copy_of_it_are_the_same_photographs(tmp_path, link):
    write_images(tmp_path / "photos", [GOOD] * 2)
    run_job(tmp_path, "photos")
    (os.symlink if link else shutil.copytree)(tmp_path / "photos", tmp_path / "other")
    with pytest.raises(ValueError, match=f"reached another way, add --moved-from {tmp_path}/photos;"):
        run_job(tmp_path, "other")
    assert run_job(tmp_path, "other", "photos").labelled == 0 and run_job(tmp_path, "photos").labelled == 0


def write_list(folder: Path) -> None:
    (folder.parent / "list.txt").write_text("".join(f"{path}\n" for path in sorted(folder.glob("in/*.png"))))


def write_tar(folder: Path) -> None:
    with tarfile.open(folder / "all.tar", "w") as tar:
        tar.add(folder / "in", "in")
    shutil.rmtree(folder / "in")


@pytest.mark.parametrize(
    ("write", "source", "again", "old"),
    [
        (None, "old/*/*.png", "new/*/*.png", "old"),
        (None, "old", "new/in", "old/in"),  # a level further down
        (None, "old/in", "new", "old"),  # and up
        (None, "old/in/0000.png", "new/in/0000.png", "old/in/0000.png"),
        (write_list, "list.txt", "list.txt", "old/in"),
        (write_tar, "old", "new", "old"),
        (write_tar, "old/all.tar", "new/all.tar", "old/all.tar"),
    ],
)
def test_every_kind_of_input_may_have_moved(tmp_path, write, source, again, old):
    write_images(tmp_path / "old/in", [GOOD] * 2)
    if write:
        write(tmp_path / "old")
    rows = run_job(tmp_path, source).labelled
    os.rename(tmp_path / "old", tmp_path / "new")
    if write is write_list:
        write(tmp_path / "new")
    with pytest.raises(ValueError, match=f"add --moved-from {tmp_path}/{old};"):
        run_job(tmp_path, again)
    assert run_job(tmp_path, again, old).labelled == 0 and len(keys(tmp_path)) == rows


def test_a_folder_that_moved_into_a_larger_one_is_named_with_its_own_place(tmp_path):
    write_images(tmp_path / "old", [GOOD] * 2)
    run_job(tmp_path, "old")
    os.makedirs(tmp_path / "all")
    os.rename(tmp_path / "old", tmp_path / "all/in")
    with pytest.raises(ValueError, match=f"add --moved-from {tmp_path}/old and --input {tmp_path}/all/in;"):
        run_job(tmp_path, "all")


def test_two_collections_with_the_same_file_names_are_two_collections(tmp_path, caplog):
    write_images(tmp_path / "2024", [GOOD] * 3)
    write_images(tmp_path / "2025", [GOOD] * 4, seed=1)
    run_job(tmp_path, "2024")
    assert run_job(tmp_path, "2025").labelled == 4
    assert f"the same names with other contents, such as {tmp_path}/2024/0000.png: these are labelled" in caplog.text
    assert run_job(tmp_path, "2024").labelled == run_job(tmp_path, "2025").labelled == 0


def test_inputs_of_other_names_are_labelled_into_one_run_without_a_word(tmp_path, caplog):
    write_images(tmp_path / "2024/a", [GOOD] * 3)
    write_images(tmp_path / "2025/b", [GOOD] * 3, seed=1)
    for path in (tmp_path / "2025/b").iterdir():
        path.rename(path.with_name(f"b{path.name}"))
    run_job(tmp_path, "2024")
    run_job(tmp_path, "2025")
    assert len(keys(tmp_path)) == 6 and not [each for each in caplog.records if each.levelname == "WARNING"]


def test_a_few_photographs_that_are_in_both_collections_are_told(tmp_path, caplog):
    write_images(tmp_path / "2024", [GOOD] * 6)
    write_images(tmp_path / "2025", [GOOD] * 6, seed=1)
    shutil.copy(tmp_path / "2024/0003.png", tmp_path / "2025/0003.png")
    run_job(tmp_path, "2024")
    assert run_job(tmp_path, "2025").labelled == 6
    assert "1 of 6 images compared: in the run already under another name" in caplog.text
    assert f"0003.png is {tmp_path}/2024/0003.png there" in caplog.text


def test_one_more_photograph_that_the_other_collection_has_stops_nothing(tmp_path, caplog):
    write_images(tmp_path / "2024", [GOOD] * 6)
    write_images(tmp_path / "2025", [GOOD] * 3, seed=1)
    run_job(tmp_path, "2024")
    run_job(tmp_path, "2025")
    shutil.copy(tmp_path / "2024/0005.png", tmp_path / "2025/0005.png")
    assert run_job(tmp_path, "2025").labelled == 1
    assert "1 of 1 image compared: in the run already under another name, now with a second row" in caplog.text


def test_a_photograph_that_was_renamed_within_the_input_is_told(tmp_path, caplog):
    write_images(tmp_path / "photos", [GOOD] * 3)
    run_job(tmp_path, "photos")
    os.makedirs(tmp_path / "photos/tiger")
    os.rename(tmp_path / "photos/0001.png", tmp_path / "photos/tiger/0001.png")
    assert run_job(tmp_path, "photos").labelled == 1
    assert f"tiger/0001.png is {tmp_path}/photos/0001.png there" in caplog.text


def test_a_place_where_nothing_or_something_else_was_labelled_is_refused(tmp_path):
    write_images(tmp_path / "old", [GOOD] * 3)
    write_images(tmp_path / "new", [GOOD] * 3, seed=1)
    run_job(tmp_path, "old")
    with pytest.raises(ValueError, match=f"--moved-from {tmp_path}/nowhere: no image of {tmp_path}/new was labelled"):
        run_job(tmp_path, "new", "nowhere")
    with pytest.raises(
        ValueError, match="3 of 3 images compared are not those that were labelled there; leave the opt"
    ):
        run_job(tmp_path, "new", "old")
    assert len(keys(tmp_path)) == 3


def test_an_image_that_changed_on_the_way_keeps_its_row_and_is_told(tmp_path, caplog):
    write_images(tmp_path / "old", [GOOD] * 3)
    run_job(tmp_path, "old")
    os.rename(tmp_path / "old", tmp_path / "new")
    write_images(tmp_path / "new", [GOOD], seed=1)
    assert run_job(tmp_path, "new", "old").labelled == 0
    assert "1 of 3 images compared: changed since the run labelled them, and their rows stay" in caplog.text


def test_of_a_run_of_many_parts_some_are_looked_into(tmp_path, monkeypatch):
    monkeypatch.setattr(moved, "PARTS", 2)
    write_images(tmp_path / "old", [GOOD] * 7)
    run_job(tmp_path, "old", limit=2)
    run_job(tmp_path, "old", limit=2)
    run_job(tmp_path, "old")
    os.rename(tmp_path / "old", tmp_path / "new")
    with pytest.raises(ValueError, match="add --moved-from"):
        run_job(tmp_path, "new")


def test_what_labels_a_run_again_knows_that_its_input_was_moved(tmp_path):
    write_images(tmp_path / "old", [GOOD] * 2)
    run_job(tmp_path, "old")
    os.rename(tmp_path / "old", tmp_path / "new")
    write_images(tmp_path / "new/more", [GOOD], seed=1)
    run_job(tmp_path, "new", "old")
    (known,) = newest_by_input(Run(str(tmp_path / "run")))
    assert (known.values["input"], known.values["moved_from"]) == (f"{tmp_path}/new", f"{tmp_path}/old")


def test_a_record_holds_no_secret_of_the_old_place(tmp_path):
    write_images(tmp_path / "old", [GOOD] * 2)
    run_job(tmp_path, "old", limit=1)
    with pytest.raises(ValueError) as error:
        label(
            Label(str(tmp_path / "old"), str(tmp_path / "run"), local=True, moved_from="s3://key:hunter2@bucket/old"),
            Faulty(),
        )
    assert "hunter2" not in str(error.value) and "--moved-from s3://bucket/old" in str(error.value)
    assert all("hunter2" not in json.dumps(json.loads(path.read_text())) for path in tmp_path.glob("run/_runs/*.json"))
