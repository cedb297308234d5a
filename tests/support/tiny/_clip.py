"""A CLIP of random weights, for methods that ask it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

START, END = "<|startoftext|>", "<|endoftext|>"


def write_model(folder: Path, *, size: int = 64, patch: int = 16, seed: int = 0, context: int = 77) -> Path:
    """A random CLIPModel with its tokenizer, as transformers saves it: 48 wide, three layers, 24 shared dimensions.

    size: side of its square input in px, a multiple of `patch`. context: how many tokens it reads.
    """
    from transformers import CLIPConfig, CLIPModel

    words = write_tokenizer(folder)
    both = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 2, "projection_dim": 24}
    ends = {"bos_token_id": words[START], "eos_token_id": words[END], "pad_token_id": words[END]}
    text = both | ends | {"vocab_size": len(words), "num_hidden_layers": 2, "max_position_embeddings": context}
    vision = both | {"num_hidden_layers": 3, "image_size": size, "patch_size": patch}
    torch.manual_seed(seed)
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    for parameter in network.parameters():  # transformers' own start is so small that all answers are alike
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter, gain=1.5)
    network.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> dict[str, int]:
    """CLIP's tokenizer files with every byte, two merges and nothing else. Returns the vocabulary."""
    words = [*letters(), *(f"{letter}</w>" for letter in letters()), "at", "att</w>", START, END]
    vocabulary = {word: i for i, word in enumerate(words)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", "a t", "at t</w>"]) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


def letters() -> list[str]:
    """GPT-2's letters for the 256 bytes: what can be shown as it is, others from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
