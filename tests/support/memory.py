"""Little memory: all that would go to the disk for a hundred million images does so for a dozen."""

import pytest

TINY = {
    "raypipe.storage.sorted.MEMORY_BYTES": 64,
    "raypipe.storage.sorted.BLOCK": 5,
    "raypipe.storage.spool.MEMORY_BYTES": 0,
    "raypipe.inputs.items.CHUNK_ROWS": 4,
    "raypipe.run.ids.ROWS": 3,
    "raypipe.run.run.ROWS": 3,
    "raypipe.run.run.PENDING_ROWS": 7,
}


def tiny(patch: pytest.MonkeyPatch) -> None:
    """Let sets, spools and chunks be of a few rows."""
    for name, value in TINY.items():
        patch.setattr(name, value)
