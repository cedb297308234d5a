"""Saliency measures: golden values, slow loops over made data sets of each layout, and labels as they come."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.golden import arrays
from support.layouts import MASKS, SIZE, write_masks, write_photos
from support.written import masks_row, write_run

import raypipe
from raypipe.cli.verbs import main
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.tasks.saliency import (
    THRESHOLDS,
    Saliency,
    counts_above,
    f_measure,
    scaled,
    selfmask_f,
    size_bins,
)
from raypipe.masks import decode_soft, encode_segments, encode_soft


def plain_counts(soft: np.ndarray, target: np.ndarray) -> tuple[list, list]:
    """A pass over all pixels for each threshold."""
    above = [soft > threshold for threshold in THRESHOLDS]
    return [int((mask & target).sum()) for mask in above], [int(mask.sum()) for mask in above]


def plain_f(hits: int, predicted: int, wanted: int) -> float:
    precision = hits / predicted if predicted else 1
    recall = hits / wanted if wanted else 1
    return 1.3 * precision * recall / (0.3 * precision + recall) if precision + recall else 0


def soft_of(rng, target: np.ndarray) -> np.ndarray:
    """A soft mask near a target, with many values at thresholds, 0 and 1."""
    soft = (target * 0.6 + rng.random(target.shape) * 0.6 - 0.1).clip(0, 1).astype(np.float32)
    soft[::2] = np.rint(soft[::2] * 255) / np.float32(255)
    return soft


@pytest.mark.parametrize("kind", ["smooth", "stored", "at thresholds", "constant", "large"])
def test_the_counts_of_two_histograms_are_those_of_255_passes(kind):
    rng = np.random.default_rng(3)
    target = rng.random((37, 53)) < 0.4
    soft = rng.random(target.shape, dtype=np.float32)
    soft = {
        "smooth": soft,
        "stored": decode_soft(encode_soft(soft)),
        "at thresholds": rng.choice(
            np.concatenate([np.nextafter(THRESHOLDS, end) for end in np.float32([0, 1])]), soft.shape
        ),
        "constant": np.full(soft.shape, THRESHOLDS[77]),
        "large": np.tile(soft, (20, 1)),
    }[kind]
    soft[0] = rng.choice([*THRESHOLDS, 1], soft.shape[1])
    target = np.tile(target, (len(soft) // len(target), 1))
    for wanted in (target, target & False, target | True):
        hits, predicted = counts_above(soft, wanted)
        assert [hits.tolist(), predicted.tolist()] == [*plain_counts(soft, wanted)]


def measured(soft: np.ndarray, target: np.ndarray, task: Saliency) -> dict:
    segments = encode_segments((soft > 0.5)[None], soft=soft[None])
    row = {"height": soft.shape[0], "width": soft.shape[1], "segments": segments}
    return task.cells(row, target)


def test_the_golden_metrics_are_met(shared):
    case, task = arrays(shared / "golden/saliency_evaluation/metrics.npz"), Saliency(f_variants=True)
    curves, rows = [], []
    for i, (soft, target) in enumerate(zip(case["pred"], case["gt_u8"] >= 128, strict=True)):
        hits, predicted = counts_above(soft, target)
        wanted, mask = np.count_nonzero(target), soft > 0.5
        curves.append(f_measure(hits, predicted, wanted))
        np.testing.assert_allclose(np.where(predicted, hits / predicted.clip(1), 1), case["precision"][i], atol=1e-6)
        np.testing.assert_allclose(hits / wanted if wanted else 1, case["recall"][i], atol=1e-6)
        np.testing.assert_allclose(curves[-1], case["f_curve"][i], atol=1e-5)
        best = selfmask_f(hits, predicted, wanted).max()
        half = selfmask_f(np.count_nonzero(mask & target), np.count_nonzero(mask), wanted)
        assert best == pytest.approx(case["variant_selfmask_f_max_per_image"][i], abs=1e-5)
        assert half == pytest.approx(case["variant_selfmask_f_measure_per_image"][i], abs=1e-5)
        rows.append(found := measured(soft, target, task))
        assert found["selfmask_f_max"] == pytest.approx(best, abs=1e-4)  # soft masks are stored with 16 bits
        assert found["per_image_max_f"] == pytest.approx(curves[-1].max(), abs=1e-3)
        for name, stored, tolerance in (
            ("acc", "accuracy", 1e-6),
            ("iou", "iou", 1e-6),
            ("f_half", "f_at_half", 1e-5),
            ("mae", "mae", 1e-5),
            ("area_ratio", "area_ratio", 1e-6),
        ):
            value = np.nan if found[name] is None else found[name]
            assert value == pytest.approx(case[stored][i], abs=tolerance, nan_ok=True), (i, name)
    mean = np.mean(curves, 0)
    np.testing.assert_allclose(mean, case["f_mean_curve"], atol=1e-5)
    assert mean.argmax() == case["max_f_threshold_index"] and mean.max() == pytest.approx(case["max_f"], abs=1e-5)
    sums = task.sums(rows)
    values, details = task.values(sums), task.details(sums)
    assert values["acc"] == pytest.approx(case["mean_accuracy"], abs=1e-6)
    assert values["iou"] == pytest.approx(case["mean_iou"], abs=1e-6) and details["iou_undefined"] == 1
    assert values["max_f"] == pytest.approx(case["max_f"], abs=1e-3)
    assert values["per_image_max_f"] == pytest.approx(case["mean_of_per_image_max_f"], abs=1e-3)
    assert values["per_image_max_f"] >= values["max_f"]


def test_the_golden_size_bins_are_met(shared):
    case = arrays(shared / "golden/saliency_evaluation/size_bins.npz")
    known = np.isfinite(case["iou"])
    table = size_bins(case["area_ratio"][known], case["iou"][known], bins=20).to_pydict()
    assert table["images"] == case["bin_count"].tolist() and [*table["low"], 1] == case["bin_edges"].tolist()
    ious = [np.nan if iou is None else iou for iou in table["iou"]]
    np.testing.assert_allclose(ious, case["bin_mean_iou"], atol=1e-6)
    of_bin = np.minimum(np.floor(20 * case["area_ratio"]), 19)
    assert (of_bin == case["bin_index"]).all()


def test_bins_of_as_many_images_each():
    rng = np.random.default_rng(0)
    ratios, ious = rng.random(103) ** 3, rng.random(103)
    table = size_bins(ratios, ious, bins=5, binning="quantile").to_pydict()
    assert sum(table["images"]) == 103 and max(table["images"]) - min(table["images"]) <= 1
    order = ious[np.argsort(ratios)]
    assert table["iou"][0] == pytest.approx(order[: table["images"][0]].mean(), abs=1e-12)
    assert size_bins(ratios[:0], ious[:0], bins=5, binning="quantile")["images"].to_pylist() == [0] * 5


def made(root, name: str, i: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A data set in a layout, and a run over it: soft masks and targets by stem, among them empty and full ones."""
    rng = np.random.default_rng(i)
    photos, masks = MASKS[name][i]
    pairs = {}
    for stem, share in (("a", 0.02), ("b", 0.3), ("c", 0.5), ("d", 1.0), ("empty", 0.0), ("false_alarm", 0.0)):
        target = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) < share * SIZE[0] * SIZE[1]
        soft = soft_of(rng, target) * (stem != "empty")
        soft[5:9, 3:9] = 0.9 if stem == "false_alarm" else soft[5:9, 3:9]
        soft = decode_soft(encode_soft(soft))
        pairs[stem] = (soft, target)
    write_photos(root / photos, [f"{stem}.jpg" for stem in pairs])
    border = {stem: np.where(target, 255, rng.integers(0, 128, SIZE)) for stem, (_, target) in pairs.items()}
    write_masks(root / masks, {f"{stem}.png": mask.astype(np.uint8) for stem, mask in border.items()})
    rows = [masks_row(f"{stem}.jpg", (soft > 0.5)[None], soft=soft[None]) for stem, (soft, _) in pairs.items()]
    write_run(str(root / "run"), rows)
    return pairs


def plain_summary(pairs: list) -> dict:
    """The values of a run by slow loops."""
    accs, ious, halves, maes, curves, maxima, adaptive = [], [], [], [], [], [], []
    for soft, target in pairs:
        pixels = [(float(p), bool(g)) for p, g in zip(soft.ravel(), target.ravel(), strict=True)]
        accs.append(sum((p > 0.5) == g for p, g in pixels) / len(pixels))
        either = sum(p > 0.5 or g for p, g in pixels)
        if either:
            ious.append(sum(p > 0.5 and g for p, g in pixels) / either)
        maes.append(sum(abs(p - g) for p, g in pixels) / len(pixels))
        wanted = sum(g for _, g in pixels)
        halves.append(plain_f(sum(p > 0.5 and g for p, g in pixels), sum(p > 0.5 for p, _ in pixels), wanted))
        curves.append([plain_f(*counts, wanted) for counts in zip(*plain_counts(soft, target), strict=True)])
        maxima.append(max(curves[-1]))
        above = [(p > 2 * sum(p for p, _ in pixels) / len(pixels), g) for p, g in pixels]
        adaptive.append(plain_f(sum(p and g for p, g in above), sum(p for p, _ in above), wanted))
    mean = [sum(column) / len(curves) for column in zip(*curves, strict=True)]
    lists = {"acc": accs, "iou": ious, "f_half": halves, "mae": maes, "per_image_max_f": maxima, "adaptive_f": adaptive}
    return {name: sum(values) / len(values) for name, values in lists.items()} | {"max_f": max(mean), "curve": mean}


@pytest.mark.parametrize(("name", "i"), [(name, i) for name, layouts in MASKS.items() for i in range(len(layouts))])
def test_a_data_set_of_each_layout_is_measured_as_by_slow_loops(tmp_path, name, i):
    pairs = made(tmp_path, name, i)
    options = Evaluate((str(tmp_path / "run"),), dataset=name, root=str(tmp_path))
    found, expected = evaluate(options, Saliency(f_variants=True)), plain_summary(list(pairs.values()))
    assert found.counts["ok"] == 6 and found.lacking == {"iou": 1} and found.empty_labels == 2
    for value in expected.keys() - {"curve"}:
        assert found.means[value] == pytest.approx(expected[value], abs=1e-9), value
    (file,) = (tmp_path / "run/metrics/summary/task=saliency").iterdir()
    (row,) = pq.read_table(file, partitioning=None).to_pylist()
    np.testing.assert_allclose(row["f_curve"], expected["curve"], atol=1e-9)
    assert row["max_f_threshold"] == expected["curve"].index(max(expected["curve"])) and row["iou_undefined"] == 1
    assert {key: row[key] for key in found.means} == found.means
    assert (row["dataset"], row["method"], row["ok"], row["lacking"]) == (name, "kmeans", 6, [("iou", 1)])
    (file,) = (tmp_path / "run/metrics/size_bins/task=saliency").iterdir()
    bins = pq.read_table(file, partitioning=None).to_pylist()
    ious = {row["key"][:-4]: row["iou"] for row in pq.read_table(found.table, partitioning=None).to_pylist()}
    expected = {0: [ious["a"], ious["false_alarm"]], 6: [ious["b"]], 10: [ious["c"]], 19: [ious["d"]]}
    assert len(bins) == 20 and {each["dataset"] for each in bins} == {name}
    for each in bins:
        its = expected.get(each["bin"], [])
        assert each["images"] == len(its)
        assert each["iou"] == (pytest.approx(sum(its) / len(its), abs=1e-12) if its else None)


def test_without_soft_masks_nothing_is_made_of_binary_ones(tmp_path):
    target = np.zeros(SIZE, bool)
    target[3:9, 4:20] = True
    write_masks(tmp_path / "labels", {f"{each}.png": np.uint8(255) * target for each in "ab"})
    rows = [masks_row("a.jpg", target[None]), masks_row("b.jpg", target[None][:0])]
    write_run(str(tmp_path / "run"), rows)
    found = evaluate(Evaluate((str(tmp_path / "run"),), str(tmp_path / "labels")), Saliency(f_variants=True))
    assert found.means["iou"] == found.means["f_half"] == 0.5
    nothing = ("max_f", "mae", "per_image_max_f", "selfmask_f_max", "adaptive_f")
    assert [found.means[name] for name in nothing] == [None] * 5
    assert found.details["f_curve"] is found.details["max_f_threshold"] is None
    assert "no mae in 1 of 2 images" in found.text().splitlines()


def test_an_image_without_a_mask_counts_as_nothing_found_among_soft_ones(tmp_path):
    target = np.zeros(SIZE, bool)
    target[3:9, 4:20] = True
    write_masks(tmp_path / "labels", {f"{each}.png": np.uint8(255) * target for each in "ab"})
    soft = target * np.float32(0.8)
    write_run(
        str(tmp_path / "run"),
        [masks_row("a.jpg", (soft > 0.5)[None], soft=soft[None]), masks_row("b.jpg", target[None][:0])],
    )
    found = evaluate(Evaluate((str(tmp_path / "run"),), str(tmp_path / "labels")), Saliency())
    assert found.means["max_f"] == 0.5 and found.means["mae"] == pytest.approx(0.6 * target.mean(), abs=1e-6)
    assert "per_image_max_f" not in found.means and not found.lacking


def test_the_first_mask_is_the_prediction():
    target = np.eye(4, 6, dtype=bool)
    row = {"height": 4, "width": 6, "segments": encode_segments(np.stack([target, ~target]))}
    assert Saliency().measure(row, target)["iou"] == 1
    assert Saliency().counted(row, {}, "iou").tolist() == [target.tolist()]


FILES = {
    "three channels": lambda mask: Image.fromarray(np.repeat(mask[:, :, None], 3, 2)),
    "RGBA": lambda mask: Image.fromarray(np.dstack([mask] * 3 + [np.full_like(mask, 255)])),
    "palette": lambda mask: Image.fromarray(mask).convert("P"),
    "16 bits": lambda mask: Image.fromarray(mask.astype(np.uint16) * 257),
    "1 bit": lambda mask: Image.fromarray(mask >= 128),
    "twice as large": lambda mask: Image.fromarray(mask.repeat(2, 0).repeat(2, 1)),
}


@pytest.mark.parametrize("kind", FILES)
def test_labels_of_data_sets_are_grey_whatever_they_are_stored_as(tmp_path, kind):
    rng = np.random.default_rng(0)
    write_photos(tmp_path / "ECSSD/images", ["a.jpg"])
    (tmp_path / "ECSSD/ground_truth_mask").mkdir()
    grey = rng.choice(np.array([0, 100, 127, 128, 255], np.uint8), SIZE)
    FILES[kind](grey).save(tmp_path / "ECSSD/ground_truth_mask/a.png")
    write_run(str(tmp_path / "run"), [masks_row("a.jpg", (grey >= 128)[None])])
    found = evaluate(Evaluate((str(tmp_path / "run"),), dataset="ecssd", root=str(tmp_path)), Saliency())
    assert found.means["iou"] == found.means["acc"] == 1
    (row,) = pq.read_table(found.table, partitioning=None).to_pylist()
    assert row["is_scaled"] == (kind == "twice as large")


def test_a_palette_of_colours_is_its_grey(tmp_path):
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3), "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 0, 127, 128, 129])
    image.save(tmp_path / "a.png")
    label = Saliency().read(str(tmp_path / "a.png"), max_bytes=10**6, max_pixels=10**6)
    assert label.tolist() == (np.asarray(image.convert("L")) >= 128).tolist()


def test_labels_of_another_shape_are_listed_and_of_the_same_scaled():
    row, task = {"height": 100, "width": 150}, Saliency()
    shapes = {
        (100, 150): True,
        (101, 150): True,
        (102, 150): False,
        (200, 300): True,
        (150, 100): False,
        (10, 15): True,
    }
    for shape, fits in shapes.items():
        assert task.fits(row, np.zeros(shape, bool)) == fits, shape
    label = np.random.default_rng(0).random((5, 7)) < 0.5
    large = scaled(label, (15, 21))
    assert (large[1::3, 1::3] == label).all() and (large == label.repeat(3, 0).repeat(3, 1)).all()
    assert (scaled(large, (5, 7)) == label).all() and scaled(label, (5, 7)) is label


def test_the_protocol_of_training_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(tmp_path), "--labels", "x", "--task", "saliency", "--protocol", "crop320"])
    text = " ".join(capsys.readouterr().err.split())
    assert "--protocol crop320 belongs to training" in text and "train sempart --validate DATASET" in text
    with pytest.raises(ValueError, match="--size-bins must be positive"):
        Saliency(size_bins=0)


def test_bad_files_of_a_data_set_are_counted_and_listed(tmp_path, capsys):
    photos, masks = (tmp_path / each for each in MASKS["ecssd"][0])
    write_photos(photos, [f"{each}.jpg" for each in "abcd"])
    good = np.uint8(255) * (np.arange(SIZE[1]) < 9)[None].repeat(SIZE[0], 0)
    write_masks(masks, {"a.png": good, "b.png": good[:, :-6], "alone.png": good})
    (masks / "c.png").write_bytes(b"nothing")
    write_run(str(tmp_path / "run"), [masks_row(f"{each}.jpg", good[None] > 0) for each in "abcd"])
    words = ["--dataset", "ecssd", "--root", str(tmp_path), "--task", "saliency", "--json"]
    assert main(["evaluate", str(tmp_path / "run"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "1 labels have another size than their image: b.jpg",
        "1 labels cannot be read: c.jpg",
        "1 images have no label of their own: d.jpg",
        "1 labels belong to no image: alone.png",
    ):
        assert line in lines
    assert json.loads(lines[-1])["counts"] == dict(ok=1, failed=0, no_label=1, other_size=1, bad_label=1)


def test_masks_that_never_were_probabilities_count_as_0_and_1(tmp_path):
    target = np.zeros((24, 30), bool)
    target[6:18, 8:22] = True
    write_masks(tmp_path / "photos", {"a.png": np.where(target, 40, 200).astype(np.uint8)})
    write_masks(tmp_path / "labels", {"a.png": np.uint8(255) * target})
    found = {}
    for refine in (None, "guided"):  # the watershed has no probabilities; what a refiner gives is soft
        raypipe.label(
            "watershed",
            tmp_path / "photos",
            run := str(tmp_path / f"{refine}"),
            foreground="whole",
            refine=refine,
            local=True,
        )
        found[refine] = evaluate(Evaluate((run,), str(tmp_path / "labels")), Saliency()).means
    assert found[None]["max_f"] == found[None]["f_half"] and found[None]["mae"] == pytest.approx(1 - found[None]["acc"])
    assert found["guided"]["max_f"] is found["guided"]["mae"] is None and found["guided"]["acc"] is not None
