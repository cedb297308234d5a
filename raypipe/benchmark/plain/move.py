"""MOVE as its authors' code runs it: the head layer by layer as it was trained, one image at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.plain._dino import PlainDino
from raypipe.benchmark.turns import with_plain


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """In full batches, against one image at a time."""
    against = "all blocks and attention in memory, the head layer by layer, one image at a time"
    return with_plain(method, device, images, repeats, PlainMove(method), against)


class PlainMove:
    """MOVE with the weights and sizes of a loaded method."""

    def __init__(self, method):
        from raypipe.segmenters.move import network

        self._dino, self._method = PlainDino(method._dino.network), method
        self._norm, self._head = trained(network.read(method._paths["weights"]))
        self._norm.to(self._dino.network.device), self._head.to(self._dino.network.device)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Bool (1, H, W) of RGB uint8 (H, W, 3)."""
        import torch
        from PIL import Image
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        options = {"interpolation": InterpolationMode.BICUBIC, "max_size": self._method.max_side}
        small = np.asarray(resize(Image.fromarray(image), self._method.short_side, **options))
        seen = self._dino(small, "reflect")
        with torch.no_grad():
            features = self._norm(seen.outputs[-2][1:]).T.unflatten(1, seen.grid)[None]
            probability = self._head(features).sigmoid()[:, :, : small.shape[0], : small.shape[1]]
            large = torch.nn.functional.interpolate(probability, size=image.shape[:2], mode="bilinear")
        return (large[0] > 0.5).cpu().numpy()


def trained(tensors: dict):
    """The LayerNorm and the head of a checkpoint as they were trained, layer by layer, with its tensors in them."""
    from torch import nn

    convolutions = [tensor for name, tensor in sorted(tensors.items()) if tensor.ndim == 4]
    layers = []
    for i, kernel in enumerate(convolutions[:-1]):
        outside, inside = kernel.shape[:2]
        block = [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.LeakyReLU()]
        enlarging = [nn.Upsample(scale_factor=2)] if i < len(convolutions) - 2 else []
        layers.append(nn.Sequential(*enlarging, *block))
    last = convolutions[-1]
    head, norm = (
        nn.Sequential(*layers, nn.Conv2d(last.shape[1], 1, 1)),
        nn.LayerNorm(convolutions[0].shape[1], eps=1e-6),
    )
    for module, prefix in ((head, "segmenter_head.model."), (norm, "feature_extractor.norm.")):
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(own, strict=False)  # without the counts of batches, which are of training
    return norm.eval().requires_grad_(False), head.eval().requires_grad_(False)
