"""A DINO vision transformer of random weights, for the tests of all methods that stand on its features."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

# From transformers' files to the authors' names, the other way round than the package has them.
NAMES = {
    r"^embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
    r"^embeddings\.position_embeddings": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^encoder\.layer": "blocks",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"^layernorm": "norm",
    r"attention\.output\.dense": "attn.proj",
    r"intermediate\.dense": "mlp.fc1",
    r"(\d)\.output\.dense": r"\1.mlp.fc2",
    r"layer_scale(.)\.lambda1": r"ls\1.gamma",
    r"weights_in": "w12",
    r"weights_out": "w3",
}


def write_model(folder: Path, *, seed: int = 0, **options) -> Path:
    """A random ViT of three small blocks with patches of 8 px, as transformers saves DINO's. options: of its config."""
    from transformers import ViTConfig, ViTModel

    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    settings |= {"image_size": 64, "patch_size": 8, "layer_norm_eps": 1e-6}
    torch.manual_seed(seed)
    network = ViTModel(ViTConfig(**settings | options), add_pooling_layer=False)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "token" not in name and "position" not in name:
            torch.nn.init.xavier_normal_(parameter.flatten(1), gain=1.5)  # transformers' own start gives flat features
    network.save_pretrained(folder)
    return folder


def as_published(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder of transformers under the names of DINO's and DINOv2's authors."""
    held = load_file(folder / "model.safetensors")
    for i in range(1000):
        for kind in ("weight", "bias"):
            parts = [f"encoder.layer.{i}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
            if parts[0] in held:
                held[f"encoder.layer.{i}.attn.qkv.{kind}"] = torch.cat([held.pop(part) for part in parts])
    for name in list(held):
        new = name
        for pattern, replacement in NAMES.items():
            new = re.sub(pattern, replacement, new)
        held[new] = held.pop(name)
    return held
