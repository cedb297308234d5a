"""What papers print stands beside our own values, in the summaries of the data sets that they speak of."""

from collections import Counter
from importlib.resources import files

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support.layouts import BOXES, MASKS, SIZE, write_classes, write_coco, write_masks, write_photos, write_voc
from support.written import masks_row, write_run

from raypipe.cli.verbs import main
from raypipe.evaluation.datasets import find
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.summary import PUBLISHED, cell, published
from raypipe.evaluation.tasks.semantic import Semantic

RECORD = yaml.safe_load(files("raypipe.evaluation").joinpath("published.yaml").read_text())
OURS = [each for each in RECORD["values"] if each["paper"] == "two_tricks"]  # its 258 values


def evaluated(root, name: str, **options):
    """What `evaluate` says of a run over a data set of one image."""
    mask = np.zeros(SIZE, bool)
    mask[4:12, 6:20] = True
    if name in MASKS:
        photos, masks = MASKS[name][0]
        write_photos(root / photos, ["a.jpg"])
        write_masks(root / masks, {"a.png": np.uint8(255) * mask})
    elif name in BOXES:
        write_voc(root / BOXES[name][0], {"a": [(6, 4, 20, 12)]}, **options)
    else:
        write_coco(root, {"a": [(6, 4, 14, 8)]})
    write_run(str(root / "run"), [masks_row("a.jpg", mask[None], soft=mask[None].astype(np.float32))])
    task = "saliency" if name in MASKS else "boxes"
    return evaluate(Evaluate((str(root / "run"),), dataset=name, root=str(root), task=task, **options))


def test_every_value_of_two_tricks_is_in_the_summary_of_its_data_set(tmp_path):
    assert len(OURS) == 258
    found, wanted = Counter(), Counter()
    for value in OURS:
        wanted[tuple(value[name] for name in ("dataset", "table", "row", "metric", "value"))] += 1
    for name in {value["dataset"] for value in OURS}:
        result = evaluated(tmp_path / name, name)
        (file,) = (tmp_path / name / "run/metrics/summary").rglob("*.parquet")
        table = pq.read_table(file, partitioning=None)
        assert table.schema.field("published").type.value_type == PUBLISHED
        (row,) = table.to_pylist()
        assert row["published"] == result.published
        for each in row["published"]:
            assert each["paper"] == "two_tricks"
            found[(name, *(each[key] for key in ("table", "row", "metric", "value")))] += 1
        lines = result.text().splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("published "))
        metrics = list(dict.fromkeys(each["metric"] for each in row["published"]))
        assert lines[start].split() == ["published", *" ".join(metrics).replace("_", " ").split()]
        assert lines[start + 1].endswith("1.000") or lines[start + 1].endswith("100.000")  # our own, first
        for each in row["published"]:
            begin = f"{each['row']} (two_tricks, table {each['table']}) "
            (line,) = (line for line in lines if line.startswith(begin))
            shown = line[len(begin) :].split()[metrics.index(each["metric"])]
            assert shown == cell(float(each["value"]))
    assert found == wanted


def test_values_in_which_the_variant_is_inferred_say_so(tmp_path):
    notes = {(e["table"], e["row"]): e["note"] for e in evaluated(tmp_path, "voc07").published}
    assert "inferred" in notes["4", "guided filter"] and notes["4", "crop + guided filter"] is None


def test_what_is_measured_otherwise_says_so(tmp_path):
    found = evaluated(tmp_path, "ecssd")
    notes = {(e["table"], e["row"], e["metric"]): e["note"] for e in found.published}
    assert "protocol crop320" in notes["1", "Ours", "iou"] and notes["5", "MOVE", "iou"] is None
    assert "selfmask_f_max" in notes["1", "FOUND single", "max_f"] and "protocol" in notes["1", "FOUND single", "iou"]
    assert "table 1: max_f of FOUND single is another F, to be compared with selfmask_f_max" in found.text()


def test_the_summaries_of_a_run_are_read_as_one_table(tmp_path):
    for name in ("ecssd", "duts-te", "voc07"):
        evaluated(tmp_path, name)
    rows = pq.read_table(tmp_path / "run/metrics/summary").to_pylist()
    tasks = {(row["task"], row["dataset"]) for row in rows}
    assert tasks == {("boxes", "voc07"), ("saliency", "ecssd"), ("saliency", "duts-te")}


def test_runs_stand_side_by_side_above_the_papers(tmp_path, capsys):
    evaluated(tmp_path, "voc12")
    (tmp_path / "run").rename(tmp_path / "first")
    evaluated(tmp_path, "voc12")
    words = ["--dataset", "voc12", "--root", str(tmp_path), "--task", "boxes"]
    assert main(["evaluate", str(tmp_path / "first"), str(tmp_path / "run"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["images", "failed", "corloc", "box", "iou"],
        ["first", "1", "0", "100.000", "1.000"],
        ["run", "1", "0", "100.000", "1.000"],
    ]
    assert "corloc: CorLoc, % of images" in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("published "))
    assert [line.split() for line in lines[start + 1 : start + 3]] == [["first", "100.000"], ["run", "100.000"]]
    assert lines[start + 3].split() == ["LOST", "(two_tricks,", "table", "2)", "64.000"]


SEMANTIC = [each for each in RECORD["values"] if each["paper"] in ("namedmask", "namedmask_main")]


@pytest.mark.parametrize("name", sorted({each["dataset"] for each in SEMANTIC}))
def test_shares_stand_beside_what_papers_print_as_percent_of_the_same_split(tmp_path, name):
    stem = {"coca": "UAV/a", "cityscapes_object": "ulm/a"}.get(name, "a")
    write_classes(tmp_path, name, {stem: np.tile(np.arange(2, dtype=np.int32) * 2, (SIZE[0], SIZE[1] // 2))})
    dataset = find(name, str(tmp_path))
    wanted = {(each["paper"], each["table"], each["row"]): each for each in SEMANTIC if each["dataset"] == name}
    wanted = {key: each["value"] for key, each in wanted.items() if each.get("split", dataset.split) == dataset.split}
    found = {(each["paper"], each["table"], each["row"]): each for each in published(dataset, Semantic.SHOWN)}
    assert found.keys() == wanted.keys() and found
    assert all(found[key]["value"] == pytest.approx(value / 100, abs=1e-9) for key, value in wanted.items())
    assert all(("of the test split" in (each["note"] or "")) == name.startswith("imagenet") for each in found.values())
    ours = published(dataset, Semantic.SHOWN, method="namedmask")
    assert {each["row"] for each in ours} == {"NamedMask"}


def test_the_training_split_has_the_rows_of_the_papers_ablation(tmp_path):
    write_classes(tmp_path, "voc2012", {"a": np.zeros(SIZE, np.int32)})
    lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / "val.txt").rename(lists / "train.txt")
    rows = published(find("voc2012", str(tmp_path), "train"), Semantic.SHOWN)
    assert [(each["row"], each["value"]) for each in rows[:2]] == [("without copy-paste", 0.566), ("n_max 2", 0.587)]
    assert len(rows) == 6


@pytest.mark.parametrize("split", ["val", "train"])
def test_another_split_than_the_papers_has_nothing_beside_it(tmp_path, split):
    result = evaluated(tmp_path, "voc12", split=split)
    assert result.published == [] and "published" not in result.text()
