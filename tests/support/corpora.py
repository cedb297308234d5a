"""Corpora of small pictures and what `raypipe archive` makes of them. Shared by tests."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from raypipe.archive.archive import Archive
from raypipe.archive.embedding import Embedder

FILES = ("archive.parquet", "rejects.parquet", "archive_summary.parquet", "manifest.parquet", "archive.json",
         "archive.html")  # fmt: skip


def draw(folder: Path, numbers, size=(40, 48), brightest: int = 255) -> None:
    """PNG files of coloured blobs."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, brightest + 1, (3, 4, 3), np.uint8)
        Image.fromarray(pixels).resize(size[::-1]).save(folder / f"{i:04d}.png")


def wanted(photos: Path, output: Path, model: Path, **options) -> Archive:
    """An archive of three categories with four images each."""
    usual = {"classes": "cat,dog,tree frog", "n": 4, "safety": False, "faces": "none", "max_bad_fraction": 1.0}
    places = {"input": str(photos), "output": str(output), "clip": str(model)}
    return Archive(**places | usual | options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an archive."""
    return {name: (folder / name).read_bytes() for name in FILES}


@dataclass
class OnFakeGpu(Embedder):
    """Runs on the CPU where Ray has given it a GPU, so that the three-stage graph runs."""

    def load(self, device):
        super().load("cpu")
