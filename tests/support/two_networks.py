"""A method with two networks; `two_networks.py VERB ...` is the command line with it as the only method."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raypipe import networks
from raypipe.types import Segmenter, Segments


@dataclass
class TwoNetworks(Segmenter):
    """One mask: where the image is brighter than what both networks agree on."""

    weights: str = "org/head"
    backbone: str = "org/backbone"

    source, licence = "the tests", "Apache-2.0"
    networks, licences = ("weights", "backbone"), {"weights": "Apache-2.0", "backbone": "MIT"}

    def __post_init__(self):
        networks.settle_options(self)

    def load(self, device: str) -> None:
        from transformers import Dinov2WithRegistersModel, ViTModel

        self._paths, options = networks.locate_each(self), {"method": self.name, "device": device}
        self._head = networks.pretrained(Dinov2WithRegistersModel, self._paths["weights"], **options)
        self._backbone = networks.pretrained(
            ViTModel, self._paths["backbone"], **options, add_pooling_layer=False, attn_implementation="eager"
        )

    def checksums(self) -> dict[str, str]:
        return networks.checksums_of_each(self._paths)

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for image in images:
            pixels = networks.pixels([image], 28, device="cpu", normalize=True)
            level = sum(network(pixels).last_hidden_state.mean().item() for network in (self._head, self._backbone))
            yield Segments(image.mean(2)[None] > 127 + 50 * np.tanh(level))


def write_models(folder: Path) -> Path:
    """Random weights of both networks in folders of their fields."""
    from support.tiny import dino_pca

    dino_pca.write_model(folder / "weights")
    write_backbone(folder / "backbone")
    return folder


def write_backbone(folder: Path) -> Path:
    """A random ViT of one small block as DINO's are published: without a pooling layer."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**settings, image_size=28, patch_size=14), add_pooling_layer=False).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    from raypipe import segmenters
    from raypipe.cli import main
    from support import two_networks

    segmenters.find = lambda name: two_networks.TwoNetworks
    sys.exit(main(sys.argv[1:]))
