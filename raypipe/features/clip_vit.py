"""CLIPs with vision transformers, of any size, as transformers saves them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from raypipe import networks
from raypipe.lookup import one_line

if TYPE_CHECKING:
    from torch import Tensor

LITERAL_EPS = 1e-6  # of the LayerNorms in MaskCLIP's released ViT, which also has the exact GELU; CLIP has 1e-5
GRIDS = 16  # whose position embeddings are kept


class Vit:
    """The two halves of a CLIP, as `clip.Clip` asks them."""

    def __init__(
        self, path: Path, *, method: str, device: str, dtype: str, vision: bool, text: bool, literal: bool
    ):  # fmt: skip
        """See `clip.Clip`."""
        from transformers import CLIPModel

        network = networks.pretrained(CLIPModel, path, method=method, device=device)
        config = network.config
        self._path, self.method, self.device, self._dtype = path, method, device, dtype
        self.width, self.patch, self.size = (
            config.projection_dim, config.vision_config.patch_size, config.vision_config.image_size,
        )  # fmt: skip
        self.context = config.text_config.max_position_embeddings
        if text:
            self.tokenizer = tokenizer(path, config.text_config.vocab_size, method=method)
        if literal:
            _read_literally(network.vision_model)
        self._is_whole = vision and text
        for is_needed, half in ((vision, "vision_model"), (text, "text_model")):
            if not is_needed:
                delattr(network, half)
        self._network = network
        self._positions = functools.lru_cache(GRIDS)(self._resampled)

    def dense(self, pixels: Tensor, *, residual: str, keys: bool) -> tuple[Tensor, Tensor | None]:
        """See `clip.Clip.dense`; the keys are None where they are not wanted."""
        import torch

        values, found = self.values(pixels, residual=residual, keys=keys)
        with torch.no_grad(), networks.autocast(self.device, "float32"):
            return self._network.visual_projection(values.movedim(1, 3)).movedim(3, 1), found

    def values(self, pixels: Tensor, *, residual: str = "full", keys: bool = False) -> tuple[Tensor, Tensor | None]:
        """What `dense` projects, float32 (B, d, h, w) after the last LayerNorm, and the keys of `dense` or None."""
        import torch

        vision = self._network.vision_model
        *before, last = vision.encoder.layers
        attention, height = last.self_attn, pixels.shape[2] // self.patch
        with torch.no_grad():
            tokens = self.through(pixels, before)
            with networks.autocast(self.device, self._dtype):
                given = last.layer_norm1(tokens)
                values = attention.out_proj(attention.v_proj(given))  # no attention: every token has its own value
                if residual == "full":
                    values = values + tokens
                    values = values + last.mlp(last.layer_norm2(values))
                found = attention.out_proj(attention.k_proj(given)) if keys else None
            with networks.autocast(self.device, "float32"):
                values = vision.post_layernorm(values.float())
        return _grid(values, height), None if found is None else _grid(found.float(), height)

    def digest(self) -> str:
        """sha256 of the tensors of both halves, whichever are there: the same of every file that holds this CLIP."""
        from transformers import CLIPModel

        network = self._network
        if not self._is_whole:
            network = networks.pretrained(CLIPModel, self._path, method=self.method, device="cpu")
        return networks.digest(network.state_dict())

    @functools.cached_property
    def digest_of_texts(self) -> str:
        """sha256 of the tensors that answer texts."""
        halves = (self._network.text_model, self._network.text_projection)
        return networks.digest({f"{i}.{k}": v for i, half in enumerate(halves) for k, v in half.state_dict().items()})

    def of_tokens(self, tokens: list[list[int]]) -> Tensor:
        """Features of texts, of their tokens: float32 (n, D)."""
        import torch

        longest, end = max(map(len, tokens)), self.tokenizer.eos_token_id
        # what follows the end has no effect: a token sees only those before
        padded = torch.tensor([[*each, *[end] * (longest - len(each))] for each in tokens], device=self.device)
        ends = torch.tensor([each.index(end) for each in tokens], device=self.device)
        with networks.autocast(self.device, "float32"):
            states = self._network.text_model(input_ids=padded).last_hidden_state  # (n, T, d)
            return self._network.text_projection(states[torch.arange(len(tokens), device=self.device), ends])

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Features of whole images, of their normalised squares: float32 (B, D)."""
        return self.projected(self.through(pixels, self.layers)[:, 0])

    def projected(self, tokens: Tensor) -> Tensor:
        """Features of images, of their class tokens (B, d) behind the last layer: float32 (B, D)."""
        with networks.autocast(self.device, "float32"):
            return self._network.visual_projection(self._network.vision_model.post_layernorm(tokens.float()))

    @property
    def layers(self):
        """The layers of the image network, first to last."""
        return self._network.vision_model.encoder.layers

    def autocast(self):
        """The context in which its layers run."""
        return networks.autocast(self.device, self._dtype)

    def through(self, pixels: Tensor, layers) -> Tensor:
        """All tokens (B, 1 + h * w, d), the class token first, behind the given layers."""
        import torch

        vision = self._network.vision_model
        with networks.autocast(self.device, "float32"):
            patches = vision.embeddings.patch_embedding(pixels)  # (B, d, h, w)
            positions = self._positions(*patches.shape[2:])
            first = vision.embeddings.class_embedding + positions[:1]
            patches = patches.flatten(2).transpose(1, 2) + positions[1:]
            tokens = vision.pre_layrnorm(torch.cat([first.expand(len(patches), -1, -1), patches], dim=1))
        with networks.autocast(self.device, self._dtype):
            for layer in layers:
                tokens = layer(tokens, attention_mask=None)
        return tokens

    def _resampled(self, height: int, width: int) -> Tensor:
        """The position embedding of a grid: float32 (1 + height * width, d), that of the class token first."""
        import torch
        from torch.nn.functional import interpolate

        stored, side = self._network.vision_model.embeddings.position_embedding.weight, self.size // self.patch
        if (height, width) == (side, side):  # not by their number: 7 x 28 are as many as 14 x 14
            return stored
        grid = stored[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
        grid = interpolate(grid, size=(height, width), mode="bicubic")
        return torch.cat([stored[:1], grid[0].flatten(1).T])


def tokenizer(path: Path, words: int, *, method: str):
    """CLIP's tokenizer beside its weights. words: what the network knows. Raises ValueError where files lack."""
    from transformers import CLIPTokenizer

    try:
        found = CLIPTokenizer.from_pretrained(path, local_files_only=True)
        if len(found) != words:  # without any file transformers makes up a vocabulary of two words
            raise ValueError(f"its vocabulary has {len(found)} words, the network's {words}")
    except Exception as error:  # many kinds: one file of two, torn files, those of another network
        text = f"{path} holds no complete tokenizer of its own ({one_line(error)})"
        raise ValueError(f"{method}: {text}; expected vocab.json and merges.txt, or tokenizer.json") from error
    return found


def _read_literally(vision) -> None:
    """Change a vision network to what MaskCLIP's released code runs."""
    import torch

    for module in vision.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = LITERAL_EPS
    for layer in vision.encoder.layers:
        layer.mlp.activation_fn = torch.nn.GELU()


def _grid(tokens: Tensor, height: int) -> Tensor:
    """Tokens of patches (B, d, h, w) out of all tokens (B, 1 + h * w, d)."""
    return tokens[:, 1:].unflatten(1, (height, -1)).movedim(3, 1)
