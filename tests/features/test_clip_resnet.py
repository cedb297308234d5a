"""CLIPs with residual networks, of random weights: against open_clip's own answers. Skips without open_clip."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from skimage import data

from raypipe.features.clip import Clip, normalise, read_templates
from raypipe.features.clip_masked import Masked
from raypipe.features.clip_prefix import Continuations
from raypipe.features.clip_resnet import Resnet
from raypipe.segmenters.maskclip import Maskclip


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", reason="needs open_clip_torch")


@pytest.fixture(scope="module")
def folder(open_clip, tmp_path_factory):
    """A tiny random CLIP as open_clip keeps it."""
    folder = tmp_path_factory.mktemp("resnet")
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    settings = {"model_cfg": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    network = open_clip.create_model(f"local-dir:{folder}")
    for module in network.modules():  # a batch norm that starts at 0 closes its block
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_answers_are_open_clips(open_clip, folder):
    found = Clip(folder, method="maskclip", device="cpu")
    assert isinstance(found._network, Resnet) and (found.width, found.patch, found.size) == (24, 32, 64)
    network = open_clip.create_model(f"local-dir:{folder}").eval()
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    image = data.astronaut()
    pixels = normalise(torch.tensor(found.prepared(image)).permute(2, 0, 1)[None])
    with torch.inference_mode():
        embedding = network.encode_image(pixels, normalize=True)
        asked = [pattern.replace("{}", "a cat") for pattern in read_templates("default")]
        texts = network.encode_text(words(asked), normalize=True).mean(0)
    np.testing.assert_allclose(found.embed([image]), embedding, atol=1e-6)
    np.testing.assert_allclose(found.texts(["a cat"])[0], texts / texts.norm(), atol=1e-6)


def test_dense_features_are_the_pooling_without_attention(open_clip, folder):
    found = Clip(folder, method="maskclip", device="cpu")
    pixels = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    dense = found.dense(pixels)
    assert dense.shape == (2, 24, 2, 4)
    visual = open_clip.create_model(f"local-dir:{folder}").eval().visual
    with torch.inference_mode():
        cells = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        pool = visual.attnpool
        value, output = (layer.weight[:, :, None, None] for layer in (pool.v_proj, pool.c_proj))
        values = torch.nn.functional.conv2d(cells, value, pool.v_proj.bias)
        expected = torch.nn.functional.conv2d(values, output, pool.c_proj.bias)
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("options", [{"residual": "plain"}, {"keys": True}])
def test_what_is_of_vision_transformers_is_refused(folder, options):
    with pytest.raises(ValueError, match="reco: residual plain and key smoothing are for CLIPs with vision"):
        Clip(folder, method="reco", device="cpu").dense(torch.zeros(1, 3, 64, 64), **options)
    with pytest.raises(ValueError, match="maskclip: literal has no effect on"):
        Clip(folder, method="maskclip", device="cpu", literal=True)


def test_a_folder_without_weights_is_refused(open_clip, folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    with pytest.raises(ValueError, match=f"maskclip: {re.escape(str(tmp_path))} cannot be read as a CLIP of open_clip"):
        Clip(tmp_path, method="maskclip", device="cpu")


def test_open_clip_is_asked_for_where_it_is_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="which is not installed: pip install 'raypipe.open-clip.'"):
        Clip(tmp_path, method="maskclip", device="cpu")


def test_maskclip_names_places_by_a_residual_network_but_knows_no_keys_of_it(folder):
    method = Maskclip(weights=str(folder), classes="cat,dog,sky,tree", short_side=64, threshold=0.0)
    method.load("cpu")
    (found,) = method.segment([data.astronaut()[:300]])
    assert found.index.shape == (300, 512) and found.index.min() == 1 and set(found.labels) <= {*method._names}
    for options in ({"ks": 1.0}, {"residual": "plain"}):
        with pytest.raises(ValueError, match="maskclip: residual plain and key smoothing are for CLIPs with vision"):
            Maskclip(weights=str(folder), classes="cat,dog", **options).load("cpu")


def test_what_only_transformers_have_is_refused(folder):
    clip = Clip(folder, method="zero_guidance", device="cpu", text=False)
    with pytest.raises(ValueError, match="zero_guidance: .* holds a CLIP with a residual network, expected one with a"):
        Masked(clip)


def test_texts_that_begin_alike_are_refused(folder):
    residual = Clip(folder, method="zero_guidance", device="cpu")
    with pytest.raises(ValueError, match="zero_guidance: texts that begin alike are asked of CLIPs with vision trans"):
        Continuations(residual, method="zero_guidance", device="cpu")
