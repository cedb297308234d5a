"""Masks as people corrected them, in the place of a run's own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from raypipe import lookup, masks
from raypipe.evaluation.evaluate import Evaluate
from raypipe.export.about import About
from raypipe.export.formats import cvat, labelstudio
from raypipe.inputs import corrections, maskfiles, shapes
from raypipe.inputs.maskfiles import Matches
from raypipe.run import Run, rows
from raypipe.storage import Location
from raypipe.types import BadImage

log = logging.getLogger("raypipe")
STAGE = "correction"  # of an error
NOTE = "corrected"  # of an image whose masks people drew


def applied(run: Run, place: str, images: Iterable[dict], about: About) -> tuple[Iterator[dict], About]:
    """The rows as `replaced` makes them, and what to tell of the run with them: images may have more masks now.

    place: as `find` takes it.
    """
    matches = find(run, place, about)
    drawn = (corrections.names(location) for location in matches.location.values())
    if _is_united(about):
        drawn = ({*names} if len(about.categories) > 1 else names[:1] for names in drawn)
    return replaced(images, matches, about), replace(about, most=max(about.most, *map(len, drawn)))


def find(run: Run, place: str, about: About) -> Matches:
    """What was drawn in which image of a run. place: as `corrections.match` takes it.

    Raises ValueError where it belongs to no image or to one of two that have one key, or has labels that are no
    categories of the export.
    """
    keys = Counter(key for table in rows.columns(run, ["key"]) for key in table["key"].to_pylist())
    matches = corrections.match(place, keys)
    if not matches.location:
        names = maskfiles.difference(next(iter(keys)), matches.unused, what="corrections") if keys else ""
        raise ValueError(f"--corrections: {Location(place)} has none of an image of {run}{names}")
    if twice := [key for key in matches.location if keys[key] > 1]:
        text = f"--corrections: {Location(place)} has {twice[0]!r}, and {run} several images of that key"
        raise ValueError(f"{text}; leave it out")
    known = _categories(about)
    for name in matches.meanings.values() if len(about.categories) > 1 else ():
        if name not in known:
            text = f"--corrections: {Location(place)} has the label {name!r}"
            raise ValueError(f"{text}; {lookup.suggest(name, about.categories)}")
    log.info("corrections: %s images, %s belong to no image", f"{len(matches.location):,}", f"{len(matches.unused):,}")
    return matches


def replaced(images: Iterable[dict], matches: Matches, about: About) -> Iterator[dict]:
    """The rows; those of corrected images have what was drawn as their segments, and NOTE.

    Of a run with one mask per image, or with a name for each, shapes of a name are one mask; of others each shape is.
    What cannot be read becomes the row's `error`.
    """
    known = _categories(about)
    for row in images:
        place = matches.location.get(row["key"])
        if place is None or row["error"]:
            yield row
            continue
        try:
            segments = _segments(place, about, known, (row["height"], row["width"]))
        except BadImage as error:
            yield row | {"error": str(BadImage(STAGE, error.kind, error.message)), "segments": []}
            continue
        yield row | {"segments": segments, "note": ",".join(filter(None, (row["note"], NOTE)))}


def _segments(place: str, about: About, known: Mapping[str, str], size: tuple[int, int]) -> list[dict]:
    """The masks at a place of `find`, as segments of a row of an image of that size. Raises BadImage."""
    content = corrections.drawn_at(place, max_pixels=Evaluate.max_pixels)
    if tuple(content["size"]) != size:
        (height, width), (h, w) = content["size"], size
        raise BadImage(STAGE, "other_size", f"drawn on {width} x {height} pixels, the image has {w} x {h}")
    found: list[tuple[str, np.ndarray]] = []
    for shape in content["drawn"]:
        name = about.categories[0] if len(about.categories) == 1 else known.get(next(iter(shape["names"]), ""))
        if name is None:
            raise BadImage(STAGE, "other_class", "a shape without a label")
        found.append((name, shapes.mask(shape, size)))
    if _is_united(about):
        names = dict.fromkeys(name for name, _ in found)
        found = [(each, np.any([mask for name, mask in found if name == each], 0)) for each in names]
    bare = (about.parts or (about.category,)) if about.unlabelled and not about.classes else ()
    segments = masks.encode_segments(np.stack([mask for _, mask in found])) if found else []
    for i, (segment, (name, _)) in enumerate(zip(segments, found, strict=True)):
        segment["label"] = None if name in bare else name
        segment["segment"] = about.parts.index(name) if name in about.parts else i
    return segments


def _is_united(about: About) -> bool:
    """Whether what was drawn under one name in an image is one mask."""
    return bool(about.parts) or about.most <= 1


def _categories(about: About) -> dict[str, str]:
    """The category by the names that our exports give to it in a tool."""
    named = zip(about.categories, cvat.label_names(about.categories), strict=True)
    known = {name: category for category, cut in named for name in (cut, labelstudio.name_of(category))}
    return known | {category: category for category in about.categories}
