"""Sempart: stored logits of its head, heads in files, and masks of whole images."""

import numpy as np
import pytest
import torch
from support.golden import arrays

from raypipe import networks
from raypipe.segmenters.sempart import network

pytestmark = pytest.mark.usefixtures("one_thread")


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) as a head sees them."""
    mean, std = np.float32(networks.IMAGENET_MEAN), np.float32(networks.IMAGENET_STD)
    return torch.from_numpy(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


CASES = {
    "head_small": "sempart-head-small",
    "head_full_dims": "sempart-head-s8",
    "head_patch16": "sempart-head-small-p16",
    "head_320": "sempart-head-small",
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_running_statistics_are_the_stored_ones(name, shared):
    stored = {key: torch.from_numpy(value) for key, value in arrays(shared / f"golden/sempart/{name}.npz").items()}
    head, config = network.read(shared / "golden/models" / CASES[name], method="sempart")
    assert config["model_type"] == "sempart_head" and head.patch == config["patch_size"]
    image, features = pixels(stored["image"].numpy()), stored["features"].float()
    with torch.no_grad():
        if "tokens_in" in stored:
            torch.testing.assert_close(head.project(features), stored["tokens_in"], atol=2e-5, rtol=0)
            torch.testing.assert_close(head.encode(features), stored["tokens_out"], atol=2e-5, rtol=0)
            first = head.up[0](head.encode(features), image)
            torch.testing.assert_close(first.mean((2, 3)), stored["up0_mean"], atol=2e-5, rtol=0)
            reduced = network.with_image(first, image)[:, -3:]
            torch.testing.assert_close(reduced, stored["image_ratio"], atol=2e-5, rtol=0)
        for mode, tolerance in (("eval", 2e-5), ("train", 5e-5)):
            coarse, fine = head.train(mode == "train")(features, image)
            torch.testing.assert_close(coarse, stored[f"coarse_logits_{mode}"], atol=tolerance, rtol=0)
            expected = stored[f"fine_logits_{mode}"]
            tolerance = 1e-3 if expected.dtype == torch.float16 else tolerance
            torch.testing.assert_close(fine, expected.float(), atol=tolerance, rtol=0)
    after = head.state_dict()
    for key in stored:
        if key.startswith("running_after/"):
            torch.testing.assert_close(after[key.partition("/")[2]], stored[key], atol=1e-5, rtol=0)


def test_the_published_sizes_have_the_published_number_of_parameters():
    assert sum(each.numel() for each in network.Head().parameters()) == 748_165
