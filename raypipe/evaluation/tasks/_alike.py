"""How alike texts are, and what CLIP makes of a region and a text: each text is read once in a process."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks

if TYPE_CHECKING:
    from raypipe.features.clip import Clip
    from raypipe.features.sentences import Sentences

KEPT = 20_000  # names whose cosines are kept, 70 MB for 459 classes: texts of a search are hardly ever written twice
PROMPT = "Image of a {}."  # in which CLIP is asked about a class
_LOCK = threading.RLock()  # images are measured in threads


class Names:
    """Cosines of names and of the texts of classes, by Sentence-BERT."""

    def __init__(self, sentences: Sentences, texts: tuple[str, ...]):
        self._sentences, self._texts, self._classes = sentences, np.array(texts), sentences(texts).astype(np.float64)
        self._rows: dict[str, np.ndarray] = {}

    def __call__(self, names: Sequence[str]) -> np.ndarray:
        """float64 (n, C), exactly 1 for a class's own name."""
        with _LOCK:
            fresh = [name for name in dict.fromkeys(names) if name not in self._rows]
            for name, vector in zip(fresh, self._sentences(fresh), strict=True):
                cosines = (self._classes @ vector).clip(-1, 1)
                self._rows[name] = np.where(self._texts == name, 1.0, cosines)
            found = np.array([self._rows[name] for name in names]).reshape(len(names), len(self._texts))
            while len(self._rows) > KEPT:
                del self._rows[next(iter(self._rows))]  # the oldest
            return found


def names(weights: str, texts: tuple[str, ...]) -> Names:
    """What compares names with these texts. weights: of Sentence-BERT, a folder or a hub id. Raises what it raises."""
    with _LOCK:
        return _names(weights, texts)


def of_classes(weights: str, texts: tuple[str, ...]) -> np.ndarray:
    """CLIP's vectors of classes: float64 (C, D), rows of length 1. weights: a folder or a hub id."""
    with _LOCK:
        return _clip(weights).texts(texts, json.dumps([PROMPT])).astype(np.float64)


def clip_scores(weights: str, texts: Sequence[str], vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Cosines of regions and their own names: float64 (n,); 0 for a blank name. vectors: (D,) each, of length 1."""
    named = [i for i, text in enumerate(texts) if text.strip()]
    found = np.zeros(len(texts))
    if named:
        with _LOCK:
            rows = _clip(weights).texts([texts[i] for i in named], "none")
        found[named] = [row @ vectors[i] for i, row in zip(named, rows, strict=True)]
    return found


def unit(embedding: Sequence[float] | None) -> np.ndarray | None:
    """A stored embedding at length 1, float64 (D,); None without one, or one without a direction."""
    vector = np.array(() if embedding is None else embedding, np.float64)
    length = np.linalg.norm(vector)
    return vector / length if 0 < length < np.inf else None


@lru_cache(maxsize=4)
def _names(weights: str, texts: tuple[str, ...]) -> Names:
    from raypipe.features.sentences import Sentences

    path = networks.locate(weights, method="naming", option="sentence_model")
    return Names(Sentences(path, method="naming"), texts)


@lru_cache(maxsize=2)
def _clip(weights: str) -> Clip:
    from raypipe.features.clip import Clip

    path = networks.locate(weights, method="naming", option="clip")
    return Clip(path, method="naming", device="cpu", vision=False)
