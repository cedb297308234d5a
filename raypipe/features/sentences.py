"""Texts as vectors (Sentence-BERT, Reimers and Gurevych, EMNLP 2019), by transformers alone: the mean of all tokens.

Cosines of such vectors say how alike two texts are in meaning.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks
from raypipe.lookup import one_line

if TYPE_CHECKING:
    from torch import Tensor

STEPS = "modules.json"  # of sentence-transformers: what is done, one after the other
KNOWN_STEPS = ("Transformer", "Pooling", "Normalize")
POOLING = "1_Pooling/config.json"  # what becomes of the tokens
LENGTH = "sentence_bert_config.json"  # how many of them are read
MOST_TOKENS = 512  # of networks that do not say
BATCH = 256  # texts at once
TINY = 1e-9  # the least that is divided by


class Sentences:
    """A frozen network for texts: BERT, MPNet or another encoder of transformers."""

    def __init__(self, path: Path, *, method: str, device: str = "cpu"):
        """Read a network and its tokenizer. path: a folder of `networks.locate`. method: whose errors these are.

        Raises ValueError for weights that are no encoder of texts, a folder without tokenizer, or one whose vectors are
        made otherwise than as the mean of all tokens; a folder that says nothing of that is taken as one of these.
        """
        self._method, self._device = method, device
        _check_steps(path, method)
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            kind, known = AutoModel._model_mapping[type(config)], config.vocab_size
            self._width = config.hidden_size
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # many kinds: no configuration, no tokenizer, an unknown architecture
            text = f"{path} cannot be read as a network for sentences ({one_line(error)})"
            raise ValueError(f"{method}: {text}; expected one such as all-mpnet-base-v2") from error
        if self._tokenizer.pad_token is None:
            text = f"{path} is no network for sentences: its tokenizer has no token that fills up shorter texts"
            raise ValueError(f"{method}: {text}; expected one such as all-mpnet-base-v2")
        options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
        self._network = networks.pretrained(kind, path, method=method, device=device, **options)
        if known < len(self._tokenizer):
            text = f"{len(self._tokenizer)} tokens, but the network knows {known}"
            raise ValueError(f"{method}: {path}: the tokenizer has {text}; they do not belong together")
        self._most = min(self._tokenizer.model_max_length, MOST_TOKENS, _told_length(path, method))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts as they are: float32 (n, D), rows of length 1; equal texts have the very same row.

        Each text is read once, in batches of BATCH of about one length. Raises ValueError for weights that give no
        finite numbers.
        """
        unique = sorted(dict.fromkeys(texts), key=lambda text: (len(text), text))
        batches = [unique[first : first + BATCH] for first in range(0, len(unique), BATCH)]
        rows = [np.empty((0, self._width), np.float32), *map(self._embed, batches)]
        place = {text: i for i, text in enumerate(unique)}
        return np.concatenate(rows)[[place[text] for text in texts]]

    def _embed(self, texts: list[str]) -> np.ndarray:
        import torch

        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._most, return_tensors="pt")
        tokens = tokens.to(self._device)
        with torch.no_grad():
            rows = pooled(self._network(**tokens).last_hidden_state, tokens["attention_mask"]).cpu().numpy()
        if not np.isfinite(rows).all():
            raise ValueError(f"{self._method}: the network for sentences gives no finite numbers; use other weights")
        return rows


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens that are there, at length 1: (n, D). states: (n, T, D). mask: (n, T), 1 for a token."""
    mask = mask[..., None].to(states.dtype)
    mean = (states * mask).sum(1) / mask.sum(1).clamp_min(TINY)
    return mean / mean.norm(dim=-1, keepdim=True).clamp_min(TINY)


def _check_steps(path: Path, method: str) -> None:
    """Raise ValueError where a folder says that its vectors are another thing than the mean of the tokens."""
    steps = [each["type"].rpartition(".")[2] for each in _said(path / STEPS, method)]
    if other := [step for step in steps if step not in KNOWN_STEPS]:
        text = f"expected {', '.join(KNOWN_STEPS)}, got {other[0]}"
        raise ValueError(f"{method}: {path / STEPS}: {text}; use a network such as all-mpnet-base-v2")
    found = _said(path / POOLING, method)
    ways = [name for name, is_on in found.items() if name.startswith("pooling_mode_") and is_on is True]
    if found and ways != ["pooling_mode_mean_tokens"]:
        text = f"expected pooling_mode_mean_tokens alone, got {', '.join(ways) or 'none'}"
        raise ValueError(f"{method}: {path / POOLING}: {text}; use a network such as all-mpnet-base-v2")


def _told_length(path: Path, method: str) -> int:
    return _said(path / LENGTH, method).get("max_seq_length") or MOST_TOKENS


def _said(file: Path, method: str):
    """What a JSON file says; {} where there is none."""
    try:
        return json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{method}: {file} cannot be read as JSON ({one_line(error)}); fetch it again") from error
