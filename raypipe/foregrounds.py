"""Where the foreground of an image comes from: another method, a folder of masks, another run, or the whole image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import segmenters
from raypipe.types import BadImage, Segmenter

GRAMMAR = "grabcut, rembg[:model or file.onnx], whole, given:DIR, run:DIR"
GIVEN_LEVEL = 128  # a given mask's pixels from this value on are foreground


@dataclass(frozen=True)
class Foreground:
    """One parsed `--foreground`. kind: grabcut, rembg, whole, given or run. argument: what follows the colon, or ""."""

    kind: str
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else self.kind

    @property
    def is_read(self) -> bool:
        """Whether masks are read from files (in the decode stage) and not computed (in the segment stage)."""
        return self.kind in ("given", "run")

    def segmenter(self, *, seed: int) -> Segmenter | None:
        """The one-mask method that computes it, not loaded; None when nothing is to be computed."""
        if self.kind == "grabcut":
            return segmenters.find("grabcut")(seed=seed)
        if self.kind == "rembg":
            rembg = segmenters.find("rembg")
            return rembg(model=self.argument) if self.argument else rembg()
        return None


def parse(text: str) -> Foreground:
    """Read the grammar of `--foreground`. Raises ValueError that shows it."""
    kind, _, argument = text.partition(":")
    if kind not in ("grabcut", "rembg", "whole", "given", "run"):
        raise ValueError(f"unknown foreground {text!r}; choose one of: {GRAMMAR}")
    if kind in ("given", "run") and not argument:
        raise ValueError(f"foreground {text!r} needs a folder; write {kind}:DIR")
    if kind in ("grabcut", "whole") and argument:
        raise ValueError(f"foreground {text!r}: {kind} takes no argument")
    if argument.endswith(".onnx"):
        argument = os.path.abspath(os.path.expanduser(argument))  # workers may have another current folder
    return Foreground(kind, argument)


def attach(manifest: pa.Table, foreground: Foreground) -> pa.Table:
    """Add the columns `foreground_location` and `foreground_row` that tell where each image's given mask lies.

    Masks are matched by relative path without extension, then by stem when just one mask has it; null = none found.
    """
    find = _given(foreground.argument) if foreground.kind == "given" else _of_run(foreground.argument)
    places = [find(key) for key in manifest["key"].to_pylist()]
    manifest = manifest.append_column("foreground_location", pa.array([place[0] for place in places], pa.string()))
    return manifest.append_column("foreground_row", pa.array([place[1] for place in places], pa.int64()))


def read(row: dict, foreground: Foreground, *, max_bytes: int, max_pixels: int) -> np.ndarray:
    """The mask that `attach` found for a row: bool (H, W). Raises BadImage if there is none or it is damaged."""
    from raypipe import images, masks, storage

    location = row["foreground_location"]
    if location is None:
        text = f"no single mask for {row['key']!r} in {foreground.argument!r}, by relative path or by stem"
        raise BadImage("foreground", "missing", text)
    if foreground.kind == "run":
        fs, path = storage.resolve(location)
        segments = pq.read_table(path, filesystem=fs, columns=["segments"], partitioning=None)["segments"]
        found = segments[row["foreground_row"]].as_py()
        if not found:
            raise BadImage("foreground", "missing", f"{foreground} found no segment in {row['key']!r}")
        return masks.decode_rle(found[0])
    try:
        return (
            images.decode(storage.read_bytes(location, max_bytes=max_bytes), max_pixels=max_pixels).max(2)
            >= GIVEN_LEVEL
        )
    except BadImage as error:
        raise BadImage("foreground", error.kind, f"{location}: {error.message}") from error


def check_size(mask: np.ndarray, image: np.ndarray) -> None:
    """Raise BadImage unless the mask has the image's size: a resized guess would be a wrong mask."""
    if mask.shape != image.shape[:2]:
        (h, w), (height, width) = mask.shape, image.shape[:2]
        raise BadImage("foreground", "wrong_size", f"the mask is {w} x {h} pixels, the image {width} x {height}")


def _given(folder: str):
    """A finder of masks by key in a folder of mask files."""
    from raypipe import inputs

    by_path, by_stem = {}, {}
    for chunk in inputs.list_inputs(folder).chunks:
        for key, location in zip(chunk["key"].to_pylist(), chunk["location"].to_pylist(), strict=True):
            path = str(PurePosixPath(key).with_suffix(""))
            by_path[path] = location
            stem = PurePosixPath(key).stem
            by_stem[stem] = None if stem in by_stem else location  # twice: ambiguous
    return lambda key: (
        by_path.get(str(PurePosixPath(key).with_suffix(""))) or by_stem.get(PurePosixPath(key).stem),
        None,
    )


def _of_run(output: str):
    """A finder of rows by key in another run."""
    from raypipe.runs import Run

    run, places = Run(output), {}
    for name in run.parts():
        path, location = run.folder.path(run.masks, name), run.folder.location(run.masks, name)
        table = pq.read_table(path, filesystem=run.folder.fs, columns=["key", "error"], partitioning=None)
        for i, (key, error) in enumerate(zip(table["key"].to_pylist(), table["error"].to_pylist(), strict=True)):
            if not error:
                places[key] = (location, i)
    return lambda key: places.get(key, (None, None))
