"""GloPER small enough for a test; it has no weights."""

from pathlib import Path


def options(folder: Path) -> dict:
    return {"size": 32, "steps": 2, "widths": (4, 8, 8, 16, 16), "local_sizes": (4, 8), "seeds": 1}
