"""SAM's generator against records that the official generator made with the same weights."""

import json

import numpy as np
import pytest
import torch
from transformers import SamModel

from raypipe.benchmark.plain.sam import agreement
from raypipe.segmenters.sam import Sam, complementary, generator
from raypipe.segmenters.sam import network as model

CASES = ("zebra_crops1", "tiger_minarea", "tiger_none")
pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("sam-tiny", "sam-tiny-original/sam_vit_tiny.pth")


@pytest.fixture(params=CASES)
def case(request, shared) -> dict[str, np.ndarray]:
    with np.load(shared / "golden" / "sam_amg" / f"{request.param}.npz") as stored:
        return dict(stored)


@pytest.fixture(params=KINDS)
def weights(request, shared, monkeypatch) -> str:
    monkeypatch.setattr(model, "DECODER_HEADS", 2)  # of this tiny network; no shape in a checkpoint tells it
    return str(shared / "golden" / "models" / request.param)


def loaded(weights: str, case: dict[str, np.ndarray]) -> Sam:
    method = Sam(weights=weights, preset="library", **json.loads(str(case["params"])))
    method.load("cpu")
    return method


def unpacked(packed: np.ndarray, size) -> np.ndarray:
    pixels = int(np.prod(size))
    return np.unpackbits(packed, axis=1, count=pixels).astype(bool).reshape(-1, *size)


def test_an_official_checkpoint_becomes_exactly_the_tensors_of_transformers(shared):
    folder = shared / "golden" / "models"
    expected = SamModel.from_pretrained(folder / "sam-tiny").state_dict()
    found = model.from_official(folder / "sam-tiny-original" / "sam_vit_tiny.pth").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_crops_and_points_are_the_official_ones(case):
    options = json.loads(str(case["params"]))
    crops = generator.crop_boxes(case["image"].shape[:2], layers=options["crop_n_layers"], overlap_ratio=512 / 1500)
    np.testing.assert_array_equal([crop[:4] for crop in crops], case["all_crop_boxes_xyxy"])
    assert [crop.layer for crop in crops] == case["crop_layer"].tolist()
    grid = generator.point_grid(options["points_per_side"])
    np.testing.assert_allclose(grid, case["grid_layer0"], rtol=0, atol=1e-15)
    height, width = case["image"].shape[:2]
    scaled = (
        grid
        * (width, height)
        * (case["model_input_image"].shape[1] / width, case["model_input_image"].shape[0] / height)
    )
    np.testing.assert_allclose(scaled, case["crop0_points_model"], rtol=1e-6)


def test_the_network_sees_the_official_pixels(case):
    np.testing.assert_array_equal(model.resize(case["image"], 128), case["model_input_image"])
    (pixels,) = model.normalise([case["model_input_image"]], 128, "cpu").numpy()
    height, width = case["model_input_image"].shape[:2]
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    expected = (case["model_input_image"] - np.array(mean)) / std
    np.testing.assert_allclose(pixels[:, :height, :width].transpose(1, 2, 0), expected, atol=1e-5)
    assert not pixels[:, height:].any() and not pixels[:, :, width:].any()


def test_logits_predicted_ious_and_stability_are_the_official_ones(case, weights):
    method, inner = loaded(weights, case), case["model_input_image"].shape[:2]
    with torch.inference_mode():
        pixels = model.normalise([case["model_input_image"]], 128, "cpu")
        (features,) = model.encode(method._network, pixels, dtype="float32")
        points = torch.from_numpy(case["crop0_points_model"]).double()
        logits, scores = model.decode(method._network, features, points, dtype="float32")
    np.testing.assert_allclose(logits[:12], case["crop0_low_res_logits"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(scores, case["crop0_iou"], rtol=0, atol=1e-4)
    large = generator.upsample(logits.flatten(0, 1), side=128, input_size=inner, size=case["image"].shape[:2])
    stability = torch.cat([generator.stability(part, method.stability_score_offset) for part in large])
    np.testing.assert_allclose(stability, case["crop0_stability"], rtol=0, atol=2e-2)
    assert np.nanmean(np.abs(stability.numpy() - case["crop0_stability"])) < 1e-3


def test_records_are_the_official_ones_in_their_order(case, weights):
    size, records = case["image"].shape[:2], loaded(weights, case).generate(case["image"])
    assert len(records) == len(case["area"])
    found = np.array([one.paste(np.zeros(size, bool)) for one in records], bool).reshape(-1, *size)
    assert agreement(found, unpacked(case["masks_packed"], size)) >= 0.995
    for one, box, area in zip(records, case["boxes_xywh"], case["area"], strict=True):
        x0, y0, x1, y1 = one.box
        np.testing.assert_allclose((x0, y0, x1 - x0, y1 - y0), box, atol=1)
        assert one.area == pytest.approx(area, rel=0.005)
    np.testing.assert_allclose([one.score for one in records], case["predicted_iou"], rtol=0, atol=1e-4)
    np.testing.assert_allclose([one.stability for one in records], case["stability_score"], rtol=0, atol=2e-3)
    points, crops = [one.point for one in records], [(*one.crop[:2], *one.crop.size[::-1]) for one in records]
    np.testing.assert_allclose(points, case["point_coords"].reshape(-1, 2) if len(points) else [])
    assert crops == [tuple(crop) for crop in case["crop_box_xywh"].reshape(-1, 4).tolist()]


def test_complementary_masks_are_those_of_the_reference(case, weights):
    method, foreground = loaded(weights, case), case["foreground"].astype(bool)
    found = complementary(method.generate(case["image"]), foreground)
    if "complementary_packed" not in case:
        assert found.note == "few_masks" and (found.masks[0] == foreground).all() and not found.masks[1:].any()
        return
    assert found.note == ""
    for mask, expected in zip(found.masks, unpacked(case["complementary_packed"], foreground.shape), strict=True):
        assert (mask != expected).mean() <= 1e-3


def test_small_regions_are_cleaned_as_by_the_reference(shared):
    with np.load(shared / "golden" / "sam_amg" / "small_regions.npz") as stored:
        case = dict(stored)
    size, min_area = case["mask_shape"], int(case["min_area"])
    stages = [unpacked(case[f"{name}_packed"], size) for name in ("masks", "after_holes", "after_islands")]
    for mask, holes, islands, changed in zip(*stages, case["changed"], strict=True):
        filled, first = generator.remove_small_regions(mask, min_area, "holes")
        np.testing.assert_array_equal(filled, holes)
        kept, second = generator.remove_small_regions(filled, min_area, "islands")
        np.testing.assert_array_equal(kept, islands)
        assert [first, second] == changed.tolist()
