"""Sempart on a DINO of random weights, with a random head in a folder as a training exports it."""

from __future__ import annotations

from pathlib import Path

import torch

from support.tiny import dino

WIDTH = 32  # of the tiny DINO


def head(*, width: int = WIDTH, hidden: int = 8, patch: int = 8):
    """A head in eval mode whose batch norms have seen something, so that its masks are no constant."""
    from raypipe.segmenters.sempart.network import Head

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Head(width, hidden=hidden, patch=patch)
        for name, buffer in made.named_buffers():
            if not name.endswith("num_batches_tracked"):
                buffer.copy_(torch.rand_like(buffer) * 0.2 + (0.01 if name.endswith("var") else -0.1))
    return made.eval()


def write_head(folder: Path, **config) -> Path:
    """A folder as a training exports it. config: what its config.json says beside the sizes."""
    from raypipe.segmenters.sempart.network import files

    folder.mkdir(parents=True)
    for name, content in files(head(), config).items():
        (folder / name).write_bytes(content)
    return folder


def options(folder: Path) -> dict:
    backbone = dino.write_model(folder / "backbone")
    weights = write_head(folder / "head", polarity=1, backbone=str(backbone))
    return {"weights": str(weights), "image_size": 64}
