"""Where the foreground of an image comes from: another method, masks, boxes, another run, or the whole image.

And given regions, which a method of its own gets in the same place: see `Segmenter.takes_regions`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from raypipe import masks, segmenters, storage
from raypipe.inputs import boxfiles, maskfiles, maskkinds
from raypipe.inputs.maskkinds import KINDS, LIGHT, Kind
from raypipe.run import Run, rows
from raypipe.storage import Location
from raypipe.types import BadImage, PatternSegmenter, Segmenter

GRAMMAR = "grabcut, rembg[:model or file.onnx], whole, given:DIR, boxes:FILE, run:DIR"
READ = ("given", "boxes", "run")  # from files, and not computed
MASK_KIND = "mask_kind"  # column of the manifest and entry of a run's provenance
IGNORED = 255, 65535  # by custom the values of pixels that do not count in class maps of 8 bits, and of more
HOW = f"--foreground given:KIND:DIR with {', '.join(KINDS)} or values such as 1,2"


@dataclass(frozen=True)
class Foreground:
    """One parsed `--foreground`. kind: grabcut, rembg, whole, given, boxes or run.

    argument: what follows the colon, or ""; a local path is absolute, for workers may have another current folder.
    masks: how given masks are read, of `given:KIND:DIR`; None = as they look. option: foreground or regions, as which
    it was said and the method gets it.
    """

    kind: str
    argument: str = ""
    masks: Kind | None = None
    option: str = "foreground"

    def __str__(self) -> str:
        """The spec with an absolute path and without credentials: what is frozen and shown."""
        return (replace(self, argument=str(Location(self.argument))) if self.is_read else self).spec

    @property
    def spec(self) -> str:
        """The same with all that opens it: what `parse` reads."""
        return ":".join(filter(None, (self.kind, self.masks and str(self.masks), self.argument)))

    @property
    def is_read(self) -> bool:
        """Whether masks are read from files (in the decode stage) and not computed (in the segment stage)."""
        return self.kind in READ

    def segmenter(self, *, seed: int) -> Segmenter | None:
        """The one-mask method that computes it, not loaded; None when nothing is to be computed."""
        if self.kind == "grabcut":
            return segmenters.find("grabcut")(seed=seed)
        if self.kind == "rembg":
            return segmenters.find("rembg")(**({"model": self.argument} if self.argument else {}))
        return None


def of(segmenter: Segmenter) -> Foreground | None:
    """Where a method's foregrounds or regions come from; None for one that takes none. Raises ValueError."""
    if isinstance(segmenter, PatternSegmenter):
        return parse(segmenter.foreground)
    if not segmenter.takes_regions or segmenter.regions is None:
        return None
    kind, _, folder = segmenter.regions.partition(":")
    if kind != "given" or not folder:
        raise ValueError(f"--regions {segmenter.regions!r}: write given:DIR, with a folder of class maps")
    return Foreground("given", storage.absolute(folder), option="regions")


def parse(text: str) -> Foreground:
    """Read the grammar of `--foreground`. Raises ValueError that shows it."""
    kind, _, argument = text.partition(":")
    if kind not in ("grabcut", "rembg", "whole", *READ):
        raise ValueError(f"unknown foreground {text!r}; choose one of: {GRAMMAR}")
    if kind in READ and not argument:
        what = "file" if kind == "boxes" else "folder"
        raise ValueError(f"foreground {text!r} needs a {what}; choose one of: {GRAMMAR}")
    if kind in ("grabcut", "whole") and argument:
        raise ValueError(f"foreground {text!r}: {kind} takes no argument")
    first, _, rest = argument.partition(":")
    masks = maskkinds.parse(first) if kind == "given" and rest else None
    argument = rest if masks else argument
    is_path = kind in READ or argument.endswith(".onnx")
    return Foreground(kind, storage.absolute(argument) if is_path else argument, masks)


def attach(
    manifest: pa.Table, foreground: Foreground, *, known: str | None = None, max_bytes: int, max_pixels: int
) -> pa.Table:
    """Add the columns that tell where each image's mask lies and how it is read.

    These are `foreground_location` (null = none found; of boxes the boxes, as JSON), `foreground_row` and MASK_KIND.
    Given masks are matched as `maskfiles.match` says, their kind is `known`, else the foreground's, else recognised;
    boxes as `boxfiles.match` says. Raises ValueError or FileNotFoundError that names the option, also when no image has
    a mask.
    """
    keys, kind = manifest["key"].to_pylist(), None
    try:
        if foreground.kind == "given":
            files = maskfiles.match(foreground.argument, keys)
            if not files.location and keys:
                names = maskfiles.difference(keys[0], files.unused, what="masks")
                raise ValueError(f"no mask there has the path or the stem of an image{names}")
            where = {key: (location, None) for key, location in files.location.items()}
            limits = {"max_bytes": max_bytes, "max_pixels": max_pixels}
            kind = known and maskkinds.parse(known)
            if foreground.option == "foreground" and not kind:
                kind = maskfiles.kind_of(files, foreground.masks, what="foreground masks", option=HOW, **limits)
        elif foreground.kind == "boxes":
            where = {key: (json.dumps(boxes), None) for key, boxes in boxfiles.match(foreground.argument, keys).items()}
        else:
            where = rows.good_rows(Run(foreground.argument))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"--{foreground.option} {foreground}: {error}") from error
    uris, indices = zip(*(where.get(key, (None, None)) for key in keys), strict=True)
    if foreground.kind != "boxes":
        uris = [uri and Location(uri).uri for uri in uris]
    uris = pa.array(uris, pa.string())
    manifest = manifest.append_column("foreground_location", uris)
    manifest = manifest.append_column("foreground_row", pa.array(indices, pa.int64()))
    return manifest.append_column(MASK_KIND, pa.array([kind and str(kind)] * len(manifest), pa.string()))


def mask_kind(manifest: storage.Spool | pa.Table) -> dict[str, str]:
    """What a run records of how its given masks are read: MASK_KIND and the kind; {} for images without such masks."""
    kinds = manifest[MASK_KIND].slice(0, 1).to_pylist() if MASK_KIND in manifest.column_names else []
    return {MASK_KIND: kinds[0]} if any(kinds) else {}


def read(row: dict, foreground: Foreground, *, size: tuple[int, int], max_bytes: int, max_pixels: int) -> np.ndarray:
    """The mask that `attach` found for a row: bool (H, W); of regions int32, 0 where none is.

    size: (height, width) of the image. Raises BadImage if there is no mask, if it is damaged, or has another size: a
    resized guess would be a wrong mask.
    """
    location, is_mask = row["foreground_location"], foreground.option == "foreground"
    what = "mask" if is_mask else "class map"
    if location is None:
        text = f"{foreground} has no single {what} for {row['key']!r}, by relative path or by name"
        raise BadImage("foreground", "missing", text)
    if foreground.kind == "boxes":
        mask = boxfiles.mask(json.loads(location), size)
    elif foreground.kind == "run":
        segments = rows.segments_of(location, row["foreground_row"])
        if not segments:
            raise BadImage("foreground", "missing", f"{foreground} found no segment in {row['key']!r}")
        try:
            mask = masks.decode_rle(segments[0])
        except masks.DamagedMask as error:
            raise BadImage("foreground", "corrupt", f"{foreground}: {error}") from error
    else:
        try:
            limits, kind = {"max_bytes": max_bytes, "max_pixels": max_pixels}, maskkinds.parse(row[MASK_KIND] or "")
            mask = maskfiles.read(location, kind or LIGHT, **limits) if is_mask else _regions(location, limits)
        except BadImage as error:
            raise BadImage("foreground", error.kind, f"{Location(location)}: {error.message}") from error
    if mask.shape != size:
        (h, w), (height, width) = mask.shape, size
        raise BadImage("foreground", "wrong_size", f"the {what} is {w} x {h} pixels, the image {width} x {height}")
    return mask


def _regions(location: str, limits: dict) -> np.ndarray:
    """A class map, int32 (H, W): 0 where it is 0 or IGNORED. Raises BadImage."""
    values = maskfiles.read_numbers(location, **limits)
    return np.where(values == IGNORED[values.dtype != np.uint8], 0, values.astype(np.int32))
