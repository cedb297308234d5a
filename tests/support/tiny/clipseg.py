"""A CLIPSeg of random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from support.tiny._clip import write_tokenizer


def write_model(folder: Path) -> Path:
    """A random CLIPSeg of five small blocks, tapped after the second to fourth, and a tokenizer of single bytes."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    vocabulary = write_tokenizer(folder)
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    both = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = both | {
        "vocab_size": len(vocabulary), "num_hidden_layers": 2, "max_position_embeddings": 40,
        "bos_token_id": start, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    vision = both | {"num_hidden_layers": 5, "image_size": 32, "patch_size": 16}
    settings = {"extract_layers": [1, 2, 3], "reduce_dim": 16, "projection_dim": 24}
    torch.manual_seed(0)
    config = CLIPSegConfig(
        text_config=text, vision_config=vision, decoder_num_attention_heads=2, decoder_intermediate_size=32,
        use_complex_transposed_convolution=True, **settings,
    )  # fmt: skip
    network = CLIPSegForImageSegmentation(config)
    for parameter in network.parameters():  # transformers' own start is so small that the map is nearly flat
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter, gain=1.5)
    network.save_pretrained(folder)
    return folder


def options(folder: Path) -> dict:
    return {"weights": str(write_model(folder)), "size": 64}
