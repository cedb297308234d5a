"""CorLoc: whether the box of an image's mask is that of one of its objects (LOST, BMVC 2021; PASCAL VOC's rule)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.evaluation.sums import Sums
from raypipe.evaluation.task import Task, Value
from raypipe.inputs import folders, maskfiles
from raypipe.inputs.items import PICTURES, LeftOut
from raypipe.masks import decode_rle
from raypipe.storage import Location, join
from raypipe.types import BadImage

CORRECT_ABOVE = 0.5  # IoU; PASCAL VOC's rule, strict
MOST_BYTES = 1 << 33  # of COCO's annotations, which people chose themselves
AT = "#"  # between COCO's file and an image's boxes, which are the rest of its label's place
MIRRORED, UPSIDE_DOWN, ON_ITS_SIDE = (2, 3, 6, 7), (3, 4, 7, 8), (5, 6, 7, 8)  # EXIF orientations (images.UPRIGHT)


class TrueBoxes(NamedTuple):
    """The boxes of an image's objects."""

    boxes: np.ndarray  # float64 (N, 4): left, top, right, bottom in pixels, the latter two exclusive
    size: tuple[int, int] | None  # (height, width) of the image that they are drawn on, where that is known


@dataclass(frozen=True)
class Boxes(Task):
    """Whether the box around an image's first mask has an IoU above 0.5 with that of an object (CorLoc).

    A mask of several components has one box, as `box_rule` says. Labels are PASCAL VOC's XML files, a folder of them,
    or one JSON file of COCO. Difficult and truncated objects count, crowds do not; images without an object are left
    out, and counted.
    """

    # which component of the mask gives its box: that with the largest box, or with the most pixels
    box_rule: Literal["largest_bbox", "largest_area"] = "largest_bbox"

    COLUMNS = (
        ("box", pa.list_(pa.int32(), 4)),  # left, top, right, bottom; null where nothing was found
        ("true_boxes", pa.int32()),  # how many; null for none, and so is all else
        ("box_iou", pa.float64()),  # the largest with a true box; 0 where nothing was found
        ("correct", pa.bool_()),
    )
    SHOWN = {
        "corloc": Value("CorLoc", "% of images", tie="box_iou"),
        "box_iou": Value("IoU of boxes", "with the nearest object"),
    }
    METRIC = "corloc"
    PER_IMAGE = ("box_iou",)
    HOLDS = "boxes"

    def match(self, folder: str, keys: Iterable[str]) -> maskfiles.Matches:
        """folder: of XML files, matched as mask files are, or a JSON file of COCO, which names its images."""
        kind = folders.kind(folder)
        if kind == "missing":
            raise FileNotFoundError(storage.missing(Location(folder)))
        labels = instances(folder) if kind == "file" else box_files(folder)
        return replace(maskfiles.paired(labels, keys), files=())  # of pixels, whose kind is to be recognised

    def read(self, location: str, *, max_bytes: int, max_pixels: int) -> TrueBoxes:
        """The boxes at a location of `match`. Raises BadImage for what is no VOC annotation."""
        _, at, content = location.rpartition(f"{AT}{{")
        if at:
            return of_coco(f"{{{content}")
        return of_voc(storage.read_bytes(location, max_bytes=max_bytes))

    def checksum(self, location: str, *, max_bytes: int) -> str:
        """Of an image in COCO's file, that of its boxes."""
        if f"{AT}{{" in location:
            return hashlib.sha256(location.encode()).hexdigest()
        return super().checksum(location, max_bytes=max_bytes)

    def fits(self, row: dict, label: TrueBoxes) -> bool:
        """Whether the annotation is of an image of this size, or does not say."""
        return label.size in (None, (row["height"], row["width"]))

    def turned(self, label: TrueBoxes, orientation: int) -> TrueBoxes:
        """The boxes on the turned image; as they are where its size is not known."""
        if label.size is None:
            return label
        boxes, (height, width) = label.boxes, label.size
        if orientation in ON_ITS_SIDE:
            boxes, (height, width) = boxes[:, [1, 0, 3, 2]], (width, height)
        if orientation in MIRRORED:
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        if orientation in UPSIDE_DOWN:
            boxes = np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], 1)
        return TrueBoxes(boxes, (height, width))

    def measure(self, row: dict, label: TrueBoxes) -> dict:
        """COLUMNS of one image; nothing without a true box."""
        if not len(label.boxes):
            return {}
        found = box_of(decode_rle(row["segments"][0]), rule=self.box_rule) if row["segments"] else None
        best = 0.0 if found is None else float(ious(np.array(found, float), label.boxes).max())
        counts = {"true_boxes": len(label.boxes), "box_iou": best, "correct": best > CORRECT_ABOVE}
        return counts | {"box": None if found is None else list(found)}

    def summary(self, sums: Sums) -> dict[str, float | None]:
        """The share of correct images, in percent as papers print it, and the mean IoU."""
        share = sums.mean("correct")
        return {"corloc": None if share is None else 100 * share, "box_iou": sums.mean("box_iou")}

    def counted(self, row: dict, measured: dict, value: str) -> np.ndarray:
        """The predicted box, filled."""
        found = measured.get("box")
        return filled([found] if found else [], (row["height"], row["width"]))

    def outline(self, row: dict, label: TrueBoxes) -> np.ndarray:
        """The true boxes, filled."""
        return filled(np.rint(label.boxes).astype(int), (row["height"], row["width"])).any(0)


def box_of(mask: np.ndarray, *, rule: str = "largest_bbox") -> tuple[int, int, int, int] | None:
    """The box of one component of a mask: left, top, right, bottom, the latter two exclusive; None of an empty mask.

    mask: bool (H, W). Components touch at edges, not at corners. rule: the one with the largest box (Two Tricks,
    supplement), or `largest_area`: with the most pixels (FOUND). Of equals the first in reading order.
    """
    import cv2

    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    stats = stats[1:]  # 0 is the ground; a row: left, top, width, height, pixels
    if not len(stats):
        return None
    sizes = stats[:, cv2.CC_STAT_AREA] if rule == "largest_area" else stats[:, 2].astype(np.int64) * stats[:, 3]
    left, top, width, height = (int(side) for side in stats[sizes.argmax(), :4])
    return left, top, left + width, top + height


def ious(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of a box (4,) with others (N, 4), whose sides are differences without a pixel more. Returns float64 (N,)."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    both = (high - low).clip(0).prod(1)
    either = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both
    return both / either


def filled(boxes: Iterable, size: tuple[int, int]) -> np.ndarray:
    """Boxes of whole pixels as masks: bool (N, H, W)."""
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    return masks


def box_files(folder: str) -> dict[str, Location]:
    """Where the files of a folder are that may hold boxes, by name: all but pictures; of one stem XML alone."""
    names = [name for name in folders.walk(folder, LeftOut()) if _ending(name) not in PICTURES]
    annotated = {name[: -len(".xml")] for name in names if _ending(name) == ".xml"}
    names = [name for name in names if _ending(name) == ".xml" or name[: -len(_ending(name))] not in annotated]
    return {name: join(folder, name) for name in names}


def of_voc(content: bytes) -> TrueBoxes:
    """The boxes of a VOC annotation, in which the first pixel is 1 and the last one belongs to the box.

    Raises BadImage for what is none, and for a document type: entities of strangers may take all memory.
    """
    from xml.etree.ElementTree import TreeBuilder
    from xml.parsers import expat

    def refuse(*_):
        raise BadImage("decode", "unsupported", "an annotation with a document type, which may hold anything")

    tree, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = tree.start, tree.end, tree.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
        root = tree.close()
        corners = [
            [float(each.find("bndbox").findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax")]
            for each in root.findall("object")
        ]
        size = tuple(int(float(root.findtext(f"size/{name}", "0"))) for name in ("height", "width"))
    except (expat.ExpatError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadImage("decode", "corrupt", f"no annotation as PASCAL VOC writes it: {error}") from error
    if root.tag != "annotation":
        raise BadImage("decode", "corrupt", f"no annotation as PASCAL VOC writes it: <{root.tag[:40]}>")
    return _checked(np.array(corners, float).reshape(-1, 4) - [1, 1, 0, 0], size if all(size) else None)


def of_coco(content: str) -> TrueBoxes:
    """The boxes of an image as `instances` gives them, rounded half to even (LOST). Raises BadImage for other ones."""
    try:
        image = json.loads(content)
        sides = np.array(image["boxes"], float).reshape(len(image["boxes"]), 4)
        size = (int(image["height"] or 0), int(image["width"] or 0))
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise BadImage("decode", "corrupt", f"no boxes as COCO has them: {error}") from error
    boxes = np.rint(np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], 1))
    return _checked(boxes, size if all(size) else None)


def instances(location: str) -> dict[str, str]:
    """The labels of the images in COCO's annotations by file name: the file's place, and behind AT the boxes as JSON.

    So the file is parsed once, and whoever reads an image's label has it. Crowds are left out. Raises ValueError for
    what is no such file, and FileNotFoundError.
    """
    place = Location(location)

    def without_outline(found: dict) -> dict:  # nine tenths of the memory
        found.pop("segmentation", None)
        return found

    try:
        content = json.loads(storage.read_bytes(place, max_bytes=MOST_BYTES), object_hook=without_outline)
        images = {each["id"]: each | {"boxes": []} for each in content["images"]}
        for each in content["annotations"]:
            if each["image_id"] in images and not each.get("iscrowd"):
                images[each["image_id"]]["boxes"].append(each.get("bbox"))
        sides = ("height", "width", "boxes")
        kept = {str(each["file_name"]): {name: each.get(name) for name in sides} for each in images.values()}
    except BadImage as error:
        raise (FileNotFoundError if error.kind == "missing" else ValueError)(error.message) from None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        text = "expected COCO's instances as JSON, with images and annotations"
        raise ValueError(f"{place}: {text}, got {type(error).__name__}: {error}") from error
    return {name: f"{place.uri}{AT}{json.dumps(image)}" for name, image in kept.items()}


def _checked(boxes: np.ndarray, size: tuple[int, int] | None) -> TrueBoxes:
    """Raises BadImage for boxes that end before they begin. One without area, after rounding, meets nothing."""
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise BadImage("decode", "corrupt", "a box that ends before it begins")
    return TrueBoxes(boxes, size)


def _ending(name: str) -> str:
    return "." + name.rpartition(".")[2].lower() if "." in name else ""


TASK = Boxes
