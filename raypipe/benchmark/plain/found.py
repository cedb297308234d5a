"""FOUND as its authors' code runs it: decoder on all keys, background by all similarities, one image at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.plain._dino import SIDE, PlainDino
from raypipe.benchmark.turns import with_plain
from raypipe.segmenters.found import read_decoder


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """In full batches, against one image at a time, at 480 px a side."""
    small = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for image in images]
    against = f"{SIDE} px a side; all blocks and attention in memory, decoder on the keys, one image at a time"
    return with_plain(method, device, small, repeats, PlainFound(method), against)


class PlainFound:
    """FOUND with the weights and options of a loaded method, for images that it does not reduce."""

    def __init__(self, method):
        self._dino, self._method = PlainDino(method._dino.network), method
        if method.variant == "decoder":
            network = self._dino.network
            decoder = read_decoder(method._paths["weights"], width=network.config.hidden_size)
            self._decoder = [tensor.to(network.device) for tensor in decoder]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Bool (1, H, W) of RGB uint8 (H, W, 3)."""
        import torch

        seen = self._dino(image, "constant")
        cells = self._logits(seen) if self._method.variant == "decoder" else self._foreground(seen)
        large = torch.nn.functional.interpolate(cells[None, None], scale_factor=self._dino.patch, mode="bilinear")
        large = large[0, :, : image.shape[0], : image.shape[1]]
        if self._method.variant == "decoder":
            large = large.sigmoid()
        return (large > 0.5).cpu().numpy()

    def _logits(self, seen):
        """Of every cell: (h, w)."""
        import torch

        weight, bias = self._decoder
        keys = seen.keys[1:].T.unflatten(1, seen.grid)[None]  # (1, D, h, w)
        return torch.nn.functional.conv2d(keys, weight[None, :, None, None], bias)[0, 0]

    def _foreground(self, seen):
        """0 where a cell is background, else 1: (h, w)."""
        import torch

        attention = seen.attention[:, 0, 1:]  # (heads, P)
        shares = torch.stack([(head > attention.mean()).float().mean() + 1e-10 for head in attention])
        weights = torch.log(shares.sum() / shares) if self._method.apply_weights else torch.ones_like(shares)
        per_head = weights.repeat_interleave(seen.keys.shape[1] // len(weights))
        descriptors = torch.nn.functional.normalize(seen.keys[1:] * per_head, dim=1)
        similarities = descriptors @ descriptors.T
        reference = (attention * weights[:, None]).sum(0).argmin()
        return 1 - (similarities[reference] > self._method.bkg_threshold).float().reshape(seen.grid)
