"""Embeddings of parts as their formulas read: all of CLIP for each part, attention written out in the masked blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, in_turns

PARTS, LAST, SIGMA2 = 8, 4, 2.5
# tokens, blocks and heads of CLIP-L/14 at 336 px, of a width that leaves its weights small
VISION = {
    "image_size": 336, "patch_size": 14, "num_hidden_layers": 24, "hidden_size": 192, "num_attention_heads": 16,
    "intermediate_size": 768,
}  # fmt: skip
TEXT = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def compare(_subject, _device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """On the CPU, with random weights: upright strips of each photograph."""
    from raypipe.features import clip_masked

    clip, plain = networks()
    masked = clip_masked.Masked(clip, last=LAST, sigma2=SIGMA2)
    strips = np.broadcast_to(np.arange(224) * PARTS // 224, (224, 224))
    masks = clip_masked.token_masks(strips, PARTS, clip.size // clip.patch)

    def ours(image: np.ndarray) -> np.ndarray:
        streams = masked.streams([clip_masked.squashed(image, clip.size)])
        return masked.embed(streams, masks, [0] * PARTS).numpy()

    def other(image: np.ndarray) -> np.ndarray:
        square = clip_masked.squashed(image, clip.size)
        return np.stack([embedding(plain, square, mask, last=LAST, sigma2=SIGMA2) for mask in masks])

    seconds, found = in_turns([ours, other], images, repeats)
    blocks, width, tokens = VISION["num_hidden_layers"], VISION["hidden_size"], masks[0].size + 1
    case = f", {PARTS} parts, {blocks} blocks, width {width}, {tokens} tokens"
    apart = [float(np.abs(one - two).max()) for one, two in zip(*found, strict=True)]
    return [
        *compared("clip_masked", seconds, "cpu; the whole network once for each part", case=case),
        Figure("clip_masked", f"largest difference{case}", "", apart),
    ]


def networks():
    """A CLIP of random weights as `features.clip` reads it, and the image half of the same as transformers has it."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from raypipe.features.clip import Clip

    torch.manual_seed(0)
    network = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=64)).eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "embedding" not in name:  # transformers' own start is so small that all attend to all
            torch.nn.init.xavier_normal_(parameter)
    with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as folder:
        network.save_pretrained(folder)
        return Clip(Path(folder), method="zero_guidance", device="cpu", text=False), network


def embedding(network, square: np.ndarray, mask: np.ndarray, *, last: int, sigma2: float | None) -> np.ndarray:
    """The embedding of one part: float32 (D,). square: uint8 (size, size, 3). mask: float32 (g, g)."""
    import torch

    from raypipe.features.clip import MEAN, STD

    pixels = torch.tensor((square / 255.0 - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]
    column = torch.cat([torch.ones(1), torch.tensor(mask).flatten()]).to(network.device)
    with torch.inference_mode():
        vision = network.vision_model
        tokens, layers = vision.pre_layrnorm(vision.embeddings(pixels.to(network.device))), vision.encoder.layers
        for i, layer in enumerate(layers):
            if i < len(layers) - last:
                tokens = layer(tokens, attention_mask=None)
            else:
                tokens = masked(layer, tokens[0], column, sigma2)[None]
        return network.visual_projection(vision.post_layernorm(tokens[0, 0])).cpu().numpy()


def masked(layer, tokens, column, sigma2: float | None):
    """One masked block, (T, d) of (T, d): zero-guidance segmentation, section 3.2."""
    import torch

    attention = layer.self_attn
    given = layer.layer_norm1(tokens)
    queries, keys, values = (
        project(given).unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    ordinary = (queries @ keys.transpose(1, 2) * attention.scale).softmax(2)  # (heads, T, T)
    kept = ordinary * column
    kept = kept / kept.sum(2, keepdim=True)
    if sigma2 is not None:
        saliency = torch.cosine_similarity(kept, ordinary, dim=2).mean()
        kept = kept - torch.exp(-((saliency + 1) ** 2) / (2 * sigma2)) * ordinary[:, :1]
    tokens = tokens + attention.out_proj((kept @ values).transpose(0, 1).flatten(1))
    return tokens + layer.mlp(layer.layer_norm2(tokens))
