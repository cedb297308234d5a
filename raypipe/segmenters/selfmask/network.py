"""SelfMask's network: a vision transformer, learned queries that look at its patches, and a mask for each query.

Shin, Albanie, Xie, "Unsupervised Salient Object Detection with Spectral Cluster Voting", CVPR Workshops 2022; its form
is MaskFormer's (Cheng et al., NeurIPS 2021) without any projection between queries, patches and masks. The encoder is
transformers' ViT; all of it can be trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTModel

from raypipe.features import originals
from raypipe.lookup import one_line

ENLARGED = 2  # cells of the masks per patch, each way (the authors' configuration: scale_factor)
EPS = 1e-5  # of the decoder's LayerNorms, torch's own; the encoder has 1e-6


class Layer(nn.TransformerDecoderLayer):
    """A block of the decoder, norms behind: what tells queries apart is added to queries and keys, not to values."""

    def forward(self, queries: Tensor, patches: Tensor, own: Tensor) -> Tensor:
        """queries: (B, Q, D). patches: (B, P, D). own: (Q, D), learned. Returns (B, Q, D)."""
        asking = queries + own
        queries = self.norm1(queries + self.self_attn(asking, asking, queries, need_weights=False)[0])
        looked = self.multihead_attn(queries + own, patches, patches, need_weights=False)[0]
        queries = self.norm2(queries + looked)
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries))))


class Decoder(nn.Module):
    """The blocks, and one norm for what each of them gives."""

    def __init__(self, layers: int, width: int, *, heads: int, inner: int):
        super().__init__()
        options = {"nhead": heads, "dim_feedforward": inner, "dropout": 0.0, "batch_first": True}
        self.layers = nn.ModuleList(Layer(width, **options, layer_norm_eps=EPS) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, patches: Tensor, own: Tensor) -> Tensor:
        """Queries after each block, normed: (B, L, Q, D)."""
        queries, found = own.new_zeros(len(patches), *own.shape), []
        for layer in self.layers:
            queries = layer(queries, patches, own)
            found.append(queries)
        return self.norm(torch.stack(found, dim=1))


class Objectness(nn.Module):
    """Three linear layers: how sure a query is that its mask is the salient object, before the sigmoid."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)])

    def forward(self, queries: Tensor) -> Tensor:
        """(..., D) to (..., 1)."""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(queries)))))


class MaskFormer(nn.Module):
    """Masks of an image, and how sure each query is of its own. Outside the encoder names are the authors'."""

    def __init__(self, encoder: ViTModel, *, queries: int = 20, layers: int = 6, heads: int = 6, inner: int = 1536):
        """encoder: without a pooling layer. queries, layers, heads, inner (of the feed-forward): as in the paper."""
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        self.decoder = Decoder(layers, width, heads=heads, inner=inner)
        self.query_embed = nn.Parameter(torch.randn(queries, width))
        self.ffn = Objectness(width)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What training looks at: the masks of all queries after every block of the decoder.

        pixels: (B, 3, H, W), normalised, of whole patches. Returns probabilities (B, L, Q, 2h, 2w) and objectness
        (B, L, Q, 1) in [0, 1], float32.
        """
        patch = self.encoder.config.patch_size
        patches = self.encoder(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        queries = self.decoder(patches, self.query_embed)  # (B, L, Q, D)
        with torch.autocast(pixels.device.type, enabled=False):
            queries, grid = queries.float(), (pixels.shape[2] // patch, pixels.shape[3] // patch)
            found = masks(queries.flatten(1, 2), patches.float(), grid)
            return found.unflatten(1, queries.shape[1:3]), self.ffn(queries).sigmoid()

    def best(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What inference needs: the mask of the surest query after the last block, the first of equally sure ones.

        patches: float32 (B, P, D), the encoder's tokens after its last norm. Returns probabilities (B, 2h, 2w) and
        objectness (B,), float32.
        """
        queries = self.decoder(patches, self.query_embed)[:, -1].float()  # (B, Q, D)
        with torch.autocast(patches.device.type, enabled=False):
            objectness = self.ffn(queries)[..., 0].sigmoid()  # (B, Q)
            rows, chosen = torch.arange(len(queries), device=queries.device), objectness.argmax(1)
            return masks(queries[rows, chosen][:, None], patches, grid)[:, 0], objectness[rows, chosen]


def masks(queries: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Probabilities (B, N, 2h, 2w) of queries (B, N, D) on patches (B, P, D), both float32.

    8 bits of a product over 384 dimensions would saturate the sigmoid. The authors enlarge the patches and multiply
    then; products of enlarged patches are enlarged products, which are 384 times fewer.
    """
    products = (queries @ patches.transpose(1, 2)).unflatten(2, grid)
    return F.interpolate(products, scale_factor=ENLARGED, mode="bilinear").sigmoid()


def read(path: Path, *, method: str) -> MaskFormer:
    """The network of a published checkpoint, or of a folder that a training wrote, on the CPU, not to be trained.

    Both have the authors' names. Sizes are read off the shapes; the number of heads, which shapes do not tell, is one
    per 64 channels or what a config.json or arch.json beside the weights says. Raises ValueError for anything else.
    """
    file = originals.checkpoint(path, method=method)
    if file is None:
        kind = originals.settings(path, method=method)["model_type"]
        if kind != "selfmask":
            raise ValueError(f"{method}: {path} holds a network of type {kind!r}, expected 'selfmask'")
        file = path / "model.safetensors"
    found = originals.tensors(file, method=method)
    inside = {name.removeprefix("encoder."): tensor for name, tensor in found.items() if name.startswith("encoder.")}
    outside = {name: tensor.float() for name, tensor in found.items() if not name.startswith("encoder.")}
    encoder = originals.build(inside, method=method, file=file)
    try:
        sizes = _sizes(outside, encoder, originals.settings(file.parent, method=method))
        with torch.device("meta"):  # no memory and no time for random numbers
            network = MaskFormer(encoder, **sizes)
        rest = network.load_state_dict(outside, assign=True, strict=False)
        if left := [*rest.unexpected_keys, *(name for name in rest.missing_keys if not name.startswith("encoder."))]:
            raise ValueError(f"{left[0]} is missing or belongs to none")
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{method}: {file} is no checkpoint of SelfMask: {why}") from error
    return network.eval().requires_grad_(False)


def _sizes(outside: Mapping[str, Tensor], encoder: ViTModel, told: Mapping) -> dict[str, int]:
    """The numbers that `MaskFormer` is made with. told: of the files beside the weights."""
    layers = {found[1] for name in outside if (found := re.match(r"decoder\.layers\.(\d+)\.", name))}
    heads = told.get("decoder_attention_heads", encoder.config.num_attention_heads)  # the same in the paper
    queries, inner = outside["query_embed"], outside["decoder.layers.0.linear1.weight"]
    return {"queries": len(queries), "layers": len(layers), "heads": heads, "inner": len(inner)}
