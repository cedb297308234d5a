"""Masks that people corrected in a tool: Label Studio's JSON export, and COCO 1.0 as CVAT exports it.

Every image of a CVAT task counts as looked at, with or without a mask. Of a Label Studio task the newest annotation
that was not cancelled counts; a task without one has no label, and predictions are none.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import posixpath
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import unquote

import numpy as np

from raypipe import storage
from raypipe.inputs import folders, maskfiles, shapes
from raypipe.inputs.items import PICTURES, LeftOut
from raypipe.inputs.maskfiles import Matches
from raypipe.storage import Location, join
from raypipe.types import BadImage

log = logging.getLogger("raypipe")
ENDINGS = (".json", ".zip")
OF_PICTURES = "images"  # folder of tools for the pictures that masks lie on
MOST_BYTES = 1 << 33  # of a file, which people chose themselves, and of one that is packed in it
MARK = '#{"drawn": '  # between a file and what was drawn in one image, as JSON
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before the name of an uploaded file
NUMBERED = re.compile(r"^\d{5}__")  # what our own export for CVAT puts before a name
SEPARATOR = re.compile(r"\s*([],]?)\s*")  # between the elements of a JSON list, or at its end
WANTED = "Label Studio's JSON export (not JSON-MIN), or COCO 1.0 as CVAT exports it"


@dataclass
class Drawn:
    """What people drew in one image."""

    file: str  # where it stands
    name: str  # the image's key, where our own export told the tool, else as the tool names it
    size: list[int] | None  # height and width
    shapes: list[dict] = field(default_factory=list)  # of `shapes.mask`, with their `names`
    first: str | None = None  # the name of shapes that are the image's first mask
    wrong: str = ""  # why it cannot be read
    when: datetime | None = None  # None where a file holds each image once
    is_key: bool = False  # whether `name` is what our own export told the tool


def are_at(place: str) -> bool:
    """Whether a file or a folder is for `match`: JSON or zip files, and no pictures but in a folder `images`."""
    if folders.kind(place) != "folder":
        return Location(place).lower().endswith(ENDINGS)
    found = False
    for name in folders.walk(place, LeftOut()):
        is_picture = posixpath.splitext(name)[1].lower() in PICTURES and OF_PICTURES not in name.split("/")[:-1]
        if is_picture or name == "run.json":  # masks, or a run, of which `maskfiles` says what to do with it
            return False
        found |= _is_one(name)
    return found


def match(place: str, keys: Iterable[str]) -> Matches:
    """What was drawn in which image. place: a file, as it is downloaded, or a folder of several.

    An image is found by its key in our own export's task, or by its file's name: with `__` for `/` as in our export for
    CVAT, without what tools put before it, else as `maskfiles.match` finds mask files. Of images that are one with `__`
    for `/`, as `a/b.jpg` and `a__b.jpg`, none is found by that. Where shapes have several names,
    those are the mask that are named as the first mask was in our export's task, else as the first label in the file.
    Raises ValueError for files of other kinds, and for two that label one image, and FileNotFoundError.
    """
    found: dict[str, Drawn] = {}
    for drawn in _all(place):
        other = found.get(drawn.name)
        if other and not (drawn.when and other.when):
            text = f"{drawn.name!r} is labelled in {Location(other.file)} and in {Location(drawn.file)}"
            raise ValueError(f"{text}; leave one out")
        if other is None or drawn.when > other.when:
            found[drawn.name] = drawn
    if not found:
        text = "no task in it has an annotation; is it what was exported after labelling?"
        raise ValueError(f"{Location(place)}: {text}")
    matched = _matched(found, dict.fromkeys(keys))
    names = sorted({name for each in found.values() for shape in each.shapes for name in shape["names"]})
    firsts = {found[name].first for name in matched.values()} if len(names) > 1 else set()
    if told := firsts & {*names}:
        masks, every = (", ".join(map(repr, each)) for each in (sorted(told), names))
        log.info("labels: the first mask is what is named %s, of %s", masks, every)
    location = {key: _location(found.pop(name), names) for key, name in matched.items()}  # each is in memory once
    return Matches(location, list(found), meanings=dict(enumerate(names, 1)))


def mask(location: str, *, max_pixels: int) -> np.ndarray:
    """The mask at a location of `match`: its shapes together, bool (H, W). Raises BadImage."""
    content = drawn_at(location, max_pixels=max_pixels)
    if content["unknown"]:
        raise BadImage("decode", "other_kind", content["unknown"])
    found = np.zeros(content["size"], bool)
    for shape in content["drawn"]:
        if content["first"] is None or content["first"] in shape["names"]:
            found |= shapes.mask(shape, content["size"])
    return found


def names(location: str) -> list[str]:
    """The first name, or "", of each shape that was drawn at a location of `match`."""
    return [next(iter(shape["names"]), "") for shape in _content(location)["drawn"]]


def drawn_at(location: str, *, max_pixels: int) -> dict:
    """What was drawn at a location of `match`: shapes, `drawn`, of an image's `size`. Raises BadImage."""
    content = _content(location)
    if content["wrong"]:
        raise BadImage("decode", "corrupt", content["wrong"])
    height, width = content["size"]
    if min(height, width) < 1:
        raise BadImage("decode", "corrupt", f"a picture of {width} x {height} pixels")
    if height * width > max_pixels:
        text = f"{width} x {height} pixels, the limit is {max_pixels} (--max-pixels)"
        raise BadImage("decode", "too_large", text)
    return content


def _content(location: str) -> dict:
    return json.loads(MARK[1:] + location.partition(MARK)[2])


def _location(drawn: Drawn, names: list[str]) -> str:
    """Where what was drawn in an image is. names: of all shapes of all images."""
    content = {"drawn": drawn.shapes, "size": drawn.size, "wrong": drawn.wrong, "first": None, "unknown": ""}
    if len(names) > 1 and drawn.shapes:
        content["first"] = drawn.first
        if drawn.first not in names:
            known = f"its first label is {drawn.first!r}" if drawn.first else "nothing tells which one is the mask"
            content["unknown"] = f"shapes are named {', '.join(map(repr, names))}, but {known}"
    return f"{Location(drawn.file).uri}#{json.dumps(content)}"


def _matched(found: Mapping[str, Drawn], keys: Mapping[str, None]) -> dict[str, str]:
    """The name in `found` of each image that has one."""
    of_flat = _by(keys, _flat)
    sure = {key for key in keys if "/" in key or len(of_flat[_flat(key)]) == 1}  # whose name is no other's, made flat
    matched = {key: key for key in keys if key in found and (key in sure or found[key].is_key)}
    for of_key, of_name in FORMS:
        if not (names := found.keys() - matched.values()):
            return matched
        by_key, by_name = _by((key for key in keys if key not in matched), of_key), _by(names, of_name)
        both = ((its, by_name.get(form, ())) for form, its in by_key.items())
        matched |= {its[0]: names[0] for its, names in both if len(its) == len(names) == 1}
    names = {NUMBERED.sub("", name): name for name in found.keys() - matched.values()}
    return matched | maskfiles.paired(names, [key for key in keys if key in sure and key not in matched]).location


def _by(texts: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    by_form = defaultdict(list)
    for text in texts:
        by_form[form(text)].append(text)
    return by_form


def _flat(key: str) -> str:
    return key.replace("/", "__")


def _file(name: str) -> str:
    return NUMBERED.sub("", posixpath.basename(name))


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


FORMS = (  # of an image's key and of a file's name, which our export for CVAT makes of it: `a.webp` is `a.webp.png`
    (_flat, _file),
    (_flat, lambda name: _stem(_file(name))),
    (lambda key: _stem(_flat(key)), lambda name: _stem(_file(name))),
)


def _is_one(name: str) -> bool:
    """Whether a file in a folder can be a tool's export; our own records begin with `_`."""
    return name.lower().endswith(ENDINGS) and not posixpath.basename(name).startswith("_")


def _all(place: str) -> Iterator[Drawn]:
    if folders.kind(place) == "missing":
        raise FileNotFoundError(storage.missing(Location(place)))
    names = [None] if folders.kind(place) == "file" else filter(_is_one, folders.walk(place, LeftOut()))
    for name in names:
        file = Location(place) if name is None else join(place, name)
        try:
            content = storage.read_bytes(file, max_bytes=MOST_BYTES)
            for text in _unpacked(content) if file.lower().endswith(".zip") else (content,):
                yield from _read(text.decode("utf-8-sig"), file.uri)
        except BadImage as error:
            raise ValueError(f"{file}: {error.message}") from None
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            text = f"expected {WANTED}, got {type(error).__name__}: {error}"
            raise ValueError(f"{file}: {text}") from error


def _unpacked(content: bytes) -> Iterator[bytes]:
    """The JSON files in a zip. Raises ValueError for one without any."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            files = [each for each in packed.infolist() if each.filename.lower().endswith(".json")]
            if not files:
                raise ValueError(f"a zip without JSON: {', '.join(packed.namelist()[:3])}")
            for each in files:
                if each.file_size > MOST_BYTES:
                    raise ValueError(f"{each.filename} has {each.file_size:,} bytes, the limit is {MOST_BYTES:,}")
                yield packed.read(each)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"a zip that cannot be read: {error}") from error


def _read(text: str, file: str) -> Iterator[Drawn]:
    if text.lstrip().startswith("["):
        return _of_tasks(_each(text), file)
    content = json.loads(text)
    if isinstance(content, dict) and "images" in content and "annotations" in content:
        return _of_coco(content, file)
    raise ValueError(f"a {type(content).__name__} without images and annotations")


def _each(text: str) -> Iterator:
    """What a JSON list holds, one by one: as numbers, run lengths take three times the memory of their text."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while (separator := SEPARATOR.match(text, at))[1] != "]":
        found, at = decoder.raw_decode(text, separator.end())
        yield found


def _of_coco(content: Mapping, file: str) -> Iterator[Drawn]:
    names = {each["id"]: str(each["name"]) for each in content["categories"]}
    drawn = defaultdict(list)
    for each in content["annotations"]:
        degrees = (each.get("attributes") or {}).get("rotation") or 0  # of CVAT's boxes, about their middle
        parts = each.get("segmentation") or [shapes.rectangle(*each["bbox"], degrees, about=(0.5, 0.5))]
        shape = {"polygons": parts} if isinstance(parts, list) else {"counts": parts["counts"], "size": parts["size"]}
        drawn[each["image_id"]].append(shape | {"names": [names[each["category_id"]]]})
    if drawn.keys() - {image["id"] for image in content["images"]}:
        raise ValueError("annotations of images that it does not have")
    first = next(iter(names.values()), None)
    for image in content["images"]:
        size = [int(image["height"]), int(image["width"])]
        key = image.get("key")
        known = Drawn(file, str(key or image["file_name"]), size, drawn[image["id"]], first, is_key=bool(key))
        if any(list(shape.pop("size", size)) != size for shape in known.shapes):
            known.wrong = "a mask of another size than its image"
        yield known


def _of_tasks(tasks: Iterable[dict], file: str) -> Iterator[Drawn]:
    for task in tasks:
        data, done = task["data"], [each for each in task.get("annotations") or () if not each.get("was_cancelled")]
        if not done:
            continue
        newest = max(done, key=lambda each: (_when(each), each.get("id") or 0))
        category = data.get("category") and str(data["category"])
        key = data.get("key")
        known = Drawn(file, str(key or _picture(data)), None, [], category, when=_when(newest), is_key=bool(key))
        try:
            sizes = {(data["height"], data["width"])} if {"height", "width"} <= {*data} else set()
            _draw(known, newest["result"], sizes)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            known.wrong = f"no regions as Label Studio has them: {type(error).__name__}: {error}"
        yield known


def _draw(known: Drawn, result: list[dict], sizes: set[tuple[int, int]]) -> None:
    """Fill in the shapes and the size of an annotation. sizes: of the picture, where they are known."""
    regions: dict[object, dict] = defaultdict(lambda: {"names": []})
    for i, each in enumerate(result):
        if "original_width" in each:
            sizes.add((each["original_height"], each["original_width"]))
        if each.get("image_rotation"):
            raise ValueError("the picture was turned in the tool")
        value = each.get("value") or {}
        region = regions[each.get("id", i)]  # of several results where shapes and names are tags of their own
        region |= value
        region["names"] += [str(name) for kind, its in value.items() if kind.endswith("labels") for name in its]
    if len(sizes) != 1:
        raise ValueError(
            "pictures of several sizes in one task" if sizes else "nothing drawn, and no size of the picture"
        )
    known.size = [int(side) for side in sizes.pop()]
    known.shapes = [shape for region in regions.values() if (shape := _shape(region, known.size))]


def _shape(region: Mapping, size: list[int]) -> dict | None:
    """A region of Label Studio, in per cent of the image, as a shape; None where it is none."""
    height, width = size
    names = {"names": region["names"]}
    if "rle" in region:
        return {"brush": base64.b64encode(bytes(region["rle"])).decode()} | names
    if "points" in region:
        points = [(x * width / 100, y * height / 100) for x, y in region["points"]]
        return {"polygons": [[side for point in points for side in point]]} | names
    if {"x", "y", "width", "height"} <= region.keys():
        sides = (region[name] / 100 for name in ("x", "y", "width", "height"))
        x, y, wide, high = (side * whole for side, whole in zip(sides, (width, height) * 2, strict=True))
        return {"polygons": [shapes.rectangle(x, y, wide, high, region.get("rotation") or 0)]} | names
    if {"x", "vertices", "imageDataURL"} & region.keys():
        raise ValueError("drawn with another tool than brush, polygon and rectangle")
    return None


def _when(annotation: Mapping) -> datetime:
    when = datetime.fromisoformat(annotation.get("updated_at") or annotation["created_at"])
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _picture(data: Mapping) -> str:
    """The name of a task's picture: the first value that ends like one, without what tools put before it."""
    for value in data.values():
        path = unquote(str(value).partition("?d=")[2] or str(value).partition("?")[0])
        if posixpath.splitext(path)[1].lower() in PICTURES:
            folder, slash, name = path.rpartition("/")
            return UPLOADED.sub("", name) if "upload" in folder.split("/") else folder + slash + name
    raise ValueError(f"a task without a picture: {', '.join(map(str, data))}")
