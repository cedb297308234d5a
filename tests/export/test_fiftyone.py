"""FiftyOne's folder: what its documents say leads to the masks; FiftyOne itself, where it runs, shows the same ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.exported import EMPTY_KEY, write_worst

from raypipe.export.export import Export, export


def pasted(detection: dict, folder: Path, size: tuple[int, int]) -> np.ndarray:
    """A detection's mask at the image's size, by its box alone."""
    x, y, width, height = np.rint(np.array(detection["bounding_box"]) * (*size[::-1], *size[::-1])).astype(int)
    picture = np.asarray(Image.open(folder / detection["mask_path"]))
    mask = np.zeros(size, bool)
    mask[y : y + height, x : x + width] = picture > 0
    assert picture.shape == (height, width) and set(np.unique(picture)) <= {0, 255}
    return mask


def exported(folder: Path, **options) -> tuple[dict, Path, list[dict]]:
    """What is expected, the folder of the export, and its samples."""
    expected, out = write_worst(folder), folder / "out"
    export(Export(str(folder / "run"), "fiftyone", output=str(out), **options))
    return expected, out, json.loads((out / "samples.json").read_text("ascii"))["samples"]


def test_samples_lead_to_pictures_and_exact_masks(tmp_path):
    expected, out, samples = exported(tmp_path)
    assert {sample["key"] for sample in samples} == expected.keys()
    ids = [each["_id"]["$oid"] for sample in samples for each in [sample, *sample["segments"]["detections"]]]
    assert len(set(ids)) == len(ids) and all(len(bytes.fromhex(each)) == 12 for each in ids)
    for sample in samples:
        found, labels, scores = expected[sample["key"]]
        size, kept = found.shape[1:], [i for i, mask in enumerate(found) if mask.any()]
        assert Image.open(out / sample["filepath"]).size == size[::-1] and 0 <= sample["_rand"] < 1
        assert [each["index"] for each in sample["segments"]["detections"]] == kept
        for i, detection in zip(kept, sample["segments"]["detections"], strict=True):
            np.testing.assert_array_equal(pasted(detection, out, size), found[i])
            assert detection["label"] == labels[i] and detection["confidence"] == scores[i]
    files = {path.relative_to(out).parts[0] for path in out.rglob("*")}
    assert files == {"data", "fields", "samples.json", "metadata.json", "_export.json", "_left_out.csv"}


def test_the_dataset_declares_all_that_its_samples_have(tmp_path):
    _, out, samples = exported(tmp_path)
    content = json.loads((out / "metadata.json").read_text())
    fields = {field["db_field"]: field for field in content["sample_fields"]}
    assert {name for sample in samples for name in sample} <= fields.keys() | {"_media_type", "_rand"}
    assert {name for sample in samples for name in sample["metadata"]} - {"_cls"} == {
        each["db_field"] for each in fields["metadata"]["fields"]
    }
    (detections,) = fields["segments"]["fields"]
    declared = {each["db_field"] for each in detections["fields"]}
    assert {name for s in samples for each in s["segments"]["detections"] for name in each} - {"_cls"} <= declared
    assert json.loads(content["info"]["made"])["method"] == "kmeans"


def test_a_condition_leaves_the_other_masks_out(tmp_path):
    _, out, samples = exported(tmp_path, where="score > 1")
    assert [len(sample["segments"]["detections"]) for sample in samples] == [1] * 6
    assert len(list((out / "fields").rglob("*.png"))) == 6


def test_fiftyone_opens_the_folder_and_shows_every_pixel(tmp_path):
    fiftyone = pytest.importorskip("fiftyone", reason="needs fiftyone")
    try:
        fiftyone.list_datasets()
    except fiftyone.core.config.FiftyOneConfigError as error:
        pytest.skip(f"fiftyone has no database: {error}")
    expected, out, _ = exported(tmp_path)
    dataset = fiftyone.Dataset.from_dir(str(out), dataset_type=fiftyone.types.FiftyOneDataset)
    try:
        assert len(dataset) == len(expected) and dataset.count("segments.detections") == 12
        assert set(dataset.distinct("segments.detections.label")) == {
            n for _, ns, _ in expected.values() for n in ns[:2]
        }
        for sample in dataset:
            found, _, scores = expected[sample.key]
            assert Path(sample.filepath).is_file() and sample.key != EMPTY_KEY or not sample.segments.detections
            for detection in sample.segments.detections:
                whole = detection.to_segmentation(frame_size=found.shape[:0:-1], target=1)
                np.testing.assert_array_equal(whole.mask > 0, found[detection.index])
                assert detection.confidence == scores[detection.index]
    finally:
        dataset.delete()
