"""Parity of CLIPSeg and DINOv2-PCA with stored arrays of tiny networks, step by step and from image to mask."""

import numpy as np
import pytest
import torch

from raypipe import networks
from raypipe.segmenters.clipseg import Clipseg, masked, stretched
from raypipe.segmenters.dino_pca import DinoPca, components, project, read_as_grey


@pytest.fixture(params=["tiger", "zebra"])
def clipseg_case(request, shared):
    """Stored arrays, and the method with the network and prompt that made them."""
    case = dict(np.load(shared / "golden" / "clipseg" / f"{request.param}.npz"))
    weights = str(shared / "golden" / "models" / "clipseg-tiny")
    segmenter = Clipseg(weights=weights, size=case["pixel_values"].shape[-1], prompt=str(case["prompt"]))
    segmenter.load("cpu")
    return case, segmenter


@pytest.fixture(params=["tiger", "zebra"])
def dino_case(request, shared):
    """Stored arrays, and the method with the network that made them."""
    case = dict(np.load(shared / "golden" / "dinov2_pca" / f"{request.param}.npz"))
    segmenter = DinoPca(weights=str(shared / "golden" / "models" / "dinov2-reg-tiny"), size=int(case["input_size"]))
    segmenter.load("cpu")
    return case, segmenter


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two bool masks."""
    return (one & other).sum() / (one | other).sum()


def test_clipseg_from_the_stored_input_follows_the_reference(clipseg_case):
    case, segmenter = clipseg_case
    np.testing.assert_allclose(segmenter._embedding, case["conditional_embedding"], atol=1e-5)
    logits = segmenter.logits(torch.tensor(case["pixel_values"]))
    np.testing.assert_allclose(logits[0], case["logits"], atol=1e-4)
    normalised = stretched(logits[0].sigmoid().numpy())
    np.testing.assert_allclose(normalised, case["normalised"], atol=1e-4)
    assert ((normalised > 0.3) != case["mask_low"]).mean() <= 0.002


def test_clipseg_from_image_to_mask_follows_the_reference(clipseg_case):
    case, segmenter = clipseg_case
    resize = networks.squeeze_as_torchvision
    (pixels,) = networks.pixels([case["image"]], segmenter.size, device="cpu", normalize=True, resize=resize)
    np.testing.assert_allclose(pixels, case["pixel_values"][0], atol=1e-6)
    (found,) = segmenter.segment([case["image"]], [case["foreground"].astype(bool)])
    assert ((found.masks[0] > segmenter.threshold) != (case["mask"] > 0)).mean() <= 0.01


def test_clipseg_enlarges_the_stored_map_exactly(clipseg_case):
    case, _ = clipseg_case
    (mask,) = masked(case["normalised"], case["foreground"].astype(bool)).masks
    np.testing.assert_array_equal(mask > 0.3, case["mask"] > 0)


def test_dino_features_follow_the_reference(dino_case):
    case, segmenter = dino_case
    (pixels,) = networks.pixels([case["image"]], segmenter.size, device="cpu", normalize=False)
    np.testing.assert_array_equal(pixels, case["pixel_values"][0])
    (features,) = segmenter.features(torch.tensor(case["pixel_values"]))
    np.testing.assert_allclose(features, case["features"], atol=1e-4)


def test_dino_components_follow_scikit_learn(dino_case):
    case, _ = dino_case
    scores, axes = project(torch.tensor(case["features"]))
    np.testing.assert_allclose(axes, case["pca_components"], atol=1e-3)
    np.testing.assert_allclose(scores, case["projection"], atol=1e-3)
    picture = components(torch.tensor(case["features"]))
    np.testing.assert_allclose(picture.reshape(-1, 3), case["normalised"], atol=1e-3)


def test_dino_grey_is_opencvs(dino_case):
    case, _ = dino_case
    size, side = (int(case["output_size"]),) * 2, int(len(case["normalised"]) ** 0.5)
    picture = case["normalised"].reshape(side, side, 3)
    np.testing.assert_array_equal(read_as_grey(picture, size), case["gray"])


def test_dino_from_image_to_masks_follows_the_reference(dino_case):
    case, segmenter = dino_case
    size = int(case["output_size"])
    # The reference works on a square and the method at the image's own size: so give it that square's components.
    grey = read_as_grey(components(next(segmenter._features([case["image"]]))), (size, size))
    assert np.abs(grey.astype(int) - case["gray"]).max() <= 1
    foreground = case["foreground"].astype(bool)
    assert agreement((grey > 127) & foreground, case["mask_half"] > 0) >= 0.995
    assert agreement((grey > 100) & foreground, case["mask_reference"] > 0) >= 0.995
    if case["image"].shape[:2] == (size, size):
        (found,) = segmenter.segment([case["image"]], [foreground])
        assert agreement(found.masks[0] > 0.5, case["mask_half"] > 0) >= 0.995
        np.testing.assert_array_equal(found.masks[1] > 0.5, foreground & ~(found.masks[0] > 0.5))
