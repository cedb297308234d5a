"""FOUND on a DINO of random weights, with a random decoder."""

from __future__ import annotations

from pathlib import Path

import torch

from support.tiny import dino

WIDTH = 32  # of the tiny DINO


def write_decoder(file: Path, *, width: int = WIDTH) -> Path:
    """A decoder as the authors save theirs, in a `.pt`; its masks are about half of an image."""
    random = torch.Generator().manual_seed(0)
    decoder = {"weight": torch.randn(1, width, 1, 1, generator=random), "bias": torch.zeros(1)}
    torch.save({"decoder": decoder}, file)
    return file


def options(folder: Path) -> dict:
    backbone = dino.write_model(folder / "backbone")
    return {"weights": str(write_decoder(folder / "decoder.pt")), "backbone": str(backbone)}
