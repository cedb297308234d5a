"""Sempart's head: from the keys of a frozen DINO to a coarse mask on its grid and a fine one of every pixel.

Ravindran and Basu, "SEMPART: Self-supervised Multi-resolution Partitioning of Image Semantics", ICCV 2023, in the form
of Sari, Locatello, Favaro, "Two Tricks to Improve Unsupervised Segmentation Learning", 2024. Norms of batches are left
to whoever trains it: in train mode they take the batch's statistics, in eval mode the running ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from raypipe.features import originals
from raypipe.features.dino import Dino
from raypipe.lookup import one_line

HEADS, LAYERS = 2, 2  # of the encoder; a head is as wide as the whole of its tokens (reference)
FIRST = 192  # channels of the first block of the decoder, whatever the others have (reference)
MAX_STEPS = 6  # of a head that is read: patches of 64 px; published ones have 8 or 16
SLOPE = 0.01  # of the leaky ReLUs
FILES = ("head.safetensors", "model.safetensors")  # in a folder, the first that is there
KINDS = ("sempart", "sempart_head")  # what its config.json says
SIZES = {"feature_dim": "width", "in_channels": "width", "hidden_dim": "hidden", "hidden": "hidden"}
SIZES |= {"patch_size": "patch"}  # of a config.json
COUNT = ".num_batches_tracked"  # of batch norms: with a fixed momentum it has no effect

# From the names of the published checkpoints to these.
RENAMED = (
    (r"^conv_input\.", "project."),
    (r"^conv_coarse\.", "coarse."),
    (r"^conv_final\.", "fine."),
    (r"^inp_transformer\.layers\.(\d+)\.0\.norm\.", r"encoder.\1.norm1."),
    (r"^inp_transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.", r"encoder.\1.attn.qkv."),
    (r"^inp_transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"encoder.\1.attn.out."),
    (r"^inp_transformer\.layers\.(\d+)\.1\.norm\.", r"encoder.\1.norm2."),
    (r"^inp_transformer\.layers\.(\d+)\.1\.fn\.net\.0\.", r"encoder.\1.mlp.fc1."),
    (r"^inp_transformer\.layers\.(\d+)\.1\.fn\.net\.3\.", r"encoder.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.0\.", r"up.\1.conv1."),
    (r"^layers\.(\d+)\.1\.", r"up.\1.bn1."),
    (r"^layers\.(\d+)\.3\.", r"up.\1.conv2."),
    (r"^layers\.(\d+)\.4\.", r"up.\1.bn2."),
)


class Attention(nn.Module):
    """Each token looks at all, in HEADS ways as wide as the tokens themselves."""

    def __init__(self, hidden: int):
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * HEADS * hidden, bias=False)
        self.out = nn.Linear(HEADS * hidden, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, hidden) to the same."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, HEADS, N, d)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """A block of the encoder, norms before."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(hidden), Attention(hidden)
        self.norm2, self.mlp = nn.LayerNorm(hidden), Mlp(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Up(nn.Module):
    """A block of the decoder: twice as large, with the image at that size beside, through one convolution or two."""

    def __init__(self, inside: int, outside: int, *, is_last: bool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside + 3, outside, 3, padding=1), nn.BatchNorm2d(outside)
        self.is_last = is_last
        if is_last:
            self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, padding=1), nn.BatchNorm2d(outside)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """x: (B, C, h, w). image: (B, 3, H, W), reduced to (2h, 2w) here."""
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        x = F.leaky_relu(self.bn1(self.conv1(with_image(x, image))), SLOPE)
        return F.leaky_relu(self.bn2(self.conv2(x)), SLOPE) if self.is_last else x


class Head(nn.Module):
    """The trained part of Sempart: 748,165 parameters with the published sizes, which are the defaults."""

    def __init__(self, width: int = 384, *, hidden: int = 64, patch: int = 8):
        """width: channels of the keys. hidden: channels of a token. patch: px a side of a patch, a power of two."""
        super().__init__()
        steps = patch.bit_length() - 1
        if steps < 1 or patch != 1 << steps:
            raise ValueError(f"sempart: patches must have 2, 4, 8, 16, ... px a side, got {patch!r}")
        self.width, self.hidden, self.patch = width, hidden, patch
        self.project = nn.Conv2d(width, hidden, 1)
        self.encoder = nn.Sequential(*(Block(hidden) for _ in range(LAYERS)))
        self.coarse = nn.Conv2d(hidden, 1, 1)
        channels = [hidden, FIRST, *[2 * hidden] * (steps - 1)]
        pairs = enumerate(zip(channels[:-1], channels[1:], strict=True))
        self.up = nn.ModuleList(Up(*pair, is_last=i == steps - 1) for i, pair in pairs)
        self.fine = nn.Conv2d(channels[-1] + 3, 1, 1)

    def forward(self, features: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, float32: coarse (B, 1, h, w) and fine (B, 1, H, W).

        features: float (B, width, h, w), of `keys`. image: float (B, 3, H, W) with ImageNet's mean 0 and deviation 1,
        H = h * patch and W = w * patch.
        """
        tokens = self.encode(features)
        return self.coarse_of(tokens), self.fine_of(tokens, image)

    def encode(self, features: Tensor) -> Tensor:
        """Tokens (B, hidden, h, w) of features (B, width, h, w), after the encoder."""
        x = self.project(features)
        return self.encoder(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])

    def coarse_of(self, tokens: Tensor) -> Tensor:
        """Coarse logits, float32 (B, 1, h, w), of `encode`'s tokens."""
        return self.coarse(tokens).float()

    def fine_of(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Fine logits, float32 (B, 1, H, W), of `encode`'s tokens and the image."""
        x = tokens
        for block in self.up:
            x = block(x, image)
        return self.fine(with_image(x, image)).float()


def with_image(x: Tensor, image: Tensor) -> Tensor:
    """(B, C, h, w) and behind it the image (B, 3, H, W) at that size, bilinear between the central pixels alone."""
    if image.shape[2:] != x.shape[2:]:
        image = F.interpolate(image, size=x.shape[2:], mode="bilinear")
    return torch.cat([x, image.to(x.dtype)], dim=1)


def keys(dino: Dino, pixels: Tensor, *, facet: str = "key") -> Tensor:
    """Keys of the last block without the class token's: float32 (B, D, h, w) on the grid, without gradient.

    pixels: float32 (B, 3, H, W) as of `Head.forward`, of whole patches. facet: see `Dino.tokens`; what else a head may
    be trained on.
    """
    patches, _ = dino.forward(pixels, facet=facet)
    return patches.transpose(1, 2).unflatten(2, dino.grid(tuple(pixels.shape[2:])))


def read(path: Path, *, method: str) -> tuple[Head, dict]:
    """A head on the CPU in eval mode, and what the config.json beside it says; {} without one.

    path: a folder that a training exported, with head.safetensors and config.json; the former alone; or a published
    `.pth`. Raises ValueError for anything else.
    """
    file = originals.checkpoint(path, method=method)
    folder = path if file is None else file.parent
    config = originals.settings(folder, method=method)
    if config.get("model_type") not in (None, *KINDS):
        found = config["model_type"]
        raise ValueError(f"{method}: {folder} holds a network of type {found!r}, expected {KINDS[0]!r}")
    if file is None:
        file = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    tensors = _named(originals.tensors(file, method=method))
    try:
        head = _filled(tensors)
        for name, size in SIZES.items():
            if name in config and config[name] != getattr(head, size):
                raise ValueError(f"its {name} is {getattr(head, size)}, config.json says {config[name]!r}")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        why = f"tensor {error} is absent" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{method}: {file} is no head of Sempart: {why}") from error
    return head, config


def _named(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in float32 under the names of `Head`, without those that have no effect."""
    named = {}
    for name, tensor in found.items():
        name = name.removeprefix("module.")
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if not name.endswith(COUNT):
            named[name] = tensor.float()
    return named


def _filled(tensors: dict[str, Tensor]) -> Head:
    """A head of the sizes that tensors have, with them in it, in eval mode."""
    hidden, width = tensors["project.weight"].shape[:2]
    steps = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"up\.(\d+)\.", name)))
    if steps > MAX_STEPS:
        raise ValueError(f"its decoder enlarges {steps:,} times")
    with torch.device("meta"):  # no memory and no time for random numbers
        head = Head(width, hidden=hidden, patch=2**steps)
    counts = {name: torch.tensor(0) for name in head.state_dict() if name.endswith(COUNT)}
    head.load_state_dict(tensors | counts, assign=True)
    return head.eval()


def files(head: Head, config: Mapping) -> dict[str, bytes]:
    """What a folder holds that `read` reads: content by name. config: what config.json says beside the sizes."""
    state = {name: tensor for name, tensor in head.state_dict().items() if not name.endswith(COUNT)}
    sizes = {"feature_dim": head.width, "hidden_dim": head.hidden, "patch_size": head.patch}
    text = json.dumps({"model_type": KINDS[0]} | sizes | dict(config), indent=1)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    return {FILES[0]: save(tensors), "config.json": text.encode()}
