"""A DINO vision transformer of random weights, for the tests of all methods that stand on its features."""

from __future__ import annotations

from pathlib import Path

import torch


def write_model(folder: Path, **options) -> Path:
    """A random ViT of three small blocks with patches of 8 px, as transformers saves DINO's. options: of its config."""
    from transformers import ViTConfig, ViTModel

    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    settings |= {"image_size": 64, "patch_size": 8, "layer_norm_eps": 1e-6}
    torch.manual_seed(0)
    network = ViTModel(ViTConfig(**settings | options), add_pooling_layer=False)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "token" not in name and "position" not in name:
            torch.nn.init.xavier_normal_(parameter.flatten(1), gain=1.5)  # transformers' own start gives flat features
    network.save_pretrained(folder)
    return folder
