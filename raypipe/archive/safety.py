"""Which images are unsafe to keep, by what CLIP takes them for: zero-shot classification by a list of concepts.

An image belongs to the concept whose text has the largest cosine with its embedding (Radford et al., ICML 2021, sec.
3.1.2), and it is unsafe where that one is an unsafe concept. Both kinds compete, because a bare cosine has no level
that means anything: it differs by model and by text. A net for an unlabelled corpus, no guarantee; columns that
say it of a corpus are better.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raypipe.classes import normalised
from raypipe.lookup import one_line

ROWS = 16_384  # images that are compared at a time: a large archive has a million candidates
DEFAULT = Path(__file__).with_name("concepts.yaml")


@dataclass(frozen=True)
class Concepts:
    """What images are told apart by: texts that CLIP is asked with, all different."""

    unsafe: tuple[str, ...]
    safe: tuple[str, ...]

    def are_unsafe(self, embeddings: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Which images are unsafe: bool (n,).

        embeddings: (n, D), unit rows of one CLIP. texts: float32 (U + S, D), its unit rows for `unsafe`, then `safe`.
        An image as close to a safe concept as to an unsafe one is safe.
        """
        found, count = np.zeros(len(embeddings), bool), len(self.unsafe)
        for first in range(0, len(embeddings), ROWS):
            scores = np.asarray(embeddings[first : first + ROWS], np.float32) @ texts.T
            found[first : first + ROWS] = scores[:, :count].max(axis=1) > scores[:, count:].max(axis=1)
        return found


def read(text: str = "default") -> Concepts:
    """The concepts that an option means: `default`, the packaged ones, or a YAML file of the lists `unsafe` and `safe`.

    Raises FileNotFoundError without the file, and ValueError for another content.
    """
    import yaml

    file = DEFAULT if text == "default" else Path(os.path.expanduser(text))
    try:
        found = yaml.load(file.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--concepts: there is no file {text!r}; give `default` or a file of concepts"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--concepts {text} cannot be read as YAML ({one_line(error)})") from error
    if not isinstance(found, dict) or found.keys() != {"unsafe", "safe"} or not all(map(_are_texts, found.values())):
        raise ValueError(f"--concepts {text}: expected two lists of texts, `unsafe` and `safe`, and nothing else")
    names = [normalised(concept) for concept in [*found["unsafe"], *found["safe"]]]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--concepts {text}: {twice[0]!r} stands there twice; name each concept once")
    return Concepts(tuple(found["unsafe"]), tuple(found["safe"]))


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each.strip() for each in value)
