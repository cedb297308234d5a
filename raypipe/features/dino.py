"""Features of every patch of an image from a vision transformer that was trained without labels.

DINO (Caron et al., ICCV 2021), iBOT (Zhou et al., ICLR 2022), DINOv2 (Oquab et al., 2023; registers: Darcet et al.,
2024), read as the papers that build on them do: the image stays as large as it is, the position embedding is resampled
to its grid. DeiT (Touvron et al., ICML 2021) too, with or without a distillation token, though it had labels. The
network runs on fused attention and stops where the features are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks
from raypipe.features import originals
from raypipe.features.grid import Features, resized, seen_size, whole
from raypipe.lookup import suggest
from raypipe.types import BadImage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACETS = ("query", "key", "value", "kqv", "input", "token", "token_norm")
POSITIONS = ("dino", "hf")
EPS = 1e-6  # of every LayerNorm in DINO, iBOT and DINOv2; some converted configurations say transformers' 1e-12
OFFSET = 0.1  # cells, in DINO's scale factors of the position embedding
TOKENS = 1 << 17  # at once in a batch on a GPU: 2 GB for the widest activation of a ViT-B in bfloat16
GRIDS = 16  # whose position embeddings are kept: at most 25 MB each with a ViT-S/8 at 1024 px


class Dino:
    """A frozen vision transformer that gives dense features of images."""

    def __init__(
        self, weights: Path | PreTrainedModel, *, method: str, device: str, dtype: str = "auto",
        stride: int | None = None, positions: str | None = None,
    ):  # fmt: skip
        """Read a network.

        weights: a path of `networks.locate`, or a transformers model that is there already. method: whose errors these
        are. dtype: see `networks.autocast`; features are float32 all the same. stride: px between patches, a divisor of
        their side; None: their side. positions: how the position embedding is resampled, "dino" as DINO's code does or
        "hf" as transformers does; None: that of the family. Raises ValueError for weights that are none of DINO, iBOT
        or DINOv2.
        """
        network = read(weights, method=method, device=device) if isinstance(weights, Path) else weights
        for module in network.modules():
            if type(module).__name__ == "LayerNorm":
                module.eps = EPS
        config = network.config
        self.network, self._method, self._device, self._dtype = network, method, device, dtype
        self.heads, self.width, self.depth = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
        self.placed = 2 if config.model_type == "deit" else 1  # tokens of no patch that have a position
        self.patch, self.special = config.patch_size, self.placed + getattr(config, "num_register_tokens", 0)
        self.stride = self.patch if stride is None else stride
        if self.stride < 1 or self.patch % self.stride:
            raise ValueError(f"{method}: stride must divide the {self.patch} px of a patch, got {stride!r}")
        self.positions = positions or ("dino" if config.model_type == "vit" else "hf")
        if self.positions not in POSITIONS:
            raise ValueError(f"{method}: unknown positions {positions!r}; {suggest(positions, POSITIONS)}")
        self._embedded = functools.lru_cache(GRIDS)(self._resampled)

    def __call__(
        self, images: Sequence[np.ndarray], *, fit: str, facet: str = "key", block: int = -1,
        cls_attention: bool = False, max_side: int = 1024,
    ) -> Iterator[Features]:  # fmt: skip
        """Features of each image, in order. Images of one size go through the network together on a GPU.

        images: RGB uint8 (H, W, 3). fit: how an image becomes whole patches: `pad` with the mean colour or `reflect` to
        the right and below, `crop` there, `resize` to the nearest multiple, or `free`, where what no patch covers is
        left out. facet, block, cls_attention: see `forward`; an attention is over all tokens, those of no patch dropped
        after the softmax. max_side: longer images are reduced to it, which is said in the log once. Raises BadImage
        where features are not finite.
        """
        import torch

        sizes = [
            seen_size(image.shape[:2], self.patch, fit, max_side=max_side, method=self._method) for image in images
        ]
        fitted = [whole(size, self.patch, fit) for size in sizes]
        done = {}
        for i, size in enumerate(fitted):
            if i not in done:
                same = [j for j in range(i, len(images)) if fitted[j] == size and j not in done]
                now = same[: self._at_once(size)]
                pixels = torch.cat([self.pixels(images[j], sizes[j], fit) for j in now])
                patches, attention = self.forward(pixels, facet=facet, block=block, cls_attention=cls_attention)
                attention = [None] * len(now) if attention is None else attention
                done |= dict(zip(now, zip(patches, attention, strict=True), strict=True))
            yield self._features(*done.pop(i), sizes[i], fit)

    def _features(self, patches, attention, size: tuple[int, int], fit: str) -> Features:
        """Those of one image. Raises BadImage where a value is NaN or infinite."""
        if not patches.isfinite().all():
            text = "the network gives features that are no finite numbers; try --dtype float32, or other weights"
            raise BadImage("segment", "non_finite", text)
        grid = self.grid(whole(size, self.patch, fit))
        margin = (self.patch - self.stride) // 2
        return Features(patches, grid, self.stride, size, fit, attention, margin)

    def _at_once(self, size: tuple[int, int]) -> int:
        """How many images of a size in px go through the network together."""
        return max(1, TOKENS // np.prod(self.grid(size))) if self._device == "cuda" else 1

    def pixels(self, image: np.ndarray, size: tuple[int, int], fit: str):
        """An image as the network sees it: float32 (1, 3, H', W') on the device, of whole patches.

        image: RGB uint8 (H, W, 3), resized (Lanczos, as Pillow does it) to `size` where that is another. Values have
        ImageNet's mean 0 and deviation 1, so that padding with zeros is the mean colour.
        """
        import torch
        from torch.nn.functional import pad

        seen = torch.tensor(np.ascontiguousarray(resized(image, size)))  # a view may be mirrored
        planes = seen.to(self._device).permute(2, 0, 1)[None].float() / 255  # uploaded as bytes
        mean, std = (
            torch.tensor(values, device=self._device)[:, None, None]
            for values in (networks.IMAGENET_MEAN, networks.IMAGENET_STD)
        )
        planes = (planes - mean) / std
        height, width = whole(size, self.patch, fit)
        below, right = height - size[0], width - size[1]
        if fit != "reflect":
            return pad(planes, (0, right, 0, below))  # negative where it is cropped
        # a mirror needs more pixels than it adds; a narrower image goes on with its edge
        planes = pad(planes, (0, right, 0, 0), "reflect" if right < size[1] else "replicate")
        return pad(planes, (0, 0, 0, below), "reflect" if below < size[0] else "replicate")

    def digest(self) -> str:
        """sha256 of the network's tensors in float32 by name: the same of every file that holds this network."""
        return networks.digest(originals.as_transformers(self.network.state_dict()))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """How many patches lie in an image of whole patches, (rows, columns). size: (height, width) in px."""
        return tuple(1 + (side - self.patch) // self.stride for side in size)

    def forward(self, pixels, *, facet: str = "key", block: int = -1, cls_attention: bool = False):
        """Features of patches, float32 (B, P, D), and attention of the class token, float32 (B, heads, P) or None.

        pixels: float32 (B, 3, H, W) on the device, normalised, of whole patches. See `tokens` for the options.
        """
        tokens, attention = self.tokens(pixels, facet=facet, block=block, cls_attention=cls_attention)
        return tokens[:, self.special :], None if attention is None else attention[..., self.special :]

    def tokens(self, pixels, *, facet: str = "key", block: int = -1, cls_attention: bool = False):
        """As `forward`, of all tokens: class, distillation or registers, patches.

        facet: what is read in a block. query, key, value: projections, channel = head * width of a head + dimension;
        kqv: key, query and value side by side; input: what they are projected from; token: what the block gives;
        token_norm: that after the network's last LayerNorm. block: its index, from the end where negative.
        cls_attention: also the softmax row of the class token in this block.
        """
        import torch

        if facet not in FACETS:
            raise ValueError(f"{self._method}: unknown facet {facet!r}; {suggest(facet, FACETS)}")
        if not -self.depth <= block < self.depth:
            raise ValueError(f"{self._method}: block must be one of the {self.depth} of the weights, got {block!r}")
        blocks = layers(self.network)
        last, attention = blocks[block], None
        with torch.no_grad():
            with networks.autocast(self._device, "float32"):
                tokens = self._embed(pixels)
            with networks.autocast(self._device, self._dtype):
                for each in blocks[: block % self.depth]:
                    tokens = each(tokens)
                given = tokens
                if facet.startswith("token"):
                    tokens = last(tokens)
            # from here on in float32: methods compare similarities with fixed numbers
            with networks.autocast(self._device, "float32"):
                given = norm_before(last)(given.float())
                if cls_attention:
                    attention = self._cls_attention(last, given)
                if facet == "token_norm":
                    tokens = self.network.layernorm(tokens.float())
                elif facet == "input":
                    tokens = given
                elif facet != "token":
                    names = ("key", "query", "value") if facet == "kqv" else (facet,)
                    tokens = torch.cat([projection(last, name)(given) for name in names], dim=2)
        return tokens.float(), attention

    def projection(self, facet: str = "key", block: int = -1):
        """The linear layer that gives query, key or value from `facet="input"` of a block."""
        return projection(layers(self.network)[block], facet)

    def _cls_attention(self, block, given):
        """The softmax row of the class token, (B, heads, T), from what a block's attention is given, (B, T, D)."""
        queries = projection(block, "query")(given[:, :1]).unflatten(2, (self.heads, -1))  # (B, 1, heads, d)
        keys = projection(block, "key")(given).unflatten(2, (self.heads, -1))  # (B, T, heads, d)
        scale = queries.shape[-1] ** -0.5
        return ((queries * keys).sum(3) * scale).softmax(dim=1).transpose(1, 2)

    def _embed(self, pixels):
        """What the first block is given: float32 (B, T, D)."""
        import torch
        from torch.nn.functional import conv2d

        embeddings = self.network.embeddings
        kernel = embeddings.patch_embeddings.projection
        patches = conv2d(pixels, kernel.weight, kernel.bias, stride=self.stride)  # (B, D, h, w)
        positions = self._embedded(*patches.shape[2:])
        patches = patches.flatten(2).transpose(1, 2) + positions[:, self.placed :]
        first = [embeddings.cls_token + positions[:, :1]]
        if self.placed > 1:
            first.append(embeddings.distillation_token + positions[:, 1:2])
        if self.special > self.placed:
            first.append(embeddings.register_tokens)
        return torch.cat([*(token.expand(len(patches), -1, -1) for token in first), patches], dim=1)

    def _resampled(self, height: int, width: int):
        """The position embedding of `placed` other tokens, then of a grid: float32 (1, placed + height * width, D)."""
        import torch
        from torch.nn.functional import interpolate

        stored = self.network.embeddings.position_embeddings
        side = round((stored.shape[1] - self.placed) ** 0.5)
        if (height, width) == (side, side):
            return stored
        grid = stored[:, self.placed :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if self.positions == "dino":
            # the factors themselves map coordinates, so that the offset shifts every position a little
            factors = tuple((cells + OFFSET) / side for cells in (height, width))
            grid = interpolate(grid, scale_factor=factors, mode="bicubic")
        else:
            antialias = self.network.config.model_type == "dinov2_with_registers"
            grid = interpolate(grid, size=(height, width), mode="bicubic", antialias=antialias)
        assert grid.shape[2:] == (height, width)
        return torch.cat([stored[:, : self.placed], grid.flatten(2).transpose(1, 2)], dim=1)


def layers(network):
    """The blocks of a transformers model: ViT's, or DINOv2's."""
    return network.layers if hasattr(network, "layers") else network.encoder.layer


def norm_before(block):
    """The LayerNorm before a block's attention."""
    return block.layernorm_before if hasattr(block, "layernorm_before") else block.norm1


def projection(block, facet: str):
    """The linear layer of a block that gives query, key or value."""
    attention = block.attention
    if hasattr(attention, f"{facet[0]}_proj"):
        return getattr(attention, f"{facet[0]}_proj")
    return getattr(attention.attention, facet)  # transformers' DINOv2 before 5.20 or so


def read(path: Path, *, method: str, device: str):
    """The transformers model in a folder as transformers saves it or in an original file, in float32 on the device.

    Raises ValueError where it is none of the architectures of DINO, iBOT and DINOv2, or not all there.
    """
    import transformers

    file = originals.checkpoint(path, method=method)
    if file is not None:
        return originals.read(file, method=method, device=device)
    family, kinds = originals.settings(path, method=method)["model_type"], originals.KINDS
    if family not in kinds:
        raise ValueError(f"{method}: {path} holds a network of type {family!r}, expected one of: {', '.join(kinds)}")
    options = {"add_pooling_layer": False} if family in originals.UNPOOLED else {}
    return networks.pretrained(getattr(transformers, kinds[family]), path, method=method, device=device, **options)
