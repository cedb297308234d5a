"""The job on a real Ray: rows, not calls. One local cluster for the module."""

import json
import os
import re
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.faulty import DIES, DIES_ONCE, GOOD, HANGS, NO_MEMORY, RAISES, Faulty, FaultyOnGpu, Soft, write_images
from support.islands import BROKEN, HUGE, Islands, picture, write
from support.written import rows_of

import raypipe
from raypipe import schema
from raypipe.cli.verbs import main
from raypipe.pipeline import dry_run
from raypipe.pipeline.graph import block_size
from raypipe.pipeline.job import Label, list_images, plan_work
from raypipe.pipeline.label import label
from raypipe.pipeline.options import build
from raypipe.refiners.guided import Guided
from raypipe.runtime import cores
from raypipe.storage import Folder, Locked, hold


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """One local Ray for all tests of the file."""
    import ray

    ray.init(
        address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    yield
    ray.shutdown()


def run_job(tmp_path: Path, name: str = "run", segmenter=None, refiner=None, **options):
    job = Label(input=str(tmp_path / "photos"), output=str(tmp_path / name), max_bad_fraction=1.0, **options)
    return label(job, segmenter or Faulty(), refiner)


def test_every_input_yields_one_row_and_a_broken_one_an_error_row(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 3)
    (tmp_path / "photos/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    summary = run_job(tmp_path)
    assert (summary.images, summary.labelled, summary.failed, summary.pending) == (4, 4, 1, 0)
    rows = rows_of(tmp_path / "run")
    assert [row["key"] for row in rows] == ["0000.png", "0001.png", "0002.png", "broken.png"]
    assert rows[3]["error"].startswith("decode: ") and rows[3]["segments"] == [] and len(rows[3]["sha256"]) == 64
    assert [(row["height"], row["width"]) for row in rows] == [(24, 32), (24, 33), (24, 34), (0, 0)]
    masks = raypipe.decode(rows[1])
    assert masks.shape == (1, 24, 33) and masks.sum() == rows[1]["segments"][0]["area"] > 0


def test_workers_batches_and_ray_itself_do_not_change_a_row(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 17 + [RAISES])
    (tmp_path / "photos/zz.png").write_bytes(b"")
    run_job(tmp_path, "alone", local=True)
    run_job(tmp_path, "one", actors=1, batch_size=5)
    run_job(tmp_path, "two", actors=2, batch_size=1)
    expected = rows_of(tmp_path / "alone")
    assert len(expected) == 19 and sum(row["error"] != "" for row in expected) == 2
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two") == expected


def test_the_three_stages_of_a_gpu_method_give_the_rows_of_the_loop(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 9 + [RAISES, DIES])
    (tmp_path / "photos/zz.png").write_bytes(b"")
    options = {"refine": "guided", "jitter": 2}
    run_job(tmp_path, "gpu", FaultyOnGpu(), Guided(), device="cuda", batch_size=4, **options)
    (tmp_path / "photos/0010.png").unlink()  # the loop has no second process that could die
    run_job(tmp_path, "loop", Faulty(), Guided(), local=True, **options)
    rows = rows_of(tmp_path / "gpu")
    assert rows.pop(10)["error"].startswith("segment: crash: ")
    assert rows == rows_of(tmp_path / "loop")
    assert all(0 < segment["stability"] < 1 for row in rows for segment in row["segments"])


def test_an_image_that_kills_its_process_becomes_one_error_row(tmp_path):
    write_images(tmp_path / "photos", [GOOD, GOOD, DIES] + [GOOD] * 9)
    summary = run_job(tmp_path, actors=1, batch_size=4)
    assert summary.errors == {"segment: crash": 1}
    rows = rows_of(tmp_path / "run")
    assert [row["key"] for row in rows if row["error"]] == ["0002.png"] and len(rows) == 12


def test_an_image_that_hangs_becomes_one_error_row_and_is_named_on_the_way(tmp_path, caplog):
    write_images(tmp_path / "photos", [GOOD, HANGS, GOOD])
    with caplog.at_level("INFO", "raypipe"):
        summary = run_job(tmp_path, actors=1, timeout=1.0)
    assert "0001.png: took longer than 1 s and is tried again; see --timeout" in caplog.text
    assert summary.errors == {"segment: timeout": 1}
    assert [row["error"] == "" for row in rows_of(tmp_path / "run")] == [True, False, True]


def test_a_worker_that_is_killed_once_costs_nothing(tmp_path):
    write_images(tmp_path / "photos", [GOOD, GOOD, DIES_ONCE, GOOD])
    summary = run_job(tmp_path, segmenter=Faulty(marks=str(tmp_path)), actors=1)
    assert (tmp_path / "died").exists()
    assert summary.failed == 0 and summary.labelled == 4


@dataclass
class Counted(Faulty):
    """Leaves a file per call in the folder `marks`, named by the call's number and its images."""

    def segment(self, images, foregrounds=None):
        Path(self.marks, f"{len(os.listdir(self.marks))}-{len(images)}").touch()
        yield from super().segment(images, foregrounds)


def test_a_batch_that_runs_out_of_memory_is_halved(tmp_path):
    write_images(tmp_path / "photos", [GOOD, NO_MEMORY, GOOD, GOOD])
    (tmp_path / "calls").mkdir()
    assert run_job(tmp_path, segmenter=Counted(marks=str(tmp_path / "calls")), local=True).failed == 0
    assert sorted(os.listdir(tmp_path / "calls")) == ["0-4", "1-2", "2-1", "3-1", "4-2"]


class Heavy:
    """What a failed call had computed."""

    alive = weakref.WeakSet()


@dataclass
class Hoarding(Faulty):
    """Runs out of memory with more than one image, and with anything of an earlier call still there."""

    def segment(self, images, foregrounds=None):
        assert not Heavy.alive
        computed = Heavy()
        Heavy.alive.add(computed)
        if len(images) > 1:
            raise MemoryError("too many images at once")
        yield from super().segment(images, foregrounds)


def test_what_a_failed_batch_had_computed_is_gone_before_its_halves_are_tried(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 5)
    assert run_job(tmp_path, segmenter=Hoarding(), local=True).failed == 0


def test_all_images_of_the_first_block_may_be_bad(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(8):
        (tmp_path / f"photos/{i}.png").write_bytes(b"")
    write_images(tmp_path / "photos/z", [GOOD] * 4)
    assert run_job(tmp_path, actors=1, batch_size=2).failed == 8
    assert sum(row["error"] == "" for row in rows_of(tmp_path / "run")) == 4


def test_a_few_images_still_make_several_blocks(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 12)
    run_job(tmp_path, actors=2)
    assert len(list((tmp_path / "run/masks/method=faulty").glob("*.parquet"))) >= 4


def test_a_grown_input_labels_only_the_new_images(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 3)
    run_job(tmp_path)
    before = rows_of(tmp_path / "run")
    write_images(tmp_path / "photos/more", [GOOD] * 2, seed=1)
    summary = run_job(tmp_path)
    assert (summary.images, summary.labelled) == (5, 2)
    assert rows_of(tmp_path / "run")[:3] == before


def test_a_finished_run_calls_nothing(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 3)
    run_job(tmp_path)
    write_images(tmp_path / "photos", [RAISES] * 3)  # a call would leave errors
    summary = run_job(tmp_path)
    assert (summary.labelled, summary.failed, summary.pending) == (0, 0, 0)


def test_a_finished_run_is_known_without_importing_ray(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 2)
    job = ["label", "kmeans", "--input", f"{tmp_path}/photos", "--output", f"{tmp_path}/run", "--foreground", "whole"]
    code = f"import sys; from raypipe.cli import main; code = main({job!r}); print(code, 'ray' in sys.modules)"
    assert main([*job, "--local"]) == 0
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "nothing to do" in done.stdout and done.stdout.endswith("\n0 False\n"), done.stdout + done.stderr


def test_a_limit_labels_some_now_and_the_rest_later(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 5)
    assert run_job(tmp_path, limit=2, local=True).pending == 3
    assert run_job(tmp_path, local=True).labelled == 3


def test_errors_are_tried_again_on_request_and_each_id_stands_once(tmp_path):
    write_images(tmp_path / "photos", [GOOD, RAISES, GOOD])
    assert run_job(tmp_path, local=True).failed == 1
    write_images(tmp_path / "photos", [GOOD, GOOD, GOOD])
    assert run_job(tmp_path, local=True).labelled == 0
    assert run_job(tmp_path, local=True, retry_errors=True).labelled == 1
    files = list((tmp_path / "run/masks").rglob("*.parquet"))
    keys = [key for file in files for key in pq.read_table(file, partitioning=None)["key"].to_pylist()]
    assert sorted(keys) == ["0000.png", "0001.png", "0002.png"]


def test_a_soft_mask_is_refined_first_and_thresholded_last(tmp_path):
    write_images(tmp_path / "photos", [GOOD])
    run_job(tmp_path, "half", Soft(), local=True, keep_soft=True)
    run_job(tmp_path, "high", Soft(threshold=0.8), local=True)
    half, high = rows_of(tmp_path / "half")[0], rows_of(tmp_path / "high")[0]
    from raypipe.masks import decode_soft

    soft = decode_soft(half["segments"][0]["soft"])
    np.testing.assert_array_equal(raypipe.decode(half)[0], soft > 0.5)
    assert high["segments"][0]["area"] < half["segments"][0]["area"] and high["segments"][0]["soft"] is None


@pytest.mark.parametrize(
    ("batch_size", "timeout", "on_gpu", "expected"),
    [
        (None, 60.0, False, 64),  # four batches of 16
        (None, 1800.0, False, 2),  # an image may take half an hour
        (None, 1e6, False, 1),
        (3, 1e6, False, 3),  # as the user wants it
        (None, 1e6, True, 64),
        (200, 60.0, False, 200),
    ],
)
def test_slow_images_are_committed_in_small_blocks_on_a_cpu(batch_size, timeout, on_gpu, expected):
    job = Label("photos", "run", batch_size=batch_size, timeout=timeout)
    assert block_size(job, plan_work(job, Faulty(), None), on_gpu=on_gpu) == expected


def test_more_actors_than_processors_are_refused(tmp_path):
    write_images(tmp_path / "photos", [GOOD])
    with pytest.raises(ValueError, match="--actors 4 leaves no CPU"):
        run_job(tmp_path, actors=4)


def test_a_method_that_cannot_load_ends_the_job_before_it_starts(tmp_path):
    write_images(tmp_path / "photos", [GOOD])
    job = {"input": str(tmp_path / "photos"), "output": str(tmp_path / "run"), "device": "cpu"}
    (tmp_path / "net.onnx").write_bytes(b"not a network")
    with pytest.raises(ValueError, match="net.onnx"):
        raypipe.label("kmeans", **job, foreground=f"rembg:{tmp_path / 'net.onnx'}")
    assert not (tmp_path / "run/run.json").exists()


def test_a_run_in_progress_is_refused_to_others(tmp_path):
    write_images(tmp_path / "photos", [GOOD])
    with hold(Folder(str(tmp_path / "run")), "someone"), pytest.raises(Locked, match="attempt someone"):
        run_job(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_soft": True}, "--keep-soft has no effect"),
        ({"actors": 0}, "--actors must be positive"),
        ({"local": True, "actors": 2}, "--actors has no effect with --local"),
        ({"device": "cuda"}, "--device cuda has no effect"),
        ({"max_bad_fraction": 2.0}, "--max-bad-fraction must be in 0..1"),
    ],
)
def test_options_without_sense_are_refused(tmp_path, options, message):
    write_images(tmp_path / "photos", [GOOD])
    with pytest.raises(ValueError, match=message):
        label(Label(str(tmp_path / "photos"), str(tmp_path / "run"), **options), Faulty())


def test_an_output_inside_the_input_is_refused(tmp_path):
    write_images(tmp_path / "photos", [GOOD])
    with pytest.raises(ValueError, match="inside the input"):
        label(Label(str(tmp_path / "photos"), str(tmp_path / "photos/run")), Faulty())


def test_given_foregrounds_are_matched_checked_and_stored(tmp_path):
    from PIL import Image

    write_images(tmp_path / "photos", [GOOD] * 4)
    masks = tmp_path / "masks"
    (masks / "deep").mkdir(parents=True)
    half = np.zeros((24, 32), np.uint8)
    half[:, :16] = 128
    Image.fromarray(half).save(masks / "0000.png")  # by path
    Image.fromarray(np.full((24, 33), 255, np.uint8)).save(masks / "deep/0001.png")  # by stem
    Image.fromarray(half).save(masks / "0002.png")  # of another size
    raypipe.label("watershed", tmp_path / "photos", tmp_path / "run", foreground=f"given:{masks}", max_bad_fraction=1.0)
    rows = rows_of(tmp_path / "run")
    np.testing.assert_array_equal(raypipe.masks.decode_rle(rows[0]["foreground"]), half >= 128)
    assert not raypipe.decode(rows[0])[:, :, 16:].any()
    assert rows[1]["error"] == "" and "wrong_size" in rows[2]["error"] and "missing" in rows[3]["error"]


def test_another_runs_first_mask_serves_as_foreground(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 3)
    run_job(tmp_path, "first", local=True)
    raypipe.label(
        "kmeans", tmp_path / "photos", tmp_path / "second", foreground=f"run:{tmp_path / 'first'}", local=True
    )
    for first, second in zip(rows_of(tmp_path / "first"), rows_of(tmp_path / "second"), strict=True):
        assert second["foreground"]["counts"] == first["segments"][0]["counts"]


def test_plain_readers_see_the_rows(tmp_path):
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    write_images(tmp_path / "photos", [GOOD] * 3)
    run_job(tmp_path, local=True)
    pattern = f"{tmp_path}/run/masks/**/*.parquet"
    query = f"select method, count(*), sum(segments[1].area) from '{pattern}' where error = '' group by method"
    method, count, area = duckdb.sql(query).fetchall()[0]
    assert (method, count) == ("faulty", 3) and area > 0
    assert len(pandas.read_parquet(tmp_path / "run/masks")) == 3


def test_the_stored_types_are_the_documented_ones(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 3)
    run_job(tmp_path)
    for file in (tmp_path / "run/masks").rglob("*.parquet"):
        assert pq.read_schema(file).equals(schema.MASKS)


def test_tiles_give_the_rows_of_the_loop_and_each_has_the_time_of_an_image(tmp_path):
    images = [picture(seed)[:size] for seed, size in ((0, 60), (1, 30), (2, 20), (3, 30))]
    images[1][0, 0], images[3][0, 0] = BROKEN, HUGE
    write(tmp_path / "photos", images)
    run_job(tmp_path, "loop", Islands(), tiles="32:12", local=True)
    slow = Islands(sleep=0.15)  # the first has nine tiles, and takes longer than an image may
    run_job(tmp_path, "ray", slow, tiles="32:12", timeout=1.0, batch_size=1, actors=2)
    rows = rows_of(tmp_path / "loop")
    assert rows == rows_of(tmp_path / "ray") and [row["error"] for row in rows] == [""] * 4
    assert [row["note"] for row in rows] == ["", "tile_failed:0/0", "", ""]


def test_a_picture_sheet_is_written_on_request(tmp_path):
    from PIL import Image

    write_images(tmp_path / "photos", [GOOD] * 5, size=(120, 160))
    summary = run_job(tmp_path, local=True, sheet=True)
    sheet = np.asarray(Image.open(summary.sheet))
    assert sheet.shape[1] > 1000 and sheet.std() > 20


def test_a_dry_run_times_three_images_and_writes_nothing(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 5)
    job = {"input": str(tmp_path / "photos"), "output": str(tmp_path / "run")}
    estimate = raypipe.label("kmeans", **job, foreground="whole", dry_run=True)
    assert estimate["pending"] == 5 and estimate["timed"] == "3 images, 0 of them failed"
    assert estimate["price_per_hour"] == pytest.approx(cores.count() * 0.0408, rel=0.01)
    assert f"{cores.count()} cores" in estimate["price_source"] and "us-east-1" in estimate.text()
    assert "seconds_per_image" not in raypipe.label("kmeans", **job, foreground="whole", dry_run=True, timing=False)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_what_a_million_images_cost(tmp_path, capsys):
    write_images(tmp_path / "photos", [GOOD] * 3)
    words = ["label", "watershed", "--input", str(tmp_path / "photos"), "--output", str(tmp_path / "run")]
    words += ["--foreground", "whole", "--local", "--dry-run", "--price", "4.5"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    rate, hours, cost = (told[name] for name in ("images_per_second", "hours_per_million", "cost_per_million"))
    assert rate == pytest.approx(1 / told["seconds_per_image"], rel=0.05)  # of one process; rounded to 0.1 ms
    assert hours == pytest.approx(1e6 / rate / 3600, rel=0.01) and cost == pytest.approx(hours * 4.5, rel=0.01)
    assert told["price_per_hour"] == 4.5 and told["price_source"] == "--price"


def test_what_more_actors_cost_than_this_machine_holds_is_what_more_machines_cost(tmp_path):
    write_images(tmp_path / "photos", [GOOD])
    actors = 100 * cores.actors(cores.for_local_ray())  # as a cluster has them
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), actors=actors, price=4.5)
    work = plan_work(job, Faulty(), None)
    told = dry_run._expected(job, work, list_images(job, work), device="cpu", actors=actors)
    assert told["cost_per_million"] == pytest.approx(told["hours_per_million"] * 4.5 * 100, rel=0.02)


def test_a_dry_run_times_one_image_where_that_takes_long(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", [GOOD] * 3)
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True)
    work = plan_work(job, Faulty(), None)
    rows = list_images(job, work).read().to_pylist()
    assert dry_run._measured(work, "cpu", rows, True)["images"] == 3
    monkeypatch.setattr(dry_run, "PATIENCE", 0.0)  # as if one image took as long as that
    assert [dry_run._measured(work, "cpu", rows, alone)["images"] for alone in (True, False)] == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"price": 2.0}, "--price has no effect without --dry-run"),
        ({"price": 2.0, "dry_run": True, "timing": False}, "--price has no effect with --no-timing"),
        ({"price": 0.0, "dry_run": True}, "--price must be positive, got 0"),
    ],
)
def test_a_price_that_changes_nothing_is_refused(tmp_path, options, message):
    write_images(tmp_path / "photos", [GOOD])
    with pytest.raises(ValueError, match=message):
        run_job(tmp_path, **options)


def test_a_dry_run_names_the_foregrounds_weights_and_downloads_none(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", [GOOD])
    monkeypatch.setenv("U2NET_HOME", str(tmp_path / "weights"))
    estimate = raypipe.label("kmeans", str(tmp_path / "photos"), str(tmp_path / "run"), dry_run=True)
    assert estimate["needs"].startswith("for the foreground: u2net.onnx, 176 MB")
    assert estimate["foreground"] == "rembg"
    assert estimate["licence"].endswith("of the foreground: Apache-2.0 (u2net weights), MIT (rembg)")
    assert "a dry run downloads nothing: for the foreground: u2net.onnx, 176 MB" in estimate["timing"]
    assert "HF_HUB" not in estimate["timing"]
    assert "expected_time" not in estimate and not (tmp_path / "weights").exists()


def test_a_dry_run_that_takes_too_long_says_so(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", [GOOD])
    monkeypatch.setattr("raypipe.pipeline.dry_run.LOADING", 0.1)
    with pytest.raises(RuntimeError, match="timing 1 image took longer than 1 s; --no-timing"):
        run_job(tmp_path, segmenter=Faulty(sleep=30), dry_run=True, timeout=0.5)


def test_unknown_options_are_named_with_the_nearest_known_one(tmp_path):
    with pytest.raises(TypeError, match="unknown option 'atempts'.*'attempts'"):
        raypipe.label("kmeans", tmp_path, tmp_path / "run", atempts=3)
    with pytest.raises(ValueError, match="kmeans"):
        raypipe.label("kmean", tmp_path, tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "gpu"}, "option 'device': expected one of 'auto', 'cpu', 'cuda', got 'gpu'"),
        ({"k": "3"}, "option 'k': expected a whole number, got '3'"),
        ({"k": True}, "option 'k': expected a whole number, got True"),
        ({"k": None}, "option 'k': expected a whole number, got None"),
        ({"limit": "2"}, "option 'limit': expected a whole number or None, got '2'"),
        ({"eps": "1"}, "option 'eps': expected a number, got '1'"),
        ({"local": 1}, "option 'local': expected true or false, got 1"),
        ({"input": ["a", "b"]}, "option 'input': expected text, got ['a', 'b']; write the paths into a .txt file"),
        ({"refine": 3}, "unknown refiner 3; choose one of: bilateral, crf, guided"),
        ({"refine_preset": "reco"}, "has no effect without a refiner; set refine to 'bilateral' or 'crf'"),
        ({"refine_radius": 4}, "option 'refine_radius' (value 4) has no effect without a refiner; set refine to"),
    ],
)
def test_values_of_the_wrong_type_are_named(values, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        build("kmeans", {"input": "photos", "output": "run"} | values)


def test_values_are_taken_as_python_people_write_them():
    values = {"input": Path("photos"), "output": "run", "k": np.int64(3), "eps": 2, "limit": None}
    job, method, _ = build("kmeans", values | {"foreground": "whole"})
    assert (job.input, method.k, method.eps, job.limit) == ("photos", 3, 2.0, None)
    assert [type(value) for value in (job.input, method.k, method.eps)] == [str, int, float]


def test_blocks_of_every_kind_cross_between_stages():
    from raypipe.pipeline.workers import from_columns, to_columns
    from raypipe.types import Segments

    rng = np.random.default_rng(0)
    base = {"image_id": "i", "uri": "u", "key": "k", "sha256": "", "height": 4, "width": 5, "error": ""}
    image = rng.integers(0, 256, (4, 5, 3), np.uint8)
    found = [Segments(rng.random((2, 4, 5)) > 0.5, ["a", "b"]), Segments(rng.random((1, 4, 5), np.float32), (), [0.5])]
    rows = [
        base | {"image": image, "foreground": image[..., 0] > 99, "found": one, "note": "", "seconds": 1.0}
        for one in found
    ]
    failed = base | {"error": "decode: empty: nothing"}
    back = from_columns(pa.concat_tables([to_columns(row) for row in [*rows, failed]]))
    for row, one in zip(back, found, strict=False):
        np.testing.assert_array_equal(row["image"], image)
        np.testing.assert_array_equal(row["foreground"], image[..., 0] > 99)
        np.testing.assert_array_equal(row["found"].masks, one.masks)
        assert row["found"].masks.dtype == one.masks.dtype and list(row["found"].scores) == list(one.scores)
    assert back[2] == failed
