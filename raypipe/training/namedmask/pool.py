"""What NamedMask learns from: the images of an archive with their masks, once for each category that they stand for.

Masks are those of a run of any method, joined by the images' ids, or files of the authors of NamedMask, by their paths.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from raypipe import classes, masks, schema, storage
from raypipe.inputs import archives, folders
from raypipe.inputs.maskfiles import paired
from raypipe.lookup import one_line
from raypipe.run import Run, rows
from raypipe.runtime.progress import count_of, count_of_images
from raypipe.storage import map_ahead
from raypipe.types import BadImage

if TYPE_CHECKING:
    from raypipe.training.namedmask import NamedMask

log = logging.getLogger("raypipe")

ADDED = pa.schema(  # of each pair of category and image
    [
        ("category", pa.string()),
        ("label", pa.int32()),
        ("size", pa.list_(pa.int32(), 2)),  # height and width of the mask
        ("mask", pa.string()),  # COCO's counts
        ("sha256", pa.string()),  # of the labelled file; null where nobody knows
    ]
)
LEAVES = ("size", "counts", "label")  # of a segment, read
MOST_BYTES = 1 << 24  # of a mask file
READ_AHEAD = 16  # mask files at the same time
EMPTY, ABSENT, FAILED = "with an empty mask", "without a mask", "that failed in the run"


class Mask(NamedTuple):
    """What a run or a file says of an image."""

    segments: list[dict]  # `size`, `counts` and `label` of each
    sha256: str | None
    why: str  # there is none; "" where there is


def read(recipe: NamedMask) -> pa.Table:
    """Rows of schema.MANIFEST and ADDED: an archive's images with their masks, by category; `key` tells both.

    What is left out is counted in the log. Raises ValueError for categories that `classes` does not have, masks of
    other images, and where nothing is left; FileNotFoundError for an archive or masks that are not there.
    """
    archive = archives.read(recipe.archive, image_root=recipe.image_root)
    labels = bound(archive, recipe)
    members = archive.members.select(["category", "image_id"]).to_pylist()
    members = [each | {"label": labels[each["category"]]} for each in members if each["category"] in labels]
    images = {row["image_id"]: row for row in archive.images.to_pylist()}
    wanted = {each["image_id"]: images[each["image_id"]] for each in members}
    known, left_out, found = masks_of(recipe, wanted), Counter(), []
    numbers = recipe.known.numbers if names_categories(known.values(), recipe.known.numbers) else {}
    for each in members:
        mask, least = known.get(each["image_id"]), recipe.min_object_fraction
        chosen, why = (None, ABSENT) if mask is None else chosen_of(mask, each["category"], numbers, least)
        if why:
            left_out[why] += 1
            continue
        key = f"{each['category']}/{wanted[each['image_id']]['key']}"
        its = {"key": key, "size": chosen["size"], "mask": chosen["counts"], "sha256": mask.sha256 or None}
        found.append(wanted[each["image_id"]] | each | its)
    _tell(recipe, members, found, left_out)
    return pa.Table.from_pylist(found, schema=pa.schema([*schema.MANIFEST, *ADDED]))


def bound(archive: archives.Archive, recipe: NamedMask) -> dict[str, int]:
    """The label of each category of an archive that is trained on, by its name there.

    Bound by name: the order of an archive that is a file means nothing. Raises ValueError for names that are none of
    the recipe's `classes`.
    """
    known, wanted, found = recipe.known, recipe.labels, {}
    for category in archive.classes.names:
        number = known.numbers.get(classes.normalised(category))
        if number is None:
            every = f"{len(known.names):,}"
            text = f"{archive.place} has the category {category!r}, which is none of the {every} of classes"
            raise ValueError(f"{recipe.name}: {text}; labels are bound by name: give those of the archive")
        if (name := classes.normalised(known.names[number - 1])) in wanted:
            found[category] = wanted[name]
    return found


def masks_of(recipe: NamedMask, wanted: dict[str, dict]) -> dict[str, Mask]:
    """The masks of images by their ids. wanted: rows of schema.MANIFEST by id. Raises ValueError where none has one."""
    run = Run(recipe.masks)
    is_run = folders.kind(recipe.masks) == "folder" and run.folder.read("run.json") is not None
    known = dict(_of_run(run, wanted) if is_run else _of_files(recipe.masks, wanted))
    if not known:
        what = "of its images" if is_run else "of its files"
        text = f"--masks {recipe.masks} has none of the {count_of_images(len(wanted))} of {recipe.archive}"
        raise ValueError(f"{recipe.name}: {text}, by the {'ids' if is_run else 'names'} {what}; label --input ARCHIVE")
    return known


def _of_run(run: Run, wanted: dict[str, dict]) -> Iterator[tuple[str, Mask]]:
    for batch in rows.batches(run, leaves=LEAVES):
        for row in batch.to_pylist():
            if row["image_id"] in wanted:
                yield row["image_id"], Mask(row["segments"] or [], row["sha256"], FAILED if row["error"] else "")


def _of_files(place: str, wanted: dict[str, dict]) -> Iterator[tuple[str, Mask]]:
    """Of the authors' folders of one JSON file per image, in folders as the images are: {size, counts} of COCO."""
    if folders.kind(place) != "folder":
        raise FileNotFoundError(storage.missing(place))
    names = [name for name in folders.walk(place, Counter()) if name.lower().endswith(".json")]
    by_key = {row["key"]: image_id for image_id, row in wanted.items()}
    matched = paired({name: storage.join(place, name) for name in names}, by_key).location

    def read(pair: tuple[str, str]) -> tuple[str, Mask]:
        key, location = pair
        return by_key[key], Mask([_rle(location)], None, "")

    return map_ahead(read, matched.items(), depth=READ_AHEAD)


def _rle(location: str) -> dict:
    """The mask in a file, as a segment of a run. Raises ValueError for anything else."""
    try:
        found = json.loads(storage.read_bytes(location, max_bytes=MOST_BYTES))
        height, width = found["size"]
        return {"size": [int(height), int(width)], "counts": str(found["counts"]), "label": None}
    except (BadImage, ValueError, KeyError, TypeError) as error:
        text = f"{location}: expected a mask as COCO's {{size, counts}}, got {one_line(error)}"
        raise ValueError(f"namedmask: {text}") from error


def names_categories(known: Iterable[Mask], numbers: Mapping[str, int]) -> bool:
    """Whether masks say which categories they show. numbers: of these, as `Classes.numbers`."""
    labels = {each["label"] for mask in known for each in mask.segments if each["label"]}
    return not numbers.keys().isdisjoint(map(classes.normalised, labels))


def chosen_of(mask: Mask, category: str, numbers: Mapping[str, int], least: float) -> tuple[dict | None, str]:
    """The segment that shows a category, and why there is none.

    numbers: of categories, where the masks of any image say which they show; {} where none does, and the first of an
    image is its object. least: the share of the image that a mask must be larger than.
    """
    if mask.why or not mask.segments:
        return None, mask.why or ABSENT
    segment = mask.segments[0]
    if numbers:
        named = {numbers.get(classes.normalised(each["label"] or "")): each for each in mask.segments}
        segment = named.get(numbers[classes.normalised(category)])
    if segment is None:
        return None, "whose masks are of other categories"
    height, width = segment["size"]
    return (None, EMPTY) if _area(segment) <= least * height * width else (segment, "")


def _area(segment: dict) -> int:
    from pycocotools import mask as coco

    return int(coco.area({"size": list(segment["size"]), "counts": segment["counts"].encode("ascii")}))


def _tell(recipe: NamedMask, members: list[dict], found: list[dict], left_out: Counter) -> None:
    """Log what is left out and shared. Raises ValueError where nothing is left."""
    reasons = ", ".join(f"{count:,} {why}" for why, count in sorted(left_out.items()))
    if not found:
        raise ValueError(
            f"{recipe.name}: no image of {recipe.archive} is left to learn from: {reasons or 'it is empty'}"
        )
    if left_out:
        log.warning("%s: %s left out: %s", recipe.name, count_of(left_out.total(), "image"), reasons)
    with_some = {each["label"] for each in found}
    if empty := sorted({name for name, label in recipe.labels.items() if label not in with_some}):
        log.warning("%s: %s without any image: %s", recipe.name, count_of(len(empty), "class"), ", ".join(empty))
    distinct = len({each["image_id"] for each in members})
    if (shared := len(members) - distinct) and len(members):
        log.info(
            "%s: %.1f %% of the pool are images of more than one category", recipe.name, 100 * shared / len(members)
        )


def mask_of(row: dict, shape: tuple[int, int]) -> np.ndarray:
    """The mask of a row, bool (H, W). shape: the image's. Raises BadImage for a mask of another size."""
    if tuple(row["size"]) != tuple(shape):
        text = "its mask has {} x {} px, the image {} x {}: was it labelled at this size?".format(*row["size"], *shape)
        raise BadImage("mask", "size", text)
    try:
        return masks.decode_rle({"size": row["size"], "counts": row["mask"]})
    except masks.DamagedMask as error:
        raise BadImage("mask", "damaged", str(error)) from error
