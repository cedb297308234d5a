"""Embeddings of segments: from a method through processes and refiners into a column, and back to who asks for it."""

import json

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.faulty import Soft, write_images
from support.naming import HUGE, MISSING, NOT_FINITE, Naming, NamingMap, embeddings_of
from support.written import as_version, rows_of

import raypipe
from raypipe import schema
from raypipe.export.export import Export, export
from raypipe.maintenance.compact import Compact, compact
from raypipe.maintenance.verify import Verify, verify
from raypipe.pipeline import stages
from raypipe.pipeline.job import Label, plan_work
from raypipe.pipeline.label import label
from raypipe.pipeline.workers import from_columns, to_columns
from raypipe.refiners.guided import Guided
from raypipe.run import NewerRun, OtherConfiguration, Run, rows
from raypipe.types import LabelMap

GOOD = 9


def job_in(folder, name="run", **options) -> Label:
    return Label(str(folder / "photos"), str(folder / name), local=True, max_bad_fraction=1.0, **options)


def expected(folder, key: str) -> np.ndarray:
    with Image.open(folder / "photos" / key) as image:
        return embeddings_of(np.asarray(image)).astype(np.float16)


def stored(run, **options) -> dict[str, list]:
    table = raypipe.load(str(run), embeddings=True, **options)
    return {row["key"]: [each["embedding"] for each in row["segments"]] for row in table.to_pylist()}


@pytest.mark.parametrize("method", [Naming(), NamingMap(threshold=0.6)])
@pytest.mark.parametrize("refiner", [None, Guided()])
def test_embeddings_come_through_processes_and_refiners_into_the_column(tmp_path, method, refiner):
    write_images(tmp_path / "photos", [GOOD])
    work = plan_work(Label("photos", "run", keep_embeddings=True), method, refiner)
    image = np.asarray(Image.open(tmp_path / "photos/0000.png"))
    row = {"image_id": "a", "error": "", "image": image, "note": "", "foreground": None}
    found = list(stages.Segment(work)([row]))
    crossed = from_columns(pa.concat_tables(map(to_columns, found)))
    (segments,) = stages.table(stages.encode(crossed, work), work)["segments"].to_pylist()
    kept = np.array([segment["embedding"] for segment in segments], np.float16)
    np.testing.assert_array_equal(kept, expected(tmp_path, "0000.png"))


def test_a_label_map_of_masks_and_what_no_pixel_is_left_to_keep_embeddings_beside_their_masks():
    image = np.random.default_rng(0).integers(4, 255, (8, 9, 3), np.uint8)
    found = next(NamingMap().segment([image]))
    np.testing.assert_array_equal(LabelMap.largest(found).embeddings, found.embeddings)
    found.index[:4] = 2  # nothing is left of the first
    row = {"image_id": "a", "error": "", "image": image, "note": "", "found": found}
    work = plan_work(Label("photos", "run", keep_embeddings=True), NamingMap(), None)
    ((segment,),) = (each["segments"] for each in stages.encode([row], work))
    np.testing.assert_array_equal(segment["embedding"], embeddings_of(image)[1].astype(np.float16))


def test_an_embedding_that_16_bits_do_not_hold_is_its_images_error_alone(tmp_path):
    write_images(tmp_path / "photos", [GOOD, NOT_FINITE, HUGE, MISSING, GOOD])
    label(job_in(tmp_path, keep_embeddings=True), Naming())
    errors = [row["error"] for row in rows_of(tmp_path / "run")]
    assert errors[0] == errors[4] == ""
    assert errors[1].startswith("segment: not_finite: ") and errors[2] == errors[1] and "65,504" in errors[1]
    assert errors[3] == "segment: invalid: embeddings are None for 2 segments"
    table = pq.read_table(tmp_path / "run/masks", partitioning=None)
    assert not any(np.isinf(each).any() for row in stored(tmp_path / "run").values() for each in row)
    assert table.schema.equals(schema.MASKS)


def test_embeddings_are_kept_where_asked_for_and_read_where_asked_for(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 3)
    with pytest.raises(ValueError, match="--keep-embeddings has no effect: faulty makes no embeddings"):
        label(job_in(tmp_path, keep_embeddings=True), Soft())
    label(job_in(tmp_path, "without"), Naming())
    label(job_in(tmp_path, keep_embeddings=True), Naming())
    with pytest.raises(OtherConfiguration, match="keep_embeddings: True there, False now"):
        label(job_in(tmp_path), Naming())
    assert set(map(str, stored(tmp_path / "without").values())) == {"[None, None]"}
    assert rows_of(tmp_path / "without") == rows_of(tmp_path / "run")  # load leaves them on the disk
    run, found = Run(str(tmp_path / "run")), stored(tmp_path / "run")
    for key, embeddings in found.items():
        np.testing.assert_array_equal(np.array(embeddings, np.float16), expected(tmp_path, key))
    assert "embedding" not in next(rows.batches(run)).to_pylist()[0]["segments"][0]
    assert "embedding" not in next(rows.select(run))["segments"][0]
    (batch,) = rows.batches(run, leaves=("embedding", "label"))
    assert [[each["embedding"] for each in row["segments"]] for row in batch.to_pylist()] == [*found.values()]
    with pytest.raises(ValueError, match="embeddings=True has no effect"):
        raypipe.load(str(run), ["key"], embeddings=True)
    parts = f"{run.folder.path()}/masks/**/*.parquet"
    query = f"SELECT segments[2].embedding FROM '{parts}' WHERE key = '0001.png'"
    ((other,),) = duckdb.sql(query).fetchall()
    np.testing.assert_array_equal(np.array(other, np.float16), expected(tmp_path, "0001.png")[1])


def test_a_run_of_the_first_version_is_read_by_all_goes_on_and_is_joined(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 4)
    label(job_in(tmp_path, limit=3), Naming())
    run = Run(str(tmp_path / "run"))
    before = rows_of(tmp_path / "run")
    as_version(run, 1)
    assert verify(Verify(str(run), deep=True)).exit_code == 0 and rows_of(tmp_path / "run") == before
    assert stored(run)["0000.png"] == [None, None]
    for leaves in (("embedding",), ("label", "embedding"), rows.SMALL):
        taken = rows.take(run, [before[1]["image_id"]], leaves=leaves)
        assert [each.get("embedding") for each in taken[0]["segments"]] == [None, None]
    assert label(job_in(tmp_path), Naming()).labelled == 1
    assert len(run.parts()) == 2 and json.loads(run.folder.read("run.json"))["schema"] == 1
    joined = rows_of(tmp_path / "run")
    assert joined[:3] == before and list(stored(run)) == [row["key"] for row in before] + ["0003.png"]
    assert len(list(rows.select(run, where="share > 0.1 and label = 'sky'"))) == 4
    query = f"SELECT sum(len(segments)), count(segments[1].label) FROM '{run.folder.path()}/masks/**/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(8, 4)]
    assert verify(Verify(str(run), deep=True)).exit_code == 0
    compact(Compact(str(run)))
    (part,) = run.parts()
    assert pq.read_schema(run.folder.path(run.data, part)).equals(schema.MASKS)
    assert rows_of(tmp_path / "run") == joined and verify(Verify(str(run), deep=True)).exit_code == 0


def test_a_failed_image_of_a_run_of_the_first_version_is_tried_again_beside_the_others(tmp_path):
    write_images(tmp_path / "photos", [GOOD, NOT_FINITE, GOOD])
    label(job_in(tmp_path), Naming())
    run = Run(str(tmp_path / "run"))
    before = rows_of(tmp_path / "run")
    as_version(run, 1)
    write_images(tmp_path / "photos", [GOOD] * 3)
    assert label(job_in(tmp_path, retry_errors=True), Naming()).failed == 0
    after = rows_of(tmp_path / "run")
    assert [row["error"] != "" for row in before] == [False, True, False] and after[::2] == before[::2]
    assert len(after[1]["segments"]) == 2 and verify(Verify(str(run), deep=True)).exit_code == 0
    plain = pq.read_table(tmp_path / "run/masks", partitioning=None)  # no row stands twice
    assert sorted(plain["key"].to_pylist()) == [row["key"] for row in before]


@pytest.mark.parametrize("where", ["run.json", "part"])
def test_columns_of_a_newer_version_are_refused_and_nothing_is_removed(tmp_path, where):
    write_images(tmp_path / "photos", [GOOD])
    label(job_in(tmp_path), Naming())
    run = Run(str(tmp_path / "run"))
    if where == "part":
        as_version(run, 1, stamp=schema.VERSION + 1)
    else:
        run.folder.write_json(json.loads(run.folder.read("run.json")) | {"schema": schema.VERSION + 1}, "run.json")
    for read in (
        lambda: raypipe.load(str(run)),
        lambda: verify(Verify(str(run), repair=True)),
        lambda: export(Export(str(run), "csv")),
    ):
        with pytest.raises(NewerRun, match=r"made by a newer raypipe \(schema 4, known is 3\); update it"):
            read()
    assert len(run.folder.files("masks/method=naming")) == 1
