"""A damaged run says so, whoever reads it, and names the command that lists and mends it."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.faulty import write_images
from support.written import masks_row, random_masks, write_run

import raypipe
from raypipe.cli.verbs import main
from raypipe.run import DamagedRun, Run

MASKS = "masks/method=kmeans"
SIZE = 40, 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A finished run of six images in three parts, its photographs, and labels for them."""
    folder = tmp_path_factory.mktemp("damage")
    write_images(folder / "photos", [0] * 6, size=SIZE)
    (folder / "labels").mkdir()
    rng, photos = np.random.default_rng(0), sorted((folder / "photos").iterdir())
    table = []
    for i, photo in enumerate(photos):
        masks = random_masks(rng, (SIZE[0], SIZE[1] + i % 3), 2)
        table.append(masks_row(photo.name, masks, uri=str(photo)))
        Image.fromarray(masks[0]).save(folder / "labels" / photo.name)
    write_run(str(folder / "run"), table, per_part=2).mark_complete({"images": 6})
    write_run(str(folder / "other"), table, per_part=6)
    return folder


def a_part(run: Path, place: str = MASKS) -> Path:
    return sorted((run / place).iterdir())[1]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def in_the_masks(part: Path) -> int:
    """A place in the run lengths of a part's masks."""
    columns = pq.ParquetFile(part).metadata.row_group(0)
    every = (columns.column(i) for i in range(columns.num_columns))
    counts = next(column for column in every if column.path_in_schema == "segments.list.element.counts")
    return (counts.dictionary_page_offset or counts.data_page_offset) + counts.total_compressed_size // 2


DAMAGES = {
    "all masks are gone": lambda run: shutil.rmtree(run / "masks"),
    "a part is gone": lambda run: a_part(run).unlink(),
    "a part is cut": lambda run: os.truncate(a_part(run), 300),
    "a part is empty": lambda run: os.truncate(a_part(run), 0),
    "a byte of a part's masks is flipped": lambda run: flip(a_part(run), in_the_masks(a_part(run))),
    "a byte of a part's footer is flipped": lambda run: flip(a_part(run), -6),
    "a part is gone with its record": lambda run: (a_part(run).unlink(), a_part(run, "_commits").unlink()),
    "all records are gone": lambda run: shutil.rmtree(run / "_commits"),
    "a record is flipped": lambda run: flip(a_part(run, "_commits"), 60),
    "run.json is gone": lambda run: (run / "run.json").unlink(),
    "run.json is cut": lambda run: os.truncate(run / "run.json", 9),
}
READERS = {
    "report": "report {run}",
    "evaluate": "evaluate {run} --labels {folder}/labels",
    "export": "export {run} --format coco",
    "export of columns": "export {run} --format csv --output {run}-csv",
    "agree": "agree {folder}/other {run}",
    "compact": "compact {run}",
    "foreground": "label kmeans --input {folder}/photos --output {run}-again --foreground run:{run}",
}


@pytest.fixture(params=DAMAGES)
def damaged(request, sound, tmp_path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(sound / "run", run)
    DAMAGES[request.param](run)
    return run


def test_every_reader_ends_with_1_and_names_verify(damaged, sound, capsys, request):
    for reader, command in READERS.items():
        if reader == "foreground" and "masks is flipped" in request.node.name:
            continue  # the driver reads no masks: the worker's error row says it, as another test shows
        assert main(command.format(run=damaged, folder=sound).split()) == 1, reader
        error = capsys.readouterr().err
        assert f"raypipe verify {damaged}" in error and "damaged" in error and "Traceback" not in error, reader
    assert not (damaged / "report.html").exists()
    with pytest.raises(DamagedRun, match="raypipe verify"):
        raypipe.load(damaged)


def test_a_flip_in_the_masks_of_a_foreground_run_is_named_in_the_image_s_row(sound, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sound / "run", run)
    flip(a_part(run), in_the_masks(a_part(run)))
    options = {"foreground": f"run:{run}", "local": True, "max_bad_fraction": 1.0}
    assert raypipe.label("kmeans", sound / "photos", tmp_path / "again", **options).failed == 2
    failed = [error for error in raypipe.load(tmp_path / "again")["error"].to_pylist() if error]
    assert len(failed) == 2 and all(f"raypipe verify {run}" in error for error in failed)


def test_masks_that_were_stored_wrongly_are_no_wrong_usage(tmp_path, capsys):
    row = masks_row("a.png", random_masks(np.random.default_rng(0), (20, 30), 1))
    row["segments"][0]["counts"] = "0d01^"
    write_run(str(tmp_path / "run"), [row])
    write_images(tmp_path / "photos", [0], size=(20, 30))
    with pytest.raises(RuntimeError, match="raypipe verify RUN --deep"):
        raypipe.decode(raypipe.load(tmp_path / "run").to_pylist()[0])
    for verb in ("report", "export --format png"):
        name, *options = verb.split()
        assert main([name, str(tmp_path / "run"), *options]) == 1
        assert "raypipe verify RUN --deep finds where" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "run"), "--deep"]) == 1


def test_verify_names_every_damage(damaged, capsys):
    assert main(["verify", str(damaged)]) == 1
    assert "problems: " in capsys.readouterr().out


def test_a_sound_run_is_read_by_all(sound, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sound / "run", run)
    for reader in set(READERS) - {"foreground"}:
        assert main(READERS[reader].format(run=run, folder=sound).split()) == 0, reader


def test_a_report_without_photographs_says_how_to_find_them(tmp_path, capsys):
    masks = random_masks(np.random.default_rng(0), SIZE, 1)
    write_run(str(tmp_path / "run"), [masks_row("a/1.jpg", masks, uri=f"{tmp_path}/a.tar/1.jpg")])
    assert main(["report", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "1 image without photograph, the first: " in text and "does not exist; give the label job's --input" in text


def test_what_repair_leaves_of_a_run_can_be_read(sound, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(sound / "run", run)
    os.truncate(a_part(run), 300)
    assert main(["verify", str(run), "--repair"]) == 1
    assert main(["export", str(run), "--format", "csv"]) == 0
    assert "4 images" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["report", "verify", "compact", "export --format csv", "evaluate --labels ."])
def test_a_folder_that_does_not_exist_and_one_without_a_run_are_told_apart(tmp_path, capsys, verb):
    for place, text in ((tmp_path / "nope", "it does not exist, so"), (tmp_path, "no run.json in it, so")):
        name, *options = verb.split()
        assert main([name, str(place), *options]) == 2
        assert f"{place}: {text} it is not a raypipe run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_labelling_into_masks_without_run_json_is_refused(sound, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(sound / "run", run)
    (run / "run.json").unlink()
    command = f"label kmeans --input {sound}/photos --output {run} --foreground whole --local"
    assert main(command.split()) == 1
    assert f"has masks but no run.json; raypipe verify {run}" in capsys.readouterr().err
    assert len(Run(str(run), "kmeans").parts()) == 3
