"""What a task is promised: no measure vanishes, none spoils the others, sums come first. With a made-up task."""

import dataclasses
import doctest
import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.area import Area
from support.written import masks_row, write_run

from raypipe import refiners, segmenters
from raypipe.cli.config import parse
from raypipe.cli.verbs import VERBS
from raypipe.evaluation import tasks
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.labels import Labels
from raypipe.evaluation.sums import Sums
from raypipe.evaluation.task import Task
from raypipe.pipeline.job import Label
from raypipe.report import measures
from raypipe.sweep.trials import Sweep


def left(pixels: int) -> np.ndarray:
    """The first pixels of a 4 x 6 mask, column by column."""
    return (np.arange(24) < pixels).reshape(6, 4).T


def evaluated(folder, pairs: dict[str, tuple[int, int]], task: Task):
    """What `evaluate` gives for images by key, each with the pixels of its mask and of its label."""
    write_run(str(folder / "run"), [masks_row(key, left(mask)[None]) for key, (mask, _) in pairs.items()])
    for key, (_, label) in pairs.items():
        (folder / "labels" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(left(label).astype(np.uint8) * 255).save(folder / "labels" / key)
    return evaluate(Evaluate((str(folder / "run"),), str(folder / "labels")), task)


def test_a_value_that_is_no_number_leaves_the_mean_of_the_others_and_is_counted(tmp_path):
    result = evaluated(tmp_path, {"a.png": (12, 8), "b.png": (0, 0), "c.png": (14, 8)}, Area())
    assert result.means["excess"] == pytest.approx((0.5 + 0.75) / 2, abs=1e-15)
    assert result.lacking == {"excess": 1, "thirds": 1} and result.counts["ok"] == 3
    assert "no excess in 1 of 3 images" in result.text().splitlines()
    rows = {row["key"]: row for row in pq.read_table(result.table, partitioning=None).to_pylist()}
    assert rows["b.png"]["excess"] is None and rows["b.png"]["thirds"] == [None] * 3 and rows["b.png"]["both"] == 0


def test_a_null_is_no_measure_and_no_error(tmp_path):
    result = evaluated(tmp_path, {"a.png": (12, 8), "b.png": (9, 2)}, Area(least=4))
    assert result.means["excess"] == 0.5 and result.lacking == dict.fromkeys(dict(Area.COLUMNS), 1)
    nothing = evaluated(tmp_path / "other", {"a.png": (1, 2)}, Area(least=4))
    assert nothing.means == nothing.group_means == dict.fromkeys(Area.SHOWN)
    assert nothing.groups == {".": {"images": 1, "failed": 0} | nothing.means} and " - " in nothing.text()


def test_a_mean_below_0_survives_in_all_and_by_group(tmp_path):
    result = evaluated(tmp_path, {"a/1.png": (4, 8), "a/2.png": (2, 8), "b/1.png": (9, 8)}, Area())
    assert result.means["excess"] == pytest.approx((-0.5 - 0.75 + 0.125) / 3, abs=1e-15)
    assert result.groups["a"]["excess"] == -0.625 and result.group_means["excess"] == pytest.approx(-0.25, abs=1e-15)
    assert "-0.625" in result.text()


def test_counts_are_summed_before_they_are_divided(tmp_path):
    result = evaluated(tmp_path, {"a.png": (2, 1), "b.png": (20, 20)}, Area())
    assert result.means["iou"] == 21 / 22 != (1 / 2 + 1) / 2


def test_lists_add_up_by_element(tmp_path):
    result = evaluated(tmp_path, {"a.png": (1, 24), "b.png": (1, 12)}, Area())
    assert result.means["right"] == pytest.approx(1 / 3, abs=1e-15)
    sums = Sums(["counts"], [{"counts": [1, 2.5, None]}, {"counts": None}, {"counts": [3, -4, float("nan")]}])
    assert sums.total("counts") == [4, -1.5, None] and sums.mean("counts") == [2, -0.75, None]
    assert sums.count("counts") == [2, 2, 0] and sums.lacking["counts"] == 3 == sums.images


def test_sums_are_the_same_in_any_order():
    values = [1e16, 1.0, -1e16, 1e-300, 0.1, 5e-324, -0.7]
    for order in itertools.permutations(values, 7):
        sums = Sums(["x"], [{"x": value} for value in order])
        assert sums.total("x") == math.fsum(values) and sums.mean("x") == math.fsum(values) / 7
    assert Sums(["x"]).total("x") is Sums(["x"]).mean("x") is None and Sums(["x"]).count("x") == 0
    none = Sums(["x"], [{"x": float("inf")}, {"x": None}, {}])
    assert none.total("x") is none.mean("x") is None and none.lacking["x"] == 3


def test_counts_by_place_add_up_in_any_order_and_beyond_64_bits():
    rows = [{"x": [(3, 2**62), (920 * 919, 1)]}, {"x": []}, {"x": None}, {}, {"x": [(3, 2**62)]}, {"x": [(3, 2**62)]}]
    for order in itertools.islice(itertools.permutations(rows), 0, 720, 37):
        sums = Sums([], order, places=["x"])
        assert sums.places("x") == {3: 3 * 2**62, 920 * 919: 1} and sums.images == 6


def test_options_of_a_task_have_a_table_of_their_own_and_are_recorded(tmp_path):
    pairs = {"a.png": (12, 8), "b.png": (9, 2)}
    tables = [evaluated(tmp_path, pairs, Area(least=least)).table for least in (0, 4, 4)]
    assert tables[0] != tables[1] == tables[2] and all("/metrics/task=area/labels-" in table for table in tables)
    schema = pq.read_schema(tables[1])
    assert json.loads(schema.metadata[b"raypipe.options"]) == {"least": 4}
    assert schema.names[7:] == ["excess", "both", "either", "thirds", "status"]
    assert b"raypipe.options" not in tasks.find("pattern")().schema().metadata


def test_the_example_of_a_task_works():
    result = doctest.testmod(tasks)
    assert result.attempted > 5 and not result.failed


def test_a_measure_that_is_no_column_is_named():
    class Wrong(Area):
        def measure(self, row, label):
            return {"exces": 1}

    with pytest.raises(ValueError, match="exces measured, which is none of its COLUMNS"):
        Wrong().cells({}, None)


def test_a_task_may_find_and_read_labels_in_its_own_way(tmp_path):
    class Worded(Area):
        """Labels are words in one text file; the location is the line."""

        def match(self, folder, keys):
            lines = open(folder).read().splitlines()
            from raypipe.inputs.maskfiles import Matches

            return Matches({key: line for key, line in zip(sorted(keys), lines, strict=False)}, [])

        def read(self, location, *, max_bytes, max_pixels):
            return location

        def fits(self, row, label):
            return label.isalpha()

        def measure(self, row, label):
            return {"excess": len(label)}

    (tmp_path / "words").write_text("cat\nzebra\n12\n")
    write_run(str(tmp_path / "run"), [masks_row(f"{name}.png", left(4)[None]) for name in "abcd"])
    result = evaluate(Evaluate((str(tmp_path / "run"),), str(tmp_path / "words")), Worded())
    assert result.means["excess"] == 4 and result.counts == dict(ok=2, failed=0, no_label=1, other_size=1, bad_label=0)


def test_a_label_has_one_status_wherever_it_is_read(tmp_path):
    Image.fromarray(left(8).astype(np.uint8) * 255).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    location = {name: str(tmp_path / name) for name in ("a.png", "b.png")}
    labels = Labels(Area(), location, max_bytes=10**6, max_pixels=10**6)
    row = {"key": "a.png", "error": "", "height": 4, "width": 6}
    label, status = labels.read(row)
    assert status == "ok" and (label == left(8)).all()
    cases = {"failed": {"error": "decode: x: y"}, "no_label": {"key": "c.png"}, "bad_label": {"key": "b.png"}}
    for status, change in (cases | {"other_size": {"height": 6}}).items():
        assert labels.read(row | change) == (None, status)


def test_a_report_shows_what_a_task_says_of_single_images(tmp_path, monkeypatch):
    from raypipe.report.report import Report, report

    monkeypatch.setattr(tasks, "names", lambda: ["area", "pattern"])
    monkeypatch.setattr(tasks, "find", lambda name: Area)
    pairs = {f"{i:02d}.png": (8 if i else 24, 7 + i % 2) for i in range(12)}
    evaluated(tmp_path, pairs | {"none.png": (0, 0)}, Area())
    figures = measures.good(measures.read(write_run(str(tmp_path / "run"), [])))
    values = dict(zip(figures["key"].to_pylist(), measures.numbers(figures, "area_excess"), strict=True))
    assert values["00.png"] == pytest.approx(17 / 7) and np.isnan(values["none.png"])
    odd = dict(zip(figures["key"].to_pylist(), measures.signs(figures)["high excess"], strict=True))
    assert odd["00.png"] > 0 == odd["01.png"] == odd["none.png"]
    report(Report((str(tmp_path / "run"),)))
    page = (tmp_path / "run/report.html").read_text()
    assert "<strong>Excess</strong> <span>of the label</span>" in page and "better polarity" not in page


def test_the_table_of_a_task_keeps_the_types_of_its_columns():
    schema = tasks.find("pattern")().schema()
    assert schema.field("tp_best").type == pa.int64() and schema.field("sign").type == pa.int8()
    assert [*schema.names[:7], schema.names[-1]] == [
        *("image_id", "key", "group", "method", "reference", "height", "width"),
        "status",
    ]


def test_no_option_of_a_task_has_the_name_of_another_one():
    others = [Evaluate, Sweep, Label, *(s.find(name) for s in (segmenters, refiners) for name in s.names())]
    taken = {field.name for kind in others for field in dataclasses.fields(kind)}
    of_methods = {field.name for name in segmenters.names() for field in dataclasses.fields(segmenters.find(name))}
    for name in tasks.names():
        both = taken & {field.name for field in dataclasses.fields(tasks.find(name))}
        assert both <= ({"clip"} if name == "naming" else set()) & of_methods, name


def test_an_option_of_a_method_and_of_a_task_has_one_value_in_a_sweep(capsys):
    words = ["--input", "a", "--labels", "b", "--output", "c", "--over", "seed=0,1", "--label-classes", "cat,dog"]
    command = parse("sweep", Sweep, VERBS["sweep"].parts, ["reco", *words, "--task", "naming", "--clip", "d"])
    method, _, task = command.parts
    assert type(task) is tasks.find("naming") and task.clip == "d" == Path(method.clip).name
    with pytest.raises(SystemExit):
        parse("sweep", Sweep, VERBS["sweep"].parts, ["reco", *words, "--task", "naming", "--help"])
    assert capsys.readouterr().out.count("--clip") == 1


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_with_any_options_can_be_sent_to_other_processes(name):
    kind = tasks.find(name)
    for options in ({}, {"f_variants": True}) if name == "saliency" else ({},):
        task = kind(**options)
        sent = pickle.loads(pickle.dumps(task))
        assert sent == task and sent.SHOWN == task.SHOWN and sent.schema() == task.schema()
        assert set(task.values(task.sums())) == set(task.SHOWN) and set(task.details(task.sums())) == set(
            dict(task.DETAILS)
        )
