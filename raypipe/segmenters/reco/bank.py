"""A bank: for each category its reference vector and its text, and what both are to be compared with.

bank.safetensors   vectors (C, D) and texts (C, Dt), of length 1, and contexts (m, D); float32
config.json        the categories in label order, the two networks with their digests, how it was made
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raypipe.features import originals
from raypipe.lookup import one_line

FILE = "bank.safetensors"
KIND = "reco"


@dataclass(frozen=True)
class Bank:
    """A bank in memory."""

    vectors: np.ndarray  # float32 (C, D), rows of length 1
    texts: np.ndarray  # float32 (C, Dt), rows of length 1
    contexts: np.ndarray  # float32 (m, D), rows of length 1, of the contexts that were left out of the others
    config: dict  # `classes`: name and query of each row; `backbone`, `clip` and their digests; `text_temperature`, ...

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each["name"] for each in self.config["classes"])


def files(bank: Bank) -> dict[str, bytes]:
    """The files of a folder that `label reco --weights` takes, by name."""
    from safetensors.numpy import save

    tensors = {"vectors": bank.vectors, "texts": bank.texts, "contexts": bank.contexts}
    config = {"model_type": KIND} | bank.config
    return {FILE: save(tensors), "config.json": json.dumps(config, indent=1, ensure_ascii=False).encode()}


def told(path: Path, *, method: str) -> dict:
    """What the config.json of a bank says. path: its folder or file.

    Raises ValueError for one that is no bank's, and FileNotFoundError where the bank is not finished.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "training.json").is_file() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{method}: the bank in {folder} is not finished; the same command makes it")
    found = originals.settings(folder, method=method)
    classes, has = found.get("classes"), (found.get("model_type"), found.get("text_temperature"))
    is_named = isinstance(classes, list) and all(isinstance(each, dict) and "name" in each for each in classes)
    if has[0] != KIND or not (is_named and classes) or not isinstance(has[1], float):
        text = f"{path} is no bank: its config.json must name the classes and the networks"
        raise ValueError(f"{method}: {text}; `raypipe train reco --archive DIR --output BANK` makes one")
    return found


def read(path: Path, *, method: str) -> Bank:
    """The bank in a folder. Raises ValueError for what is none."""
    from safetensors.numpy import load_file

    config, file = told(path, method=method), path / FILE if path.is_dir() else path
    try:
        tensors = load_file(file)
        found = [tensors[name].astype(np.float32) for name in ("vectors", "texts", "contexts")]
    except Exception as error:  # safetensors' own kinds, a missing file or tensor
        raise ValueError(f"{method}: {file} cannot be read as a bank ({one_line(error)})") from error
    _check(found, len(config["classes"]), file, method)
    return Bank(*found, config)


def _check(tensors: Sequence[np.ndarray], classes: int, file: Path, method: str) -> None:
    """Raise ValueError where the numbers cannot be those of as many classes."""
    vectors, texts, contexts = tensors
    shapes = [each.shape for each in tensors]
    is_right = all(each.ndim == 2 for each in tensors) and len(vectors) == len(texts) == classes
    if not is_right or contexts.shape[1] != vectors.shape[1]:
        text = f"{file} has vectors, texts and contexts of shapes {shapes}, its config.json names {classes} classes"
        raise ValueError(f"{method}: {text}; make the bank again")
    if not all(np.isfinite(each).all() for each in tensors):
        raise ValueError(f"{method}: {file} holds values that are no finite numbers; make the bank again")
