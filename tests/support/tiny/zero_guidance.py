"""A DINO, a CLIP and a GPT-2 of random weights in a folder of folders, as `raypipe weights` makes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from support.tiny import _clip, dino

END = "<|endoftext|>"
PIECES = ("Ġ a", "Ġ o", "a t", "Ġ d", "Ġd o", "Ġdo g", "Ġ c", "Ġc at", "Ġ m", "Ġm an", "a n", "Ġ I", "a g")  # merges
WORDS = ["cat", "dog", "grass", "blue sky", "a stone wall", "water", "tree", "street lamp"]


def write_lm(folder: Path, *, seed: int = 0) -> Path:
    """A random GPT2LMHeadModel with its tokenizer: two layers, 32 wide, every byte and a few longer words."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder.mkdir(parents=True, exist_ok=True)
    merges = sorted(PIECES, key=lambda pair: len(pair))  # a longer piece is made of shorter ones
    words = [*_clip.letters(), *("".join(pair.split()) for pair in merges), END]
    numbers = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **ends}))
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64, "vocab_size": len(words)}
    network = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=numbers[END], eos_token_id=numbers[END]))
    for parameter in network.parameters():  # transformers' own start is so small that all tokens are alike
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter, gain=1.5)
    network.save_pretrained(folder)
    return folder


def options(folder: Path) -> dict:
    dino.write_model(folder / "weights")
    _clip.write_model(folder / "clip_model")
    write_lm(folder / "lm")
    small = {"size": 64, "mask_last_layers": 2, "vocabulary": json.dumps(WORDS)}
    return small | {"weights": str(folder)}
