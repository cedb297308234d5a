"""Sweeps on a real Ray: every row against `label` and `evaluate`, and what happens when something goes wrong."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from support.area import Area
from support.layouts import write_voc
from support.sweepable import PLACES, SIZE, Gamma, Staged, sweep_of, write_labelled

from raypipe import masks
from raypipe.cli.verbs import main
from raypipe.evaluation.tasks.pattern import Pattern
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.refiners.guided import Guided
from raypipe.run import OtherConfiguration, Run
from raypipe.run.rows import load
from raypipe.segmenters.grabcut import Grabcut
from raypipe.segmenters.kmeans import Kmeans
from raypipe.sweep.scoring import as_stored
from raypipe.sweep.sweep import sweep
from raypipe.sweep.trials import Sweep

TESTS = Path(__file__).parents[1]
SCRIPT = "support/sweepable.py"
MEANS = ("dice_fixed", "dice_best", "iou_fixed", "iou_best")


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """One local Ray for all tests of the file."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path):
    """A folder with six labelled photographs, and one without a label."""
    write_labelled(tmp_path, 6)
    Image.fromarray(np.full((9, 9, 3), 90, np.uint8)).save(tmp_path / "photos/alone.png")
    return tmp_path


def run(folder: Path, *over: str, segmenter=None, refiner=None, output: str = "sweep", **options):
    job = sweep_of(folder, *over, output=str(folder / output), refine="guided" if refiner else None, **options)
    return sweep(job, segmenter or Gamma(), refiner)


def table(folder: Path, name: str = "trials", output: str = "sweep") -> list[dict]:
    return pq.read_table(folder / output / f"{name}.parquet").to_pylist()


def evaluated(folder: Path, output: str, segmenter, refiner=None) -> dict[str, dict]:
    """What `label` and then `evaluate` give: the measures by key."""
    job = Label(str(folder / "photos"), str(folder / output), refine="guided" if refiner else None, local=True)
    label(job, segmenter, refiner)
    assert main(["evaluate", str(folder / output), "--labels", str(folder / "labels")]) == 0
    (file,) = (folder / output / "metrics/task=pattern").glob("*.parquet")
    return {row["key"]: row for row in pq.read_table(file).to_pylist() if row["status"] != "no_label"}


def assert_equal(folder: Path, setting: dict, segmenter, refiner=None) -> None:
    """The rows of a sweep's setting are those of `label` and `evaluate`."""
    expected = evaluated(folder, "run-" + "-".join(map(str, setting.values())), segmenter, refiner)
    is_it = lambda row: all(row[name] == value for name, value in setting.items())  # noqa: E731
    rows = {row["key"]: row for row in table(folder, "per_image") if is_it(row)}
    assert rows.keys() == expected.keys() and len(rows) == 6
    for key, row in rows.items():
        assert {name: row[name] for name in expected[key]} == expected[key]
    (trial,) = filter(is_it, table(folder))
    for mean in MEANS:
        assert trial[mean] == pytest.approx(np.mean([row[mean] for row in expected.values()]), abs=1e-12)
    assert (trial["status"], trial["images"], trial["failed_images"]) == ("done", 6, 0)


def test_soft_masks_swept_by_threshold_give_what_label_and_evaluate_give(folder):
    swept = run(folder, "threshold=0.3,0.45,None", "gamma=0.7,1,1.5")
    assert swept.exit_code == 0 and swept.settings == 9 and swept.trials["done"] == 3
    for threshold, gamma in ((0.3, 0.7), (0.45, 1.5), (None, 1.0)):
        assert_equal(
            folder, {"threshold": threshold, "gamma": gamma}, Gamma(threshold=threshold, gamma=gamma, is_dark=False)
        )


def test_refined_masks_give_what_label_and_evaluate_give(folder):
    run(folder, "threshold=0.4,0.5", "refine_radius=3,9", refiner=Guided(refine_working_size=None))
    for threshold, radius in ((0.4, 9), (0.5, 3)):
        refiner = Guided(refine_radius=radius, refine_working_size=None)
        assert_equal(folder, {"threshold": threshold, "refine_radius": radius}, Gamma(threshold=threshold), refiner)


def test_binary_masks_are_refined_afterwards_as_label_does_it(folder):
    method = Kmeans(foreground="grabcut")
    run(folder, "threshold=0.4,0.6", "k=2,3", segmenter=method, refiner=Guided())
    for threshold, k in ((0.6, 2), (0.4, 3)):
        method = Kmeans(foreground="grabcut", k=k, threshold=threshold)
        assert_equal(folder, {"threshold": threshold, "k": k}, method, Guided())
    assert len(load(Run(str(folder / "sweep/foreground")))) == 6  # computed once for both trials


def test_a_value_equal_to_the_threshold_stays_outside_as_in_label():
    values = np.array([0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1], np.float32)[None]
    stored = masks.decode_soft(masks.encode_soft(values))
    assert (stored > 0.5).sum() > (values > 0.5).sum()  # what would go wrong
    for threshold in (0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        np.testing.assert_array_equal(stored > as_stored(threshold), values > threshold)


def test_a_task_has_its_own_values_and_options(folder):
    job = sweep_of(folder, "threshold=0.3,0.5", "gamma=1,2", metric="excess")
    swept = sweep(job, Gamma(), None, Area(least=3))
    assert swept.exit_code == 0 and (swept.metric, swept.tie) == ("excess", {})
    rows = table(folder)
    assert swept.value == min(row["excess"] for row in rows) < 0 and {"iou", "right"} <= rows[0].keys()
    record = json.loads((folder / "sweep/sweep.json").read_text())
    assert record["common"]["task"] == "area" and record["fixed"]["least"] == 3
    assert "excess there" not in (folder / "sweep/sweep.html").read_text()
    with pytest.raises(OtherConfiguration, match="least: 3 there, 0 now"):
        sweep(job, Gamma(), None, Area())


def test_five_values_after_the_features_run_the_network_once_per_image(folder):
    counts = folder / "counts.txt"
    swept = run(folder, "tau=90,100,110,120,130", segmenter=Staged(counts=str(counts)))
    assert swept.trials == {"done": 5, "stopped": 0, "failed": 0, "running": 0} and swept.settings == 5
    count = Counter(counts.read_text().split())
    assert count.pop("load") == 2 and count.pop("gained") == 6  # the first load is a trial before the start
    assert sorted(count.values()) == [1] * 6
    for tau in (90, 130):
        assert_equal(folder, {"tau": tau}, Staged(counts=str(counts), tau=tau))


def test_a_process_that_dies_takes_no_trial_along_that_shares_its_features(folder, caplog):
    swept = run(folder, "tau=90,66,7,110", segmenter=Staged(counts=str(folder / "counts.txt")))
    assert (swept.trials["done"], swept.trials["failed"], swept.exit_code) == (3, 1, 0)
    assert "4 trials that share a network ended together; each is tried alone" in caplog.text
    rows = {row["tau"]: row for row in table(folder)}
    assert [(rows[tau]["images"], rows[tau]["failed_images"]) for tau in (90, 7, 110)] == [(6, 0), (0, 6), (6, 0)]
    assert rows[66]["status"] == "failed" and "its process died" in rows[66]["error"]


def test_trials_are_found_again_and_post_processing_values_only_scored(folder):
    run(folder, "threshold=0.3,0.5", "gamma=1,2")
    parts = {file: file.stat().st_mtime_ns for file in (folder / "sweep/trials").glob("*/masks/*/*")}
    again = run(folder, "threshold=0.3:0.7:0.1", "gamma=1,2")
    assert {file: file.stat().st_mtime_ns for file in (folder / "sweep/trials").glob("*/masks/*/*")} == parts
    assert again.settings == 10 and len(parts) > 1
    grown = run(folder, "gamma=3", "is_dark=true,false")
    assert grown.settings == 12 and grown.trials["done"] == 4  # the earlier ones are still in the table
    rows = table(folder)
    assert {type(row["is_dark"]) for row in rows} == {bool} and {row["gamma"] for row in rows} == {1.0, 2.0, 3.0}


def test_new_labelled_images_are_added_to_every_trial(folder):
    first = run(folder, "gamma=1,2")
    write_labelled(folder, 3, first=6)
    again = run(folder, "gamma=1,2")
    assert (first.images, again.images) == (6, 9)
    assert [row["images"] for row in table(folder)] == [9, 9]


def test_one_trial_runs_on_all_cores_and_is_a_run_like_any_other(folder, capsys):
    swept = run(folder, "threshold=0.1:0.9:0.05")
    assert swept.trials["done"] == 1 and len(swept.rows) == 15 and "\nand 2 more\nbest: " in swept.text()
    (place,) = (folder / "sweep/trials").iterdir()
    assert len(load(Run(str(place)))) == 6  # of the seven photographs those with a label
    assert main(["verify", str(place), "--deep"]) == 0
    assert main(["report", str(place)]) == 0
    (attempt,) = (json.loads(file.read_text()) for file in place.glob("_runs/2*.json"))
    assert attempt["ray"]["place"]["actors" if "actors" in attempt["ray"]["place"] else "max_actors"] >= 1
    assert (attempt["labelled"], attempt["pending"], attempt["exit_code"]) == (6, 0, 0)


def test_failed_trials_are_listed_and_stop_nothing(folder):
    swept = run(folder, "gamma=13,1,66")
    assert swept.exit_code == 0 and (swept.trials["done"], swept.trials["failed"]) == (1, 2)
    rows = {row["gamma"]: row for row in table(folder)}
    assert rows[13]["status"] == rows[66]["status"] == "failed" and rows[13]["dice_best"] is None
    assert "no luck with 13" in rows[13]["error"] and "its process died" in rows[66]["error"]
    assert "no luck with 13" in swept.text() and swept.best == {"gamma": 1.0}


def test_a_sweep_without_any_good_trial_ends_with_code_1(folder):
    swept = run(folder, "gamma=7")
    assert (swept.exit_code, swept.config, swept.best, swept.tie) == (1, None, {}, {})
    assert not (folder / "sweep/best.yaml").exists()


@pytest.mark.parametrize("over", ["gamma=13", "gamma=13,66"])
def test_a_method_that_cannot_load_is_an_error_and_leaves_the_output_free(folder, over):
    with pytest.raises(ValueError, match="sweepable: no luck with 13"):
        run(folder, over)
    with pytest.raises(ValueError, match="sweepable: no luck with 13"):  # nothing was kept as a failed trial
        run(folder, over)
    swept = run(folder, "is_dark=true", segmenter=Gamma(seed=5))
    assert swept.trials == {"done": 1, "stopped": 0, "failed": 0, "running": 0}
    failed = run(folder, over, segmenter=Gamma(seed=5))  # now that something was labelled, they are trials that failed
    assert failed.exit_code == 0 and failed.trials["failed"] == over.count(",") + 1


def test_the_mask_and_not_its_inverse_is_the_best(folder):
    swept = run(folder, "is_dark=true,false")
    values = {row["is_dark"]: row for row in swept.rows}
    assert values[True]["dice_best"] == values[False]["dice_best"] and swept.best == {"is_dark": False}
    assert values[False]["dice_fixed"] > 0.8 > 0.3 > values[True]["dice_fixed"]
    shown = f"dice_best {swept.value:.4f}, dice_fixed {values[False]['dice_fixed']:.4f}"
    assert f"best: is_dark False ({shown})" in swept.text()
    assert (folder / "sweep/best.yaml").read_text().startswith(f"# {shown}, mean over 6 labelled images\n")


def test_changed_labels_are_scored_again(folder):
    run(folder, "threshold=0.3,0.5", "gamma=1,2")
    before = table(folder)
    for i, file in enumerate(sorted((folder / "labels/wild").iterdir())):
        content = b"nothing" if i == 0 else file.read_bytes()
        file.write_bytes(content)
        if i > 2:
            Image.fromarray(np.roll(np.asarray(Image.open(file)), 20, 0)).save(file)
    run(folder, "threshold=0.5", "gamma=1")
    rows = {(row["gamma"], row["threshold"]): row for row in table(folder)}
    assert [rows[1, t]["status"] for t in (0.3, 0.5)] == ["done"] * 2  # values of earlier sweeps too
    assert [rows[2, t]["status"] for t in (0.3, 0.5)] == ["running"] * 2 and rows[2, 0.5]["images"] == 2
    assert rows[1, 0.5]["images"] == 5
    assert (
        rows[1, 0.5]["dice_fixed"] != next(r for r in before if (r["gamma"], r["threshold"]) == (1, 0.5))["dice_fixed"]
    )
    run(folder, "threshold=0.3,0.5", "gamma=1,2")
    again = table(folder)
    fresh = run(folder, "threshold=0.3,0.5", "gamma=1,2", output="fresh")
    names = ["gamma", "threshold", "status", "images", *MEANS]
    assert [[row[n] for n in names] for row in again] == [
        [row[n] for n in names] for row in table(folder, output="fresh")
    ]
    assert fresh.images == 6 and {row["images"] for row in again} == {5}


def test_a_label_that_could_not_be_used_is_tried_again(folder):
    file = folder / "labels/wild/cat_1.png"
    content = file.read_bytes()
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(file)
    run(folder, "threshold=0.3,0.5")
    assert [row["images"] for row in table(folder)] == [5, 5]
    file.write_bytes(content)
    run(folder, "threshold=0.3,0.5")
    assert [row["images"] for row in table(folder)] == [6, 6]


def test_broken_images_and_labels_are_counted_and_not_scored(folder):
    (folder / "photos/wild/cat_0.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (folder / "labels/wild/cat_1.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(folder / "labels/wild/cat_2.png")
    run(folder, "threshold=0.3,0.5")
    assert [(row["images"], row["failed_images"]) for row in table(folder)] == [(3, 1), (3, 1)]
    found = {row["key"]: row["status"] for row in table(folder, "per_image")}
    assert sorted(found.values()) == ["bad_label", "failed", "ok", "ok", "ok", "other_size"]


def test_asha_stops_the_worse_trials_and_a_grid_takes_them_up_again(folder):
    write_labelled(folder, 6, first=6)
    over = ["gamma=1,1.1,1.2,40,50,60"]
    swept = run(folder, *over, search="asha", trials=6, metric="dice_fixed", actors=1)
    assert swept.trials["stopped"] >= 1 and swept.trials["done"] >= 1
    rows = table(folder)
    stopped = [row for row in rows if row["status"] == "stopped"]
    assert all(row["images"] in (3, 6) and row["dice_fixed"] is not None for row in stopped)
    assert all(row["images"] == 12 for row in rows if row["status"] == "done") and swept.best["gamma"] < 2
    again = run(folder, *over, search="asha", trials=6, metric="dice_fixed", actors=1)
    assert again.trials == swept.trials and table(folder) == rows
    whole = run(folder, *over, metric="dice_fixed")
    assert whole.trials == {"done": 6, "stopped": 0, "failed": 0, "running": 0}
    assert {row["images"] for row in table(folder)} == {12}


def test_random_draws_are_repeatable(folder):
    run(folder, "gamma=0.5..2", "threshold=0.3,0.5", search="random", trials=3)
    first = table(folder)
    assert len(first) == 6 and len({row["gamma"] for row in first}) == 3
    run(folder, "gamma=0.5..2", "threshold=0.3,0.5", search="random", trials=3)
    assert table(folder) == first


def test_another_sweep_on_the_same_output_is_refused_with_the_difference(folder):
    run(folder, "threshold=0.3,0.5")
    with pytest.raises(OtherConfiguration, match="gamma: 1.0 there, 2.0 now"):
        run(folder, "threshold=0.3,0.5", segmenter=Gamma(gamma=2.0))
    with pytest.raises(OtherConfiguration, match="method: 'sweepable' there, 'kmeans' now"):
        run(folder, "k=2,3", segmenter=Kmeans(foreground="whole"))
    (folder / "others").mkdir()
    Image.fromarray(np.tri(*SIZE, dtype=np.uint8) * 255).save(folder / "others/cat_0.png")
    with pytest.raises(OtherConfiguration, match="labels: '.*labels' there, '.*others' now"):
        sweep(sweep_of(folder, "threshold=0.3", labels=str(folder / "others")), Gamma())


def command(folder: Path, *options: str, output: str = "sweep") -> int:
    places = ["--input", str(folder / "photos"), "--labels", str(folder / "labels"), "--output", str(folder / output)]
    return main(["sweep", "kmeans", *places, "--foreground", "whole", *options])


def test_the_best_setting_is_a_config_for_label(folder, capsys):
    assert command(folder, "--over", "k=2,3", "threshold=0.4,0.6", "--refine", "guided", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["exit_code"] == 0 and result["best"].keys() == {"k", "threshold"} and len(result["rows"]) == 4
    assert any(line.startswith("best: k ") for line in lines)
    best = folder / "sweep/best.yaml"
    assert best.read_text().startswith(f"# dice_best {result['value']:.4f}, dice_fixed ")
    values = yaml.safe_load(best.read_text())
    assert {name: values[name] for name in result["best"]} == result["best"] and values["refine"] == "guided"
    place = ["--input", str(folder / "photos"), "--output", str(folder / "run"), "--local"]
    assert main(["label", "kmeans", "--config", str(best), *place]) == 0
    assert main(["evaluate", str(folder / "run"), "--labels", str(folder / "labels"), "--json"]) == 0
    means = json.loads(capsys.readouterr().out.splitlines()[-1])["means"]
    assert means["dice_best"] == pytest.approx(result["value"], abs=1e-12)


def test_a_data_set_is_swept_by_name_and_held_to(tmp_path, capsys):
    boxes = {stem: [(6, 4, 20, 12), (0, 0, 9, 9)] for stem in "abcdef"}
    for split, listed in (("trainval", "abcd"), ("val", "ef")):
        write_voc(tmp_path / "VOCdevkit/VOC2007", boxes, listed=listed, split=split)
    words = ["--dataset", "voc07", "--root", str(tmp_path), "--task", "boxes"]
    command = ["sweep", "kmeans", *words, "--output", str(tmp_path / "sweep"), "--foreground", "whole"]
    command += ["--over", "k=2,3", "--metric", "box_iou", "--json"]
    assert main([*command, "--limit", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 3
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    photos = str(tmp_path / "VOCdevkit/VOC2007/JPEGImages")
    place = ["--input", photos, "--output", str(tmp_path / "run"), "--local"]
    assert main(["label", "kmeans", "--config", str(tmp_path / "sweep/best.yaml"), *place]) == 0
    assert main(["evaluate", str(tmp_path / "run"), *words, "--json"]) == 0
    means = json.loads(capsys.readouterr().out.splitlines()[-1])["means"]
    assert result["images"] == 4 and means["box_iou"] == pytest.approx(result["value"], abs=1e-12)
    assert {row["reference"] for row in table(tmp_path, "per_image")} == {photos.replace("JPEGImages", "Annotations")}
    assert {"corloc", "box_iou"} <= table(tmp_path)[0].keys()
    assert main([*command, "--split", "val"]) == 4
    assert "split: 'trainval' there, 'val' now" in capsys.readouterr().err


def test_relative_places_mean_the_same_to_every_trial(folder, monkeypatch):
    monkeypatch.chdir(folder)
    label(Label("photos", "fg", local=True), Grabcut())
    swept = sweep(Sweep(**PLACES, over=("k=2,3",)), Kmeans(foreground="run:fg"))
    assert swept.exit_code == 0 and swept.trials["done"] == 2
    assert {row["reference"] for row in table(folder, "per_image")} == {str(folder / "labels")}
    for place in (folder / "sweep/trials").iterdir():
        assert Run(str(place)).configuration()["settings"]["foreground"] == f"run:{folder / 'fg'}"
        (attempt,) = (json.loads(file.read_text()) for file in place.glob("_runs/2*.json"))
        assert attempt["options"]["input"] == str(folder / "photos")
    again = sweep(Sweep(**PLACES, over=("foreground=run:fg,whole",)), Kmeans(k=3))
    assert again.trials["done"] == 3  # the first one is there already


def test_a_sweep_in_use_ends_with_code_4(folder, capsys):
    from raypipe.storage import Folder, hold

    with hold(Folder(str(folder / "sweep")), "another"):
        assert command(folder, "--over", "k=2,3") == 4
    assert "is being written by process" in capsys.readouterr().err


def test_the_page_shows_curves_and_images_and_nothing_of_it_is_run(folder):
    for kind in ("photos", "labels"):
        (folder / kind / "wild/cat_5.png").rename(folder / kind / "wild/<img src=x>_5.png")
    run(folder, "threshold=0.3,0.4,0.5", "gamma=1,2", "is_dark=true,false", group="prefix")
    page = (folder / "sweep/sweep.html").read_text()
    assert page.count("<polyline") == 3 * len(Pattern.SHOWN) and page.count('class="plane"') == 3
    assert page.count("data:image/jpeg;base64,") == 6 * (3 + 2 + 2)
    assert "<img src=x>" not in page and "&lt;img src=x&gt;_5.png" in page
    assert not re.findall(r"https?://", page) and "script-src 'sha256-" in page
    assert "Best setting of each group" in page


def test_a_sweep_may_lie_in_a_bucket(folder, bucket, capsys):
    filesystem, uri = bucket
    place = uri("sweep").replace("s3://", "s3://test:test@")  # Ray's workers do not have this test's environment
    job = sweep_of(folder, "k=2,3", "threshold=0.4,0.6", output=place, refine="guided")
    swept = sweep(job, Kmeans(foreground="whole"), Guided())
    assert swept.exit_code == 0 and swept.trials["done"] == 2 and swept.settings == 4
    assert swept.config == "s3://photos/sweep/best.yaml" and "test:test" not in str(swept)
    page = filesystem.open_input_stream("photos/sweep/sweep.html").read().decode()
    assert page.count("data:image/jpeg;base64,") == 6 * (2 + 2) and "test:test" not in page
    assert "--config s3://photos/sweep/best.yaml --input" in page
    rows = pq.read_table("photos/sweep/trials.parquet", filesystem=filesystem).to_pylist()
    assert {(row["status"], row["images"]) for row in rows} == {("done", 6)}
    assert all(filesystem.get_file_info(row["run"].removeprefix("s3://") + "/run.json").is_file for row in rows)
    assert (
        main(["label", "kmeans", "--config", uri("sweep/best.yaml"), "--print-config", "--input", "a", "--output", "b"])
        == 0
    )
    values = yaml.safe_load(capsys.readouterr().out)
    assert {name: values[name] for name in swept.best} == swept.best and values["refine"] == "guided"
    assert main(["label", "kmeans", "--config", uri("none.yaml")]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err


# Other processes


def start(*words: str) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen([sys.executable, *words], start_new_session=True, env=environment, **streams)


def stop(job: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupted_sweep_goes_on_where_it_was(folder, signum):
    places = ["--input", str(folder / "photos"), "--labels", str(folder / "labels"), "--output", str(folder / "sweep")]
    words = [
        str(TESTS / "support/sweepable.py"),
        *places,
        "--over",
        "gamma=1,2,3",
        "threshold=0.3,0.5",
        "--actors",
        "1",
    ]
    job = start(*words, "--sleep", "0.3")
    deadline = time.monotonic() + 120
    while len(list(folder.glob("sweep/trials/*/scores.parquet"))) < 1:
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    os.kill(job.pid, signum)
    text = "" if signum == signal.SIGKILL else job.communicate(timeout=60)[0]
    job.wait(timeout=60)
    assert signum == signal.SIGKILL or "this command goes on:\n  raypipe sweep sweepable --input " in text, text
    assert job.returncode == (-signal.SIGKILL if signum == signal.SIGKILL else 130), text
    finished = [file.parent for file in folder.glob("sweep/trials/*/scores.parquet")]
    before = {file: file.stat().st_mtime_ns for place in finished for file in place.glob("masks/*/*")}
    assert 1 <= len(finished) < 3
    again = start(*words, "--sleep", "0.3")
    text = again.communicate(timeout=180)[0]
    stop(job), stop(again)
    assert again.returncode == 0, text
    assert {file: file.stat().st_mtime_ns for file in before} == before
    rows = table(folder)
    assert len(rows) == 6 and all((row["status"], row["images"]) == ("done", 6) for row in rows)


def test_an_interrupted_sweep_does_not_wait_for_its_trials(folder):
    places = [f"--{name}={folder / place}" for name, place in PLACES.items()]
    job = start(str(TESTS / "support/sweepable.py"), *places, "--over", "gamma=1,2", "--sleep", "60")
    deadline = time.monotonic() + 120
    while len(list(folder.glob("sweep/trials/*/run.json"))) < 2:
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGINT)
    text = job.communicate(timeout=60)[0]
    stop(job)
    assert job.returncode == 130 and "this command goes on:\n  raypipe sweep sweepable --input=" in text, text


def test_the_script_for_ray_job_submit_sweeps(folder):
    places = ["--input", str(folder / "photos"), "--labels", str(folder / "labels"), "--output", str(folder / "sweep")]
    job = start(str(TESTS.parent / "jobs/sweep.py"), "kmeans", *places, "--foreground", "whole", "--over", "k=2,3")
    text = job.communicate(timeout=180)[0]
    stop(job)
    assert job.returncode == 0 and "best: k " in text, text
    assert "WARNING" not in text and "Traceback" not in text and len(text.splitlines()) < 15, text


def test_a_sweep_reads_nothing_of_ray_when_all_is_done(folder, monkeypatch):
    run(folder, "gamma=1,2")
    for name in ("attempt", "run_on_tune"):
        monkeypatch.setattr(f"raypipe.sweep.tuning.{name}", None)
    assert run(folder, "gamma=1,2").trials["done"] == 2
