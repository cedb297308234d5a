"""CLIPs with residual networks (RN50, RN50x16, ...), which transformers does not have, through open_clip (MIT)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from raypipe import networks
from raypipe.lookup import one_line

if TYPE_CHECKING:
    from torch import Tensor


class Resnet:
    """The two halves of a CLIP in a folder as open_clip keeps it, as `clip.Clip` asks them."""

    def __init__(
        self, path: Path, *, method: str, device: str, dtype: str, vision: bool, text: bool, literal: bool
    ):  # fmt: skip
        """See `clip.Clip`; both halves are kept. Raises ValueError without open_clip, and for other networks."""
        if literal:
            raise ValueError(f"{method}: literal has no effect on {path}: it is a form of vision transformers")
        network, self.tokenizer = _read(path, method=method)
        self._network = network.eval().requires_grad_(False).float().to(device)
        self._method, self._device, self._dtype = method, device, dtype
        self.context, side = network.context_length, network.visual.image_size
        self.patch, self.width = 32, network.visual.output_dim  # five times halved, whatever the width
        self.size = side if isinstance(side, int) else side[0]

    def dense(self, pixels: Tensor, *, residual: str, keys: bool) -> tuple[Tensor, None]:
        """See `clip.Clip.dense`: value and output projection of the pooling, at each cell of the last layer by itself.

        The pooling has no residual, so that `plain` is refused, and its keys are not MaskCLIP's.
        """
        import torch

        if residual != "full" or keys:
            raise ValueError(f"{self._method}: residual plain and key smoothing are for CLIPs with vision transformers")
        pool = self._network.visual.attnpool
        with torch.no_grad():
            with networks.autocast(self._device, self._dtype):
                cells = self._cells(pixels)
            with networks.autocast(self._device, "float32"):
                return pool.c_proj(pool.v_proj(cells.float().movedim(1, 3))).movedim(3, 1), None

    def digest(self) -> str:
        """sha256 of the tensors."""
        return networks.digest(self._network.state_dict())

    @functools.cached_property
    def digest_of_texts(self) -> str:
        """The same, for texts."""
        return self.digest()

    def of_tokens(self, tokens: list[list[int]]) -> Tensor:
        """Features of texts, of their tokens: float32 (n, D)."""
        import torch

        padded = [[*each, *[0] * (self.context - len(each))] for each in tokens]  # the end has the largest number
        with networks.autocast(self._device, "float32"):
            return self._network.encode_text(torch.tensor(padded, device=self._device))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Features of whole images, of their normalised squares: float32 (B, D)."""
        with networks.autocast(self._device, self._dtype):
            cells = self._cells(pixels)
        with networks.autocast(self._device, "float32"):
            return self._network.visual.attnpool(cells.float())

    def _cells(self, pixels: Tensor) -> Tensor:
        """The last layer: (B, d, h, w), a cell for 32 px."""
        visual = self._network.visual
        cells = visual.stem(pixels)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            cells = layer(cells)
        return cells


class _Words:
    """open_clip's tokenizer with the names of transformers'."""

    def __init__(self, tokenizer):
        self._tokenizer, self.all_special_ids = tokenizer, tokenizer.all_special_ids
        self._start, self.eos_token_id = tokenizer.sot_token_id, tokenizer.eot_token_id

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self._start, *self._tokenizer.encode(text), self.eos_token_id] for text in texts]}


def _read(path: Path, *, method: str):
    """The network in a folder and its tokenizer."""
    try:
        import open_clip
    except ImportError as error:
        text = f"{path} holds a CLIP of open_clip, which is not installed: pip install 'raypipe[open-clip]'"
        raise ValueError(f"{method}: {text}; CLIPs with vision transformers need nothing") from error
    name = f"local-dir:{path}"
    try:
        network = open_clip.create_model(name, require_pretrained=True)
        words = open_clip.get_tokenizer(name)
    except Exception as error:  # many kinds: no weights, torn files, another architecture
        raise ValueError(f"{method}: {path} cannot be read as a CLIP of open_clip: {one_line(error)}") from error
    if not hasattr(network.visual, "attnpool"):
        text = f"{path} holds {type(network.visual).__name__} of open_clip, expected a residual network"
        raise ValueError(f"{method}: {text}; vision transformers are read as transformers saves them")
    return network, _Words(words)
