"""CVAT's format: exact masks for CVAT, whose reader, Datumaro, gives them back pixel by pixel."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.exported import write_worst

from raypipe.export.export import Export, export
from raypipe.export.formats.cvat import command, label_names, run_lengths
from raypipe.masks import encode_rle


def unrolled(segmentation: dict) -> np.ndarray:
    """A mask of uncompressed run lengths, value by value: columns one after the other, background first."""
    values = [i % 2 for i, count in enumerate(segmentation["counts"]) for _ in range(count)]
    height, width = segmentation["size"]
    return np.array(values, bool).reshape(width, height).T


def exported(folder: Path, **options) -> tuple[dict, Path, dict]:
    """What is expected, the folder of the export, and its annotations."""
    expected, out = write_worst(folder), folder / "out"
    export(Export(str(folder / "run"), "cvat", output=str(out), **options))
    return expected, out, json.loads((out / "annotations/instances_default.json").read_text())


def test_masks_names_and_pictures_are_those_of_the_run(tmp_path):
    expected, out, content = exported(tmp_path)
    names = {each["id"]: each["name"] for each in content["categories"]}
    assert [label["name"] for label in json.loads((out / "labels.json").read_text())] == list(names.values())
    assert len(set(names.values())) == len(names) and all(len(name.strip()) in range(1, 65) for name in names.values())
    assert {image["key"] for image in content["images"]} == expected.keys()
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(i["file_name"] for i in content["images"])
    for image in content["images"]:
        found, labels, scores = expected[image["key"]]
        assert Image.open(out / "images" / image["file_name"]).size == (image["width"], image["height"])
        annotations = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        for i, annotation in enumerate(annotations):
            np.testing.assert_array_equal(unrolled(annotation["segmentation"]), found[i])
            name = names[annotation["category_id"]]
            assert name[:60] == " ".join(labels[i].split())[:60] or not labels[i].strip()
            assert annotation["iscrowd"] == 1 and annotation["score"] == scores[i]
        assert len(annotations) == sum(mask.any() for mask in found)


def test_a_condition_keeps_pictures_of_matching_segments_alone(tmp_path):
    _, out, content = exported(tmp_path, where="score > 1 and key like 'b/%'")
    assert [image["key"] for image in content["images"]] == ["b/x.jpg", "b/x.png"] and len(content["annotations"]) == 2
    assert len(list((out / "images").iterdir())) == 2


def test_the_command_that_is_printed_is_the_one_for_the_folder(tmp_path):
    write_worst(tmp_path)
    out = tmp_path / "a folder; with 'words'"
    result = export(Export(str(tmp_path / "run"), "cvat", output=str(out)))
    (line,) = [line for line in result.text().splitlines() if "cvat-cli" in line]
    assert line.split(maxsplit=1) == ["7", f"images to send with: {command(str(out), 'kmeans')}"]
    words = shlex.split(command(str(out), "kmeans"))
    assert words[:2] == ["cd", str(out)] and all((out / words[i]).is_file() for i in (-5, -3))


def test_names_that_would_be_cut_to_the_same_stay_apart():
    assert label_names(["a" * 70, "a" * 80, " ", "b  b", "b b"]) == [
        "a" * 64,
        "a" * 61 + " #2",
        "category 3",
        "b b",
        "b b #5",
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (6, 8)])
def test_run_lengths_are_exact_at_both_ends(size, rng):
    found = [np.ones(size, bool), rng.random(size) > 0.5, rng.random(size) > 0.5]
    found = [mask for mask in found if mask.any()]
    counts = list(run_lengths([encode_rle(mask) for mask in found]))
    for mask, each in zip(found, counts, strict=True):
        np.testing.assert_array_equal(unrolled({"size": list(size), "counts": each}), mask)
    assert list(run_lengths([])) == []


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_datumaro_reads_every_pixel_and_writes_every_pixel_back(tmp_path):
    datumaro = pytest.importorskip("datumaro", reason="needs datumaro")
    expected, out, content = exported(tmp_path)
    keys = {Path(image["file_name"]).stem: image["key"] for image in content["images"]}
    datumaro.Dataset.import_from(str(out), "coco_instances").export(str(tmp_path / "again"), "coco_instances")
    for folder in (out, tmp_path / "again"):
        items = list(datumaro.Dataset.import_from(str(folder), "coco_instances"))
        assert {keys[item.id] for item in items} >= {key for key, (found, *_) in expected.items() if len(found)}
        for item in items:
            found = [each.image for each in item.annotations if each.type is datumaro.AnnotationType.mask]
            masks = [mask for mask in expected[keys[item.id]][0] if mask.any()]
            assert sorted(mask.astype(bool).tobytes() for mask in found) == sorted(mask.tobytes() for mask in masks)
