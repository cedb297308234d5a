"""A SAM of random weights, and options with which it finds masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import SamConfig, SamModel

from raypipe.segmenters.sam import generator
from raypipe.segmenters.sam.generator import Crop, Record

# Options with which a random network finds masks; a box IoU above 1 is none, so that nothing is suppressed.
LOW = {"points_per_side": 8, "pred_iou_thresh": 0.61, "stability_score_thresh": 0.83, "stability_score_offset": 0.1}


def write_model(folder: Path) -> Path:
    """A tiny network with random weights, as transformers saves it: input 64 px, masks of 16 px, scores near 0.6."""
    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 16, "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
    decoder = {"hidden_size": 32, "mlp_dim": 48, "num_attention_heads": 8, "iou_head_hidden_dim": 24}
    decoder |= {"layer_norm_eps": 1e-5}  # what official checkpoints are read with
    network = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            scale = 1 if "positional" in name else 0.25
            tensor.copy_(torch.randn(tensor.shape, generator=random) * scale + ("norm" in name))
        network.mask_decoder.iou_prediction_head.proj_out.weight *= 0.2
        network.mask_decoder.iou_prediction_head.proj_out.bias.fill_(0.6)
    network.save_pretrained(folder)
    return folder


def record(mask: np.ndarray, score: float = 0.9, crop: Crop | None = None) -> Record:
    box = tuple(generator.mask_boxes(torch.from_numpy(mask)[None])[0].tolist())
    crop = crop or Crop(0, 0, mask.shape[1], mask.shape[0], 0)
    return Record(generator.cut(mask, box), box, int(mask.sum()), score, 0.95, (0.0, 0.0), crop)


def options(folder: Path) -> dict:
    return {"weights": str(write_model(folder)), **LOW, "points_per_side": 3, "crop_n_layers": 1}
