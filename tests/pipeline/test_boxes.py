"""Boxes of MegaDetector as foregrounds: which count, whose they are, and what a pattern method makes of them."""

import json

import numpy as np
import pytest
from support.faulty import GOOD, write_images

import raypipe
from raypipe.export.export import Export, export
from raypipe.inputs import boxfiles
from raypipe.masks import decode_rle
from raypipe.pipeline import foregrounds

NAMES = {"1": "animal", "2": "person"}


def detection(conf: float, bbox: list, category: str = "1") -> dict:
    return {"category": category, "conf": conf, "bbox": bbox}


def write_results(path, images: list[dict], *, names: dict = NAMES, **metadata) -> str:
    info = {"format_version": "1.6", "detector": "md", "detector_metadata": metadata}
    path.write_text(json.dumps({"info": info, "detection_categories": names, "images": images}))
    return str(path)


def test_boxes_that_count_are_confident_animals_of_files_that_did_not_fail(tmp_path):
    box, other = [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.25, 0.5]
    images = [
        {"file": "a.jpg", "detections": [detection(0.9, box), detection(0.19, other), detection(0.9, other, "2")]},
        {"file": "/data/sub\\b.jpg", "detections": [detection(0.2, other)]},
        {"file": "x/c.jpg", "detections": []},
        {"file": "y/c.jpg", "detections": [detection(0.9, box)]},
        {"file": "failed.jpg", "failure": "Failure image access", "detections": None},
    ]
    keys = ("a.jpg", "sub/b.jpg", "c.jpg", "x/c.jpg", "failed.jpg", "elsewhere.jpg")
    found = boxfiles.match(write_results(tmp_path / "md.json", images), keys)
    assert found == {"a.jpg": [box], "sub/b.jpg": [other], "x/c.jpg": []}  # two could be c.jpg
    stricter = write_results(tmp_path / "md.json", images, typical_detection_threshold=0.5)
    assert boxfiles.match(stricter, keys)["sub/b.jpg"] == []
    without_animals = write_results(tmp_path / "md.json", images, names={"1": "thing", "2": "person"})
    assert boxfiles.match(without_animals, keys)["a.jpg"] == [box, other]


@pytest.mark.parametrize("size", [(1, 1), (20, 30), (7, 11)])
def test_a_box_covers_its_pixels_and_never_none(size):
    rng = np.random.default_rng(0)
    for _ in range(50):
        top, left = rng.integers(0, size[0]), rng.integers(0, size[1])
        bottom, right = rng.integers(top, size[0]) + 1, rng.integers(left, size[1]) + 1
        expected = np.zeros(size, bool)
        expected[top:bottom, left:right] = True
        box = [left / size[1], top / size[0], (right - left) / size[1], (bottom - top) / size[0]]
        np.testing.assert_array_equal(boxfiles.mask([box], size), expected)
    assert boxfiles.mask([[0.0, 0.0, 1e-6, 1e-6]], size).sum() == 1 and not boxfiles.mask([], size).any()


def test_a_pattern_method_looks_inside_the_boxes_of_an_export(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 3)
    raypipe.label("grabcut", tmp_path / "photos", tmp_path / "first", local=True)
    export(Export(str(tmp_path / "first"), "megadetector", output=str(tmp_path / "out")))
    path = tmp_path / "out/megadetector.json"
    content = json.loads(path.read_text())
    content["images"] = content["images"][:2]
    path.write_text(json.dumps(content))
    options = {"foreground": f"boxes:{path}", "local": True, "max_bad_fraction": 1.0}
    raypipe.label("kmeans", tmp_path / "photos", tmp_path / "run", **options)
    first = {row["key"]: row for row in raypipe.load(tmp_path / "first").to_pylist()}
    rows = sorted(raypipe.load(tmp_path / "run").to_pylist(), key=lambda row: row["key"])
    for row in rows[:2]:
        mask = decode_rle(first[row["key"]]["segments"][0])
        ys, xs = np.nonzero(mask)
        expected = np.zeros_like(mask)
        expected[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
        np.testing.assert_array_equal(decode_rle(row["foreground"]), expected)
        assert row["segments"] and not row["error"]
        assert not any((decode_rle(each) & ~expected).any() for each in row["segments"])
    assert rows[2]["error"].startswith("foreground: missing")
    frozen = json.loads((tmp_path / "run/run.json").read_text())
    assert f"boxes:{path}" in json.dumps(frozen["settings"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "it has no MegaDetector results"),
        ('{"images": []}', "it has no MegaDetector results: KeyError 'detection_categories'"),
        ("not json", "it has no MegaDetector results"),
        (None, "none of its files is '0000.png' or ends with it"),
        ("pixels", "are not relative to the image"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_before_the_run(tmp_path, content, message):
    path, boxes = tmp_path / "md.json", [102.4, 88.1, 540.7, 470.2] if content == "pixels" else [0, 0, 1, 1]
    write_results(path, [{"file": "other.jpg", "detections": [detection(0.9, boxes)]}])
    if content not in (None, "pixels"):
        path.write_text(content)
    write_images(tmp_path / "photos", [GOOD])
    with pytest.raises(ValueError, match=f"--foreground boxes:.*{message}"):
        raypipe.label("kmeans", tmp_path / "photos", tmp_path / "run", foreground=f"boxes:{path}", local=True)
    with pytest.raises(ValueError, match="needs a file; choose one of: grabcut"):
        foregrounds.parse("boxes:")
