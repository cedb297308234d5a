"""verify finds every kind of damage, names the file, and repair removes exactly that."""

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco
from support.attempts import Killed, attempt_all, finished, kill_at, manifest
from support.faulty import write_images

import raypipe
from raypipe import masks, schema
from raypipe.cli.verbs import main
from raypipe.maintenance.integrity import check_masks, run_lengths
from raypipe.maintenance.verify import Verify, verify
from raypipe.run import DamagedRun, Run, is_sealed, new_attempt, seal
from raypipe.storage import Locked, hold, parquet_bytes

MASKS = "masks/method=kmeans"


@pytest.fixture
def run(tmp_path) -> Run:
    """Twelve images in four parts; the last three failed."""
    run = Run(str(tmp_path / "run"), "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, manifest(9))
    attempt_all(run, manifest(12), error="decode: corrupt: x")
    return run


def check(run: Run, **options):
    return verify(Verify(run.folder.uri, **options))


def found(run: Run, **options) -> set[tuple[str, str]]:
    return {(problem.kind, problem.file) for problem in check(run, **options).problems}


def digests(run: Run) -> dict[str, str]:
    root = Path(run.folder.path())
    files = [path for place in (MASKS, "_commits") for path in (root / place).iterdir()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def change(run: Run, file: str, content) -> None:
    path = Path(run.folder.path(file))
    path.write_bytes(content(path.read_bytes()))


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def write_again(run: Run, name: str, rows: pa.Table, record: pa.Table | None = None) -> None:
    """Replace a part and its record, checksums included, as a wrong writer would."""
    attempt = new_attempt()
    with hold(run.folder, attempt):
        content = parquet_bytes(rows)
        run.write_record(attempt, name, run.write_part(name, content, rows if record is None else record))


def rows_of(run: Run, name: str) -> pa.Table:
    return pq.read_table(run.folder.path(MASKS, name), partitioning=None)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> tuple[Path, Path]:
    """480 small images and a finished run of them in 120 parts."""
    folder = tmp_path_factory.mktemp("verify")
    write_images(folder / "images", [0] * 480, size=(8, 8))
    options = {"foreground": "whole", "attempts": 1, "local": True, "batch_size": 1}
    raypipe.label("kmeans", folder / "images", folder / "run", **options)
    return folder / "images", folder / "run"


def test_a_hundred_planted_damages_are_found_and_mended_and_good_parts_stay_as_they_are(labelled):
    run = Run(str(labelled[1]), "kmeans")
    assert check(run, deep=True).exit_code == 0 and len(run.parts()) == 120
    before, rows = digests(run), raypipe.load(labelled[1]).sort_by("image_id")
    rng, names = random.Random(0), run.parts()
    rng.shuffle(names)
    for name in names[:50]:
        change(run, f"{MASKS}/{name}", lambda content: flipped(content, rng.randrange(len(content))))
    for name in names[50:100]:
        change(run, f"{MASKS}/{name}", lambda content: content[: rng.randrange(len(content))])
    damaged = {("altered", f"{MASKS}/{name}") for name in names[:50]}
    damaged |= {("torn", f"{MASKS}/{name}") for name in names[50:100]}
    assert found(run) == damaged
    repaired = check(run, repair=True)
    assert repaired.removed == 100 and repaired.exit_code == 1 and {p.kind for p in repaired.left} == {"unlabelled"}
    good = {file: digest for file, digest in before.items() if file.rpartition("/")[2] in names[100:]}
    assert digests(run) == good
    assert main([*repaired.commands[0].split()[1:]]) == 0  # the printed command
    after = digests(run)
    assert good.items() <= after.items() and check(run, deep=True).exit_code == 0
    fixed = ["attempt", "seconds"]
    again = raypipe.load(labelled[1]).sort_by("image_id")
    assert again.drop_columns(fixed).equals(rows.drop_columns(fixed))


def test_redo_labels_what_repair_removed_with_the_recorded_options(labelled):
    run = Run(str(labelled[1]), "kmeans")
    lost = rows_of(run, run.parts()[3])["image_id"].to_pylist()
    change(run, f"_commits/{run.parts()[3]}", lambda content: content[:-20])
    kept = digests(run)
    result = check(run, repair=True, redo=True)
    assert result.exit_code == 0 and result.removed == 1 and result.relabelled == 4
    said = result.text().splitlines()[-3:]
    assert said[0] == "repaired: 1 damaged part removed, the others are untouched"
    assert said[1:] == ["labelled again: 4 images", "clean now: every committed row is there, once and unchanged"]
    assert len([file for file in digests(run) if file not in kept]) == 2  # one part and its record
    newest = raypipe.load(labelled[1]).sort_by([("attempt", "descending")]).slice(0, 4)
    assert set(newest["image_id"].to_pylist()) == set(lost)


@pytest.mark.parametrize("place", ["part", "record"])
def test_a_flip_of_any_byte_is_found(run, place):
    name = run.parts()[0]
    file = f"{MASKS}/{name}" if place == "part" else f"_commits/{name}"
    content = Path(run.folder.path(file)).read_bytes()
    for i in range(0, len(content), 61):
        change(run, file, lambda _, i=i: flipped(content, i))
        assert {name in problem.file for problem in check(run).problems} == {True}
    change(run, file, lambda _: content)
    assert not check(run).problems


def test_a_sealed_file_is_read_as_before_and_every_flip_breaks_the_seal(run):
    content = parquet_bytes(pa.table({"a": list(range(50))}))
    closed = seal(content)
    assert pq.read_table(pa.BufferReader(closed)).equals(pq.read_table(pa.BufferReader(content)))
    assert is_sealed(closed) is True and is_sealed(content) is None
    assert not any(is_sealed(flipped(closed, i)) for i in range(len(closed)))


def test_files_without_their_other_half_are_named(run):
    parts = run.parts()
    run.folder.delete("_commits", parts[0])
    run.folder.delete(MASKS, parts[1])
    expected = {("orphan", f"{MASKS}/{parts[0]}"), ("missing", f"{MASKS}/{parts[1]}")}
    assert found(run) == expected
    assert check(run, repair=True).removed == 1
    assert found(run) == set() and run.parts() == parts[2:]


def test_a_label_run_stops_at_a_damaged_record_and_says_what_to_do(run):
    change(run, f"_commits/{run.parts()[0]}", lambda content: flipped(content, 60))
    with pytest.raises(DamagedRun, match="its commit record .*verify .* --repair"):
        run.commits()


def test_a_record_without_checksum_is_sealed_and_its_part_kept(run):
    name, before = run.parts()[0], digests(run)
    record = pq.read_table(run.folder.path("_commits", name))
    change(run, f"_commits/{name}", lambda _: parquet_bytes(record))
    assert found(run) == {("checksum", f"_commits/{name}")} and len(run.commits()) == 12
    assert check(run, repair=True).exit_code == 0
    assert digests(run) == before


def test_ids_that_are_lost_added_or_twice_in_a_part_are_found(run):
    for i, wrong in enumerate((lambda rows: rows.slice(1), lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]))):
        name = run.parts()[i]
        write_again(run, name, wrong(rows_of(run, name)), rows_of(run, name) if i == 0 else None)
    names = run.parts()
    # the first record counts another number of rows than the data file has, the second file holds an id twice
    assert found(run) == {("ids", f"{MASKS}/{names[0]}"), ("ids", f"{MASKS}/{names[1]}")}
    assert "1 recorded images are not in the file" in check(run).problems[0].text
    assert "1 image twice in the file" in check(run).problems[1].text


def test_other_columns_are_found(run):
    name = run.parts()[0]
    write_again(run, name, rows_of(run, name).drop_columns("note"))
    assert found(run) == {("schema", f"{MASKS}/{name}")}
    assert "note" in check(run).problems[0].text


def test_doubled_ids_are_settled_by_the_newest_good_row(run):
    attempt = new_attempt()
    with hold(run.folder, attempt):
        run.commit(attempt, 0, finished(manifest(4), attempt, "segment: crash: x"))
        run.commit(attempt, 1, finished(manifest(12).slice(9), attempt))
    names = run.parts()
    doubled = {("doubled", f"{MASKS}/{name}") for name in (names[3], names[4])}
    assert found(run) == {*doubled, ("errors", "errors.parquet")}
    assert check(run, repair=True).exit_code == 0 and not found(run)
    rows = pq.ParquetDataset(run.folder.path(MASKS), partitioning=None).read()
    assert sorted(rows["image_id"].to_pylist()) == manifest(12)["image_id"].to_pylist()
    assert set(rows["error"].to_pylist()) == {""}


def test_leftovers_of_ended_attempts_are_found_and_deleted(run):
    root = Path(run.folder.path())
    (root / "_runs/20200101T000000Z-dead").mkdir()
    (root / "_runs/20200101T000000Z-dead/pending-00000.parquet").touch()
    for place in ("_tmp.old", "_commits/_tmp.old", "_runs/torn.json"):
        (root / place).touch()
        os.utime(root / place, (0, 0))
    (root / "_commits/_tmp.young").touch()
    expected = {
        ("leftover", "_runs/20200101T000000Z-dead/"),
        ("leftover", "_tmp.old"),
        ("leftover", "_commits/_tmp.old"),
    }
    assert found(run) == expected | {("attempt", "_runs/torn.json")}
    assert check(run, repair=True).exit_code == 0 and not found(run)
    assert (root / "_commits/_tmp.young").exists()


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-9], lambda c: c.replace(b'"k": 2', b'"k": 3')])
def test_a_damaged_configuration_is_restored_from_the_parts(run, damage):
    before = Path(run.folder.path("run.json")).read_bytes()
    change(run, "run.json", damage)
    assert found(run) == {("configuration", "run.json")}
    assert check(run, repair=True).exit_code == 0
    assert Path(run.folder.path("run.json")).read_bytes() == before
    os.remove(run.folder.path("run.json"))
    assert found(run) == {("configuration", "run.json")}
    text = check(run, repair=True).text()
    assert "repaired: run.json written as the parts repeat it\nclean now: " in text and "0 damaged" not in text
    assert Path(run.folder.path("run.json")).read_bytes() == before
    assert check(run, repair=True).text().endswith("\nclean: every committed row is there, once and unchanged")


def test_foreign_files_and_folders_are_reported_and_stay(run):
    os.mkdir(run.folder.path("masks/method=other"))
    Path(run.folder.path(f"{MASKS}/mine.txt")).touch()
    Path(run.folder.path("_commits/mine.parquet")).touch()
    expected = {"masks/method=other/", f"{MASKS}/mine.txt", "_commits/mine.parquet"}
    assert found(run) == {("foreign", file) for file in expected}
    assert check(run, repair=True).exit_code == 1
    assert all(os.path.exists(run.folder.path(file)) for file in expected)


def test_a_finished_run_that_was_copied_without_its_records_keeps_its_parts(run):
    run.mark_complete({})
    for name in run.parts():
        run.folder.delete("_commits", name)
    assert {kind for kind, _ in found(run)} == {"orphan"}
    with pytest.raises(RuntimeError, match="_commits"):
        check(run, repair=True)
    assert len(run.folder.files(MASKS)) == 4


def test_a_part_that_vanished_with_its_record_shows_by_the_attempts_record(run):
    run.folder.write_json(record := attempt_record(run), "_runs", "20990101T000000000000Z-0000.json")
    assert not found(run)
    run.drop(run.parts()[0])
    result = check(run)
    assert [problem.kind for problem in result.problems] == ["unlabelled"] and result.exit_code == 1
    assert "3 images" in result.problems[0].text
    assert result.commands == [f"raypipe label kmeans --input {record['options']['input']} --output {run} --k 3"]


def attempt_record(run: Run) -> dict:
    """A finished attempt's record as `label` leaves it."""
    options = {"input": "/photos", "output": str(run), "column": None, "limit": 5, "retry_errors": True}
    return {"options": options, "settings": {"k": 3}, "images": 14, "pending": 2, "labelled": 12}


@pytest.mark.parametrize("step", range(12))
def test_a_kill_at_any_moment_of_a_repair_leaves_what_the_next_one_mends(run, monkeypatch, step):
    names = run.parts()
    change(run, f"{MASKS}/{names[0]}", lambda content: content[:100])
    change(run, f"_commits/{names[1]}", lambda content: flipped(content, 50))
    run.folder.delete("_commits", names[2])
    before = digests(run)
    with monkeypatch.context() as patch:
        kill_at(step, patch)
        try:
            check(run, repair=True)
        except Killed:
            pass
    os.path.exists(run.folder.path("_runs", "LOCK")) and os.remove(run.folder.path("_runs", "LOCK"))
    check(run, repair=True)
    assert not found(run)
    good = [f"{place}/{names[3]}" for place in (MASKS, "_commits")]
    assert digests(run) == {file: before[file] for file in good}


def test_a_job_at_work_is_not_taken_for_damage_and_not_repaired(run):
    with hold(run.folder, attempt := new_attempt()):
        run.write_pending(manifest(3), attempt)
        run.write_part(f"part-{attempt}-000000.parquet", b"not yet", finished(manifest(1), attempt))
        assert not found(run)
        with pytest.raises(Locked):
            check(run, repair=True)


def test_what_is_no_run_is_said_and_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a raypipe run"):
        verify(Verify(str(tmp_path), repair=True))
    assert not list(tmp_path.iterdir())
    assert main(["verify", str(tmp_path), "--redo"]) == 2


def test_the_command_line_prints_the_problems_and_ends_with_1(run, capsys):
    assert main(["verify", run.folder.uri]) == 0
    assert "clean" in capsys.readouterr().out
    change(run, f"{MASKS}/{run.parts()[0]}", lambda content: content[:10])
    assert main(["verify", run.folder.uri, "--json"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"torn          {MASKS}/{run.parts()[0]}")
    assert json.loads(lines[-1])["problems"][0]["kind"] == "torn"


def test_a_run_in_a_bucket(bucket):
    filesystem, uri = bucket
    run = Run(uri("run"), "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, manifest(6))
    assert not check(run, deep=True).problems
    with filesystem.open_output_stream(run.folder.path(MASKS, run.parts()[0])) as stream:
        stream.write(b"PAR1")
    assert found(run) == {("torn", f"{MASKS}/{run.parts()[0]}")}
    assert check(run, repair=True).removed == 1
    assert not found(run) and len(run.commits()) == 3


# Masks


def masks_row(found: np.ndarray) -> dict:
    return {
        "height": found.shape[1],
        "width": found.shape[2],
        "segments": masks.encode_segments(found),
        "foreground": masks.encode_rle(found[0]),
    }


def blobs(rng, shape: tuple[int, int, int]) -> np.ndarray:
    steps = rng.choice([1, 2, 40, 900], shape).cumsum(1) % 2000
    return steps > 1000


def test_run_lengths_agree_with_a_slow_count():
    rng = np.random.default_rng(0)
    shapes = [(1, 1, 1), (1, 1, 7), (3, 5, 1), (2, 40, 30), (1, 1200, 900)]
    for found in [blobs(rng, shape) for shape in shapes] + [np.zeros((1, 4, 4), bool), np.ones((1, 4, 4), bool)]:
        for mask in found:
            pixels = mask.ravel("F")
            starts = [0, *(np.flatnonzero(np.diff(pixels.astype(int))) + 1), len(pixels)]
            lengths = np.diff(starts).tolist()
            expected = [0, *lengths] if pixels[0] else lengths
            assert run_lengths(masks.encode_rle(mask)["counts"]).tolist() == expected


def test_good_masks_pass_and_each_wrong_field_is_named():
    row = masks_row(blobs(np.random.default_rng(1), (2, 30, 20)))
    check_masks(row)
    check_masks(masks_row(np.zeros((1, 3, 3), bool)))
    segment = row["segments"][0]
    other = coco.encode(np.asfortranarray(np.ones((30, 21), np.uint8)))["counts"].decode()
    for field, value, text in (
        ("area", segment["area"] + 1, "area"),
        ("bbox", [0.0, 0.0, 1.0, 1.0], "bbox"),
        ("size", [20, 30], "size"),
        ("counts", other, "pixels"),
        ("counts", segment["counts"][:-1], "run lengths"),
        ("counts", "\x01", "do not decode"),
        ("counts", "o", "do not decode"),  # says that more follows
        ("counts", "o" * 20 + "0", "do not decode"),
        ("counts", "é", "ascii"),
    ):
        with pytest.raises(ValueError, match=text):
            check_masks(row | {"segments": [segment | {field: value}]})
    with pytest.raises(ValueError, match="size"):
        check_masks(row | {"foreground": {"size": [1, 1], "counts": "01"}})


def test_wrong_masks_are_found_only_by_the_deep_check_and_removed(run):
    name, row = run.parts()[0], masks_row(blobs(np.random.default_rng(2), (1, 9, 9)))
    rows = rows_of(run, name).to_pylist()
    rows[1] |= row
    rows[1]["segments"][0]["area"] += 1
    write_again(run, name, pa.Table.from_pylist(rows, schema=schema.MASKS))
    assert not found(run)
    assert found(run, deep=True) == {("mask", f"{MASKS}/{name}")}
    assert "1 row; 1.png: area" in check(run, deep=True).problems[0].text
    check(run, deep=True, repair=True)
    assert not found(run, deep=True) and len(run.commits()) == 9


def test_what_repair_could_not_restore_stands_under_what_it_did(run):
    os.remove(run.folder.path("run.json"))
    os.truncate(run.folder.path(MASKS, run_parts(run)[0]), 50)
    text = check(run, repair=True).text().splitlines()
    done = text.index("repaired: 1 damaged part removed, the others are untouched")
    assert text[done + 1] == "repaired: run.json written as the parts repeat it"
    assert text[done + 2].startswith("still wrong: unlabelled") and "3 images of removed parts" in text[done + 2]


def run_parts(run: Run) -> list[str]:
    return sorted(run.folder.files("_commits"))


def test_a_photograph_that_was_labelled_at_two_places_is_found(tmp_path):
    def row(place: str, key: str, content: str) -> dict:
        made = {"image_id": place + key, "uri": f"/{place}/{key}", "key": key, "sha256": content, "segments": []}
        return made | {"attempt": "a", "error": "" if content else "fetch: missing: x"}

    run, attempt = Run(str(tmp_path / "run"), "kmeans"), new_attempt()
    run.freeze({"k": 2}, {"weights": {}})
    places = {"old": ("s1", "s2", ""), "new": ("s1", "other", "")}  # the second is another photograph of that name
    with hold(run.folder, attempt):
        for task, (place, contents) in enumerate(places.items()):
            rows = [row(place, f"{i}.jpg", content) for i, content in enumerate(contents)]
            run.commit(attempt, task, pa.Table.from_pylist(rows, schema=schema.MASKS))
        run.finish(attempt)
    result = check(run)
    assert found(run) == {("twice", f"{MASKS}/")} and result.exit_code == 1
    assert "1 photograph with several rows, from several places, such as 0.jpg" in result.text()
    assert "--repair" not in result.text() and check(run, repair=True).exit_code == 1
