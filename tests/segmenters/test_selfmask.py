"""SelfMask: outputs of its authors' code, files that are none of its own, what training will need of the network."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import golden
from support.tiny.selfmask import write_model

from raypipe.benchmark.plain import selfmask as plain
from raypipe.refiners.bilateral import Bilateral, iou
from raypipe.segmenters.selfmask import SelfMask
from raypipe.segmenters.selfmask.network import read
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = 2.5e-4  # stored saliency is float16


@pytest.fixture(scope="module")
def published(shared, tmp_path_factory) -> SelfMask:
    """A file of the authors' names, as small as the stored arrays want it."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copy(shared / "golden/selfmask/maskformer_tiny_original_names.safetensors", folder / "selfmask.safetensors")
    (folder / "arch.json").write_text(json.dumps({"num_heads": 2}))  # of 32 channels, where the paper's have 64
    method = SelfMask(weights=str(folder / "selfmask.safetensors"))
    method.load("cpu")
    return method


@pytest.fixture(params=["maskformer_square", "maskformer_nonsquare_padded"])
def stored(request, shared):
    return golden.arrays(shared / "golden/selfmask" / f"{request.param}.npz")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SelfMask:
    method = SelfMask(weights=str(write_model(tmp_path_factory.mktemp("selfmask"))))
    method.load("cpu")
    return method


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (45, 70, 3)).astype(np.uint8)


def whole(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels with zeros to the right and below up to multiples of 8."""
    return torch.nn.functional.pad(pixels, (0, -pixels.shape[3] % 8, 0, -pixels.shape[2] % 8))


def test_masks_are_those_of_the_authors_code(published, stored):
    images = list(stored["image"])
    for i, found in enumerate(published.segment(images)):
        np.testing.assert_allclose(found.masks[0], stored["saliency"][i], atol=HALF)
        np.testing.assert_array_equal(found.masks[0] > 0.5, stored["saliency_mask"][i])
        best = stored["best_query"][i]
        np.testing.assert_allclose(found.scores, stored["objectness"][i, -1, best], atol=1e-4)
        assert found.masks.dtype == np.float32 and found.note == ""


def test_all_queries_of_all_blocks_are_those_of_the_authors_code(published, stored):
    network, pixels = published._network, whole(torch.from_numpy(stored["pixel_values"]))
    with torch.inference_mode():
        masks, objectness = network(pixels)
        tokens = network.encoder(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    np.testing.assert_allclose(tokens.mT, stored["encoder_last_tokens"], atol=1e-4)
    np.testing.assert_allclose(masks, stored["mask_pred"], atol=1e-4)
    np.testing.assert_allclose(objectness, stored["objectness"], atol=1e-4)


def test_the_surest_query_is_the_first_of_equally_sure_ones(tiny, noise):
    features = next(iter(tiny.features([noise])))
    network = tiny._network
    last = network.ffn.layers[-1]
    before = last.weight.clone()
    last.weight.data.zero_()
    with torch.no_grad():
        masks, objectness = network.best(features.patches[None], features.grid)
        picked = network(tiny._dino.pixels(noise, noise.shape[:2], "pad"))[0][0, -1, 0]
    last.weight.data = before
    assert objectness == last.bias.sigmoid()
    np.testing.assert_allclose(masks[0], picked, atol=1e-5)


def test_a_query_s_mask_is_that_of_the_plain_formulation(tiny, noise):
    (found,) = tiny.segment([noise])
    features = next(iter(tiny.features([noise])))
    np.testing.assert_allclose(found.masks[0], plain.saliency(tiny._network, features, noise.shape[:2]), atol=1e-5)


def test_a_folder_of_a_training_is_read(shared, noise):
    folder = shared / "golden/models/selfmask-tiny"
    network = read(folder, method="test")
    assert len(network.decoder.layers) == 2 and network.query_embed.shape == (6, 64)
    assert network.decoder.layers[0].self_attn.num_heads == 2 and network.encoder.config.num_attention_heads == 2
    method = SelfMask(weights=str(folder))
    method.load("cpu")
    assert list(method.checksums()) == ["model.safetensors"]
    (found,) = method.segment([noise])
    assert found.masks.shape == (1, *noise.shape[:2]) and 0 < found.scores[0] < 1


def test_a_long_image_is_seen_smaller_and_its_mask_has_its_size(tiny):
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None], (48, 200, 3))
    (small,), (large,) = replaced(tiny, max_side=80).segment([ramp]), tiny.segment([ramp])
    assert small.masks.shape == large.masks.shape == (1, 48, 200)
    assert small.masks.min() >= 0 and small.masks.max() <= 1 and (small.masks != large.masks).any()


@pytest.mark.parametrize("name", ["square", "rect"])
def test_pseudo_masks_of_namedmask_are_the_stored_ones(shared, name):
    case = golden.arrays(shared / "golden/namedmask" / f"selfmask_{name}.npz")
    method = SelfMask(weights=str(shared / "golden/models/selfmask-tiny"))
    method.load("cpu")
    image = case["image"]
    (features,) = method.features([image])
    np.testing.assert_allclose(features.patches.T, case["patch_tokens"], atol=1e-4)
    (found,) = method.segment([image])
    np.testing.assert_allclose(found.scores, case["objectness"][case["selected_query"]], atol=1e-4)
    np.testing.assert_allclose(found.masks[0], case["saliency"], atol=1e-4)
    np.testing.assert_array_equal(found.masks[0] > 0.5, case["mask"])
    refined, _ = Bilateral("namedmask", refine_working_size=min(image.shape[:2]))(found.masks, image)
    assert iou(refined[0] > 0, case["mask_bilateral"] > 0) >= 0.995  # where the solution is 0.5, rounding decides


def replaced(method: SelfMask, **options) -> SelfMask:
    made = replace(method, **options)
    made.load("cpu")
    return made


def test_everything_can_be_trained(tmp_path):
    network = read(write_model(tmp_path), method="test")
    network.requires_grad_(True).train()
    masks, objectness = network(torch.randn(2, 3, 32, 40))
    assert masks.shape == (2, 2, 4, 8, 10) and objectness.shape == (2, 2, 4, 1)
    (masks.mean() + objectness.mean()).backward()
    without = [name for name, each in network.named_parameters() if each.grad is None or not each.grad.isfinite().all()]
    assert without == []


def test_hand_made_features_are_refused():
    with pytest.raises(ValueError, match="^selfmask: weights 'color' are no network"):
        SelfMask(weights="color")


BROKEN = {
    "encoder.blocks.1.norm1.weight": "layernorm_before",
    "decoder.layers.1.norm3.bias": "decoder.layers.1.norm3.bias is missing or belongs to none",
    "query_embed": "no 'query_embed'",
    "encoder.cls_token": "no 'embeddings.cls_token'",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_without_one_of_its_tensors_is_refused(tmp_path, name):
    file = write_model(tmp_path) / "model.safetensors"
    state = load_file(file)
    del state[name]
    save_file(state, file)
    with pytest.raises(ValueError, match=rf"^test: .*model.safetensors.*{BROKEN[name]}"):
        read(tmp_path, method="test")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"query_embed": torch.zeros(4, 16)}, "size mismatch"),
        ({"decoder.layers.7.norm1.bias": torch.zeros(32)}, "decoder.layers.7.norm1.bias is missing or belongs to none"),
        ({"extra": torch.zeros(1)}, "extra is missing or belongs to none"),
    ],
    ids=str,
)
def test_a_file_of_other_tensors_is_refused(tmp_path, change, text):
    file = write_model(tmp_path) / "model.safetensors"
    save_file(load_file(file) | change, file)
    with pytest.raises(ValueError, match=rf"^test: .*model.safetensors is no checkpoint of SelfMask: .*{text}"):
        read(tmp_path, method="test")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model_type": "vit"}, "holds a network of type 'vit', expected 'selfmask'"),
        ({"decoder_attention_heads": 5}, "is no checkpoint of SelfMask"),
        ({"decoder_attention_heads": "many"}, "is no checkpoint of SelfMask"),
        ({"hidden_size": 64}, "its width is 32"),
    ],
    ids=str,
)
def test_a_configuration_of_another_network_is_refused(tmp_path, settings, text):
    config = write_model(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(ValueError, match=rf"^test: .*{text}"):
        read(tmp_path, method="test")


@pytest.mark.parametrize("name", ["ffn.layers.0.weight", "query_embed"])
def test_values_that_are_no_numbers_are_an_error_of_the_image(name, tmp_path, noise):
    file = write_model(tmp_path) / "model.safetensors"
    held = load_file(file)
    save_file(held | {name: held[name] * torch.nan}, file)
    method = SelfMask(weights=str(tmp_path))
    method.load("cpu")
    with pytest.raises(BadImage, match="segment: non_finite: the decoder gives values"):
        next(iter(method.segment([noise])))


def test_a_backbone_alone_is_refused(shared):
    folder: Path = shared / "golden/models/dino-vits8-tiny"
    with pytest.raises(ValueError, match="^test: .*expected 'selfmask'"):
        read(folder, method="test")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_finds_for_images_of_several_sizes(tiny, noise):
    images = [noise, noise[:40], noise, noise[:, ::-1]]
    there = replace(tiny, dtype="float32")
    there.load("cuda")
    for one, other in zip(tiny.segment(images), there.segment(images), strict=True):
        np.testing.assert_allclose(one.masks, other.masks, atol=1e-3)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
