"""Dense features against those of DINO's own code, and of dino-vit-features for overlapping patches."""

import numpy as np
import pytest
import torch
from support.golden import arrays

from raypipe.features import descriptors
from raypipe.features.dino import Dino
from raypipe.features.grid import seen_size

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 5e-5  # of the stored arrays' description
FACETS = {
    "query": "query", "key": "key", "value": "value", "block_output": "token", "last_hidden_state": "token_norm",
}  # fmt: skip
FIXED = {"vits8_96x136": "", "vits8_native224": "", "vits8_112x160_layer1": "", "vits16_padded_150x203": "pad"}
FIXED |= {"vits16_cropped_150x203": "crop", "vits16_lanczos_150x203": "resize"}
OVERLAPPING = ("stride4_vits8_64x88", "stride8_vits16_80x96_layer1")


@pytest.fixture(scope="module")
def dino(shared):
    """A function that gives the network of a case."""

    def make(case: str, **options) -> Dino:
        folder = shared / "golden/models" / f"dino-{'vits16' if 'vits16' in case else 'vits8'}-tiny"
        return Dino(folder, method="test", device="cpu", **options)

    return make


@pytest.fixture(params=[*FIXED, *OVERLAPPING])
def case(request, shared):
    return request.param, arrays(shared / "golden/dense_features" / f"{request.param}.npz")


def test_pixels_are_fitted_and_normalised_as_the_papers_do(case, dino):
    name, stored = case
    fit, image = FIXED.get(name) or "pad", stored["image"]
    network = dino(name)
    pixels = network.pixels(image, seen_size(image.shape[:2], network.patch, fit, max_side=1024, method="test"), fit)
    np.testing.assert_allclose(pixels, stored["pixel_values"], atol=1e-6)


@pytest.mark.parametrize("name", FIXED)
def test_every_facet_is_that_of_the_original_code(name, shared, dino):
    stored = arrays(shared / "golden/dense_features" / f"{name}.npz")
    network, pixels, block = dino(name), torch.from_numpy(stored["pixel_values"]), int(stored.get("layer", -1))
    present = [key for key in FACETS if key in stored]
    assert "key" in present
    for key in present:
        # the stored output of the last LayerNorm is always that after the last block
        tokens, attention = network.tokens(
            pixels, facet=FACETS[key], block=-1 if key == "last_hidden_state" else block, cls_attention=True
        )
        np.testing.assert_allclose(tokens, stored[key], atol=TOLERANCE)
        if key != "last_hidden_state":
            np.testing.assert_allclose(attention, stored["cls_attention"], atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in FIXED if "native" not in name])
def test_the_rule_of_transformers_gives_other_features(name, shared, dino):
    stored = arrays(shared / "golden/dense_features" / f"{name}.npz")
    pixels, block = torch.from_numpy(stored["pixel_values"]), int(stored["layer"])
    key, _ = dino(name, positions="hf").tokens(pixels, block=block)
    np.testing.assert_allclose(key, stored["key_hf"], atol=TOLERANCE)
    if "last_hidden_state_hf" in stored:
        state, _ = dino(name, positions="hf").tokens(pixels, facet="token_norm")
        np.testing.assert_allclose(state, stored["last_hidden_state_hf"], atol=TOLERANCE)
    other = np.linalg.norm(stored["key"] - key.numpy()) / np.linalg.norm(stored["key"])
    assert other > 0.005


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_patches_and_binned_descriptors_are_those_of_the_original_code(name, shared, dino):
    stored = arrays(shared / "golden/dense_features" / f"{name}.npz")
    network, options = dino(name, stride=int(stored["stride"])), {"block": int(stored["layer"])}
    (found,) = network([stored["image"]], fit="pad", cls_attention=True, **options)
    assert found.grid == tuple(stored["num_patches"])
    shaped = descriptors.by_dimension(found.patches, network.heads)
    np.testing.assert_allclose(shaped, stored["descriptors"], atol=TOLERANCE)
    np.testing.assert_allclose(found.cls_attention[None], stored["cls_attention"][..., 1:], atol=TOLERANCE)
    tokens, _ = network.tokens(torch.from_numpy(stored["pixel_values"]), **options)
    first = descriptors.by_dimension(tokens[0, :1], network.heads)
    np.testing.assert_allclose(first, stored["descriptors_with_cls_first_row"], atol=TOLERANCE)
    binned = descriptors.log_binned(shaped, found.grid)[stored["binned_rows"]]
    np.testing.assert_allclose(binned, stored["binned"], atol=TOLERANCE)
