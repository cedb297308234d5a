"""Sempart in the plainest form: the whole backbone and both masks of the head, layer by layer, one image at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.plain._dino import PlainDino
from raypipe.benchmark.plain.guided import cumulative_guided_filter
from raypipe.benchmark.turns import with_plain

if TYPE_CHECKING:
    from torch import Tensor


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """In full batches, against one image at a time."""
    against = "all blocks and attention in memory, both masks of the head, cumulative sums, one image at a time"
    return with_plain(method, device, images, repeats, PlainSempart(method), against)


class PlainSempart:
    """Sempart with the weights and options of a loaded method that squeezes images into squares."""

    def __init__(self, method):
        self._dino, self._method = PlainDino(method._dino.network), method
        self._tensors = method._head.state_dict()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Bool (1, H, W) of RGB uint8 (H, W, 3)."""
        import torch
        from PIL import Image
        from torch.nn.functional import interpolate

        side, method = self._method.image_size, self._method
        small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        seen = self._dino(small, "constant")
        with torch.no_grad():
            pixels = self._dino.pixels(small, "constant")
            _, fine = head(self._tensors, seen.keys[1:].T.unflatten(1, seen.grid)[None], pixels)
            mask = fine[0].sigmoid().cpu().numpy()
        mask = 1 - mask if method._sign == -1 else mask
        mask = cumulative_guided_filter(mask, small, radius=method.filter_radius, eps=method.filter_eps)
        large = interpolate(torch.from_numpy(mask.astype(np.float32))[None], size=image.shape[:2], mode="bilinear")
        return large[0].numpy() > 0.5


def head(
    tensors: Mapping[str, Tensor], features: Tensor, image: Tensor, *, train: bool = False
) -> tuple[Tensor, Tensor]:
    """Coarse (B, 1, h, w) and fine logits (B, 1, H, W) of a head's tensors: published layers, one after the other.

    features: (B, D, h, w). image: normalised (B, 3, H, W). train: statistics of this batch instead of running ones.
    """
    import torch
    from torch.nn.functional import conv2d, interpolate

    x = conv2d(features, tensors["project.weight"], tensors["project.bias"])
    tokens, i = x.flatten(2).mT, 0  # (B, N, hidden)
    while f"encoder.{i}.norm1.weight" in tensors:
        tokens = block({name: tensors[f"encoder.{i}.{name}"] for name in BLOCK}, tokens)
        i += 1
    x = tokens.mT.reshape(x.shape)
    coarse = conv2d(x, tensors["coarse.weight"], tensors["coarse.bias"])
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("up."))
    for i in range(last + 1):
        x = interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        ratio = image.shape[2] // x.shape[2]
        central = image[:, :, (ratio - 1) // 2 :: ratio], image[:, :, ratio // 2 :: ratio]
        rows = (central[0] + central[1]) / 2
        small = (rows[..., (ratio - 1) // 2 :: ratio] + rows[..., ratio // 2 :: ratio]) / 2
        x = torch.cat([x, small], dim=1)
        for step in ("1", "2") if i == last else ("1",):
            x = step_up({name: tensors[f"up.{i}.{name.format(step)}"] for name in STEP}, x, train)
    return coarse, conv2d(torch.cat([x, image], dim=1), tensors["fine.weight"], tensors["fine.bias"])


BLOCK = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.out.weight", "attn.out.bias", "norm2.weight")
BLOCK += ("norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
STEP = ("conv{}.weight", "conv{}.bias", "bn{}.weight", "bn{}.bias", "bn{}.running_mean", "bn{}.running_var")


def block(tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """A block of the encoder, head by head: (B, N, hidden) to the same."""
    import torch
    from torch.nn.functional import gelu, layer_norm

    hidden = tokens.shape[2]
    norm1, norm1_bias, qkv, out, out_bias, norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias = tensors.values()
    query, key, value = (layer_norm(tokens, (hidden,), norm1, norm1_bias) @ qkv.T).chunk(3, dim=2)
    heads = []
    for i in range(query.shape[2] // hidden):
        q, k, v = (each[..., i * hidden : (i + 1) * hidden] for each in (query, key, value))
        heads.append((q @ k.mT / hidden**0.5).softmax(2) @ v)
    tokens = tokens + torch.cat(heads, dim=2) @ out.T + out_bias
    inner = gelu(layer_norm(tokens, (hidden,), norm2, norm2_bias) @ fc1.T + fc1_bias)
    return tokens + inner @ fc2.T + fc2_bias


def step_up(tensors: Mapping[str, Tensor], x: Tensor, train: bool) -> Tensor:
    """A convolution of the decoder, its batch norm and leaky ReLU."""
    from torch.nn.functional import conv2d

    weight, bias, scale, offset, mean, variance = tensors.values()
    x = conv2d(x, weight, bias, padding=1)
    if train:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    mean, variance, scale, offset = (each[:, None, None] for each in (mean, variance, scale, offset))
    x = (x - mean) / (variance + 1e-5).sqrt() * scale + offset
    return x.where(x > 0, 0.01 * x)
