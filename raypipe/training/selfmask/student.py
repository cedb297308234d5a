"""SelfMask's network under training: its first weights, views of its images, losses, and the folder it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from raypipe import networks
from raypipe.features.dino import Dino
from raypipe.segmenters.selfmask import SelfMask as Method
from raypipe.segmenters.selfmask import network
from raypipe.segmenters.selfmask.losses import losses
from raypipe.training import augment
from raypipe.training.recipe import Sample, Student

if TYPE_CHECKING:
    from raypipe.storage import Folder
    from raypipe.training.selfmask import Draw, SelfMask


class SelfMaskStudent(nn.Module, Student):
    """A MaskFormer whose encoder learns too."""

    def __init__(self, recipe: SelfMask, device: str):
        super().__init__()
        self.recipe, self._device = recipe, device
        self.network = first_network(recipe).requires_grad_(True).to(device).train()
        patch = self.network.encoder.config.patch_size
        if recipe.image_size % patch:
            text = f"image_size must be a multiple of {patch}, the side of the network's patches"
            raise ValueError(f"{recipe.name}: {text}, got {recipe.image_size}")

    def views(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """What `forward` takes: scaled, cropped, mirrored alike; then colours, grey and blur of the images alone."""
        size, is_flipped = self.recipe.image_size, [draw.is_flipped for draw in draws]
        images = augment.pixels([sample["image"] for sample in samples], self._device)
        masks = augment.moved([sample["mask"] for sample in samples], self._device)
        images, masks = augment.scale_and_crop(images, masks, [draw.scaled for draw in draws], size)
        images = augment.jitter(augment.flip(images, is_flipped), [draw.jitter for draw in draws])
        images = augment.grey(images, [draw.is_grey for draw in draws])
        images = augment.blur(images, [draw.sigma for draw in draws], augment.kernel_size(size))
        return augment.normalise(images), augment.flip(masks, is_flipped)

    def forward(self, pixels: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """pixels: float32 (B, 3, H, W), normalised. targets: (B, H, W) in [0, 1]. Terms: see `losses`."""
        with networks.autocast(self._device, self.recipe.dtype):
            masks, objectness = self.network(pixels)
        with networks.autocast(self._device, "float32"):  # sums over thousands of pixels
            terms = losses(masks, objectness, targets, order=self.recipe.ranking_order)
        total = self.recipe.w_dice * terms["dice"] + self.recipe.w_ranking * terms["ranking"]
        return terms | {"total": total}

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        options = {"lr": lr, "weight_decay": self.recipe.weight_decay, "fused": self._device == "cuda"}
        return torch.optim.AdamW(self.parameters(), **options)

    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `label selfmask` finds them."""
        method = Method(dtype=self.recipe.dtype)
        method.use(self.network, self._device)
        return [found.masks[0] for found in method.segment(images)]

    def finish(self, samples: Sequence[Sample]) -> None:
        """Nothing is left to do."""

    def export(self, folder: Folder) -> None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        folder.write(save(state), "model.safetensors")
        folder.write_json(settings(self.network), "config.json")


def first_network(recipe: SelfMask) -> network.MaskFormer:
    """On the CPU: the network to go on from, or the backbone with a decoder that nothing was taught yet."""
    ((option, path),) = networks.locate_each(recipe).items()
    if option == "start_from":
        return network.read(path, method=recipe.name)
    encoder = Dino(path, method=recipe.name, device="cpu").network
    config = encoder.config
    if config.model_type != "vit":
        text = (
            f"backbone {recipe.backbone!r} is a {config.model_type}, expected a plain vision transformer such as DINO"
        )
        raise ValueError(f"{recipe.name}: {text}")
    heads, inner = recipe.heads or config.num_attention_heads, recipe.inner or 4 * config.hidden_size
    if config.hidden_size % heads:
        raise ValueError(f"{recipe.name}: {config.hidden_size} channels cannot be divided among {heads} heads")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would also touch the GPUs'
        return network.MaskFormer(encoder, queries=recipe.queries, layers=recipe.layers, heads=heads, inner=inner)


def settings(trained: network.MaskFormer) -> dict[str, str | int]:
    """What config.json says of a network: what it is, and its numbers, of which the heads cannot be told by shapes."""
    encoder, layers = trained.encoder.config, trained.decoder.layers
    return {
        "model_type": "selfmask",
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.num_hidden_layers,
        "num_attention_heads": encoder.num_attention_heads,
        "patch_size": encoder.patch_size,
        "num_queries": len(trained.query_embed),
        "num_decoder_layers": len(layers),
        "decoder_attention_heads": layers[0].self_attn.num_heads,
        "decoder_ffn_dim": layers[0].linear1.out_features,
    }
