"""Label maps of classes: how files store them; as numbers 0 = background, 1, 2, ... = a class, -1 = ignored."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice

import numpy as np

from raypipe import classes, lookup, storage
from raypipe.classes import Classes
from raypipe.inputs import corrections, folders, maskfiles, maskkinds, shapes
from raypipe.inputs.items import PICTURES, LeftOut
from raypipe.inputs.maskfiles import Matches
from raypipe.inputs.maskkinds import HALF, Stored, stored
from raypipe.storage import Location, join
from raypipe.types import BadImage

IGNORED = -1
FORMS = {  # how a file stores a pixel's class
    "indices": "numbers of a palette, or grey levels: the class's number",
    "packed": "RGB, R + 256 G: the class's number",  # ImageNet-S
    "ids": "grey levels: the data set's own number of the class; all others are background",  # Cityscapes, Context
}
# A label that is no one file has a place and, behind one of these marks, what belongs to it as JSON.
MASKS = '#{"masks": '  # a mask file for each of its classes, by the class's number
INSTANCES = '#{"instances": '  # COCO's entries of its objects, and the size of their image
LOOKED_AT = 3  # files of each folder of a class, to tell masks from label maps
MOST_BYTES = 1 << 33  # of COCO's annotations, which people chose themselves


def ignored_value(known: Classes) -> int:
    """The stored value of pixels that do not count. A number that a class has is never it."""
    if known.source:
        return classes.facts(known.source)["ignore_index"]
    return 255 if len(known.categories) < 255 else 65535


def read(
    location: str, known: Classes, *, form: str | Mapping[int, int] = "indices", max_bytes: int, max_pixels: int
) -> np.ndarray:
    """The label at a location: int32 (H, W), upright as its own EXIF says.

    form: of FORMS, where it is a file, or the classes' numbers by what stands for them; all else is then background.

    Raises BadImage for one that cannot be read, is stored in another way, or has a value that is no class.
    """
    limits = {"max_bytes": max_bytes, "max_pixels": max_pixels}
    if MASKS in location:
        return _painted(_apart(location, MASKS)["masks"], limits)
    if INSTANCES in location:
        return _of_instances(_apart(location, INSTANCES), known, max_pixels)
    if corrections.MARK in location:
        return _of_shapes(corrections.drawn_at(location, max_pixels=max_pixels), known)
    file = stored(storage.read_bytes(location, max_bytes=max_bytes), max_pixels=max_pixels)
    return numbers(file, known, form=form)


def numbers(file: Stored, known: Classes, *, form: str | Mapping[int, int] = "indices") -> np.ndarray:
    """The class of each pixel of a file: int32 (H, W). form: as in `read`. Raises BadImage."""
    values = maskkinds.numbers(
        file, of_colours=form == "packed", expected=FORMS[form if isinstance(form, str) else "ids"]
    )
    if form == "packed":
        return _checked((values >> 16) + (values >> 8 & 255) * 256, known)
    if form == "ids":
        form = {id_: number for number, id_ in enumerate(own_ids(known), 1)}
    if isinstance(form, Mapping):
        ids = np.array(sorted(form))
        place = np.searchsorted(ids, values).clip(max=len(ids) - 1)
        return np.where(ids[place] == values, np.array([form[id_] for id_ in ids.tolist()])[place], 0).astype(np.int32)
    return _checked(values, known)


def own_ids(known: Classes) -> list[int]:
    """The data set's own numbers of its classes, ascending, in their order."""
    return classes.facts(known.source)["source_ids"]


def match(folder: str, keys: Iterable[str], known: Classes) -> Matches:
    """Which label of one's own belongs to which image: label maps, or masks in a folder per class, by its name.

    In folders of classes files are masks where their values are no numbers of classes. Raises ValueError for a folder
    without labels, or an export whose numbers are those of other classes, and FileNotFoundError. What people drew in a
    tool (`corrections`) is named by its labels there.
    """
    keys, number = list(keys), known.numbers
    if corrections.are_at(folder):
        matches = corrections.match(folder, keys)
        if unknown := [name for name in matches.meanings.values() if classes.normalised(name) not in number]:
            raise ValueError(
                f"{Location(folder)} has the label {unknown[0]!r}; {lookup.suggest(unknown[0], known.names)}"
            )
        return matches
    found, stray = _by_class(folder, number)
    if found and _are_masks(folder, found, len(known.categories)):
        if stray is not None:
            text = f"{Location(folder)} has masks in a folder per class, but {stray!r} is in none of them"
            raise ValueError(f"{text}; name its class in --classes, or move it elsewhere")
        return _of_masks(folder, found, keys)
    matches = maskfiles.match(folder, keys)
    for value, name in matches.meanings.items():
        if value and number.get(classes.normalised(name)) != value:
            text = f"{Location(folder)} is an export in which {value} is {name!r}, which is another one in the classes"
            raise ValueError(f"{text}; make it anew with --classes")
    return replace(matches, files=())  # of label maps, which have no kind to be recognised


def of_class_folders(place: Location, name: str) -> dict[str, str]:
    """Where the label of each mask file of CoCA is, by the file's relative path; its folder is the class's name.

    name: of the data set's class list. Raises ValueError for a folder of another name.
    """
    number = classes.read(name).numbers
    files = (each for each in folders.walk(place, LeftOut()) if posixpath.splitext(each)[1].lower() in PICTURES)
    found = {}
    for file in files:
        folder = posixpath.basename(posixpath.dirname(file))
        if classes.normalised(folder) not in number:
            raise ValueError(f"{join(place, file)}: its folder is none of the classes of {name}")
        found[file] = _joined(place, {"masks": {number[classes.normalised(folder)]: join(place, file).uri}})
    return found


def instances(place: Location) -> dict[str, str]:
    """Where the label of each image of COCO's annotations is, by file name. Raises ValueError, FileNotFoundError."""
    try:
        content = json.loads(storage.read_bytes(place, max_bytes=MOST_BYTES))
        found = {image["id"]: (image, []) for image in content["images"]}
        for each in content["annotations"]:
            kept = {name: each.get(name) for name in ("category_id", "area", "segmentation")}
            if each["image_id"] in found:
                found[each["image_id"]][1].append(kept)
        sized = {str(image["file_name"]): ((image["height"], image["width"]), its) for image, its in found.values()}
    except BadImage as error:
        raise (FileNotFoundError if error.kind == "missing" else ValueError)(error.message) from None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        text = "expected COCO's instances as JSON, with images and annotations"
        raise ValueError(f"{place}: {text}, got {type(error).__name__}: {error}") from error
    return {name: _joined(place, {"instances": its, "size": size}) for name, (size, its) in sized.items()}


def file_of(location: str) -> str | None:
    """The file in which a label's own EXIF is; None where it is in none."""
    if MASKS in location:
        return next(iter(_apart(location, MASKS)["masks"].values()))
    return None if INSTANCES in location else location


def contents(location: str, *, max_bytes: int) -> bytes:
    """What changes when a label does. Raises BadImage where it cannot be read."""
    files = _apart(location, MASKS)["masks"].values() if MASKS in location else [location]
    if INSTANCES in location or corrections.MARK in location:
        return location.encode()
    return b"".join(storage.read_bytes(file, max_bytes=max_bytes) for file in files)


def _checked(values: np.ndarray, known: Classes) -> np.ndarray:
    """Stored numbers with what is ignored as IGNORED. Raises BadImage for one that is neither it nor a class."""
    ignored, most = values == ignored_value(known), len(known.categories)
    if (wrong := ~ignored & ((values < 0) | (values > most))).any():
        row, column = np.unravel_index(wrong.argmax(), wrong.shape)
        text = f"the value {values[row, column]} at row {row}, column {column} is no class: they are 0 to {most}"
        raise BadImage("decode", "other_class", f"{text}, and {ignored_value(known)} for what is ignored")
    return np.where(ignored, np.int32(IGNORED), values.astype(np.int32))


def _painted(files: Mapping[str, str], limits: Mapping[str, int]) -> np.ndarray:
    """Masks of classes as one label map; where they overlap the smaller one lies on top."""
    masks = [(int(number), maskfiles.read(file, **limits)) for number, file in files.items()]
    if len({mask.shape for _, mask in masks}) > 1:
        raise BadImage("decode", "other_size", "the masks of an image's classes have several sizes")
    return painted(sorted(masks, key=lambda each: -np.count_nonzero(each[1])), masks[0][1].shape)


def painted(masks: Iterable[tuple[int, np.ndarray]], size: tuple[int, int]) -> np.ndarray:
    """Masks as one label map int32 (H, W), the last one on top. masks: number of the class and bool (H, W)."""
    found = np.zeros(size, np.int32)
    for number, mask in masks:
        found[mask] = number
    return found


def _of_shapes(content: Mapping, known: Classes) -> np.ndarray:
    """What people drew in an image as one label map; where shapes overlap the smaller one lies on top."""
    drawn = [(each["names"], shapes.mask(each, content["size"])) for each in content["drawn"]]
    if any(len(names) != 1 for names, _ in drawn):
        raise BadImage("decode", "other_class", "a shape without a label, or with several")
    masks = [(known.numbers[classes.normalised(names[0])], mask) for names, mask in drawn]
    return painted(sorted(masks, key=lambda each: -np.count_nonzero(each[1])), content["size"])


def _of_instances(content: Mapping, known: Classes, max_pixels: int) -> np.ndarray:
    """COCO's objects of an image, crowds too, as one label map: the larger ones are painted first. Raises BadImage."""
    from pycocotools import mask as coco

    number = {id_: i for i, id_ in enumerate(own_ids(known), 1)}
    try:
        height, width = content["size"]
        if height * width > max_pixels:
            raise BadImage(
                "decode", "too_large", f"{width} x {height} pixels, the limit is {max_pixels} (--max-pixels)"
            )
        masks = []
        for each in sorted(content["instances"], key=lambda each: -each["area"]):
            rle = each["segmentation"]  # polygons, run lengths as numbers or the text that COCO makes of them
            if isinstance(rle, list) or isinstance(rle["counts"], list):
                rle = coco.frPyObjects(rle, height, width)
            masks.append((number[each["category_id"]], coco.merge(rle) if isinstance(rle, list) else rle))
        return painted(((number, coco.decode(rle).astype(bool)) for number, rle in masks), (height, width))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        text = f"no objects as COCO has them: {type(error).__name__}: {error}"
        raise BadImage("decode", "corrupt", text) from error


def _by_class(folder: str, number: Mapping[str, int]) -> tuple[dict[int, dict[str, Location]], str | None]:
    """The files of each folder that has a class's name, by the class's number; and one that lies elsewhere."""
    found, stray = {}, None
    for name in folders.walk(folder, LeftOut()) if folders.kind(folder) == "folder" else ():
        if posixpath.splitext(name)[1].lower() in PICTURES:
            top, slash, _ = name.partition("/")
            if slash and classes.normalised(top) in number:
                found.setdefault(number[classes.normalised(top)], {})[name] = join(folder, name)
            else:
                stray = stray or name
    return found, stray


def _are_masks(folder: str, found: Mapping[int, Mapping[str, Location]], most: int) -> bool:
    """Whether files in folders of classes are masks, by some of each: their values are no numbers of classes, or white.

    most: the number of classes. Raises ValueError for masks of 0 and 1, which look like label maps of one class.
    """
    values, is_light = set(), False
    for file in (file for its in found.values() for file in islice(its.values(), LOOKED_AT)):
        try:
            picture = stored(storage.read_bytes(file, max_bytes=MOST_BYTES), max_pixels=MOST_BYTES)
        except BadImage:
            continue  # listed by whoever reads it
        values.update(np.unique(picture.values).tolist())
        is_light |= bool(picture.brightest().max() >= HALF)
    values.discard(0)
    if values == {1} and len(found) > 1:
        text = f"{Location(folder)} has masks of 0 and 1 in a folder per class, or label maps of one class only"
        raise ValueError(f"{text}; save masks as 0 and 255, or label maps elsewhere")
    return is_light and (values == {255} or not any(1 <= value <= most for value in values))


def _of_masks(folder: str, found: Mapping[int, Mapping[str, Location]], keys: list[str]) -> Matches:
    files: dict[str, dict[int, str]] = {}
    unused = []
    for number, its in found.items():
        matches = maskfiles.paired(its, keys)
        unused += matches.unused
        for key, place in matches.location.items():
            files.setdefault(key, {})[number] = Location(place).uri
    return Matches({key: _joined(Location(folder), {"masks": its}) for key, its in files.items()}, unused)


def _joined(place: Location, content: Mapping) -> str:
    """A place with what belongs to it, of which a mark has the first name."""
    return f"{place.uri}#{json.dumps(content)}"


def _apart(location: str, mark: str) -> dict:
    """What belongs to a place. mark: MASKS or INSTANCES."""
    return json.loads(mark[1:] + location.partition(mark)[2])
