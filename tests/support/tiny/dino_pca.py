"""A DINOv2 with registers of random weights."""

from __future__ import annotations

from pathlib import Path

import torch


def write_model(folder: Path, **options) -> Path:
    """A random DINOv2 of five small blocks with four registers. options: other settings of its configuration."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    settings = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    torch.manual_seed(0)
    network = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings | options))
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "token" not in name:
            torch.nn.init.xavier_normal_(parameter, gain=1.5)
    network.save_pretrained(folder)
    return folder


def options(folder: Path) -> dict:
    return {"weights": str(write_model(folder)), "size": 112}
