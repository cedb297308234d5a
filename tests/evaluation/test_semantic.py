"""Named masks against classes: mIoU in every layout, what is ignored, whose mask is whose class, what is refused."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.golden import arrays
from support.layouts import CLASSES, picture_of, write_classes
from support.written import masks_row, write_run

from raypipe import classes, images
from raypipe.cli.verbs import main
from raypipe.evaluation import classmaps
from raypipe.evaluation.datasets import find
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.tasks import semantic
from raypipe.evaluation.tasks.semantic import Semantic
from raypipe.types import LabelMap

SIZE = (24, 32)
NAMES = [(name, i) for name, layouts in CLASSES.items() for i in range(len(layouts))]
FOLDERS = {
    "coca": ["Accordion/1", "UAV/1", "UAV/2", "avocado/3"],
    "cityscapes_object": ["bonn/b_1", "bonn/b_2", "ulm/u_1"],
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def blobs(rng, count: int, size: tuple[int, int] = SIZE, numbers=None) -> np.ndarray:
    """A label map of squares of up to `count` classes."""
    coarse = rng.choice(numbers if numbers is not None else count + 1, (size[0] // 8, size[1] // 8))
    return np.repeat(np.repeat(coarse, 8, 0), 8, 1).astype(np.int32)


def made(rng, name: str) -> tuple[dict, dict]:
    """Labels of a data set by stem, and predictions, which agree in part and use all numbers of its list."""
    most = len(classes.read(name).names)
    stems = FOLDERS.get(name, [f"n01443537/{i}" if "imagenet" in name else f"{i:03d}" for i in range(4)])
    labels = {stem: blobs(rng, most, numbers=[0, 1, 2, most - 1, most]) for stem in stems}
    if name == "coca":
        number = {category: i for i, category in enumerate(classes.read(name).names, 1)}
        labels = {stem: (label > 1) * number[stem.split("/")[0]] for stem, label in labels.items()}
    elif name not in ("coco2017", "cityscapes_object"):
        for label in labels.values():
            label[:3] = label[:, -2:] = -1
    predictions = {stem: np.where(rng.random(SIZE) < 0.6, label.clip(0), 2) for stem, label in labels.items()}
    return labels, predictions


def row_of(key: str, predicted: np.ndarray, names, **cells) -> dict:
    """A row of a run with a mask for each class of a label map."""
    numbers = [number for number in np.unique(predicted).tolist() if number > 0]
    masks = np.stack([predicted == number for number in numbers]) if numbers else np.zeros((0, *predicted.shape), bool)
    return masks_row(key, masks, labels=[names[number - 1] for number in numbers], **cells)


def plain(labels, predictions, count: int) -> dict:
    """The same values from the definitions, with fractions, over the pixels as they lie one after the other."""
    pairs = Counter()
    for label, predicted in zip(labels, predictions, strict=True):
        pairs.update((g, p) for g, p in zip(label.ravel().tolist(), predicted.ravel().tolist(), strict=True) if g >= 0)
    total, found = sum(pairs.values()), {"class_iou": [], "recall": [], "freqw_acc": Fraction(0)}
    for number in range(count):
        both = pairs[number, number]
        wanted = sum(pixels for (g, _), pixels in pairs.items() if g == number)
        predicted = sum(pixels for (_, p), pixels in pairs.items() if p == number)
        iou = Fraction(both, wanted + predicted - both) if wanted + predicted else None
        found["class_iou"].append(iou)
        found["recall"].append(Fraction(both, wanted) if wanted else None)
        found["freqw_acc"] += Fraction(wanted, total) * iou if wanted else 0
    for name, of in (("miou", "class_iou"), ("mean_acc", "recall")):
        known = [value for value in found[of] if value is not None]
        found[name] = sum(known) / len(known)
    return found | {"pixel_acc": Fraction(sum(n for (g, p), n in pairs.items() if g == p), total)}


def evaluated(tmp_path, name: str, predictions: dict, **options):
    """What `evaluate` says of a run over photographs of a data set in tmp_path."""
    end = "_leftImg8bit.png" if name == "cityscapes_object" else ".jpg"
    rows = [row_of(stem + end, each, classes.read(name).names) for stem, each in predictions.items()]
    write_run(str(tmp_path / "run"), rows)
    return evaluate(Evaluate((str(tmp_path / "run"),), dataset=name, root=str(tmp_path), **options))


@pytest.mark.parametrize(("name", "i"), NAMES)
def test_all_values_equal_the_definitions_in_every_layout(tmp_path, rng, name, i):
    labels, predictions = made(rng, name)
    if name == "pascal_context_59" and i:  # whose numbers are those of other classes too: none is ignored
        labels = {stem: label.clip(0) for stem, label in labels.items()}
    write_classes(tmp_path, name, labels, i)
    result = evaluated(tmp_path, name, predictions)
    count = len(classes.read(name).names) + 1
    expected = plain(labels.values(), predictions.values(), count)
    assert result.counts["ok"] == len(labels) and not result.outside and not result.unused_labels
    for value in Semantic.SHOWN:
        assert result.means[value] == pytest.approx(float(expected[value]), abs=1e-12), value
    for found, iou in zip(result.details["class_iou"], expected["class_iou"], strict=True):
        assert found == (None if iou is None else pytest.approx(float(iou), abs=1e-12))
    assert result.details["class_names"] == ["background", *classes.read(name).names]
    assert result.details["ignored_pixels"] == sum(int((label < 0).sum()) for label in labels.values())
    of_images = {row["key"]: row for row in pq.read_table(result.table, partitioning=None).to_pylist()}
    for (stem, label), row in zip(sorted(labels.items()), (of_images[key] for key in sorted(of_images)), strict=True):
        assert row["miou"] == pytest.approx(float(plain([label], [predictions[stem]], count)["miou"]), abs=1e-12)


@pytest.mark.parametrize("name", ["running_score_voc", "running_score_imagenets"])
def test_sums_and_ratios_are_the_stored_ones(shared, name):
    case = arrays(shared / f"golden/semantic_evaluation/{name}.npz")
    count, sums = int(case["n_classes"]), Counter()
    for i in range(case["n_images"]):
        sums.update(semantic.confusion(case[f"pred_{i}"].astype(np.int32), case[f"gt_{i}"], count))
    matrix = np.zeros((count, count), np.int64)
    for place, pixels in sums.items():
        matrix[divmod(place, count)] = pixels
    assert (matrix == case["confusion"]).all()
    found = semantic.ratios(sums, count)
    np.testing.assert_allclose(found.class_iou, case["class_iou"], rtol=0, atol=1e-12)
    for value, stored in (("miou", "mean_iou"), *((each, each) for each in ("pixel_acc", "mean_acc", "freqw_acc"))):
        assert getattr(found, value) == pytest.approx(float(case[stored]), abs=1e-12)


def test_the_iou_of_an_expert_is_the_stored_one(shared):
    case = arrays(shared / "golden/semantic_evaluation/binary_iou.npz")
    for pred, target, iou in zip(case["pred"].astype(int), case["gt"].astype(int), case["iou"], strict=True):
        assert semantic.binary_iou(semantic.confusion(pred, target, 2)) == pytest.approx(float(iou), abs=1e-12)


def test_all_thresholds_of_scores_are_measured_in_one_pass(shared):
    case = arrays(shared / "golden/semantic_evaluation/threshold_sweep.npz")
    exponents = np.exp(case["temperature"] * (case["cosine"] - case["cosine"].max(1, keepdims=True)).astype(float))
    scores = (exponents / exponents.sum(1, keepdims=True)).astype(np.float32)
    task, sums = Semantic().of_classes("a,b,c,d,e,f"), [Counter() for _ in case["thresholds"]]
    for i, (plane, label) in enumerate(zip(scores, case["gt"].astype(np.int32), strict=True)):
        label = np.where(label < 7, label, -1)
        found = LabelMap(plane.argmax(0).astype(np.uint8) + 1, plane.max(0), "abcdef")
        for k, measured in enumerate(task.measure_above({"key": "x"}, found, label, case["thresholds"])):
            sums[k].update(measured["confusion"])
            alone = task.of_map(case["label"][k, i].astype(np.int32), label)
            assert measured == alone and measured["ignored_pixels"] == np.count_nonzero(label < 0)
    means = [semantic.ratios(counts, 7).miou for counts in sums]
    np.testing.assert_allclose(means, case["mean_iou"], rtol=0, atol=1e-12)
    assert case["thresholds"][int(np.argmax(means))] == case["best_threshold"]


@pytest.mark.parametrize("options", [{}, {"expert": "c"}, {"expert": "e"}, {"object_sizes": True}])
def test_one_pass_over_thresholds_equals_a_loop_over_them(rng, options):
    """Values lie on thresholds too, which come in any order and twice; the classes of the method in its own."""
    names, steps = ["d", "b", "a", "c", "f"], np.float32([0, 0.05, 0.35, 0.7, 0.95, 1])  # the label has an e
    task, thresholds = Semantic(**options).of_classes("a,b,c,d,e,f"), [0.35, 0.0, 0.95, 0.05, 0.35, 0.7, 0.35000002]
    for most in (6, 6, 6, 4):  # an expert of e has no class in the last one
        label = np.where(rng.random((30, 41)) < 0.1, -1, rng.integers(0, most + 1, (30, 41))).astype(np.int32)
        values = np.where(rng.random(label.shape) < 0.5, rng.choice(steps, label.shape), rng.random(label.shape))
        found = LabelMap(rng.integers(0, 6, label.shape).astype(np.uint8), values.astype(np.float32), names)
        measured = task.measure_above({"key": "x"}, found, label, thresholds)
        for threshold, each in zip(thresholds, measured, strict=True):
            planes = np.stack([*found.planes()]) > np.float32(threshold)
            assert each == task.measure(masks_row("x", planes, labels=names), label)
    nothing = LabelMap(np.zeros(label.shape, np.uint8), np.zeros(label.shape, np.float32))
    (each,) = task.measure_above({"key": "x"}, nothing, label, [0.5])
    assert each == task.of_map(np.zeros(label.shape, np.int32), label)


def test_a_class_that_never_occurs_leaves_the_mean_unless_it_counts_as_0(rng):
    label, predicted = blobs(rng, 3), blobs(rng, 4)
    means = {}
    for absent_zero in (False, True):
        task = Semantic(absent_zero=absent_zero).of_classes("a,b,c,d,e,f")
        means[absent_zero] = task.values(task.sums([task.cells(row_of("x", predicted, "abcdef"), label)]))["miou"]
    expected = plain([label], [predicted], 7)["class_iou"]
    assert expected[4] == 0 and expected[5] is expected[6] is None  # only predicted, and absent
    assert means[False] == pytest.approx(float(sum(expected[:5]) / 5), abs=1e-12)
    assert means[True] == pytest.approx(float(sum(expected[:5]) / 7), abs=1e-12)


def test_an_image_without_a_valid_pixel_is_counted_and_spoils_nothing(tmp_path, rng):
    labels, predictions = made(rng, "voc2012")
    alone = dict(list(labels.items())[1:])
    labels["000"][:] = -1
    write_classes(tmp_path, "voc2012", labels)
    result = evaluated(tmp_path, "voc2012", predictions)
    expected = plain(alone.values(), list(predictions.values())[1:], 21)
    assert result.means["miou"] == pytest.approx(float(expected["miou"]), abs=1e-12)
    assert result.details["without_valid"] == 1 and result.lacking == {"miou": 1}
    with pytest.raises(ValueError, match="needs the classes of the labels: add --classes"):
        Semantic().of_classes(None)
    everything = Semantic().of_classes("voc2012")
    assert set(everything.values(everything.sums()).values()) == {None}


def test_where_masks_overlap_the_surer_one_lies_on_top_and_else_the_smaller_one():
    masks = np.zeros((3, 4, 6), bool)
    masks[0, :, :4] = masks[1, 1:3, 1:3] = masks[2, :2] = True
    task = Semantic().of_classes("a,b,c")
    by_size = task.predicted(masks_row("x", masks, labels=["a", "b", "c"]))
    assert by_size.tolist() == [[3] * 6, [3, 2, 2, 3, 3, 3], [1, 2, 2, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
    by_score = task.predicted(masks_row("x", masks, labels=["a", "b", "c"], scores=[0.5, 0.2, 0.3]))
    assert by_score.tolist() == [[1, 1, 1, 1, 3, 3]] * 2 + [[1, 1, 1, 1, 0, 0]] * 2


def test_names_are_bound_by_what_they_mean(tmp_path, rng):
    task = Semantic().of_classes("voc2012")
    mask = np.ones((1, 2, 3), bool)
    for name in ("tv/monitor", "tvmonitor", "TV/Monitor"):
        assert (task.predicted(masks_row("x", mask, labels=[name])) == 20).all()
    assert (task.predicted(masks_row("x", mask, labels=["dining_table"])) == 11).all()
    with pytest.raises(ValueError, match=r"semantic: z/x.jpg: a mask is named 'cats', .* voc2012; did you mean 'cat'"):
        task.measure(masks_row("z/x.jpg", mask, labels=["cats"]), np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match="z/x.jpg: a mask without a name.*--expert CLASS, or --task saliency"):
        task.measure(masks_row("z/x.jpg", mask), np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match="no class: expected classes 0 to 20, got 21 to 21"):
        semantic.confusion(np.full((2, 3), 21), np.zeros((2, 3), int), 21)
    with pytest.raises(ValueError, match=r"the size \(2, 3\), the label \(3, 2\)"):
        semantic.confusion(np.zeros((2, 3), int), np.zeros((3, 2), int), 21)


@pytest.mark.parametrize("is_named", [True, False])
def test_an_expert_is_measured_against_its_class_in_images_that_have_it(tmp_path, rng, is_named):
    labels, predictions = made(rng, "voc2012")
    labels["003"][labels["003"] == 2] = 0
    write_classes(tmp_path, "voc2012", labels)
    masks = {stem: (each == 2)[None] for stem, each in predictions.items()}
    rows = [masks_row(f"{stem}.jpg", mask, labels=["bicycle"] if is_named else []) for stem, mask in masks.items()]
    write_run(str(tmp_path / "run"), rows)
    options = Evaluate((str(tmp_path / "run"),), dataset="voc2012", root=str(tmp_path))
    result = evaluate(options, Semantic(expert="Bicycle"))
    ious, both = [], []
    for stem in ("000", "001", "002"):
        valid, mask = labels[stem] >= 0, masks[stem][0]
        target = labels[stem] == 2
        ious.append((mask & target).sum() / (((mask & valid) | target).sum() + 1e-7))
        both.append((np.where(valid, target, -1), mask.astype(int)))
    assert result.means["binary_iou"] == pytest.approx(np.mean(ious), abs=1e-12)
    expected = plain(*zip(*both, strict=True), 2)
    assert result.means["pixel_acc"] == pytest.approx(float(expected["pixel_acc"]), abs=1e-12)
    assert result.details["class_iou"][1] == pytest.approx(float(expected["class_iou"][1]), abs=1e-12)
    assert result.lacking == {"binary_iou": 1} and result.details["without_valid"] == 0 and not result.published
    with pytest.raises(ValueError, match="--expert 'bycicle' is none of the classes; did you mean 'bicycle'"):
        evaluate(options, Semantic(expert="bycicle"))
    with pytest.raises(ValueError, match="--absent-zero has no effect with --expert"):
        Semantic(expert="bicycle", absent_zero=True)


def test_sizes_of_objects_are_counted_as_imagenet_s_does(tmp_path, rng):
    """Against a loop over the pixels: each group holds the background and its classes, and classes with a label."""
    labels, predictions = {}, {}
    for i in range(6):
        label = np.zeros((20, 20), np.int32)
        label[:4, :5], label[5, :7], label[6:16, :10], label[16:] = 1, 2 + i % 2, 4, -1
        label[6:, 10:] = 5 if i == 3 else 0
        labels[f"n01443537/{i}"], predictions[f"n01443537/{i}"] = (
            label,
            np.where(rng.random((20, 20)) < 0.7, label, 6).clip(0),
        )
    write_classes(tmp_path, "imagenet_s50", labels)
    result = evaluated(tmp_path, "imagenet_s50", predictions)
    most = {"s": (0, 5), "ms": (5, 25), "ml": (25, 50), "l": (50, 100)}
    for size, (low, high) in most.items():
        pairs = Counter()
        for label, predicted in zip(labels.values(), predictions.values(), strict=True):
            share = {c: Fraction(100 * int((label == c).sum()), int((label >= 0).sum())) for c in range(1, 51)}
            its = [c for c, each in share.items() if each and low < np.ceil(float(each)) <= high]
            if its:
                kept = np.isin(label, [0, *its])
                pairs.update(zip(label[kept].tolist(), predicted[kept].tolist(), strict=True))
        ious = []
        for c in {g for g, _ in pairs}:
            either = sum(n for (g, p), n in pairs.items() if c in (g, p))
            ious.append(pairs[c, c] / either)
        expected = None if not ious else pytest.approx(np.mean(ious), abs=1e-12)
        assert result.means[f"miou_{size}"] == expected, size
    assert result.means["miou_s"] is not None and result.means["miou_l"] is None


def test_own_labels_may_be_indices_palettes_or_folders_of_masks(tmp_path, rng):
    names = ["cat", "sea star", "dog"]
    labels = {f"{i}": blobs(rng, 3) for i in range(3)}
    predictions = {stem: np.where(rng.random(SIZE) < 0.7, label, 0) for stem, label in labels.items()}
    write_run(str(tmp_path / "run"), [row_of(f"{stem}.jpg", each, names) for stem, each in predictions.items()])
    for stem, label in labels.items():
        for place in ("grey", "palette", "deep", "folders/cat", "folders/Sea_Star", "folders/dog"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(label.astype(np.uint8)).save(tmp_path / f"grey/{stem}.png")
        picture_of("voc2012", label).save(tmp_path / f"palette/{stem}.png")
        Image.fromarray(label.astype(np.uint16)).save(tmp_path / f"deep/{stem}.png")
        for number, folder in enumerate(("cat", "Sea_Star", "dog"), 1):
            if (label == number).any():
                Image.fromarray(np.uint8(255) * (label == number)).save(tmp_path / f"folders/{folder}/{stem}.png")
    expected = plain(labels.values(), predictions.values(), 4)
    for place in ("grey", "palette", "deep", "folders"):
        options = Evaluate((str(tmp_path / "run"),), str(tmp_path / place), classes="cat, sea star,dog")
        result = evaluate(options)
        assert result.counts["ok"] == 3 and not result.unused_labels, place
        assert result.means["miou"] == pytest.approx(float(expected["miou"]), abs=1e-12), place
    assert "sea star" in result.text() and result.details["class_names"] == ["background", *names]
    with pytest.raises(ValueError, match="--classes has no effect: task pattern knows no classes; add --task semantic"):
        evaluate(Evaluate((str(tmp_path / "run"),), str(tmp_path / "grey"), classes="cat", task="pattern"))


def test_masks_that_are_taken_for_label_maps_are_no_silent_zero(tmp_path, rng):
    write_run(str(tmp_path / "run"), [row_of("1.jpg", blobs(rng, 2), ["cat", "dog"])])
    for place in ("plain", "folders/cat", "folders/zebra"):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(np.uint8(255) * (blobs(rng, 2) == 1)).save(tmp_path / place / "1.png")
    run = (str(tmp_path / "run"),)
    with pytest.raises(ValueError, match="no pixel of any label in .*plain is of a class.*one folder per class"):
        evaluate(Evaluate(run, str(tmp_path / "plain"), classes="cat,dog"))
    with pytest.raises(ValueError, match="folder per class, but 'zebra/1.png' is in none.*name its class in --classes"):
        evaluate(Evaluate(run, str(tmp_path / "folders"), classes="cat,dog"))
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(tmp_path / "plain/1.png")
    with pytest.raises(ValueError, match="labels cannot be read, such as '1.jpg'; a label map in colours"):
        evaluate(Evaluate(run, str(tmp_path / "plain"), classes="cat,dog"))


def test_folders_of_classes_may_hold_label_maps_of_their_photographs(tmp_path, rng):
    labels = {f"{name}/1": blobs(rng, 2) for name in ("cat", "dog")}
    for stem, label in labels.items():
        (tmp_path / "labels" / stem).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label.astype(np.uint8)).save(tmp_path / "labels" / f"{stem}.png")
    write_run(str(tmp_path / "run"), [row_of(f"{stem}.jpg", label, ["cat", "dog"]) for stem, label in labels.items()])
    assert evaluate(Evaluate((str(tmp_path / "run"),), str(tmp_path / "labels"), classes="cat,dog")).means["miou"] == 1


def test_labels_that_cannot_be_meant_are_listed_by_image_and_never_resized(tmp_path, rng):
    labels, predictions = made(rng, "voc2012")
    write_classes(tmp_path, "voc2012", labels)
    folder = tmp_path / "VOCdevkit/VOC2012/SegmentationClass"
    Image.open(folder / "000.png").convert("RGB").save(folder / "000.png")  # the palette's colours
    wrong = labels["001"].clip(0)
    wrong[5, 7] = 21
    Image.fromarray(wrong.astype(np.uint8)).save(folder / "001.png")
    Image.fromarray(labels["002"][:-1].clip(0).astype(np.uint8)).save(folder / "002.png")
    result = evaluated(tmp_path, "voc2012", predictions)
    assert result.counts == dict(ok=1, failed=0, no_label=0, other_size=1, bad_label=2)
    assert result.examples == {"other_size": ["002.jpg"], "bad_label": ["000.jpg", "001.jpg"]}
    lines = result.text().splitlines()
    i = lines.index("2 labels cannot be read: 000.jpg, 001.jpg")
    assert lines[i + 1].startswith("000.jpg: a label map in colours, expected numbers of a palette")
    texts = {"000": "a label map in colours, expected numbers of a palette"}
    texts["001"] = "the value 21 at row 5, column 7 is no class: they are 0 to 20, and 255"
    for stem, text in texts.items():
        with pytest.raises(images.BadImage, match=text):
            classmaps.read(str(folder / f"{stem}.png"), classes.read("voc2012"), max_bytes=10**6, max_pixels=10**6)


def test_photographs_without_a_label_are_named(tmp_path, rng):
    write_classes(tmp_path, "voc2012", made(rng, "voc2012")[0])
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/001.png").unlink()
    with pytest.raises(ValueError, match="voc2012: 1 images have no label: 001; photographs are in .*JPEGImages"):
        find("voc2012", str(tmp_path))
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/000.jpg").unlink()
    with pytest.raises(ValueError, match="voc2012: 1 images have no photograph: 000;"):
        find("voc2012", str(tmp_path))


@pytest.mark.parametrize("name", ["voc2012", "coco2017", "coca"])
def test_a_label_is_turned_like_its_photograph(tmp_path, rng, name):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    labels, _ = made(rng, name)
    labels = {stem: label.clip(0) for stem, label in labels.items()}
    write_classes(tmp_path, name, labels, exif=exif)
    turned = {stem: images.UPRIGHT[6](label) for stem, label in labels.items()}
    result = evaluated(tmp_path, name, turned)
    assert result.means["miou"] == 1 and result.turned == len(labels)
    assert f"{len(labels)} labels were turned, as their photographs' EXIF says" in result.text()


def test_an_evaluation_from_the_command_line_shows_classes_and_papers(tmp_path, rng, capsys):
    labels, predictions = made(rng, "voc2012")
    write_classes(tmp_path, "voc2012", labels)
    evaluated(tmp_path, "voc2012", predictions)
    words = ["evaluate", str(tmp_path / "run"), "--dataset", "voc2012", "--root", str(tmp_path)]
    assert main([*words, "--task", "semantic", "--split", "val"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["iou", "pixels"] in lines and ["MaskCLIP", "(namedmask_main,", "table", "main)", "0.291"] in lines
    assert any(line[:1] == ["aeroplane"] for line in lines) and not any(line[:1] == ["boat"] for line in lines)
    assert main([*words, "--absent-zero"]) == 0 and main([*words, "--classes", "cat"]) == 2
    assert "--classes has no effect with --dataset voc2012" in capsys.readouterr().err
    assert main([*words, "--task", "saliency"]) == 2
    error = capsys.readouterr().err
    assert "data set voc2012 has classes, but task saliency measures masks; add --task semantic" in error
    rows = [row_of(f"{stem}.jpg", label.clip(0), classes.read("voc2012").names) for stem, label in labels.items()]
    write_run(str(tmp_path / "perfect"), rows)
    assert main(["evaluate", words[1], str(tmp_path / "perfect"), *words[2:]]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    its = lines[lines.index(["iou", "run", "perfect"]) :]
    assert its[2][0] == "aeroplane" and float(its[2][1]) < 1 and its[2][2] == "1.000"
    table = pq.read_table(tmp_path / "run/metrics/summary/task=semantic", partitioning=None)
    assert sorted(table["options"].to_pylist())[0].count('"label_classes": "voc2012"') == 1 and len(table) == 2
