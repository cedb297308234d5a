"""A bank of random vectors for a DINO and a CLIP of random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.tiny import _clip, dino

NAMES = ("cat", "dog", "sky")


def write_networks(folder: Path) -> dict[str, str]:
    """The options that name both networks."""
    return {
        "backbone": str(dino.write_model(folder / "backbone")),
        "clip": str(_clip.write_model(folder / "clip", patch=16)),
    }


def write_bank(folder: Path, *, backbone: str, clip: str, names=NAMES) -> Path:
    """A bank for two networks, as a training exports it."""
    from raypipe.features.clip import Clip
    from raypipe.features.dino import Dino
    from raypipe.segmenters.reco.bank import Bank, files

    encoder, named = Dino(Path(backbone), method="reco", device="cpu"), Clip(Path(clip), method="reco", device="cpu")
    random = np.random.default_rng(0)
    vectors = random.normal(size=(len(names) + 1, encoder.width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    config = {
        "classes": [{"name": name, "query": f"a {name}", "images": 2} for name in names],
        "contexts": ["tree"],
        "text_temperature": 10.0,
        "backbone": backbone,
        "backbone_digest": encoder.digest(),
        "clip": clip,
        "clip_digest": named.digest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files(Bank(vectors[1:], named.texts(names, "none"), vectors[:1], config)).items():
        (folder / name).write_bytes(content)
    return folder


def options(folder: Path) -> dict:
    networks = write_networks(folder)
    return {"weights": str(write_bank(folder / "bank", **networks)), "short_side": 64, "max_side": 160}
