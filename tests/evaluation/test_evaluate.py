"""Runs against labels: the measures of a pattern, which label belongs to which image, and what is left out."""

import json
import tarfile
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raypipe
from raypipe.cli.verbs import main
from raypipe.evaluation import tasks
from raypipe.evaluation.evaluate import Evaluate, evaluate, group
from raypipe.evaluation.tasks import pattern
from raypipe.evaluation.tasks.pattern import Pattern
from raypipe.export.export import Export, export
from raypipe.inputs import maskfiles
from raypipe.masks import encode_rle, encode_segments


def slow_dice(pred: set, target: set) -> Fraction:
    pixels = len(pred) + len(target)
    return Fraction(2 * len(pred & target), pixels) if pixels else Fraction(1)


def pixels_of(mask: np.ndarray) -> set:
    return {(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_counts_agree_with_a_slow_loop(rng):
    for share in (0.1, 0.5, 0.9):
        pred, target = rng.random((2, 7, 9)) < share
        pairs = list(zip(pred.ravel(), target.ravel(), strict=True))
        counts = pattern.count(pred, target)
        assert counts == tuple(sum((p, t) == kind for p, t in pairs) for kind in ((1, 1), (1, 0), (0, 1), (0, 0)))
        assert pattern.dice(counts) == float(slow_dice(pixels_of(pred), pixels_of(target)))
        assert pattern.iou(counts) == sum(p and t for p, t in pairs) / sum(p or t for p, t in pairs)


def test_two_empty_masks_agree_and_one_empty_mask_does_not():
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    for pred, target, expected in ((empty, empty, 1), (empty, full, 0), (full, empty, 0), (full, full, 1)):
        counts = pattern.count(pred, target)
        assert pattern.dice(counts) == pattern.iou(counts) == expected


@pytest.mark.parametrize("clusters", [0, 1, 2, 4])
def test_the_best_polarity_is_that_of_a_slow_search(rng, clusters):
    for _ in range(20):
        label_map, foreground, target = rng.integers(0, 4, (6, 8)), rng.random((6, 8)) < 0.7, rng.random((6, 8)) < 0.4
        masks = np.stack([(label_map == i) & foreground for i in range(clusters)] or [np.zeros((6, 8), bool)])
        inside, wanted = pixels_of(foreground), pixels_of(target)
        slow = [slow_dice(part, wanted) for m in masks for part in (pixels_of(m), inside - pixels_of(m))]
        found = list(pattern.readings(masks[:clusters], foreground, target))
        assert [pattern.dice(reading.counts) for reading in found] == list(map(float, slow))
        best = pattern.best(found)
        assert 2 * best.segment + (best.sign < 0) == slow.index(max(slow))


def test_counts_give_the_stored_binary_iou(shared):
    case = np.load(shared / "golden/semantic_evaluation/binary_iou.npz")
    for pred, target, expected in zip(case["pred"], case["gt"], case["iou"], strict=True):
        valid = target != 255
        counts = pattern.count(pred[valid] == 1, target[valid] == 1)
        assert counts.tp / (counts.tp + counts.fp + counts.fn + 1e-7) == pytest.approx(expected, abs=1e-12)


def test_precision_recall_and_the_share_of_false_positives_agree_with_a_slow_loop(rng):
    for share in (0.0, 0.3, 0.9):
        mask, foreground, label = rng.random((3, 7, 9)) < np.array([0.5, 0.6, share])[:, None, None]
        row = {"segments": encode_segments(mask[None]), "foreground": encode_rle(foreground)}
        found = Pattern().measure(row, label)
        pixels = list(zip(mask.ravel(), foreground.ravel(), label.ravel(), strict=True))
        for kind in ("fixed", "best"):
            is_inverse = kind == "best" and found["sign"] < 0
            pred = [f and m != is_inverse for m, f, _ in pixels]
            hits = sum(p and t for p, (_, _, t) in zip(pred, pixels, strict=True))
            others = sum(f and not t for _, f, t in pixels)
            labelled = sum(t for *_, t in pixels)
            assert found[f"precision_{kind}"] == hits / sum(pred)
            assert found[f"recall_{kind}"] == (hits / labelled if labelled else 1)
            assert found[f"fp_share_{kind}"] == (sum(pred) - hits) / others


def test_measures_of_nothing_have_their_value():
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    nothing = {"segments": [], "foreground": encode_rle(full)}
    assert (
        Pattern().measure(nothing, full)["precision_fixed"] == 1
        and Pattern().measure(nothing, full)["recall_fixed"] == 0
    )
    assert (
        Pattern().measure(nothing, empty)["recall_fixed"] == 1
        and Pattern().measure(nothing, full)["fp_share_fixed"] == 0
    )


def test_false_positives_fall_and_so_does_recall_as_nested_masks_shrink(rng):
    soft, label = rng.random((20, 30)), rng.random((20, 30)) < 0.4
    rows = [{"segments": encode_segments((soft > rho)[None]), "foreground": None} for rho in (0.2, 0.4, 0.6, 0.8)]
    found = [Pattern().measure(row, label) for row in rows]
    for name in ("fp_share_fixed", "recall_fixed"):
        values = [each[name] for each in found]
        assert values == sorted(values, reverse=True) and len(set(values)) == 4


def test_groups_are_folders_or_name_prefixes():
    assert [group("a/b/cat_1.jpg", by) for by in ("folder", "prefix", "none")] == ["a/b", "cat", "all"]
    assert [group("cat.jpg", by) for by in ("folder", "prefix", "none")] == [".", "cat", "all"]


def test_an_unknown_task_is_named_with_the_known_ones():
    assert "pattern" in tasks.names()
    with pytest.raises(ValueError, match="did you mean 'pattern'"):
        tasks.find("patern")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_mask_files_are_matched_by_path_then_by_a_stem_that_is_unique_on_both_sides(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png", "deep/2.png", "3.png", "4.png", "4.gif", "5.png", "d/7.png")
    keys = [
        "a/1.jpg",
        "c/1.jpg",
        "x/2.jpg",
        "x/3.jpg",
        "y/3.jpg",
        "4.jpg",
        "6.jpg",
        "e/7.jpg",
        "d/7.jpg",
        "a/1.jpg",
        "x/2.jpg",
    ]
    matches = maskfiles.match(str(tmp_path), keys)
    expected = {"a/1.jpg": "a/1.png", "x/2.jpg": "deep/2.png", "d/7.jpg": "d/7.png"}
    assert matches.location == {key: str(tmp_path / name) for key, name in expected.items()}
    assert sorted(matches.unused) == ["3.png", "4.gif", "4.png", "5.png", "b/1.png"]


def test_packed_masks_are_refused(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    with tarfile.open(tmp_path / "masks.tar", "w") as tar:
        tar.add(tmp_path / "1.png", "1.png")
    with pytest.raises(ValueError, match="unpack them"):
        maskfiles.match(str(tmp_path / "masks.tar"), ["1.jpg"])


@pytest.fixture
def labelled(tmp_path):
    """A run over two groups of images, of which some have no fit label, and the folder of labels."""
    rng = np.random.default_rng(1)
    for name in ("cat_1", "cat_2", "cow_1", "cow_2", "cow_3", "cow_4"):
        picture = rng.integers(0, 256, (20, 30, 3), np.uint8)
        for folder, pixels in (("photos", picture), ("labels", (picture.mean(2) < 90).astype(np.uint8) * 255)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
    labels = tmp_path / "labels"
    (tmp_path / "photos/cow_1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (labels / "cow_2.png").unlink()
    Image.new("L", (31, 20)).save(labels / "cow_3.png")
    (labels / "cow_4.png").write_bytes((labels / "cow_4.png").read_bytes()[:60])
    Image.new("L", (30, 20)).save(labels / "dog_1.png")
    options = {"foreground": "whole", "local": True, "max_bad_fraction": 1.0}
    raypipe.label("kmeans", tmp_path / "photos", tmp_path / "run", **options)
    return tmp_path / "run", labels


def test_a_run_gets_a_row_per_image_and_says_what_could_not_be_measured(labelled):
    run, labels = labelled
    result = evaluate(Evaluate((str(run),), str(labels), group="prefix"))
    table = pq.read_table(result.table, partitioning=None)
    assert table.schema.equals(Pattern().schema())
    rows = {row["key"]: row for row in table.to_pylist()}
    statuses = {"cat_1.png": "ok", "cat_2.png": "ok", "cow_1.png": "failed", "cow_2.png": "no_label"}
    assert {key: row["status"] for key, row in rows.items()} == statuses | {
        "cow_3.png": "other_size",
        "cow_4.png": "bad_label",
    }
    assert rows["cow_3.png"]["dice_best"] is None and rows["cow_3.png"]["tp_fixed"] is None
    for masks in raypipe.load(run).to_pylist():
        row = rows[masks["key"]]
        if row["status"] == "ok":
            target = np.asarray(Image.open(labels / masks["key"])) >= 128
            pred = raypipe.decode(masks)[0]
            assert row["dice_fixed"] == float(slow_dice(pixels_of(pred), pixels_of(target)))
            assert [row[f"{n}_fixed"] for n in ("tp", "fp", "fn", "tn")] == list(pattern.count(pred, target))
            assert sum(row[f"{n}_best"] for n in ("tp", "fp", "fn", "tn")) == 600
    cats = [rows[f"cat_{i}.png"]["dice_best"] for i in (1, 2)]
    assert result.means["dice_best"] == result.group_means["dice_best"] == pytest.approx(np.mean(cats), abs=1e-12)
    assert result.groups["cow"] == {"images": 0, "failed": 1} | dict.fromkeys(Pattern.SHOWN)
    assert result.counts == {"ok": 2, "failed": 1, "no_label": 1, "other_size": 1, "bad_label": 1}
    assert result.unused_labels == 1 and result.examples["other_size"] == ["cow_3.png"]


def test_measuring_again_replaces_the_table_and_other_labels_get_their_own(labelled, tmp_path):
    run, labels = labelled
    first = evaluate(Evaluate((str(run),), str(labels)))
    Image.new("L", (30, 20)).save(labels / "cat_1.png")
    second = evaluate(Evaluate((str(run),), f"{labels}/"))
    assert first.table == second.table and first.means != second.means
    assert pq.read_table(second.table, partitioning=None).num_rows == 6
    labels.rename(tmp_path / "others")
    other = evaluate(Evaluate((str(run),), str(tmp_path / "others")))
    assert other.means == second.means and other.table != second.table
    assert len(list((run / "metrics/task=pattern").iterdir())) == 2


def test_the_command_prints_a_table_and_json_last(labelled, capsys):
    run, labels = map(str, labelled)
    assert main(["evaluate", run, "--labels", labels, "--task", "pattern", "--group", "prefix", "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["cat", "cow"]
    assert "1 labels have another size than their image: cow_3.png" in lines
    found = json.loads(lines[-1])
    assert found["counts"]["ok"] == 2
    assert f"{found['means']['dice_best']:>9.3f}  dice_best: Dice, better polarity" in lines


def test_several_runs_are_compared_side_by_side(labelled, tmp_path, capsys, caplog):
    run, labels = labelled
    options = {"foreground": "whole", "local": True, "max_bad_fraction": 1.0}
    raypipe.label("watershed", tmp_path / "photos", tmp_path / "other", **options)
    places = (str(run), str(tmp_path / "other"))
    caplog.set_level("INFO", "raypipe")
    assert main(["evaluate", *places, "--labels", str(labels), "--group", "prefix", "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert caplog.messages.count("labels: light on dark, 6 files") == 1
    found = {place: evaluate(Evaluate((place,), str(labels))).means for place in places}
    table = lines[lines.index(next(line for line in lines if line.startswith("dice best"))) :]
    assert table[0].split() == ["dice", "best", "run", "other"]
    assert table[1].split() == ["cat", *(f"{means['dice_best']:.3f}" for means in found.values())]
    assert table[2].split() == ["cow", "-", "-"]
    assert lines.count("all runs: 1 labels have another size than their image: cow_3.png") == 1
    assert json.loads(lines[-1])["runs"]["other"]["means"] == found[places[1]]


def test_no_run_and_a_run_named_twice_are_refused(labelled, capsys):
    run, labels = map(str, labelled)
    assert main(["evaluate", run, f"{run}/", "--labels", labels]) == 2
    assert "the same run is named twice" in capsys.readouterr().err
    assert main(["evaluate", "--labels", labels]) == 2
    assert "needs a run" in capsys.readouterr().err


def test_labels_of_other_images_are_a_mistake_that_shows_both_names(labelled, tmp_path, capsys):
    touch(tmp_path / "others", "x.png")
    assert main(["evaluate", str(labelled[0]), "--labels", str(tmp_path / "others")]) == 2
    assert "images are named as 'cat_1.png', labels as 'x.png'" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "photos"), "--labels", str(labelled[1])]) == 2
    assert "not a raypipe run" in capsys.readouterr().err


def write_stored(folder, make, name: str, **options) -> str:
    """A folder of the labels of `labelled` that fit, stored in another way: `make` makes the file of a bool (H, W)."""
    (folder / name).mkdir()
    for file in ("cat_1", "cat_2"):
        mask = np.asarray(Image.open(folder / f"labels/{file}.png")) >= 128
        make(mask).save(folder / name / f"{file}.png", **options)
    return str(folder / name)


STORED = {
    "nonzero": lambda mask: Image.fromarray(mask.astype(np.uint8)),
    "ink": lambda mask: Image.fromarray(255 - mask * np.uint8(255)),
    "2": lambda mask: Image.fromarray(np.where(mask, 2, 255 * np.eye(*mask.shape, dtype=bool)).astype(np.uint8)),
    "alpha": lambda mask: Image.fromarray(np.dstack([np.full((*mask.shape, 3), 200), mask * 255]).astype(np.uint8)),
}


@pytest.mark.parametrize("kind", STORED)
def test_labels_measure_the_same_however_they_are_stored(labelled, tmp_path, kind, caplog):
    run, labels = labelled
    expected = evaluate(Evaluate((str(run),), str(labels))).means
    with caplog.at_level("INFO", "raypipe"):
        found = evaluate(Evaluate((str(run),), write_stored(tmp_path, STORED[kind], "stored")))
    assert found.means == expected and found.label_kind == kind
    assert pq.read_schema(found.table).metadata[b"raypipe.label_kind"] == kind.encode()
    assert caplog.messages[-1].startswith("labels: ") and caplog.messages[-1].endswith(", 2 files")


def test_a_kind_that_is_asked_for_is_taken(labelled, tmp_path, capsys):
    run, labels = map(str, labelled)
    classes = write_stored(tmp_path, lambda mask: Image.fromarray((1 + mask + 0 * mask).astype(np.uint8)), "classes")
    assert main(["evaluate", run, "--labels", classes]) == 2
    assert (
        "which of them is the object? --label-kind light|ink|alpha|nonzero or --label-value" in capsys.readouterr().err
    )
    assert main(["evaluate", run, "--labels", classes, "--label-value", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["means"] == evaluate(Evaluate((run,), labels)).means and found["label_kind"] == "2"
    ink = Evaluate((run,), labels, label_kind="ink")
    assert evaluate(ink).means != found["means"] and evaluate(ink).label_kind == "ink"
    for words, message in (
        (["--label-value", "9"], "no pixel of any of the labels is set, read as value 9"),
        (["--label-value", "two"], "--label-value 'two': expected whole numbers"),
        (["--label-kind", "ink", "--label-value", "2"], "--label-kind ink has no effect"),
    ):
        assert main(["evaluate", run, "--labels", classes, *words]) == 2
        assert message in capsys.readouterr().err


def test_labels_by_which_nothing_can_be_measured_are_a_mistake(labelled, tmp_path, capsys):
    run, labels = labelled
    before = sorted((run / "metrics").rglob("*"))
    for name, change in {
        "another size": lambda mask: Image.fromarray(mask[:10]),
        "empty": lambda mask: Image.fromarray(mask & False),
    }.items():
        assert main(["evaluate", str(run), "--labels", write_stored(tmp_path, change, name)]) == 2
        error = capsys.readouterr().err
        expected = "2 labels have another size than their image" if name == "another size" else "no pixel of any"
        assert expected in error and "Traceback" not in error
    assert sorted((run / "metrics").rglob("*")) == before


def test_empty_labels_are_said(labelled, tmp_path):
    run, labels = labelled
    Image.new("L", (30, 20)).save(labels / "cat_1.png")
    result = evaluate(Evaluate((str(run),), str(labels)))
    assert result.empty_labels == 1 and "1 of 2 labels are empty: no pixel is set" in result.text().splitlines()


@pytest.mark.parametrize("form", ["png", "cutout"])
def test_our_own_exports_are_read_as_what_they_were(labelled, tmp_path, form):
    run, _ = labelled
    out = str(tmp_path / "out")
    export(Export(str(run), form, output=out))
    result = evaluate(Evaluate((str(run),), out))
    assert result.counts["ok"] == 5 and result.means["dice_fixed"] == 1
    options = {"foreground": f"given:{out}", "local": True, "max_bad_fraction": 1.0}
    raypipe.label("kmeans", tmp_path / "photos", tmp_path / "inside", **options)
    first = {row["key"]: row["segments"][0]["counts"] for row in raypipe.load(run).to_pylist() if row["segments"]}
    rows = raypipe.load(tmp_path / "inside").to_pylist()
    assert {row["key"]: row["foreground"]["counts"] for row in rows if row["foreground"]} == first


@pytest.mark.parametrize("form", ["png", "cutout"])
def test_an_export_of_some_segments_is_read_as_the_first_of_them(labelled, tmp_path, form):
    run, out = str(labelled[0]), str(tmp_path / "out")
    export(Export(run, form, output=out, where="segment = 1"))
    result = evaluate(Evaluate((run,), out))
    assert result.counts["ok"] == 5 and result.means["dice_best"] == 1 > result.means["dice_fixed"]


def test_a_run_is_no_folder_of_labels(labelled, capsys):
    run = str(labelled[0])
    assert main(["evaluate", run, "--labels", run]) == 2
    assert f"is a run; `raypipe export {run} --format png` makes a folder of masks of it" in capsys.readouterr().err


def test_own_label_maps_may_have_a_palette_and_names(labelled, tmp_path, capsys):
    run, _ = labelled
    out = tmp_path / "out"
    export(Export(str(run), "png", output=str(out)))
    for file in out.rglob("*.png"):
        image = Image.fromarray(np.asarray(Image.open(file)), "P")
        image.putpalette([0, 0, 0, 255, 255, 255, 230, 120, 20])
        image.save(file)
    assert evaluate(Evaluate((str(run),), str(out))).means["dice_fixed"] == 1
    (out / "values.csv").write_text("value,name\n0,background\n1,stripes\n2,spots\n")
    assert main(["evaluate", str(run), "--labels", str(out)]) == 2
    assert "label maps of raypipe with 1 'stripes', 2 'spots'; which is the object?" in capsys.readouterr().err
    assert evaluate(Evaluate((str(run),), str(out), label_value=1)).means["dice_fixed"] == 1


@pytest.mark.parametrize(
    ("method", "foreground", "expected"),
    [
        ("kmeans", "whole", 0.431),
        ("kmeans", "given", 0.634),
        ("watershed", "whole", 0.412),
        ("watershed", "given", 0.593),
    ],
)
def test_the_labelled_photographs_give_the_measured_means(shared, tmp_path, method, foreground, expected):
    examples = shared / "data/gloper_examples"
    foreground = foreground if foreground == "whole" else f"given:{examples / 'foreground_grabcut'}"
    raypipe.label(method, examples / "images", tmp_path / "run", foreground=foreground, local=True)
    result = evaluate(Evaluate((str(tmp_path / "run"),), str(examples / "labels"), group="prefix"))
    assert result.counts["ok"] == 20 and len(result.groups) == 10
    assert result.means["dice_best"] == pytest.approx(expected, abs=0.005)
