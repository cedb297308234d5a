"""A CLIP of random weights."""

from __future__ import annotations

from pathlib import Path

from support.tiny._clip import write_model


def options(folder: Path) -> dict:
    return {"weights": str(write_model(folder)), "short_side": 48, "max_side": 200, "threshold": 0.0}
