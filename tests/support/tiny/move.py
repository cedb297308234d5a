"""MOVE on a DINO of random weights, with a random head."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from support.tiny import dino

WIDTHS = (32, 16, 8, 8, 8)  # of the tiny DINO, then of the head's layers


def write_checkpoint(file: Path, *, widths=WIDTHS, seed: int = 0) -> Path:
    """A checkpoint as the reference's training saves it, with its arguments and what is no part of the head."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        "feature_extractor.norm.weight": torch.ones(widths[0]),
        "feature_extractor.norm.bias": torch.zeros(widths[0]),
    }
    last = len(widths) - 1
    for i in range(last):
        first, (inside, outside) = int(i < last - 1), widths[i : i + 2]
        name = f"segmenter_head.model.{i}"
        kernel = torch.randn(outside, inside, 3, 3, generator=random) / (4.5 * inside) ** 0.5
        tensors[f"{name}.{first}.weight"] = kernel
        tensors[f"{name}.{first}.bias"] = torch.randn(outside, generator=random) / 10
        for part, least in (("weight", 0.5), ("bias", 0), ("running_mean", 0), ("running_var", 0.5)):
            tensors[f"{name}.{first + 1}.{part}"] = least + torch.rand(outside, generator=random) / 2
        tensors[f"{name}.{first + 1}.num_batches_tracked"] = torch.tensor(7)
    tensors[f"segmenter_head.model.{last}.weight"] = torch.randn(1, widths[-1], 1, 1, generator=random)
    tensors[f"segmenter_head.model.{last}.bias"] = torch.zeros(1)
    beside = {"mae_model.cls_token": torch.zeros(1), "segmenter.feature_extractor.model.cls_token": torch.zeros(1)}
    model = {f"segmenter.{name}": tensor for name, tensor in tensors.items()} | beside
    model = {f"module.{name}": tensor for name, tensor in model.items()}
    torch.save({"args": Namespace(segmenter_head="conv_minc128"), "epoch": 1, "model": model}, file)
    return file


def model(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under the names that it has for them."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(file, weights_only=True)["model"]


def options(folder: Path) -> dict:
    backbone = dino.write_model(folder / "backbone")
    return {"weights": str(write_checkpoint(folder / "move.pth")), "backbone": str(backbone), "short_side": 64}
