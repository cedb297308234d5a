"""MOVE's network behind DINO: a LayerNorm of its own and a head of convolutions, read from a training checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from raypipe.features import originals
from raypipe.lookup import one_line

NORM_EPS = 1e-6  # of the LayerNorm (reference)
BATCH_EPS = 1e-5  # of the BatchNorms: torch's default, which the reference keeps
SLOPE = 0.01  # of the leaky ReLUs: likewise
PREFIXES = re.compile(r"^((_forward_|_original_|_)?module\.)*(segmenter\.)?")  # that training puts before names
NORM, LAYER = "feature_extractor.norm", "segmenter_head.model"  # the names behind that
# What a checkpoint may hold beside: DINO and the inpainting MAE, which training leaves alone, and counts of batches.
LEFT_ALONE = re.compile(r"feature_extractor\.model\.|mae_model\.|.*\.num_batches_tracked$")


class Head(nn.Module):
    """From a block's tokens to logits, 8 times as large with the published three steps of 2.

    Equal to the layers as they were trained: a BatchNorm is part of the convolution before it, and enlarging by 2
    (nearest) with a 3 x 3 convolution behind is one transposed convolution of 4 x 4, with less than half of the
    multiplications. On one CPU core that is 2.1 to 2.3 times as fast at the published widths.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        """tensors: those of a checkpoint, see `load`. Raises KeyError for an absent, ValueError for an unknown one."""
        super().__init__()
        left = dict(tensors)
        last = max(int(name.split(".")[2]) for name in left if name.startswith(LAYER))
        self.norm = _parameters(*_pair(left, NORM))
        self.steps = nn.ModuleList()
        for i in range(last):
            enlarges = i < last - 1
            first = int(enlarges)  # layer 0 of such a block is the enlarging itself, without tensors
            weight, bias = _folded(left, f"{LAYER}.{i}.{first}", f"{LAYER}.{i}.{first + 1}")
            self.steps.append(_parameters(_enlarging(weight) if enlarges else weight, bias))
        self.out = _parameters(*_pair(left, f"{LAYER}.{last}"))
        if left:
            raise ValueError(f"tensor {min(left)} belongs to no layer of the head")
        self.width, self.scale = len(self.norm[0]), 2 ** (last - 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits, float32 (B, 1, scale * h, scale * w), of a block's output on the grid: float (B, h, w, D)."""
        x = self.normed(tokens).permute(0, 3, 1, 2)
        for weight, bias in self.steps[:-1]:
            x = functional.leaky_relu(functional.conv_transpose2d(x, weight, bias, stride=2, padding=1), SLOPE)
        x = functional.leaky_relu(functional.conv2d(x, *self.steps[-1], padding=1), SLOPE)
        return functional.conv2d(x, *self.out).float()

    def normed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The LayerNorm, in float32 whatever the rest runs in: some channels are a hundred times as large as others."""
        return functional.layer_norm(tokens.float(), (self.width,), *self.norm, NORM_EPS)


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the norm and the head, by name, in a checkpoint of the reference's training or a folder with one.

    Raises ValueError for any other file, and for a checkpoint on other features than those of DINO's middle blocks.
    """
    file = originals.checkpoint(path, method="move") or path
    tensors = {PREFIXES.sub("", name): tensor for name, tensor in originals.tensors(file, method="move").items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not LEFT_ALONE.match(name)}
    if not any(name.startswith(LAYER) for name in tensors):
        raise ValueError(f"move: {file} is no checkpoint of MOVE: it has no tensor {LAYER}.*")
    if f"{NORM}.weight" not in tensors:
        text = "has no LayerNorm of its own, so it was trained on features of MAE or of a last block"
        raise ValueError(f"move: {file} {text}; expected a checkpoint on DINO's block before the last")
    return tensors


def load(path: Path, device: str) -> Head:
    """The head, ready to use, of what `read` reads. Raises ValueError also where tensors are absent or do not fit."""
    tensors = read(path)
    try:
        head = Head(tensors)
        head(torch.zeros(1, 1, 1, head.width))  # do the shapes of one layer fit those of the next
    except KeyError as error:
        raise ValueError(f"move: {path} is no checkpoint of MOVE: tensor {error} is absent") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"move: {path} is no checkpoint of MOVE: {one_line(error)}") from error
    return head.to(device, memory_format=torch.channels_last)


def _parameters(*tensors: torch.Tensor) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(tensor.float(), requires_grad=False) for tensor in tensors)


def _pair(left: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a layer, taken out."""
    return left.pop(f"{name}.weight"), left.pop(f"{name}.bias")


def _folded(left: dict[str, torch.Tensor], convolution: str, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution that does what it and the BatchNorm behind it do; both are taken out."""
    weight, bias = _pair(left, convolution)
    scale, offset = _pair(left, norm)
    mean, variance = left.pop(f"{norm}.running_mean"), left.pop(f"{norm}.running_var")
    scale = scale / (variance + BATCH_EPS).sqrt()
    return weight * scale[:, None, None, None], (bias - mean) * scale + offset


def _enlarging(weight: torch.Tensor) -> torch.Tensor:
    """The kernel (I, O, 4, 4) of a transposed convolution, stride 2 and padding 1, that enlarges and convolves.

    weight: (O, I, 3, 3), for the image enlarged by 2. A pixel of the small image is four there, and each of the four
    has its 3 x 3 kernel spread around it.
    """
    spread = weight.flip(2, 3).transpose(0, 1)
    return sum(functional.pad(spread, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1))
