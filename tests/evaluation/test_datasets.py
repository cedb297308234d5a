"""Data sets as people unpack them: where they are found, what belongs to what, and what is no failure."""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.layouts import (
    ALL,
    BOXES,
    CLASSES,
    LISTS,
    MASKS,
    SIZE,
    voc_xml,
    write_coco,
    write_masks,
    write_photos,
    write_voc,
)
from support.written import masks_row, write_run

from raypipe import images
from raypipe.cli.verbs import main
from raypipe.evaluation import datasets
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.tasks.semantic import Semantic


def square(value: int = 255) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[4:12, 6:20] = value
    return mask


def write(root, name: str, i: int) -> tuple[str, str]:
    """One photograph `a` with its label in a layout. Returns where both are, beneath the root."""
    if name == "coco20k":
        write_coco(root, {"COCO_train2014_000000000009": [(6, 4, 14, 8)]})
        return "COCO/images/train2014", "COCO/annotations/instances_train2014.json"
    if name in BOXES:
        write_voc(root / BOXES[name][i], {"a": [(6, 4, 20, 12)]})
        return f"{BOXES[name][i]}/JPEGImages", f"{BOXES[name][i]}/Annotations"
    photos, masks = MASKS[name][i]
    write_photos(root / photos, ["a.JPG"])
    write_masks(root / masks, {"a.png": square()})
    return photos, masks


@pytest.mark.parametrize(("name", "i"), ALL)
def test_each_layout_is_found_beneath_its_root(tmp_path, name, i):
    photos, labels = write(tmp_path, name, i)
    for junk in (".DS_Store", "Thumbs.db", "__MACOSX/._a.png"):
        (tmp_path / labels / junk).parent.mkdir(exist_ok=True) if name != "coco20k" else None
        (tmp_path / labels / junk).write_bytes(b"junk") if name != "coco20k" else None
    found = datasets.find(name, str(tmp_path))
    assert (str(found.images), str(found.labels)) == (str(tmp_path / photos), str(tmp_path / labels))
    (stem,) = found.stems
    assert found.location.keys() == found.photographs.keys() == {stem} and found.is_usual
    assert found.match([f"any/{stem}.png", "b.jpg"]).location == {f"any/{stem}.png": found.location[stem]}
    assert found.outside([f"any/{stem}.png", "b.jpg"]) == {"b.jpg"}
    as_uri = datasets.find(name, f"file://{tmp_path}")
    assert as_uri.location == found.location


def test_the_first_of_several_folders_counts(tmp_path):
    for i in range(2):
        write(tmp_path, "ecssd", i)
    assert str(datasets.find("ecssd", str(tmp_path)).images).endswith("ECSSD/images")


@pytest.mark.parametrize("name", datasets.names())
def test_a_root_without_the_folders_names_all_that_it_looked_for(tmp_path, name):
    expected = {folder for pair in MASKS.get(name, []) for folder in pair}
    expected |= {f"{root}/{each}" for root in BOXES.get(name, []) for each in ("JPEGImages", "Annotations")}
    expected |= {f"{root}/ImageSets/Main/trainval.txt" for root in BOXES.get(name, [])}
    expected |= {folder for pair in CLASSES.get(name, [])[:1] for folder in pair if name != "coco2017"}
    if name == "coco2017":
        expected = {"coco/val2017", "coco/annotations/instances_val2017.json", "annotations/instances_val2017.json"}
    if name in LISTS:
        expected |= {f"VOCdevkit/VOC{'2012' if name == 'voc2012' else '2010'}/{LISTS[name]}"}
    if name == "coco20k":
        expected = {"COCO/images/train2014", "COCO/annotations/instances_train2014.json", "coco_20k_filenames.txt"}
    with pytest.raises(ValueError, match=f"{name} is not in {tmp_path}, which has none of: ") as error:
        datasets.find(name, str(tmp_path))
    assert expected <= set(str(error.value).partition("none of: ")[2].partition("; ")[0].split(", "))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        datasets.find(name, str(tmp_path / "nowhere"))


def test_all_classes_of_pascal_context_are_those_that_its_own_list_names(tmp_path):
    label = np.array([[1, 1, 3, 431], [9, 9, 3, 3]], np.uint16)
    write_photos(tmp_path / "val/images", ["a.jpg"], label.shape)
    write_masks(tmp_path / "segment_anno", {"a.png": label, "of_train.png": label})
    (tmp_path / "labels.txt").write_text("1: zebra\n3: wine glass\n9: ash can\n431: unknown\n")
    found = datasets.find("pascal-context-459", str(tmp_path))
    assert found.stems == {"a"} and found.split == "val" and datasets.task_of("pascal-context-459") == "semantic"
    task = datasets.bound(Semantic(), found)
    assert task.names == ("background", "zebra", "wine glass", "ash can")
    read = task.read(found.location["a"], max_bytes=10**6, max_pixels=10**6, form=found.form)
    assert read.tolist() == [[1, 1, 2, 0], [3, 3, 2, 2]]
    (tmp_path / "labels_59.txt").write_text("3: aeroplane\n9: zebra\n")
    with pytest.raises(ValueError, match="labels_59.txt has the class 'zebra'"):
        datasets.find("pascal_context_59", str(tmp_path))
    (tmp_path / "labels.txt").write_text("1 zebra\n")
    with pytest.raises(ValueError, match="labels.txt: expected lines such as `2: aeroplane`, got '1 zebra'"):
        datasets.find("pascal_context_459", str(tmp_path))


def test_a_data_set_whose_labels_are_of_other_photographs_is_an_error(tmp_path):
    write_photos(tmp_path / "ECSSD/images", ["a.jpg"])
    write_masks(tmp_path / "ECSSD/ground_truth_mask", {"b.png": square()})
    with pytest.raises(ValueError, match="no label in .* has the stem of a photograph"):
        datasets.find("ecssd", str(tmp_path))


def test_accents_are_the_same_in_either_form_of_unicode(tmp_path):
    write_photos(tmp_path / "ECSSD/images", ["b\u00e4r.jpg"])
    write_masks(tmp_path / "ECSSD/ground_truth_mask", {"ba\u0308r.png": square()})
    dataset = datasets.find("ecssd", str(tmp_path))
    for key in ("b\u00e4r.jpg", "ba\u0308r.jpg"):
        assert dataset.match([key]).location.keys() == {key} and not dataset.outside([key])


@pytest.mark.parametrize(
    ("content", "stems"),
    [
        (b"\xef\xbb\xbfa\r\nb\r\n", "ab"),  # as Windows writes it
        (b"a -1\nb  1\nc  0\n", "bc"),  # of a class: c is a difficult one
    ],
)
def test_a_list_may_have_a_mark_and_columns(tmp_path, content, stems):
    root = tmp_path / "VOCdevkit/VOC2007"
    write_voc(root, {stem: [(6, 4, 20, 12)] for stem in "abc"})
    (root / "ImageSets/Main/cat_val.txt").write_bytes(content)
    assert datasets.find("voc07", str(tmp_path), "cat_val").stems == set(stems)


def test_a_list_that_names_no_photograph_is_named(tmp_path):
    write_voc(tmp_path / "VOCdevkit/VOC2007", {"a": [(6, 4, 20, 12)]}, listed="x")
    with pytest.raises(ValueError, match="no label in .* a photograph in .*JPEGImages that .*Main/trainval.txt names"):
        datasets.find("voc07", str(tmp_path))


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path):
    (tmp_path / "ECSSD/img").mkdir(parents=True)
    (tmp_path / "ECSSD/images").write_bytes(b"a file")
    (tmp_path / "ECSSD/gt").write_bytes(b"a file")
    with pytest.raises(ValueError, match="which has none of: ECSSD/ground_truth_mask, ECSSD/gt; --root is the folder"):
        datasets.find("ecssd", str(tmp_path))
    write_voc(tmp_path / "VOCdevkit/VOC2007", {"a": [(6, 4, 20, 12)]}, split="val")
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt").mkdir()
    with pytest.raises(ValueError, match="which has none of: .*trainval.txt"):
        datasets.find("voc07", str(tmp_path))


def test_labels_of_0_and_1_are_told_from_those_of_nothing(tmp_path, capsys):
    write(tmp_path, "ecssd", 0)
    masks = tmp_path / "ECSSD/ground_truth_mask"
    write_masks(masks, {"a.png": square(1)})
    write_run(str(tmp_path / "run"), [masks_row("a.JPG", square()[None] > 0)])
    words = ["evaluate", str(tmp_path / "run"), "--task", "saliency"]
    assert main([*words, "--dataset", "ecssd", "--root", str(tmp_path)]) == 2
    assert (advice := f"--labels {masks} --label-kind nonzero") in capsys.readouterr().err
    assert main([*words, *advice.split()]) == 0 and "1.000  iou" in capsys.readouterr().out


def test_what_is_outside_the_split_is_no_failure(tmp_path):
    boxes = {stem: [(6, 4, 20, 12)] for stem in "abcdef"}
    write_voc(tmp_path / "VOCdevkit/VOC2012", boxes, listed="abcd")
    (tmp_path / "VOCdevkit/VOC2012/Annotations/b.xml").unlink()
    write_voc(tmp_path / "VOCdevkit/VOC2012", {"e": boxes["e"]}, split="val")
    rows = [masks_row(f"{stem}.jpg", square()[None] > 0) for stem in "abdf"]
    rows.append(masks_row("e.jpg", square()[None] > 0, error="decode: truncated: cut"))
    write_run(str(tmp_path / "run"), rows)
    options = {"runs": (str(tmp_path / "run"),), "dataset": "voc12", "root": str(tmp_path), "task": "boxes"}
    found = evaluate(Evaluate(**options))
    assert found.counts == dict(ok=2, failed=0, no_label=1, other_size=0, bad_label=0)
    assert (found.images, found.outside, found.unused_labels, found.unused_examples) == (3, 2, 1, ["c.xml"])
    assert found.means["corloc"] == 100 and found.published
    lines = found.text().splitlines()
    assert "1 labels belong to no image: c.xml" in lines
    assert "2 images are none of the data set's, or of another split of it" in lines
    assert pq.read_table(found.table, partitioning=None)["key"].to_pylist() == ["a.jpg", "b.jpg", "d.jpg"]
    with pytest.raises(ValueError, match="cannot be measured against .*: 1 images failed, such as"):
        evaluate(Evaluate(**options, split="val"))
    with pytest.raises(ValueError, match="voc12 is not in .*ImageSets/Main/test.txt"):
        evaluate(Evaluate(**options, split="test"))


def test_of_images_with_one_stem_the_photograph_is_measured(tmp_path):
    write(tmp_path, "ecssd", 0)
    keys = ["images/a.JPG", "ground_truth_mask/a.png", "copy/a.jpg"]
    found = datasets.find("ecssd", str(tmp_path))
    assert list(found.match(keys).location) == ["images/a.JPG"]
    assert not found.match(keys[1:]).location and not found.match(["es/a.JPG", "a.png"]).location


def test_a_label_is_turned_like_its_photograph(tmp_path):
    exif = Image.Exif()
    for orientation in images.UPRIGHT:
        exif[images.ORIENTATION] = orientation
        write_photos(tmp_path / "ECSSD/images", [f"{orientation}.jpg"], exif=exif)
        write_photos(tmp_path / "VOCdevkit/VOC2007/JPEGImages", [f"{orientation}.jpg"], exif=exif)
    write_masks(tmp_path / "ECSSD/ground_truth_mask", {f"{each}.png": square() for each in images.UPRIGHT})
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / "VOCdevkit/VOC2007" / folder).mkdir(parents=True)
    for each in images.UPRIGHT:
        (tmp_path / f"VOCdevkit/VOC2007/Annotations/{each}.xml").write_text(voc_xml([(6, 4, 20, 12)]))
    lines = "".join(f"{each}\n" for each in images.UPRIGHT)
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt").write_text(lines)
    rows = [masks_row(f"{o}.jpg", turn(square())[None] > 0) for o, turn in images.UPRIGHT.items()]
    write_run(str(tmp_path / "run"), rows)
    found = evaluate(Evaluate((str(tmp_path / "run"),), dataset="voc07", root=str(tmp_path), task="boxes"))
    assert found.counts["ok"] == 8 and found.means == {"corloc": 100, "box_iou": 1}
    found = evaluate(Evaluate((str(tmp_path / "run"),), dataset="ecssd", root=str(tmp_path)))
    assert found.counts["ok"] == 8 and found.means["iou"] == 1
    write_run(str(tmp_path / "copies"), [masks_row("6.jpg", square()[None] > 0)])  # whose orientation was lost
    found = evaluate(Evaluate((str(tmp_path / "copies"),), dataset="ecssd", root=str(tmp_path)))
    assert found.means["iou"] == 1
    for orientation in images.UPRIGHT:  # made with a tool that copies the photograph's EXIF
        exif[images.ORIENTATION] = orientation
        path = tmp_path / f"ECSSD/ground_truth_mask/{orientation}.png"
        Image.fromarray(square()).save(path, exif=exif)
    found = evaluate(Evaluate((str(tmp_path / "run"),), dataset="ecssd", root=str(tmp_path)))
    assert found.counts["ok"] == 8 and found.means["iou"] == 1


@dataclass
class Options:
    """What `chosen` reads of a command's options."""

    labels: str | None = None
    dataset: str | None = None
    root: str | None = None
    split: str | None = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no labels: name a folder of them with --labels, or --dataset NAME --root DIR"),
        ({"labels": "x", "dataset": "ecssd"}, "--labels has no effect with --dataset ecssd"),
        ({"dataset": "ecssd"}, "--dataset ecssd: add --root"),
        ({"labels": "x", "root": "y"}, "--root has no effect without --dataset"),
        ({"labels": "x", "split": "val"}, "--split has no effect without --dataset"),
        ({"dataset": "ecsd", "root": "."}, "unknown data set 'ecsd'; did you mean 'ecssd'?"),
        ({"dataset": "ecssd", "root": ".", "split": "val"}, "--split 'val' has no effect: ecssd has no splits"),
    ],
)
def test_options_that_name_no_labels_or_two_of_them_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        datasets.chosen(Options(**options))
    assert datasets.chosen(Options(labels="x")) == "x"


def test_a_data_set_says_which_task_and_refuses_one_that_wants_other_labels(tmp_path, capsys):
    write(tmp_path, "voc07", 0)
    write_run(str(tmp_path / "run"), [masks_row("a.jpg", square()[None] > 0)])
    words = ["evaluate", str(tmp_path / "run"), "--dataset", "voc07", "--root", str(tmp_path)]
    assert main([*words, "--task", "pattern"]) == 2
    assert "data set voc07 has boxes, but task pattern measures masks; add --task boxes" in capsys.readouterr().err
    assert main([*words, "--label-value", "1"]) == 2
    assert "have no effect: voc07 has boxes of its own" in capsys.readouterr().err
    assert main([*words, "--box-rule", "largest_area"]) == 0 and "corloc" in capsys.readouterr().out
    config = tmp_path / "voc07.yaml"
    config.write_text(f"dataset: voc07\nroot: {tmp_path}\nbox_rule: largest_area\n")
    assert main(["evaluate", words[1], "--config", str(config)]) == 0 and "corloc" in capsys.readouterr().out
    assert evaluate(Evaluate((words[1],), dataset="voc07", root=str(tmp_path))).means["corloc"] == 100


def test_a_root_may_be_a_uri_of_another_file_system(tmp_path):
    import fsspec

    write(tmp_path, "voc07", 0)
    fsspec.filesystem("memory").put(str(tmp_path / "VOC2007"), "/sets/VOC2007", recursive=True)
    try:
        write_run(str(tmp_path / "run"), [masks_row("a.jpg", square()[None] > 0)])
        found = evaluate(Evaluate((str(tmp_path / "run"),), dataset="voc07", root="memory://sets", task="boxes"))
        assert found.means["corloc"] == 100 and found.labels.startswith("memory://sets/VOC2007")
    finally:
        fsspec.filesystem("memory").rm("/sets", recursive=True)
