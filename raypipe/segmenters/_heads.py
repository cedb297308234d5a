"""What the methods with a published head share: reading the file that holds it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from raypipe.lookup import one_line
from raypipe.networks import WEIGHTS

if TYPE_CHECKING:
    import torch

WRAPPED = re.compile(r"^(module\.)+")  # what training on several GPUs puts before every name


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
