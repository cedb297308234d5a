"""Checkpoints under their authors' names give the features of the same weights as transformers saves them."""

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import dino_pca
from support.tiny.dino import as_published, write_model

from raypipe.features import originals
from raypipe.features.dino import Dino

pytestmark = pytest.mark.usefixtures("one_thread")


def features(path: Path) -> torch.Tensor:
    network = Dino(path, method="test", device="cpu")
    pixels = torch.randn(1, 3, 5 * network.patch, 7 * network.patch, generator=torch.Generator().manual_seed(0))
    return network.forward(pixels, facet="token_norm")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain ViT with heads of 64 channels, which the number of heads is read off."""
    return write_model(tmp_path_factory.mktemp("dino"), hidden_size=128)


@pytest.fixture(scope="module")
def published(folder):
    return as_published(folder)


def write(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def test_the_original_files_of_the_reference_are_the_folder_of_transformers(shared):
    models = shared / "golden/models"
    expected = features(models / "dino-vits8-tiny")
    for name in ("pretrain", "full_checkpoint"):
        file = models / "dino-vits8-tiny-original" / f"dino_vits8_tiny_{name}.pth"
        torch.testing.assert_close(features(file), expected, atol=1e-6, rtol=0)


WRAPPED = {
    "flat": lambda tensors: tensors,
    "dino": lambda tensors: {
        "student": {"module.backbone.cls_token": torch.zeros(1)},
        "teacher": {f"module.backbone.{k}": v for k, v in tensors.items()}
        | {"module.head.mlp.0.weight": torch.ones(3)},
        "epoch": 100,
        "args": Namespace(arch="vit_small", patch_size=8),
    },
    "ibot": lambda tensors: {
        "state_dict": {f"backbone.{k}": v for k, v in tensors.items()}
        | {"backbone.masked_embed": torch.ones(1, 128), "head.last_layer.weight_g": torch.ones(2)}
    },
    "mae": lambda tensors: {
        "model": tensors
        | {"mask_token": torch.ones(1, 1, 64), "decoder_pos_embed": torch.ones(2), "decoder_norm.bias": torch.ones(2)}
    },
    "deit": lambda tensors: {"model": tensors | {"head.weight": torch.ones(2), "head.bias": torch.ones(2)}},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_checkpoints_are_read_however_they_are_wrapped(form, folder, published, tmp_path):
    file = write(tmp_path / "checkpoint.pth", WRAPPED[form](published))
    torch.testing.assert_close(features(file), features(folder), atol=1e-6, rtol=0)
    # a folder that holds nothing else is as good as the file
    torch.testing.assert_close(features(tmp_path), features(folder), atol=1e-6, rtol=0)


def test_deit_has_a_distillation_token_with_a_position(tmp_path):
    from transformers import DeiTConfig, DeiTModel

    torch.manual_seed(0)
    settings = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    settings |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    whole = DeiTModel(DeiTConfig(**settings), add_pooling_layer=False).eval()
    for name, parameter in whole.named_parameters():  # transformers starts tokens and positions at 0
        if "token" in name or "position" in name:
            torch.nn.init.normal_(parameter)
    whole.save_pretrained(tmp_path / "folder")
    tensors = as_published(tmp_path / "folder")
    tensors["dist_token"] = tensors.pop("embeddings.distillation_token")
    assert tensors["pos_embed"].shape == (1, 2 + 16, 128)
    heads = {"head.weight": torch.ones(2), "head_dist.weight": torch.ones(2)}
    file = write(tmp_path / "deit.pth", {"model": tensors | heads})
    for path in (tmp_path / "folder", file):
        for size in ((32, 32), (40, 56)):  # of its own grid, and of another
            pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                expected = whole(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 2:]
            found = Dino(path, method="test", device="cpu").forward(pixels, facet="token_norm")[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len({Dino(path, method="test", device="cpu").digest() for path in (tmp_path / "folder", file)}) == 1


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_names_of_transformers_files_and_modules_are_read_too(suffix, folder, tmp_path):
    files = load_file(folder / "model.safetensors")
    modules = {}
    for name, tensor in Dino(folder, method="test", device="cpu").network.state_dict().items():
        modules[name] = tensor
    assert any(".q_proj." in name for name in modules) and not set(files) & set(modules) - {
        name for name in files if name.startswith(("embeddings", "layernorm"))
    }
    for i, tensors in enumerate((files, modules)):
        file = tmp_path / f"{i}{suffix}"
        save_file(tensors, file) if suffix == ".safetensors" else write(file, tensors)
        torch.testing.assert_close(features(file), features(folder), atol=1e-6, rtol=0)


def test_moco_v3_has_12_heads_beside_a_momentum_encoder(tmp_path):
    folder = write_model(tmp_path / "folder", hidden_size=48, num_attention_heads=12)
    tensors = as_published(folder)
    others = {"momentum_encoder.cls_token": torch.ones(3), "predictor.0.weight": torch.ones(3)}
    both = {f"base_encoder.{name}": tensor for name, tensor in tensors.items()} | others
    both |= {"base_encoder.head.0.weight": torch.ones(2), "base_encoder.head.1.num_batches_tracked": torch.ones(())}
    file = write(tmp_path / "vit-s.pth", {"state_dict": {f"module.{name}": each for name, each in both.items()}})
    assert Dino(file, method="test", device="cpu").heads == 12
    torch.testing.assert_close(features(file), features(folder), atol=1e-6, rtol=0)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("has_gate", [False, True])
def test_dinov2_with_and_without_registers_and_gates(registers, has_gate, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    options = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "use_swiglu_ffn": has_gate}
    folder = tmp_path / "folder"
    if registers:
        dino_pca.write_model(folder, **options)
    else:
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**options, image_size=70, patch_size=14)).save_pretrained(folder)
    tensors = as_published(folder)
    assert "mask_token" in tensors and ("blocks.1.mlp.w12.weight" in tensors) == has_gate
    file = write(tmp_path / "dinov2_pretrain.pth", tensors)
    network = Dino(file, method="test", device="cpu")
    assert network.special == 1 + registers and network.positions == "hf"
    torch.testing.assert_close(features(file), features(folder), atol=1e-6, rtol=0)


def test_half_precision_and_the_number_of_heads_beside_the_file(published, folder, tmp_path):
    file = write(tmp_path / "half.pth", {name: tensor.half() for name, tensor in published.items()})
    torch.testing.assert_close(features(file), features(folder), atol=0.05, rtol=0)
    (tmp_path / "arch.json").write_text(json.dumps({"num_heads": 4, "patch_size": 8, "mean": [0.5]}))
    assert Dino(file, method="test", device="cpu").heads == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("blocks.1.norm1.bias"), r"1 of its tensors are absent .*layernorm_before.bias"),
        (lambda t: t.pop("cls_token"), "no 'embeddings.cls_token'"),
        (lambda t: t.pop("blocks.0.attn.qkv.bias"), r"of its tensors are absent|belong to none"),
        (
            lambda t: t.update(other_token=torch.ones(1, 1, 128)),
            "1 of its tensors belong to none, the first is other_token",
        ),
        (lambda t: t.update(dist_token=torch.ones(1, 1, 128)), "positions are those of 63 patches, which is no square"),
        (lambda t: t.update({"blocks.2.mlp.fc1.weight": torch.ones(9, 128)}), "absent or of another shape"),
        (lambda t: t.update(pos_embed=torch.ones(1, 8, 128)), "positions are those of 7 patches, which is no square"),
        (lambda t: t.update(cls_token=torch.ones(1, 1, 1).expand(1, 1, 64 * 10**6)), "numbers, the weight files have"),
        (lambda t: t.update({"blocks.1000000000.norm1.bias": torch.ones(1)}), "it has 1,000,000,001 blocks"),
        (lambda t: t.update(cls_token=torch.ones(1, 1, 100)), "100 channels are no multiple of 64: say `num_heads`"),
    ],
)
def test_what_is_missing_left_over_or_of_another_shape_is_refused(change, text, published, tmp_path):
    tensors = dict(published)
    change(tensors)
    file = write(tmp_path / "changed.pth", tensors)
    with pytest.raises(ValueError, match=rf"^lost: .*changed.pth .*({text})"):
        Dino(file, method="lost", device="cpu")


def test_settings_that_contradict_the_weights_are_refused(published, tmp_path):
    file = write(tmp_path / "vit.pth", published)
    (tmp_path / "arch.json").write_text('{"patch_size": 16}')
    with pytest.raises(ValueError, match="lost: .* its patch is 8, .* says 16"):
        Dino(file, method="lost", device="cpu")
    (tmp_path / "arch.json").write_text('{"num_heads": 7}')
    with pytest.raises(ValueError, match="lost: .* 128 channels cannot be divided among 7 heads"):
        Dino(file, method="lost", device="cpu")
    (tmp_path / "arch.json").write_text("[7]")
    with pytest.raises(ValueError, match="lost: .*arch.json cannot be read as a configuration"):
        Dino(file, method="lost", device="cpu")


def test_a_folder_of_several_files_must_be_told_which(published, tmp_path):
    for name in ("a.pth", "b.pth"):
        write(tmp_path / name, published)
    with pytest.raises(ValueError, match=r"lost: .* has no config.json of transformers and 2 files \(a.pth, b.pth\)"):
        Dino(tmp_path, method="lost", device="cpu")


class Canary:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("form", ["code", "cut", "text", "numbers"])
def test_what_is_no_checkpoint_is_one_clear_error_and_runs_nothing(form, published, tmp_path):
    file, canary = tmp_path / "x.pth", tmp_path / "canary"
    write(file, {"code": {"cls_token": Canary(canary)}, "numbers": {"epoch": 3}}.get(form, published))
    if form in ("cut", "text"):
        file.write_bytes(file.read_bytes()[:1000] if form == "cut" else b"<html>")
    expected = "holds no tensors by name" if form == "numbers" else "is not a checkpoint that can be read safely"
    with pytest.raises(ValueError, match=f"^lost: .*x.pth {expected}"):
        originals.read(file, method="lost", device="cpu")
    assert not canary.exists()
