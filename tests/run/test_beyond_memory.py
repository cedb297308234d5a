"""Plans that do not fit in memory: what is sorted and kept on the disk is what plain tables and sets hold."""

import posixpath
import resource
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from support.attempts import attempt_all, manifest
from support.faulty import GOOD, RAISES, Faulty, write_images
from support.memory import tiny

from raypipe import schema, storage
from raypipe.inputs.items import Item, hashed, manifest_of
from raypipe.maintenance.compact import _spill
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.run import Ids, Run
from raypipe.run.ids import digests
from raypipe.run.rows import load
from raypipe.storage import Location, SortedSet, Spool, portions


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    tiny(monkeypatch)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("kind", ["S16", "i8"])
def test_a_set_on_the_disk_holds_what_a_set_in_memory_holds(rng, kind):
    """Values of many files, some with zero bytes at their ends, which NumPy's texts leave out."""
    known = (
        np.array(range(-150, 150)) if kind == "i8" else np.array([bytes([i, 0, j]) for i in range(20) for j in (0, 7)])
    )
    for size in (1, 3, 40):
        segments, plain = SortedSet(kind), set()
        for _ in range(12):
            values = rng.choice(known, size).astype(kind)
            assert segments.contains(values).tolist() == [value in plain for value in values.tolist()]
            first = [
                value not in plain and values.tolist().index(value) == i for i, value in enumerate(values.tolist())
            ]
            assert segments.add(values).tolist() == first
            plain |= set(values.tolist())
            assert len(segments) == len(plain)
    assert any(isinstance(segment, np.memmap) for segment in segments._segments) and len(segments._segments) < 5
    assert not segments.contains(np.zeros(0, kind)).size and not segments.add(np.zeros(0, kind)).size


def test_a_spool_on_the_disk_does_what_a_table_does(rng, monkeypatch):
    monkeypatch.setattr("raypipe.storage.spool.MEMORY_BYTES", 150)  # the first rows stay in memory
    for _ in range(20):
        tables = [manifest(40).slice(int(rng.integers(30)), int(rng.integers(9))) for _ in range(6)]
        spool, table = Spool.of(schema.MANIFEST, tables), pa.concat_tables(tables)
        for _ in range(4):
            assert len(spool) == len(table) and spool.read().equals(table) and spool.to_pylist() == table.to_pylist()
            assert spool["key"].equals(table["key"]) and spool.column_names == table.column_names
            assert pa.Table.from_batches(spool.to_batches(), spool.schema).equals(table)
            chosen = rng.integers(len(table), size=5).tolist() if len(table) else []
            assert spool.take(chosen).equals(table.take(pa.array(chosen, pa.int64())))
            size = int(rng.integers(1, 9))
            assert [each.to_pylist() for each in portions(spool.to_batches(), size)] == [
                table.slice(start, size).to_pylist() for start in range(0, len(table), size)
            ]
            kept, start, length = pa.array(rng.random(len(table)) < 0.8, pa.bool_()), *rng.integers(4, 30, 2).tolist()
            spool, table = spool.filter(kept).slice(start - 4, length), table.filter(kept).slice(start - 4, length)
        assert spool.slice(1).read().equals(table.slice(1)) and spool.slice(0, None).read().equals(table)


def test_where_temporary_files_find_no_space_is_told(tmp_path):
    """A file may not grow beyond 90 bytes, as on a full disk: what NumPy's `tofile` cannot write it keeps to itself."""
    run, images = Run(str(tmp_path), "kmeans"), manifest(9)
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, images, per_part=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = "the folder of temporary files '.*': File too large; name one with more space in TMPDIR"
    chunk = load(run)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (90, hard))
        with pytest.raises(OSError, match=told):
            segments = SortedSet("i8")
            segments.add(np.arange(9))
            segments.add(np.arange(9, 18))
        with pytest.raises(OSError, match=told):
            Spool.of(schema.MANIFEST, [images])
        with pytest.raises(OSError, match=told):
            _spill(chunk, chunk["image_id"].combine_chunks()[:0], tmp_path / "0.arrow")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def plain_manifest(items: list[Item]) -> tuple[list[tuple], int]:
    """The rule in words: an image counts once, where it comes first; a key that is taken gets the id's beginning."""
    ids, keys, rows = set(), set(), []
    for item in items:
        image_id = hashed(storage.normalise(item.location) + item.part).hex()
        if image_id in ids:
            continue
        ids.add(image_id)
        key = item.key
        if "//" in key or "./" in key or key.startswith("/") or key.endswith("."):
            key = "/".join(part for part in key.split("/") if part not in ("", ".", "..")) or image_id
        if key in keys:
            stem, suffix = posixpath.splitext(key)
            key = f"{stem}-{image_id[:8]}{suffix}"
        keys.add(key)
        rows.append((image_id, item.location + item.part, key, item.location.uri, *item[3:8]))
    return rows, len(items) - len(rows)


def test_images_are_listed_once_with_keys_of_their_own_however_many_there_are(rng):
    twins = f"a-{hashed('/p/5.png').hex()[:8]}.png"  # what another image's key becomes when `a.png` is taken
    names = ["a.png", "b.png", "../a.png", "/", "c/./d.png", twins]
    for _ in range(30):
        items = [
            Item(Location(f"/p/{i}.png"), names[j], "#row=1" * int(k > 5), int(i), public=bool(j % 2))
            for i, j, k in zip(
                rng.integers(25, size=40), rng.integers(6, size=40), rng.integers(9, size=40), strict=True
            )
        ]
        rows, again = plain_manifest(items)
        found, dropped = manifest_of(iter(items))
        assert [tuple(row.values()) for row in found.to_pylist()] == rows and dropped == again


def test_a_plan_is_what_the_manifest_has_and_the_commits_have_not(rng, tmp_path):
    run, images = Run(str(tmp_path / "run"), "kmeans"), manifest(60)
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, images.take(rng.permutation(60)[:20]), error="fetch: network: gone")
    attempt_all(run, images.take(rng.permutation(60)[:20]), per_part=2)
    table = run.commits().read()
    for retry_errors in (False, True):
        done = table.filter(pc.equal(table["error"], "")) if retry_errors else table
        left = images.filter(pc.invert(pc.is_in(images["image_id"], value_set=done["image_id"].combine_chunks())))
        for limit in (None, 0, 5, 100):
            for given in (images, Spool.of(images.schema, [images])):
                found = run.plan(given, retry_errors=retry_errors, limit=limit)
                assert type(found) is type(given) and found.to_pylist() == left.slice(0, limit).to_pylist()
        filesystem, paths = run.write_pending(left, "attempt")
        assert [pq.read_table(path, filesystem=filesystem).num_rows for path in paths[:-1]] == [7] * (len(paths) - 1)
        assert pa.concat_tables(pq.read_table(path, filesystem=filesystem) for path in paths).equals(left)
    attempt_all(run, images, retry_errors=True, per_part=5)
    assert sorted(load(run)["image_id"].to_pylist()) == images["image_id"].to_pylist()
    assert len(run.plan(images, retry_errors=True)) == 0 and not run.errors().num_rows


def test_ids_that_are_no_digests_are_told_apart_all_the_same():
    texts = ["a", "", "A" * 32, "a" * 32, f"{'a' * 31} ", f"{'a' * 32}\n"]
    assert len(set(digests(pa.array(texts)).tolist())) == len(texts)
    alone = Ids([pa.record_batch({"image_id": pa.array(["a" * 32])})])
    assert alone.among(pa.table({"image_id": texts})).to_pylist() == [text == "a" * 32 for text in texts]


def test_a_job_that_plans_on_the_disk_labels_each_image_once(tmp_path):
    write_images(tmp_path / "photos", [GOOD, RAISES, *[GOOD] * 9])
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True, batch_size=2, max_bad_fraction=1.0)
    first = label(Label(**vars(job) | {"limit": 4}), Faulty())
    assert (first.labelled, first.pending, first.failed, list(first.failures)) == (4, 7, 1, ["0001.png"])
    estimate = label(Label(**vars(job) | {"dry_run": True, "timing": False}), Faulty())
    assert estimate["pending"] == 7 and estimate["planned_in"].endswith(" s")
    last = label(Label(**vars(job) | {"sheet": True}), Faulty())
    assert (last.labelled, last.pending, last.failed) == (7, 0, 1) and last.sheet
    assert label(Label(**vars(job) | {"retry_errors": True}), Faulty()).labelled == 1
    assert sorted(load(Run(job.output))["key"].to_pylist()) == [f"{i:04d}.png" for i in range(11)]


MEASURED = """
import resource, sys
import pyarrow as pa
from raypipe import schema
from raypipe.inputs import items
from raypipe.run import Run
from raypipe.storage import Location, hold, sorted as sets, spool

sets.MEMORY_BYTES, spool.MEMORY_BYTES, items.CHUNK_ROWS = 1 << 18, 1 << 20, 5_000
place = "s3://photographs/survey/station-%06d/image-%09d.jpg"

def planned(folder, count):
    run = Run(folder, "kmeans")
    found = (items.Item(Location(place % (i // 100, i)), f"{i}.jpg") for i in range(count))
    manifest, _ = items.manifest_of(found)
    for task, start in enumerate(range(0, count, 4_000)):
        ids = manifest.slice(start, 2_000)["image_id"]
        record = pa.table({"image_id": ids, "error": [""] * len(ids)}, schema=schema.COMMIT)
        name = f"part-20260101T000000000000Z-0000-{task:06d}.parquet"
        with hold(run.folder, "none"):
            run.write_record("none", name, run.write_part(name, b"masks", record))
    pending = run.plan(manifest)
    _, paths = run.write_pending(pending, "attempt")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return manifest, [len(pending), len(paths), peak]

few, many = planned(sys.argv[1], 100_000), planned(sys.argv[2], 300_000)
print(*few[1], *many[1], many[0].read().nbytes)
"""


def test_a_larger_plan_takes_less_memory_than_its_rows_alone_would(tmp_path):
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "few"), str(tmp_path / "many")]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    *counts, size = map(int, child.stdout.split())
    assert counts[:2] == [50_000, 3] and counts[3:5] == [150_000, 8]
    assert counts[5] - counts[2] < size  # measured: up to a half of it; with tables and Python's sets the double
