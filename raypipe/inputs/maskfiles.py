"""A folder of mask files (labels, given foregrounds): which file belongs to which image, and its pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from raypipe import images, storage
from raypipe.inputs.manifest import list_inputs
from raypipe.storage import Location

SET_FROM = 128  # a mask's pixels from this value on are set


@dataclass(frozen=True)
class Matches:
    """Which mask file belongs to which image."""

    location: dict[str, str]  # image key -> the file's location; images without a file of their own are left out
    unused: list[str]  # paths of the files that no image has


def match(folder: str, keys: Iterable[str]) -> Matches:
    """Find the mask file of each image in a folder: by relative path without extension, else by stem.

    A stem counts only if one file has it, which matched no path, and one image that no path matched; two files with one
    path match nothing. So no image gets a mask that may be another's. keys: those of all images, in which one may stand
    twice. Raises ValueError when the folder holds no images, or packed ones, and FileNotFoundError when it does not
    exist.
    """
    by_path, by_stem = _index(folder)
    location, claimants = {}, {}
    for key in keys:
        path, stem = str(PurePosixPath(key).with_suffix("")), PurePosixPath(key).stem
        if by_path.get(path):
            location[key] = by_path[path]
        elif by_stem.get(stem):
            claimants[stem] = key if claimants.get(stem, key) == key else None
    used = set(location.values())
    location |= {key: by_stem[stem] for stem, key in claimants.items() if key is not None and by_stem[stem] not in used}
    used |= set(location.values())
    return Matches(location, [path for path, file in by_path.items() if file not in used])


def read(location: str, *, max_bytes: int, max_pixels: int) -> np.ndarray:
    """A mask file as bool (H, W): the brightest channel is at least 128. Raises BadImage when it cannot be read."""
    content = storage.read_bytes(location, max_bytes=max_bytes)
    return images.decode(content, max_pixels=max_pixels).max(2) >= SET_FROM


def _index(folder: str) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Location by path without extension and by stem; None where two files have it."""
    by_path, by_stem = {}, {}
    files = list_inputs(folder)
    if files["start"].null_count + files["row"].null_count < 2 * len(files):
        raise ValueError(f"{Location(folder)}: masks in tars or tables are not matched; unpack them")
    for key, location in zip(files["key"].to_pylist(), files["location"].to_pylist(), strict=True):
        path, stem = str(PurePosixPath(key).with_suffix("")), PurePosixPath(key).stem
        by_path[path] = None if path in by_path else location
        by_stem[stem] = None if stem in by_stem else location
    return by_path, by_stem
