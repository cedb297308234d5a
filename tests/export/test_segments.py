"""What segments are called in an export, and how many of them a format takes: one rule for all formats."""

import csv
import hashlib
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from support.written import masks_row, write_run

from raypipe import masks
from raypipe.export.export import Export, export


@pytest.mark.parametrize(
    ("method", "count", "options", "expected"),
    [
        ("kmeans", 3, {}, ["cluster 0", "cluster 1", "cluster 2"]),
        ("kmeans", 3, {"category": "stripe"}, ["stripe"]),
        ("dino_pca", 2, {}, ["bright", "dark"]),
        ("watershed", 1, {}, ["pattern"]),
        ("grabcut", 1, {}, ["grabcut"]),
        ("sam", 3, {}, ["pattern"]),  # its library has no order
        ("of_another_version", 3, {}, ["of_another_version"]),
    ],
)
def test_segments_have_one_name_in_all_formats(tmp_path, method, count, options, expected):
    found = np.eye(count, dtype=bool)[:, None]
    Image.new("RGB", (count, 1)).save(tmp_path / "a.png")
    sha256 = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    write_run(
        str(tmp_path / "run"), [masks_row("a.png", found, uri=str(tmp_path / "a.png"), sha256=sha256)], method=method
    )
    for form in ("coco", "yolo", "labelstudio", "png", "hf"):
        export(Export(str(tmp_path / "run"), form, **options))
    out = tmp_path / "run/export"
    coco = json.loads((out / "coco/annotations.json").read_text())
    assert [each["name"] for each in coco["categories"]] == expected
    assert list(yaml.safe_load((out / "yolo/data.yaml").read_text())["names"].values()) == expected
    labels = ElementTree.parse(out / "labelstudio/config.xml").findall(".//Label")
    assert [label.get("value") for label in labels] == expected
    values = list(csv.reader((out / "png/values.csv").read_text().splitlines()))[2:]
    instances = [f"segment {i}" for i in range(count)]  # a map of one value would not tell them apart
    is_library = method in ("sam", "of_another_version")
    assert [name for _, name in values] == (instances if is_library else expected)
    assert f"| {len(values)} | {values[-1][1]} |" in (out / "hf/README.md").read_text()


def test_many_segments_need_16_bits_and_255_stays_free(tmp_path):
    found = np.eye(300, dtype=bool)[:, None]  # (300, 1, 300)
    many, few = masks_row("a.jpg", found[:200]), masks_row("b.jpg", found[:1])
    many["segments"] += masks.encode_segments(found[200:])
    write_run(str(tmp_path / "run"), [many, few])
    export(Export(str(tmp_path / "run"), "png"))
    values = np.asarray(Image.open(tmp_path / "run/export/png/a.png"))
    assert values[0].tolist() == [*range(1, 255), *range(256, 302)]
    assert Image.open(tmp_path / "run/export/png/b.png").mode.startswith("I")  # the whole export has one depth


def test_labels_become_categories_whose_numbers_a_condition_does_not_change(tmp_path):
    found = np.zeros((3, 4, 5), bool)
    found[0, 0], found[1, 1], found[2, 2] = True, True, True
    write_run(str(tmp_path / "run"), [masks_row("a.jpg", found, labels=["zebra", "cat", "zebra"])])
    export(Export(str(tmp_path / "run"), "png", where="label = 'zebra'"))
    values = np.asarray(Image.open(tmp_path / "run/export/png/a.png"))
    np.testing.assert_array_equal(values[:, 0], [2, 0, 2, 0])
    assert (tmp_path / "run/export/png/values.csv").read_text().split() == [
        "value,name",
        "0,background",
        "1,cat",
        "2,zebra",
    ]
    export(Export(str(tmp_path / "run"), "coco"))
    coco = json.loads((tmp_path / "run/export/coco/annotations.json").read_text())
    assert [each["category_id"] for each in coco["annotations"]] == [2, 1, 2]


def test_masks_without_pixels_are_no_annotations(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    found = np.zeros((2, 2, 3), bool)
    found[1, 0] = True
    sha256 = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    write_run(str(tmp_path / "run"), [masks_row("a.png", found, uri=str(tmp_path / "a.png"), sha256=sha256)])
    for form in ("coco", "labelstudio"):
        result = export(Export(str(tmp_path / "run"), form))
        assert result.remarks == {"masks have no pixels and are left out": 1}
    (annotation,) = json.loads((tmp_path / "run/export/coco/annotations.json").read_text())["annotations"]
    assert (annotation["area"], annotation["segment"], annotation["category_id"]) == (3, 1, 2)
    (task,) = json.loads((tmp_path / "run/export/labelstudio/tasks.json").read_text())
    (region,) = task["predictions"][0]["result"]
    assert region["value"]["brushlabels"] == ["cluster 1"]


def test_a_table_has_columns_for_each_segment_whatever_the_condition(tmp_path):
    found = np.zeros((102, 1, 200), bool)
    found[0, 0, :30], found[1, 0, 30:40] = True, True
    many, few, bare = (masks_row(key, found[:count]) for key, count in (("c.jpg", 102), ("a.jpg", 2), ("b.jpg", 2)))
    few["foreground"], bare["foreground"] = masks.encode_rle(found[:2].any(0)), None
    write_run(str(tmp_path / "run"), [many, few, bare])
    result = export(Export(str(tmp_path / "run"), "csv", where="segment <> 1"))
    assert result.remarks == {"images have more than 100 segments: the others have no columns": 1}
    a, b, c = csv.DictReader(open(tmp_path / "run/export/csv/images.csv", newline="", encoding="utf-8-sig"))
    assert [a["key"], b["key"], c["key"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert (a["area_0"], a["share_0"], a["area_1"], a["share_1"]) == ("30", "0.75", "", "")  # of the foreground
    assert (b["share_0"], b["share_of_foreground"]) == ("0.15", "")  # of the image
    assert "area_99" in c and "area_100" not in c and c["area_99"] == "0"
