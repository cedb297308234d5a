"""A DINO of random weights."""

from __future__ import annotations

from pathlib import Path

from support.tiny import dino


def options(folder: Path) -> dict:
    return {"weights": str(dino.write_model(folder))}
