"""MegaDetector's format: boxes where the masks are, failures as failures, and its own validator has no objection."""

import json

import numpy as np
import pytest
from support.exported import BROKEN, write_worst

from raypipe.export.export import Export, export

NO_VALIDATOR = "needs megadetector-utils"


def box_of(mask: np.ndarray) -> list[float]:
    """The mask's box by its first and last pixels, relative to the image: x, y, width, height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    sides = (columns[-1] + 1 - columns[0]) / width, (rows[-1] + 1 - rows[0]) / height
    return [columns[0] / width, rows[0] / height, *sides]


def test_each_mask_has_its_box_and_each_failure_its_reason(tmp_path):
    expected = write_worst(tmp_path)
    result = export(Export(str(tmp_path / "run"), "megadetector"))
    content = json.loads((tmp_path / "run/export/megadetector/megadetector.json").read_text("ascii"))
    assert content["info"]["format_version"] == "1.6" and all(content["detection_categories"].values())
    images = {image["file"]: image for image in content["images"]}
    failed = images.pop(BROKEN)
    assert failed["failure"].startswith("decode: truncated") and failed["detections"] is None
    assert images.keys() == expected.keys() and result.left_out == {}
    for key, (found, labels, scores) in expected.items():
        kept = [i for i, mask in enumerate(found) if mask.any()]
        assert [each["segment"] for each in images[key]["detections"]] == kept
        for i, detection in zip(kept, images[key]["detections"], strict=True):
            assert detection["bbox"] == pytest.approx(box_of(found[i])) and detection["conf"] == min(scores[i], 1)
            name = content["detection_categories"][detection["category"]]
            assert name == " ".join(labels[i].split()) or not labels[i].strip()
    assert result.remarks["scores lie outside [0, 1], where confidences end, and are clipped"] == 6
    assert result.remarks["masks have no pixels and are left out"] == 6


def test_a_condition_leaves_the_other_segments_out(tmp_path):
    write_worst(tmp_path)
    export(Export(str(tmp_path / "run"), "megadetector", where="score < 0.3"))
    content = json.loads((tmp_path / "run/export/megadetector/megadetector.json").read_text())
    assert [len(image["detections"]) for image in content["images"]] == [1] * 6
    assert {each["conf"] for image in content["images"] for each in image["detections"]} == {0.25}


def test_its_own_validator_takes_the_file(tmp_path):
    validator = pytest.importorskip("megadetector.postprocessing.validate_batch_results", reason=NO_VALIDATOR)
    write_worst(tmp_path)
    export(Export(str(tmp_path / "run"), "megadetector"))
    answer = validator.validate_batch_results(str(tmp_path / "run/export/megadetector/megadetector.json"))
    found = answer["validation_results"]
    assert found["errors"] == found["warnings"] == [] and sum(found["detection_category_id_to_count"].values()) == 12
