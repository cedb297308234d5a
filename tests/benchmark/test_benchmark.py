"""The benchmark: what it counts, against slow loops on made-up runs, and that its tables say the same. No timings."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from skimage import data
from support import tiny
from support.namedmask import write_backbone

from raypipe import lookup, refiners, segmenters
from raypipe.benchmark import methods, pipeline, processes
from raypipe.benchmark import plain as twins_of
from raypipe.benchmark.benchmark import Benchmark, benchmark, names
from raypipe.benchmark.figures import QUICK, Figure, Sizes, markdown
from raypipe.benchmark.pipeline import JOBS, Outcome
from raypipe.benchmark.plain import kmeans as plain
from raypipe.benchmark.plain.guided import box_sum
from raypipe.benchmark.processes import Sample, Used
from raypipe.cli.verbs import main

TINY = Sizes(side=96, photographs=2, repeats=2, batch=2, steady=0.2, corpus=600, settled=64)
RATIOS = {"x", "s", "images/s"}  # units of figures that are above zero; growth and added time may be below


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def measured(output, *only: str, sizes: Sizes = TINY) -> list[dict]:
    """Rows of the Parquet table, after a look at the Markdown beside it: the same lines, in the same order."""
    result = benchmark(Benchmark(output=str(output), only=only), sizes)
    text = (output / "benchmark.md").read_text()
    assert result.text().startswith(text)
    rows = pq.read_table(output / "benchmark.parquet").to_pylist()
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")][2:]
    assert [line[:2] for line in lines] == [[row["benchmark"], row["figure"]] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        if row["median"] is None:
            assert line[2:5] == ["-", "-", "0"] and row["note"]
        else:
            median = float(line[2].split()[0].replace(",", ""))
            assert median == pytest.approx(row["median"], rel=0.01, abs=0.01) and int(line[4]) == row["runs"]
    return rows


def assert_sound(rows: list[dict]) -> None:
    for row in rows:
        assert math.isfinite(row["median"]) and row["low"] <= row["median"] <= row["high"] and row["runs"] >= 1, row
        assert row["low"] > 0 or row["unit"] not in RATIOS, row


# Methods


def test_a_method_is_measured_in_pairs_with_its_plain_formulation(tmp_path):
    rows = measured(tmp_path, "kmeans")
    assert_sound(rows)
    of = {row["figure"]: row for row in rows}
    assert of["times faster than plain"]["runs"] == TINY.repeats * TINY.photographs
    assert of["objective, ours / plain"]["high"] < 1.001
    metadata = pq.read_schema(tmp_path / "benchmark.parquet").metadata
    environment = json.loads(metadata[b"raypipe.benchmark"])
    assert environment["machine"]["cpus"] == os.cpu_count() and "numpy" in environment["packages"]
    assert environment["time"] in (tmp_path / "benchmark.md").read_text()


def test_only_names_the_rows_and_they_keep_their_order(tmp_path):
    rows = measured(tmp_path, "guided", "watershed", "grabcut")
    assert_sound([row for row in rows if row["unit"]])
    assert list(dict.fromkeys(row["benchmark"] for row in rows)) == ["grabcut", "watershed", "guided"]
    (difference,) = [row for row in rows if row["figure"] == "largest difference to plain"]
    assert difference["high"] < 1e-4


@pytest.mark.parametrize("name", ["clipseg", "deep_spectral", "dino_pca", "lost", "maskclip", "namedmask"])
def test_given_weights_are_those_of_both_ways(name, tmp_path):
    weights = tiny.options(name, tmp_path)["weights"]
    rows = {row.figure: row for row in methods.measure(name, dataclasses.replace(TINY, repeats=1), True, weights)}
    assert len(rows["times faster than plain"].values) == TINY.photographs
    assert max(rows["share of pixels unlike plain"].values) < 0.02


@pytest.mark.usefixtures("one_thread")
def test_the_solver_is_measured_on_photographs_and_a_made_up_graph(monkeypatch):
    monkeypatch.setattr(twins_of.find("spectral"), "SIDES", (12,))
    rows = {row.figure: row for row in methods.measure("spectral", TINY, False)}
    for kind in ("photographs", "six regions"):
        assert min(rows[f"times faster than plain, 144 nodes, {kind}"].values) > 0
        assert max(rows[f"share of nodes unlike plain, 144 nodes, {kind}"].values) == 0


@pytest.mark.usefixtures("one_thread")
def test_images_are_cosegmented_as_by_the_matrix_of_all_pairs(monkeypatch):
    for name, value in {"IMAGES": 12, "WIDTH": 16, "SIDE": 4}.items():
        monkeypatch.setattr(twins_of.find("cosegment"), name, value)
    rows = {row.figure: row for row in methods.measure("cosegment", TINY, False)}
    assert len(rows["times faster than plain, 12 images of 4 x 4 x 16"].values) == TINY.repeats
    assert max(rows["largest difference, 12 images of 4 x 4 x 16"].values) < 1e-5


@pytest.mark.usefixtures("one_thread")
def test_parts_are_embedded_as_by_the_whole_network_for_each(monkeypatch):
    twin = twins_of.find("clip_masked")
    small = {"image_size": 64, "patch_size": 16, "num_hidden_layers": 5, "hidden_size": 48, "intermediate_size": 96}
    monkeypatch.setattr(twin, "VISION", twin.VISION | small)
    rows = {row.figure: row for row in methods.measure("clip_masked", dataclasses.replace(TINY, repeats=1), False)}
    case = ", 8 parts, 5 blocks, width 48, 17 tokens"
    assert len(rows[f"times faster than plain{case}"].values) == TINY.photographs
    assert max(rows[f"largest difference{case}"].values) < 1e-5


@pytest.mark.usefixtures("one_thread")
def test_texts_are_those_of_the_search_as_it_is_written(monkeypatch):
    for name, value in {"SEGMENTS": 1, "TOKENS": 1}.items():
        monkeypatch.setattr(twins_of.find("naming"), name, value)
    rows = {row.figure: row for row in methods.measure("naming", dataclasses.replace(TINY, repeats=1), False)}
    case = ", zerocap, 1 tokens, 1 segments"
    assert len(rows[f"times faster than plain{case}"].values) == len(rows["time per segment, retrieval"].values) == 1
    assert rows[f"share of segments with texts unlike plain{case}"].values == [0.0]
    assert rows[f"text tokens per segment, plain{case}"].values == [5 * 512 * 77]
    assert rows[f"times fewer text tokens than plain{case}"].values[0] > 20
    assert rows["text tokens per run, retrieval"].values[0] > 3000


@pytest.mark.usefixtures("one_thread")
def test_vectors_become_the_tree_that_scipy_gives(monkeypatch):
    for name, value in {"SIDE": 20, "WIDTH": 24}.items():
        monkeypatch.setattr(twins_of.find("ward"), name, value)
    rows = {row.figure: row for row in methods.measure("ward", TINY, False)}
    assert len(rows["times faster than plain, 400 x 24"].values) == TINY.repeats * TINY.photographs
    assert max(rows["share of merges unlike plain, 400 x 24"].values) == 0


def test_named_segments_are_scored_as_a_plain_loop_does(monkeypatch):
    monkeypatch.setattr(twins_of.find("naming_evaluation"), "SIZE", (60, 80))
    rows = {row.figure: row for row in methods.measure("naming_evaluation", TINY, False)}
    assert len(rows["times faster than plain"].values) == 2 * TINY.repeats
    assert max(rows["largest difference from plain"].values) < 1e-9


@pytest.mark.usefixtures("one_thread")
def test_the_crf_is_measured_at_both_sizes(monkeypatch):
    for name, value in {"SIDE": 32, "LARGE": (40, 12)}.items():
        monkeypatch.setattr(twins_of.find("crf"), name, value)
    rows = {row.figure: row for row in methods.measure("crf", TINY, False)}
    assert len(rows["time per image, plain"].values) == len(rows["time per image, 40 x 40, 12 labels"].values) == 2
    assert max(rows["share of labels unlike plain"].values) < 0.1


@pytest.mark.usefixtures("one_thread")
def test_archives_are_ranked_in_the_order_of_a_full_sort(monkeypatch):
    monkeypatch.setattr(twins_of.find("archive_ranking"), "IMAGES", 3000)
    rows = {row.figure: row for row in methods.measure("archive_ranking", TINY, False)}
    assert rows["share of queries unlike a full sort of exact scores"].values == [0.0]
    assert 0 < rows["memory beside the embeddings"].values[0] < 60 and rows["time per ranking, plain"].values


@pytest.mark.usefixtures("one_thread")
def test_training_is_measured_at_equal_losses(monkeypatch):
    twin = twins_of.find("train_sempart")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(twin, "BACKBONE", small)
    monkeypatch.setattr(twin, "CPU", (64, 2))
    monkeypatch.setattr(twin, "GPU", (64, 2))
    rows = {row.figure: row for row in methods.measure("train_sempart", dataclasses.replace(TINY, repeats=1), False)}
    case = ", 64 px, 2 per step, cpu"
    assert len(rows[f"times faster than plain{case}"].values) == 1
    assert max(rows[f"largest relative difference of a loss to plain{case}"].values) < 1e-3
    (ours,), (other,) = (rows[f"kept for the way back{each}{case}"].values for each in ("", ", plain"))
    assert 0 < ours < 0.7 * other  # the teacher's decoder is most of the rest
    assert min(rows[f"losses alone{case}"].values) > 0 and min(rows[f"head alone{case}"].values) > 0


@pytest.mark.usefixtures("one_thread")
def test_named_masks_are_trained_at_equal_losses_on_equal_samples(monkeypatch, tmp_path):
    twin = twins_of.find("train_namedmask")
    network = {"channels": 16, "backbone": write_backbone(tmp_path / "resnet.pth")}
    for name, value in {"CPU": (32, 4), "GPU": (32, 4), "SIDE": 48, "SAMPLES": 12, "NETWORK": network}.items():
        monkeypatch.setattr(twin, name, value)
    rows = {row.figure: row for row in methods.measure("train_namedmask", dataclasses.replace(TINY, repeats=1), False)}
    case = ", augmentation, 48 px, one core"
    assert len(rows[f"times faster than plain{case}"].values) == 1
    assert max(rows[f"share of colours unlike plain{case}"].values) < 0.01
    case = ", 32 px, 4 per step, cpu"
    assert min(rows[f"steps per second{case}"].values) > 0
    assert rows[f"relative difference of a loss to plain{case}"].values[0] < 1e-3


def test_every_plain_twin_is_that_of_a_method_a_refiner_or_a_solver():
    twins = lookup.modules(twins_of.__path__)
    assert twins and set(twins) <= {*segmenters.names(), *refiners.names(), *methods.SOLVERS}
    assert all(callable(twins_of.find(name).compare) for name in twins)
    assert twins_of.find("watershed") is None


def test_a_method_without_its_weights_is_a_row_that_says_so():
    (row,) = methods.measure("rembg", TINY, False)
    assert not row.values and row.note.startswith("skipped: needs u2net.onnx")


def test_an_unknown_name_ends_with_code_2_and_the_choices(tmp_path, capsys):
    assert main(["benchmark", "--output", str(tmp_path), "--only", "kmean"]) == 2
    assert "did you mean 'kmeans'" in capsys.readouterr().err
    assert main(["benchmark", "--output", str(tmp_path), "--only", "zzz"]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in names())
    assert not list(tmp_path.iterdir())


def test_methods_are_measured_without_importing_ray():
    code = (
        "import sys; from raypipe.benchmark import methods; from raypipe.benchmark.benchmark import names;"
        "from raypipe.benchmark.figures import Sizes;"
        "names(); methods.measure('kmeans', Sizes(side=64, photographs=1, repeats=1), False);"
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_benchmark_imports_no_heavy_library():
    code = "import sys, raypipe.benchmark.pipeline; assert not {'torch', 'ray', 'cv2'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_ray_whole_jobs_are_rows_that_say_so(tmp_path):
    code = (
        "import importlib.util as util; found = util.find_spec;"
        "util.find_spec = lambda name, *rest: None if name == 'ray' else found(name, *rest);"
        "from raypipe.benchmark.benchmark import Benchmark, benchmark;"
        f"benchmark(Benchmark({str(tmp_path)!r}, only=('efficiency', 'memory', 'resume')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    rows = pq.read_table(tmp_path / "benchmark.parquet").to_pylist()
    assert [row["benchmark"] for row in rows] == ["efficiency", "memory", "resume"]
    assert all(row["median"] is None and row["note"].startswith("needs Ray") for row in rows)


# Plain formulations


def test_box_sums_agree_with_a_slow_loop():
    plane = np.random.default_rng(0).random((7, 9))
    for radius in (1, 3, 20):
        slow = [
            [plane[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1].sum() for x in range(9)]
            for y in range(7)
        ]
        np.testing.assert_allclose(box_sum(plane, radius), slow)


def test_the_spread_of_opencvs_masks_is_opencvs_own_objective():
    image = cv2.resize(data.coffee(), (60, 40), interpolation=cv2.INTER_AREA)
    masks = plain.opencv_kmeans(image, k=3, attempts=5, max_iter=100, eps=0.0)
    assert masks.shape == (3, 40, 60) and (masks.sum(0) == 1).all()
    cv2.setRNGSeed(0)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 100, 0.0)
    pixels = image.reshape(-1, 3).astype(np.float32)
    best, _, _ = cv2.kmeans(pixels, 3, None, criteria, 5, cv2.KMEANS_RANDOM_CENTERS)
    assert plain.spread(image, masks) == pytest.approx(best, rel=1e-3)


# Counting


def test_the_rate_leaves_out_start_and_end():
    commits = [(5.0, 8), (5.1, 8), *((6.0 + i, 8) for i in range(10)), (40.0, 8), (41.0, 3)]
    assert pipeline.steady_rate(commits, 2) == pytest.approx(8)  # the ten in the middle, one a second


@pytest.mark.parametrize("last", [9, 10])
def test_workers_that_commit_together_are_counted_in_whole_rounds(last):
    commits = [(float(i // 2), 64) for i in range(2 * last + 1)]  # two blocks a second, and one more
    assert pipeline.steady_rate(commits, 2) == pytest.approx(128)


def test_a_run_of_few_commits_still_has_a_rate():
    assert pipeline.steady_rate([(1.0, 8), (3.0, 4)], 2) == pytest.approx(2)


def test_ended_processes_keep_their_cpu_time():
    samples = [
        Sample(0.0, {(1, "a"): Used(1.0, 0, "")}),
        Sample(1.0, {(1, "a"): Used(2.0, 0, ""), (2, "b"): Used(5.0, 0, "")}),
        Sample(2.0, {(1, "a"): Used(2.5, 0, ""), (2, "c"): Used(0.5, 0, "")}),  # pid 2 once more, another process
    ]
    assert processes.cpu_seconds(samples) == [1.0, 7.0, 8.0]


def test_growth_per_image_is_read_between_start_up_and_end():
    commits = tuple((float(second), 100) for second in range(1, 11))  # 1,000 images, one batch a second
    samples = [Sample(second + 0.5, {}) for second in range(-3, 14)]
    rows = [100 * min(max(math.floor(sample.time), 0), 10) for sample in samples]
    values = [
        float("nan") if done == 500 else 0.02 * done + (500 if done < 200 else -300 if done > 800 else 7)
        for done in rows
    ]
    run = Outcome(0.0, "", commits, 0.0, None)
    sizes = dataclasses.replace(TINY, corpus=1000, settled=200)
    assert pipeline.steady_slope(samples, run, values, sizes) == pytest.approx(0.02)


def test_memory_counts_only_while_all_actors_live():
    def actor(pid: int, memory: float) -> dict:
        return {(pid, "x"): Used(0.0, memory, pipeline.ACTOR)}

    samples = [Sample(0.0, actor(1, 50.0) | actor(2, 60.0)), Sample(1.0, actor(2, 61.0)), Sample(2.0, {})]
    both = pipeline.memory_of(samples, lambda _, used: pipeline.ACTOR in used.command, number=2)
    assert both[0] == 110.0 and np.isnan(both[1:]).all()
    assert pipeline.memory_of(samples, lambda pid, _: pid == 2)[:2] == [60.0, 61.0]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc (Linux)")
def test_a_child_is_watched_with_its_own_children():
    with processes.Watched(subprocess.run, [sys.executable, "-c", "import time; time.sleep(0.6)"]) as child:
        samples = child.watched()
        assert child.result().returncode == 0
    assert max(len(sample.used) for sample in samples) == 2
    assert processes.cpu_seconds(samples)[-1] < 60
    assert any(used.memory > 1 and "sleep" in used.command for sample in samples for used in sample.used.values())


def test_a_failing_child_passes_on_its_last_words():
    with pytest.raises(RuntimeError, match="ended with 1: .*ValueError: invalid literal for int.*'no luck'"):
        processes.call(int, "no luck")


def test_a_child_has_one_thread_and_not_the_clusters_address(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    found = processes.call(os.getenv, "RAY_ADDRESS"), processes.call(os.getenv, "OMP_NUM_THREADS")
    assert found == (None, "1")


def test_bare_loops_run_the_stages(tmp_path):
    pipeline.write_photographs(str(tmp_path / "photos"), 24)
    rate, cpu = pipeline.bare_loop(pipeline.Spec(24, workers=1, batch=8, bare=True), str(tmp_path / "photos"), 0)
    assert rate > 0 and cpu > 0


def test_figures_show_their_median_and_ends():
    figures = [Figure("a", "b", "x", [3.0, 1.0, 2.0]), Figure("a", "d", note="needs | this")]
    environment = {
        "time": "now", "python": "3", "packages": {}, "git_commit": None, "load": [1, 1, 1], "load_after": [2, 2, 2],
        "machine": {"cpus": 2, "processor": "p", "memory_gb": 8, "gpu": "", "system": "s"},
    }  # fmt: skip
    lines = markdown(figures, environment).splitlines()
    assert lines[-2] == "| a | b | 2 x | 1 to 3 | 3 |  |"
    assert lines[-1] == "| a | d | - | - | 0 | needs / this |"


# Whole jobs


@pytest.mark.parametrize("sizes", [TINY, QUICK, Sizes()])
def test_the_images_suffice_for_every_run(sizes):
    assert all(spec.images <= sizes.corpus for specs in pipeline.specs_of(sizes).values() for spec in specs)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc (Linux)")
def test_every_benchmark_of_whole_jobs_gives_its_figures(tmp_path):
    pytest.importorskip("ray")
    sizes = dataclasses.replace(TINY, repeats=1, corpus=2_000, settled=256)
    rows = measured(tmp_path, *JOBS, "help", sizes=sizes)
    assert_sound(rows)
    assert {row["benchmark"] for row in rows} == {*JOBS, "help"}
    (resume,) = [row for row in rows if row["benchmark"] == "resume"]
    assert "Ray is not imported" in resume["note"]
