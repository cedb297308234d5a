"""Segment Anything's network: transformers' folders and official checkpoints, its input, encoder and decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks
from raypipe.lookup import one_line

if TYPE_CHECKING:
    import torch
    from transformers import SamConfig, SamModel
    from transformers.models.sam.modeling_sam import SamMaskDecoder

MEAN = (123.675, 116.28, 103.53)  # of RGB in 0..255 (official code)
STD = (58.395, 57.12, 57.375)
DECODER_HEADS = 8  # of every official size; the only setting that no tensor's shape tells
DECODER_EPS = 1e-5  # torch's default, which the official decoder blocks keep; transformers' configurations say 1e-6
POSITIONS = "positional_embedding"  # one tensor that transformers holds twice
# What reading a file of another program ends in: no dict, no tensors, lacking names, other dimensions and shapes.
FOREIGN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError)

# Official names to transformers', in this order. A pattern may match in the middle of a name.
RENAMED = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"^(vision_encoder)\.blocks\.", r"\1.layers."),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
    (r"pe_layer\.positional_encoding_gaussian_matrix", f"shared_embedding.{POSITIONS}"),
    (r"point_embeddings\.", "point_embed."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
)


def load(path: Path, device: str) -> SamModel:
    """The network in float32, ready to run. path: a folder of transformers' or an official `.pth` file.

    Raises ValueError for weights of another network: nothing is left at random numbers.
    """
    from transformers import SamModel

    if path.is_file():
        return from_official(path).eval().requires_grad_(False).to(device)
    return networks.pretrained(SamModel, path, method="sam", device=device)


def from_official(file: Path) -> SamModel:
    """The network of an official checkpoint. Raises ValueError for any other file."""
    import torch
    from transformers import SamModel

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and torch's own kinds
        why = one_line(error)
        raise ValueError(f"sam: {file} is not a checkpoint that can be read safely ({why})") from error
    try:
        config, tensors = official_config(state), renamed(state)
        with torch.device("meta"):  # no memory and no time for random numbers
            network = SamModel(config)
        network.load_state_dict(tensors, assign=True)
    except FOREIGN as error:
        raise ValueError(
            f"sam: {file} is no official SAM checkpoint ({one_line(error)}); "
            "pass a file such as sam_vit_h_4b8939.pth, or a folder of transformers"
        ) from error
    return network.float()


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an official checkpoint under transformers' names."""
    tensors = {}
    for name, tensor in state.items():
        for pattern, name_here in RENAMED:
            name = re.sub(pattern, name_here, name)
        tensors[name] = tensor
    tensors[f"shared_image_embedding.{POSITIONS}"] = tensors[f"prompt_encoder.shared_embedding.{POSITIONS}"]
    return tensors


def official_config(state: dict[str, torch.Tensor]) -> SamConfig:
    """The settings of an official checkpoint, read off its shapes: ViT-B, L, H or any other size."""
    from transformers import SamConfig

    shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _, grid, _, width = shape["image_encoder.pos_embed"]
    patch = shape["image_encoder.patch_embed.proj.weight"][-1]
    depth = _count(shape, r"image_encoder\.blocks\.(\d+)\.")
    spans = [(shape[f"image_encoder.blocks.{i}.attn.rel_pos_h"][0] + 1) // 2 for i in range(depth)]  # px of a window
    vision = {
        "hidden_size": width,
        "output_channels": shape["image_encoder.neck.0.weight"][0],
        "num_hidden_layers": depth,
        "num_attention_heads": width // shape["image_encoder.blocks.0.attn.rel_pos_h"][1],
        "image_size": grid * patch,
        "patch_size": patch,
        "window_size": min(spans),
        "global_attn_indexes": [i for i, span in enumerate(spans) if span == grid],
        "num_pos_feats": shape["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"][1],
        "mlp_dim": shape["image_encoder.blocks.0.mlp.lin1.weight"][0],
    }
    prompt = {
        "hidden_size": shape["prompt_encoder.no_mask_embed.weight"][1],
        "image_size": grid * patch,
        "patch_size": patch,
        "mask_input_channels": shape["prompt_encoder.mask_downscaling.3.weight"][0],
    }
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=_decoder_settings(shape))


def _decoder_settings(shape: dict[str, tuple[int, ...]]) -> dict:
    first = "mask_decoder.transformer.layers.0"
    width, inner = (shape[f"{first}.{name}.q_proj.weight"] for name in ("self_attn", "cross_attn_token_to_image"))
    return {
        "hidden_size": width[0],
        "mlp_dim": shape[f"{first}.mlp.lin1.weight"][0],
        "num_hidden_layers": _count(shape, r"mask_decoder\.transformer\.layers\.(\d+)\."),
        "num_attention_heads": DECODER_HEADS,
        "attention_downsample_rate": width[0] // inner[0],
        "num_multimask_outputs": shape["mask_decoder.mask_tokens.weight"][0] - 1,
        "iou_head_depth": _count(shape, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
        "iou_head_hidden_dim": shape["mask_decoder.iou_prediction_head.layers.0.weight"][0],
        "layer_norm_eps": DECODER_EPS,
    }


def _count(names: Sequence[str], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def input_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) of an image whose longest side is scaled to `side` px; at least one pixel each."""
    scale = side / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """An image, RGB uint8 (H, W, 3), with its longest side scaled to `side` px, as the official code does (Pillow)."""
    from PIL import Image

    height, width = input_size(image.shape[:2], side)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def normalise(images: Sequence[np.ndarray], side: int, device: str) -> torch.Tensor:
    """Resized images, RGB uint8 (h, w, 3), as one float32 batch (B, 3, side, side); zeros fill right and bottom."""
    import torch

    batch = torch.zeros(len(images), 3, side, side, device=device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    for slot, image in zip(batch, images, strict=True):
        pixels = torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)
        slot[:, : image.shape[0], : image.shape[1]] = (pixels - mean) / std
    return batch


def encode(network: SamModel, pixels: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """Image features (B, C, h, w) of normalised images (B, 3, side, side). dtype: as in `networks.autocast`."""
    with networks.autocast(pixels.device.type, dtype):
        return network.get_image_embeddings(pixels).float()


def decode(
    network: SamModel, features: torch.Tensor, points: torch.Tensor, *, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Three masks for each point of one image.

    features: (C, h, w) from `encode`. points: (P, 2) float64, (x, y) in px of the network's input.
    Returns logits (P, 3, s, s) at low resolution and predicted IoUs (P, 3), both float32.
    """
    import torch

    prompts = points[None, :, None]  # (1, P, 1, 2): one prompt of one point each
    labels = torch.ones(prompts.shape[:3], device=points.device)
    sparse, dense = network.get_prompt_embeddings(prompts, labels)  # positions need float32: 8 bits are 4 px of 1024
    positions, decoder = network.get_image_wide_positional_embeddings(), network.mask_decoder
    asked = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(points), -1, -1)
    with networks.autocast(features.device.type, dtype):
        tokens, pixels = decoder.transformer(
            point_embeddings=torch.cat([asked, sparse[0]], 1)[None],  # (1, P, T, C)
            image_embeddings=(features[None] + dense).expand(len(points), -1, -1, -1),
            image_positional_embeddings=positions.expand(len(points), -1, -1, -1),
            attention_similarity=None,
        )
        with torch.autocast(features.device.type, enabled=False):
            pixels = pixels.float().transpose(2, 3).reshape(len(points), *features.shape)
            return _read_off(decoder, tokens[0].float(), pixels)


def _read_off(decoder: SamMaskDecoder, tokens: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and predicted IoUs, as `decode` returns them, from what the decoder's transformer made of P points.

    tokens: (P, T, C): for the IoUs, for one mask, for each of three masks, the point's. pixels: (P, C, h, w). Both are
    float32: bfloat16 has 31 values from 0.88 to 1, so that predicted IoUs would tie and suppression keep any of them.
    """
    import torch

    large = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(pixels)))
    large = decoder.activation(decoder.upscale_conv2(large))  # (P, D, s, s)
    heads = decoder.output_hypernetworks_mlps
    weights = torch.stack([heads[i](tokens[:, 1 + i]) for i in range(1, len(heads))], 1)  # (P, 3, D)
    logits = (weights @ large.flatten(2)).unflatten(2, large.shape[2:])
    return logits, decoder.iou_prediction_head(tokens[:, 0])[:, 1:]
