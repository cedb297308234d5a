"""A random DINO for spectral voting."""

from __future__ import annotations

from pathlib import Path

from support.tiny.dino import write_model


def options(folder: Path) -> dict:
    return {"weights": str(write_model(folder))}
