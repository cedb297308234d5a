"""A NamedMask of random weights: one narrow block a stage, for a background and three classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raypipe.segmenters.namedmask.network import DeepLab

SIZES = {"blocks": (1, 1, 1, 1), "width": 4, "channels": 8, "fine": 4}
CLASSES = ("dining table", "crane", "otter")
SEED = 6  # of weights with which every class is somewhere


def made(classes: int = 1 + len(CLASSES), *, seed: int = SEED, **options) -> DeepLab:
    """A network whose norms are not those of a start, in eval mode."""
    import torch

    from raypipe.segmenters.namedmask import network

    deeplab = network.DeepLab(classes, **SIZES | options)
    network.initialise(deeplab, None, seed)
    random = torch.Generator().manual_seed(seed)
    for module in deeplab.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=random)
            module.running_var.uniform_(0.5, 2, generator=random)
    last = deeplab.classifier.classifier[-1]
    last.weight.data.mul_(8)  # probabilities far from equal
    return deeplab.eval()


def write_model(folder: Path, **config) -> Path:
    """The folder that a training exports. config: what else its config.json says."""
    from raypipe.segmenters.namedmask import network

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in network.files(made(), {"classes": list(CLASSES)} | config).items():
        (folder / name).write_bytes(content)
    return folder


def options(folder: Path) -> dict:
    return {"weights": str(write_model(folder))}
