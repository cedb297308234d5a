"""A Sentence-BERT of random weights, which knows letters."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz/",
    *(f"##{x}" for x in "abcdefghijklmnopqrstuvwxyz/"),
]


def write_sentences(folder: Path, *, mode: str = "mean", words: int = len(WORDS)) -> Path:
    """A BertModel 32 wide with its tokenizer, as sentence-transformers lays them out. mode: how it says it pools."""
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 512, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{name}_tokens": name == mode for name in ("mean", "max")}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32} | modes))
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = BertModel(BertConfig(vocab_size=words, max_position_embeddings=32, **both))
    for parameter in network.parameters():  # transformers' own start is so small that all answers are alike
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter, gain=1.5)
    network.save_pretrained(folder)
    return folder
