"""What the methods with a published head share: reading its file, and knowing the network that it was trained on."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from raypipe.lookup import one_line
from raypipe.networks import WEIGHTS
from raypipe.types import Segmenter

if TYPE_CHECKING:
    import torch

log = logging.getLogger("raypipe")

# DINO's authors published two ViT-S/8 of one shape. A head on the wrong one finds noise, without an error.
S8_300 = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth"
S8_HUB = "facebook/dino-vits8"  # torch.hub's dino_deitsmall8_pretrain.pth
S8 = {  # how each is recognised in ids, paths and names of files
    S8_300: re.compile(r"dino_deitsmall8_300ep_pretrain"),
    S8_HUB: re.compile(r"dino_deitsmall8_pretrain|(^|/|--)dino-vits8($|[@/])"),
}
WRAPPED = re.compile(r"^(module\.)+")  # what training on several GPUs puts before every name


def check_s8(method: Segmenter, wanted: str, path: Path | None = None) -> None:
    """Raise ValueError where a method's `backbone` is the other of DINO's two ViT-S/8, by its name.

    wanted: S8_300 or S8_HUB. path: where it was found; then one that is not recognised is warned about. What it was
    says its checksum in the run's provenance.
    """
    names = [method.backbone, *([str(path), *_notes(path)] if path else ())]
    recognised = {one for one, pattern in S8.items() if any(pattern.search(name) for name in names)}
    if recognised - {wanted}:
        text = f"backbone {method.backbone!r} is not the ViT-S/8 that the head was trained on"
        raise ValueError(f"{method.name}: {text}; pass --backbone {wanted}")
    if path and not recognised:
        text = "%s: backbone %s is not known to be %s, which the head was trained on; its sha256 is recorded"
        log.warning(text, method.name, method.backbone, wanted)


def _notes(path: Path) -> list[str]:
    """What a folder says of where its files are from: their names, and what `raypipe weights` wrote beside them."""
    if path.is_file():
        return []
    source = path / "source.json"
    return [
        *(file.name for file in path.iterdir()),
        *([json.loads(source.read_bytes())["weights"]] if source.is_file() else ()),
    ]


def weight_file(path: Path, *, method: str) -> Path:
    """The one weight file that a path is, or is a folder of. Raises ValueError where a folder has several."""
    if path.is_file():
        return path
    files = sorted(file for kind in WEIGHTS for file in path.glob(kind))
    if len(files) == 1:
        return files[0]
    named = ", ".join(file.name for file in files) or "none"
    raise ValueError(f"{method}: {path} must hold one weight file, it holds {named}; pass --weights FILE")


def read(file: Path, inside: str, *, method: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, `.safetensors` or of torch, by name without `module.`.

    inside: where they are in a checkpoint with other things beside them. Nothing that a file says is executed; of
    Python's own only argparse's Namespace is read, which authors keep their settings in. Raises ValueError for a file
    that is no checkpoint.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            stored = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's, torch's and safetensors' own kinds
        why = one_line(error)
        raise ValueError(f"{method}: {file} is not a checkpoint that can be read safely ({why})") from error
    if isinstance(stored, Mapping) and isinstance(stored.get(inside), Mapping):
        stored = stored[inside]
    if not isinstance(stored, Mapping) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise ValueError(f"{method}: {file} is no checkpoint: expected tensors by name, alone or as {inside!r}")
    return {WRAPPED.sub("", name): value for name, value in stored.items()}
