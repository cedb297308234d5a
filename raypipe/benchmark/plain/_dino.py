"""DINO as its authors' code runs it: one image at a time, every block to its end, all attention in memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raypipe import networks

EPS = 1e-6  # of its LayerNorms
SIDE = 480  # px a side of what is measured: the papers' images have about as many, and a GB of attention at twice that


class Seen(NamedTuple):
    """What a network gives of one image, of the class token first and then of each patch."""

    outputs: list  # of each block, (T, D)
    keys: object  # of the last block, (T, D)
    attention: object  # of the last block, (heads, T, T)
    grid: tuple[int, int]


class PlainDino:
    """A transformers ViT called part by part."""

    def __init__(self, network):
        self.network, self.patch = network, network.config.patch_size
        self.heads = network.config.num_attention_heads

    def __call__(self, image: np.ndarray, mode: str) -> Seen:
        """image: RGB uint8 (H, W, 3), not resized. mode: of `torch.nn.functional.pad`, to whole patches."""
        import torch

        with torch.no_grad():
            pixels = self.pixels(image, mode)
            tokens, grid = self.embed(pixels)
            outputs = []
            for block in self.network.layers:
                tokens, keys, attention = self.block(block, tokens)
                outputs.append(tokens)
        return Seen(outputs, keys, attention, grid)

    def pixels(self, image: np.ndarray, mode: str):
        """Normalised and padded to the right and below: float32 (1, 3, H', W')."""
        import torch

        colours = (image.astype(np.float32) / 255 - np.float32(networks.IMAGENET_MEAN)) / np.float32(
            networks.IMAGENET_STD
        )
        planes = torch.from_numpy(colours.transpose(2, 0, 1)[None]).to(self.network.device)
        height, width = image.shape[:2]
        return torch.nn.functional.pad(planes, (0, -width % self.patch, 0, -height % self.patch), mode)

    def patches(self, pixels):
        """What is made of the colours of each patch: (1, D, h, w)."""
        return self.network.embeddings.patch_embeddings.projection(pixels)

    def embed(self, pixels):
        """Patches with their positions and the class token before them: (T, D), and the grid."""
        import torch

        embeddings = self.network.embeddings
        patches = self.patches(pixels)  # (1, D, h, w)
        grid, stored = tuple(patches.shape[2:]), embeddings.position_embeddings[0]
        side = int((len(stored) - 1) ** 0.5)
        positions = stored[1:]
        if grid != (side, side):
            square = positions.T.reshape(1, -1, side, side)
            scale = tuple((cells + 0.1) / side for cells in grid)
            positions = torch.nn.functional.interpolate(square, scale_factor=scale, mode="bicubic")[0].flatten(1).T
        first = embeddings.cls_token[0] + stored[:1]
        return torch.cat([first, patches[0].flatten(1).T + positions]), grid

    def block(self, block, tokens):
        """What a block makes of tokens (T, D); its keys (T, D) and its attention (heads, T, T)."""
        given, attend = self._norm(block.layernorm_before, tokens), block.attention
        query, key, value = (
            layer(given).unflatten(1, (self.heads, -1)).transpose(0, 1)  # (heads, T, d)
            for layer in (attend.q_proj, attend.k_proj, attend.v_proj)
        )
        attention = (query @ key.mT * key.shape[-1] ** -0.5).softmax(-1)
        tokens = tokens + attend.o_proj((attention @ value).transpose(0, 1).flatten(1))
        hidden = block.mlp(self._norm(block.layernorm_after, tokens))
        return tokens + hidden, key.transpose(0, 1).flatten(1), attention

    @staticmethod
    def _norm(layer, tokens):
        import torch

        return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], layer.weight, layer.bias, EPS)
