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


def published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A head's tensors under the names of the published checkpoints."""
    parts = {"norm1": "0.norm", "attn.qkv": "0.fn.to_qkv", "attn.out": "0.fn.to_out.0"}
    parts |= {"norm2": "1.norm", "mlp.fc1": "1.fn.net.0", "mlp.fc2": "1.fn.net.3"}
    parts |= {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4"}
    first = {"project": "conv_input", "coarse": "conv_coarse", "fine": "conv_final"}
    first |= {"encoder": "inp_transformer.layers", "up": "layers"}
    named = {}
    for name, tensor in tensors.items():
        where, _, rest = name.partition(".")
        inner, _, kind = rest.rpartition(".")
        number, _, part = inner.partition(".")
        named[".".join(filter(None, (first[where], number, parts.get(part), kind)))] = tensor
    return named


def options(folder: Path) -> dict:
    from raypipe.features.dino import Dino

    backbone = dino.write_model(folder / "backbone")
    digest = Dino(backbone, method="sempart", device="cpu").digest()
    weights = write_head(folder / "head", polarity=1, backbone=str(backbone), backbone_digest=digest)
    return {"weights": str(weights), "image_size": 64}
