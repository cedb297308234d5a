"""Stored reference arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as stored:
        return dict(stored)
