"""A SelfMask of random weights, in the authors' names."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SIZES = {"patch_size": 8, "num_attention_heads": 2, "decoder_attention_heads": 2}
ENCODER = {  # from transformers' names to the authors'
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layers.": "blocks.",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm.": "norm.",
}


def write_model(folder: Path) -> Path:
    """Three blocks of 32 channels that see patches of 8 px, and four queries that look at them twice."""
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTModel

    from raypipe.segmenters.selfmask.network import MaskFormer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = ViTModel(ViTConfig(**sizes, image_size=64, patch_size=8), add_pooling_layer=False)
    network = MaskFormer(encoder, queries=4, layers=2, heads=2, inner=48)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and not name.startswith("encoder.embeddings.") and name != "query_embed":
            torch.nn.init.xavier_normal_(parameter, gain=1.5)  # transformers' own start gives flat features
    folder.mkdir(parents=True, exist_ok=True)
    save_file(published(network.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "selfmask"} | SIZES))
    return folder


def published(state: dict) -> dict:
    """The tensors of a network under the authors' names, query, key and value in one."""
    named = {}
    for name, tensor in state.items():
        if name.startswith("encoder."):
            for ours, theirs in ENCODER.items():
                name = name.replace(ours, theirs)
        if ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        if ".attention.q_proj." in name:
            where = name.replace("blocks.", "layers.")
            tensor = torch.cat([state[where.replace("q_proj", f"{each}_proj")] for each in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        named[name] = tensor.contiguous()
    return named


def options(folder: Path) -> dict:
    return {"weights": str(write_model(folder))}
