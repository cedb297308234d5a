"""compact: the same rows in few sorted files, whatever parts they came in and whenever it is killed."""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.attempts import Killed, attempt_all, kill_at, manifest
from support.faulty import write_images

import raypipe
from raypipe import masks, schema
from raypipe.cli.verbs import main
from raypipe.maintenance import compact as module
from raypipe.maintenance.compact import Compact, compact
from raypipe.maintenance.verify import Verify, verify
from raypipe.run import Run, new_attempt
from raypipe.run.rows import load
from raypipe.storage import Locked, hold

MASKS = "masks/method=kmeans"


def masked_rows(count: int, *, attempt: str = "x", seed: int = 0) -> pa.Table:
    """Rows with hashed ids, zero to two masks each, with and without foreground, soft mask and error."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        found = rng.random((i % 3, 12, 9 + i % 4)) > 0.5
        soft = found.astype(np.float32) if i % 5 == 0 and len(found) else None
        row = {"image_id": rng.bytes(16).hex(), "uri": f"/photos/{i}.png", "key": f"{i}.png", "sha256": f"{i:064x}"}
        row |= {"height": 12, "width": 9 + i % 4, "note": "", "seconds": i / 7, "attempt": attempt, "error": ""}
        row |= {"segments": masks.encode_segments(found, soft=soft), "foreground": None}
        if i % 2 and len(found):
            row["foreground"] = masks.encode_rle(found[0])
        if i % 11 == 10:
            row |= {"segments": [], "foreground": None, "error": "decode: corrupt: x"}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=schema.MASKS)


def make_run(folder: Path, rows: pa.Table, *, per_part: int) -> Run:
    """A finished run of these rows, in parts of `per_part`."""
    run, attempt = Run(str(folder), "kmeans"), new_attempt()
    run.freeze({"k": 2}, {"weights": {}})
    with hold(run.folder, attempt):
        for task, start in enumerate(range(0, len(rows), per_part)):
            run.commit(attempt, task, rows.slice(start, per_part))
        run.finish(attempt)
    return run


def contents(run: Run) -> list[bytes]:
    """The data files' bytes, by name."""
    return [Path(run.folder.path(MASKS, name)).read_bytes() for name in sorted(run.folder.files(MASKS))]


def plain(run: Run) -> pa.Table:
    """What a reader sees that knows nothing of commit records."""
    return pa.concat_tables(pq.read_table(pa.BufferReader(content)) for content in contents(run))


@pytest.fixture
def small(monkeypatch):
    """Limits so small that a few hundred rows take several chunks, ranges, row groups and files."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(module, "RANGE_BYTES", 9_000)
    monkeypatch.setattr(module, "GROUP_ROWS", 20)


def test_the_same_rows_are_there_sorted_in_fewer_parts(tmp_path):
    rows = masked_rows(90)
    run = make_run(tmp_path, rows, per_part=4)
    before = raypipe.load(tmp_path).sort_by("image_id")
    result = compact(Compact(str(tmp_path)))
    assert (result.rows, result.parts_before, result.parts_after) == (90, 23, 1)
    assert plain(run).equals(rows.sort_by("image_id"))
    assert raypipe.load(tmp_path).equals(before)
    assert plain(run).schema.metadata == pq.read_schema(run.folder.path(MASKS, run.parts()[0])).metadata
    assert b"raypipe.run" in plain(run).schema.metadata
    assert verify(Verify(str(tmp_path), deep=True)).exit_code == 0


@pytest.mark.parametrize("per_part", [3, 50, 400])
def test_the_files_do_not_depend_on_the_parts_the_rows_came_in(tmp_path, small, monkeypatch, per_part):
    rows = masked_rows(400)
    runs = [make_run(tmp_path / "a", rows, per_part=7)]
    runs.append(make_run(tmp_path / "b", rows.take(np.random.default_rng(3).permutation(400)), per_part=per_part))
    monkeypatch.setattr(module, "MEGABYTE", 20_000)
    for run, chunk in zip(runs, (20_000, 1_000_000), strict=True):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
        compact(Compact(run.folder.uri, megabytes=1))
    assert len(contents(runs[0])) > 3
    assert contents(runs[0]) == contents(runs[1])


def test_files_are_cut_the_same_way_whatever_the_attempts_are_called(tmp_path, small):
    names = ["part-x", "part-another-attempt-with-a-long-name"]
    runs = [make_run(tmp_path / name, masked_rows(300, attempt=name), per_part=9) for name in names]
    tables = [[table.drop_columns("attempt") for table in split(run, 12_000)] for run in runs]
    assert len(tables[0]) > 3
    assert len(tables[0]) == len(tables[1]) and all(a.equals(b) for a, b in zip(*tables, strict=True))


def split(run: Run, size: int) -> list[pa.Table]:
    """The rows of each file that `compact` would write."""
    rows = raypipe.load(run.folder.uri).drop_columns("method").sort_by("image_id")
    groups = (rows.slice(start, 20) for start in range(0, len(rows), 20))
    files = itertools.groupby(module._files(groups, size), key=lambda pair: pair[0])
    return [pa.concat_tables([group for _, group in pairs]) for _, pairs in files]


def test_files_have_about_the_asked_for_size(tmp_path, monkeypatch):
    run = make_run(tmp_path, pa.concat_tables([masked_rows(700, seed=seed) for seed in range(8)]), per_part=700)
    monkeypatch.setattr(module, "GROUP_ROWS", 200)
    monkeypatch.setattr(module, "MEGABYTE", 60_000)
    compact(Compact(str(tmp_path), megabytes=2))
    *full, last = map(len, contents(run))
    assert len(full) > 2 and all(100_000 < size < 150_000 for size in full) and last < 150_000


def test_many_chunks_and_ranges_merge_to_one_order(tmp_path, small):
    rows = masked_rows(500)
    run = make_run(tmp_path, rows, per_part=6)
    compact(Compact(str(tmp_path)))
    assert plain(run).equals(rows.sort_by("image_id"))
    groups = pq.ParquetFile(run.folder.path(MASKS, run.parts()[0])).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [20] * 25


def test_a_doubled_id_keeps_the_row_that_counts(tmp_path, small):
    images = manifest(9)
    run = Run(str(tmp_path), "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, images, error="fetch: network: gone")
    attempt, good = new_attempt(), masked_rows(5)
    good = good.set_column(0, "image_id", images["image_id"].slice(0, 5))
    with hold(run.folder, attempt):
        run.commit(attempt, 0, good)
    compact(Compact(str(tmp_path)))
    assert plain(run)["image_id"].to_pylist() == images["image_id"].to_pylist()
    assert plain(run)["error"].to_pylist() == [""] * 5 + ["fetch: network: gone"] * 4
    assert pq.read_table(run.folder.path("errors.parquet")).num_rows == 4


def test_a_compact_run_is_left_alone_until_it_grows_or_another_size_is_asked_for(tmp_path):
    run = make_run(tmp_path, masked_rows(30), per_part=4)
    compact(Compact(str(tmp_path)))
    names = run.parts()
    assert compact(Compact(str(tmp_path))).parts_after == 1 and run.parts() == names
    compact(Compact(str(tmp_path), megabytes=8))
    assert run.parts() != names
    attempt_all(run, manifest(3))
    compact(Compact(str(tmp_path), megabytes=8))
    assert len(run.parts()) == 1 and len(run.commits()) == 33


@pytest.mark.parametrize("step", range(13))
def test_a_kill_before_any_change_of_the_folder_loses_and_doubles_nothing(tmp_path, monkeypatch, step):
    rows = masked_rows(12)
    run = make_run(tmp_path, rows, per_part=4)
    before = raypipe.load(tmp_path).sort_by("image_id")
    with monkeypatch.context() as patch:
        patch.setattr(module, "GROUP_ROWS", 6)
        patch.setattr(module, "MEGABYTE", 1)  # two files
        kill_at(step, patch)
        try:
            compact(Compact(str(tmp_path)))
            assert step == 12
        except Killed:
            pass
    os.path.exists(run.folder.path("_runs", "LOCK")) and os.remove(run.folder.path("_runs", "LOCK"))
    assert raypipe.load(tmp_path).sort_by("image_id").equals(before)
    extra = manifest(1)
    if step % 2:
        attempt_all(Run(str(tmp_path), "kmeans"), extra)
    else:
        compact(Compact(str(tmp_path), megabytes=9))
    found = plain(run).sort_by("image_id")
    assert found.slice(step % 2).equals(rows.sort_by("image_id"))
    assert verify(Verify(str(tmp_path))).exit_code == 0


def test_a_damaged_part_is_not_sealed_into_a_good_one(tmp_path):
    run = make_run(tmp_path, masked_rows(12), per_part=4)
    name = run.parts()[1]
    content = Path(run.folder.path(MASKS, name)).read_bytes()
    Path(run.folder.path(MASKS, name)).write_bytes(content[:99] + bytes([content[99] ^ 4]) + content[100:])
    names = run.parts()
    with pytest.raises(RuntimeError, match=f"{re.escape(name)} is damaged .*verify .* --repair"):
        compact(Compact(str(tmp_path)))
    assert run.parts() == names


def test_labelling_goes_on_where_it_was_after_compaction(tmp_path):
    write_images(tmp_path / "images", [0] * 10, size=(8, 8))
    options = {"foreground": "whole", "attempts": 1, "local": True, "batch_size": 1}
    raypipe.label("kmeans", tmp_path / "images", tmp_path / "run", limit=7, **options)
    before = raypipe.load(tmp_path / "run")
    assert main(["compact", str(tmp_path / "run")]) == 0
    summary = raypipe.label("kmeans", tmp_path / "images", tmp_path / "run", **options)
    assert (summary.labelled, summary.pending) == (3, 0)
    after = raypipe.load(tmp_path / "run")
    assert len(after) == 10
    assert after.slice(0, 7).equals(before.sort_by("image_id"))


def test_a_job_at_work_and_wrong_options_are_refused(tmp_path):
    run = make_run(tmp_path / "run", masked_rows(3), per_part=2)
    with hold(run.folder, "job"), pytest.raises(Locked):
        compact(Compact(run.folder.uri))
    with pytest.raises(ValueError, match="positive"):
        compact(Compact(run.folder.uri, megabytes=0))
    with pytest.raises(FileNotFoundError, match="not a raypipe run"):
        compact(Compact(str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_a_run_in_a_bucket(bucket):
    _, uri = bucket
    run = Run(uri("run"), "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, manifest(7))
    assert compact(Compact(uri("run"))).parts_after == 1
    assert load(run)["image_id"].to_pylist() == manifest(7)["image_id"].to_pylist()
