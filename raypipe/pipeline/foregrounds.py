"""Where the foreground of an image comes from: another method, a folder of masks, another run, or the whole image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raypipe import masks, segmenters, storage
from raypipe.inputs import maskfiles
from raypipe.run import Run, rows
from raypipe.storage import Location
from raypipe.types import BadImage, Segmenter

GRAMMAR = "grabcut, rembg[:model or file.onnx], whole, given:DIR, run:DIR"


@dataclass(frozen=True)
class Foreground:
    """One parsed `--foreground`. kind: grabcut, rembg, whole, given or run.

    argument: what follows the colon, or ""; a local path is absolute, for workers may have another current folder.
    """

    kind: str
    argument: str = ""

    def __str__(self) -> str:
        """The spec with an absolute path and without credentials: what is frozen and shown."""
        argument = Location(self.argument) if self.is_read else self.argument
        return f"{self.kind}:{argument}" if argument else self.kind

    @property
    def is_read(self) -> bool:
        """Whether masks are read from files (in the decode stage) and not computed (in the segment stage)."""
        return self.kind in ("given", "run")

    def segmenter(self, *, seed: int) -> Segmenter | None:
        """The one-mask method that computes it, not loaded; None when nothing is to be computed."""
        if self.kind == "grabcut":
            return segmenters.find("grabcut")(seed=seed)
        if self.kind == "rembg":
            return segmenters.find("rembg")(**({"model": self.argument} if self.argument else {}))
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
    is_path = kind in ("given", "run") or argument.endswith(".onnx")
    return Foreground(kind, storage.absolute(argument) if is_path else argument)


def attach(manifest: pa.Table, foreground: Foreground) -> pa.Table:
    """Add the columns `foreground_location` and `foreground_row` that tell where each image's given mask lies.

    Masks are matched as `maskfiles.match` says; null = none found.
    """
    keys = manifest["key"].to_pylist()
    if foreground.kind == "given":
        files = maskfiles.match(foreground.argument, keys).location
        where = {key: (location, None) for key, location in files.items()}
    else:
        where = rows.good_rows(Run(foreground.argument))
    uris, indices = zip(*(where.get(key, (None, None)) for key in keys), strict=True)
    uris = pa.array([uri and Location(uri).uri for uri in uris], pa.string())
    manifest = manifest.append_column("foreground_location", uris)
    return manifest.append_column("foreground_row", pa.array(indices, pa.int64()))


def read(row: dict, foreground: Foreground, *, size: tuple[int, int], max_bytes: int, max_pixels: int) -> np.ndarray:
    """The mask that `attach` found for a row: bool (H, W).

    size: (height, width) of the image. Raises BadImage if there is no mask, if it is damaged, or has another size: a
    resized guess would be a wrong mask.
    """
    location = row["foreground_location"]
    if location is None:
        text = f"{foreground} has no single mask for {row['key']!r}, by relative path or by stem"
        raise BadImage("foreground", "missing", text)
    if foreground.kind == "run":
        segments = rows.segments_of(location, row["foreground_row"])
        if not segments:
            raise BadImage("foreground", "missing", f"{foreground} found no segment in {row['key']!r}")
        mask = masks.decode_rle(segments[0])
    else:
        try:
            mask = maskfiles.read(location, max_bytes=max_bytes, max_pixels=max_pixels)
        except BadImage as error:
            raise BadImage("foreground", error.kind, f"{Location(location)}: {error.message}") from error
    if mask.shape != size:
        (h, w), (height, width) = mask.shape, size
        raise BadImage("foreground", "wrong_size", f"the mask is {w} x {h} pixels, the image {width} x {height}")
    return mask
