"""Which published network a checkpoint is, by its name: heads are trained on the features of one of them.

Two DINO ViT-S/8 were published. torch.hub and the Hugging Face Hub have one, LOST, TokenCut, FOUND and SelfMask loaded
the other, of 300 epochs. Both have the same shapes, so that a head on the wrong one finds noise without an error.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

log = logging.getLogger("raypipe")

SERVER = "https://dl.fbaipublicfiles.com/dino"  # of DINO's authors
S8_300 = f"{SERVER}/dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth"
S8 = "facebook/dino-vits8"

# What each published network is passed as, and all names it is known by: ids, and files without their suffix.
PUBLISHED = {
    S8: {"facebook/dino-vits8", "dino_deitsmall8_pretrain", "dino_deitsmall8_pretrain_full_checkpoint"},
    S8_300: {"dino_deitsmall8_300ep_pretrain"},
    "facebook/dino-vits16": {
        "facebook/dino-vits16", "dino_deitsmall16_pretrain", "dino_deitsmall16_pretrain_full_checkpoint",
    },
    "facebook/dino-vitb8": {
        "facebook/dino-vitb8", "dino_vitbase8_pretrain", "dino_vitbase8_pretrain_full_checkpoint",
    },
    "facebook/dino-vitb16": {
        "facebook/dino-vitb16", "dino_vitbase16_pretrain", "dino_vitbase16_pretrain_full_checkpoint",
    },
}  # fmt: skip


def check_checkpoint(weights: str, *, needed: str, method: str, field: str = "backbone") -> None:
    """Raise ValueError where weights are known by name as another network than the one that a method needs.

    weights: a Hugging Face id, a folder, a file or its address, as `networks.settle_options` leaves it in a field.
    needed: a key of PUBLISHED. What has none of the known names is accepted with a warning in the log, once.
    """
    names = _names(weights)
    found = next((each for each, known in PUBLISHED.items() if known & names), None)
    if found is None:
        _warn_once(weights, needed, method, field)
    elif found != needed:
        text = f"{field} {weights!r} is {_called(found)}, but {_called(needed)} is needed: pass --{field} {needed}"
        raise ValueError(f"{method}: {text}, or that file")


def _names(weights: str) -> set[str]:
    """All names under which weights may be known."""
    path = Path(weights)
    names = {weights.partition("@")[0], PurePosixPath(urlsplit(weights).path).stem}
    if path.is_dir():
        names |= {file.stem for file in path.iterdir()}
        source = path / "source.json"  # of `raypipe weights`
        if source.is_file():
            names |= _names(str(json.loads(source.read_bytes()).get("weights")))
    return names


def _called(published: str) -> str:
    return PurePosixPath(published).name if published.startswith(SERVER) else published


@functools.cache
def _warn_once(weights: str, needed: str, method: str, field: str) -> None:
    text = "%s: %s %r has no name that is known here; masks are right only if it is %s under another name"
    log.warning(text, method, field, weights, _called(needed))
