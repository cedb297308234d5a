"""Made data sets in each of the layouts that people have, and runs over their photographs."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from raypipe import classes

SIZE = (24, 32)
MASKS = {  # data set -> folders of photographs and of masks
    "duts-tr": [
        ("DUTS/DUTS-TR/DUTS-TR-Image", "DUTS/DUTS-TR/DUTS-TR-Mask"),
        ("DUTS/DUTS-TR-Image", "DUTS/DUTS-TR-Mask"),
        ("DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask"),
    ],
    "duts-te": [
        ("DUTS/DUTS-TE/DUTS-TE-Image", "DUTS/DUTS-TE/DUTS-TE-Mask"),
        ("DUTS/DUTS-TE-Image", "DUTS/DUTS-TE-Mask"),
        ("DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask"),
        ("DUTS_Test/img", "DUTS_Test/gt"),
    ],
    "dut-omron": [
        ("DUT-OMRON/DUT-OMRON-image", "DUT-OMRON/pixelwiseGT-new-PNG"),
        ("DUT-OMRON/DUT-OMRON-image/DUT-OMRON-image", "DUT-OMRON/DUT-OMRON-gt-pixelwise.zip/pixelwiseGT-new-PNG"),
        ("DUTS-OMRON/DUT-OMRON-image", "DUTS-OMRON/pixelwiseGT-new-PNG"),
        ("DUT_OMRON/img", "DUT_OMRON/gt"),
    ],
    "ecssd": [("ECSSD/images", "ECSSD/ground_truth_mask"), ("ECSSD/img", "ECSSD/gt")],
}
BOXES = {
    "voc07": ["VOC2007/VOCdevkit/VOC2007", "VOCdevkit/VOC2007"],
    "voc12": ["VOC2012/VOCdevkit/VOC2012", "VOCdevkit/VOC2012"],
}
ALL = [(name, i) for name, layouts in (MASKS | BOXES).items() for i in range(len(layouts))] + [("coco20k", 0)]


def write_photos(folder: Path, names, size: tuple[int, int] = SIZE, **options) -> None:
    """Photographs of one size, with the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name, "JPEG", **options)


def write_masks(folder: Path, masks: dict[str, np.ndarray]) -> None:
    """Masks of 8 bits by the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        Image.fromarray(mask).save(folder / name, "PNG")


def voc_xml(boxes, size: tuple[int, int] = SIZE) -> str:
    """An annotation of VOC. boxes: half-open, as raypipe has them."""
    objects = "".join(
        f"<object><name>cat</name><difficult>{i % 2}</difficult><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
        f"<xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
        for i, (left, top, right, bottom) in enumerate(boxes)
    )
    height, width = size
    sides = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{sides}{objects}</annotation>"


def write_voc(root: Path, boxes: dict[str, list], *, split: str = "trainval", listed=None) -> None:
    """The photographs, annotations and list of VOC by stem."""
    write_photos(root / "JPEGImages", [f"{stem}.jpg" for stem in boxes])
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for stem, its in boxes.items():
        (root / f"Annotations/{stem}.xml").write_text(voc_xml(its))
    (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"{stem}\n" for stem in listed or boxes))


def write_coco(root: Path, boxes: dict[str, list], *, listed=None) -> None:
    """The photographs, the instances and the list of COCO20k by stem, a crowd in each. boxes: [x, y, width, height]."""
    write_photos(root / "COCO/images/train2014", [f"{stem}.jpg" for stem in boxes])
    images = [
        {"id": i, "file_name": f"{stem}.jpg", "height": SIZE[0], "width": SIZE[1]} for i, stem in enumerate(boxes)
    ]
    annotations = [
        {"id": 0, "image_id": i, "iscrowd": int(j == len(its)), "bbox": box, "segmentation": [[1, 2, 3, 4, 5, 6]]}
        for i, its in enumerate(boxes.values())
        for j, box in enumerate([*its, (0, 0, SIZE[1], SIZE[0])])
    ]
    (root / "COCO/annotations").mkdir(parents=True, exist_ok=True)
    content = json.dumps({"images": images, "annotations": annotations})
    (root / "COCO/annotations/instances_train2014.json").write_text(content)
    lines = "".join(f"train2014/{stem}.jpg\n" for stem in listed or boxes)
    (root / "coco_20k_filenames.txt").write_text(lines)


CLASSES = {  # data set of classes -> the folders of photographs and labels in each of its layouts, and its split's list
    "voc2012": [(f"{root}JPEGImages", f"{root}SegmentationClass") for root in ("VOCdevkit/VOC2012/", "")],
    "pascal_context_59": [
        ("VOCdevkit/VOC2010/JPEGImages", "VOCdevkit/VOC2010/SegmentationClassContext"),
        ("PascalContext/val/images", "PascalContext/segment_anno"),
        ("val/images", "val/segment_anno"),
    ],
    "coco2017": [("coco/val2017", "coco/annotations"), ("images/val2017", "annotations")],
    "coca": [("CoCA/image", "CoCA/binary"), ("image", "binary")],
    "cityscapes_object": [("cityscapes/leftImg8bit/val", "cityscapes/gtFine/val")],
    **{
        f"imagenet_s{n}": [
            (f"ImageNetS{n}/validation", f"ImageNetS{n}/validation-segmentation"),
            ("validation", "validation-segmentation"),
        ]
        for n in (50, 300, 919)
    },
}
LISTS = {"voc2012": "ImageSets/Segmentation/val.txt", "pascal_context_59": "ImageSets/SegmentationContext/val.txt"}


def write_classes(root: Path, name: str, labels: dict[str, np.ndarray], i: int = 0, **options) -> Path:
    """Photographs and labels of a data set of classes in its i-th layout. Returns the photographs' folder.

    labels: int (H, W) by the stem of the photograph's path in its folder: 0 = background, 1, 2, ... = a class, -1 =
    ignored. Of CoCA one class each, the folder's; COCO and Cityscapes ignore nothing.
    """
    photographs, folder = (root / each for each in CLASSES[name][i])
    end = "_leftImg8bit" if name == "cityscapes_object" else ""
    for stem, label in labels.items():
        path = photographs / f"{stem}{end}.{'png' if end else 'jpg'}"
        write_photos(path.parent, [path.name], label.shape, **options)
        if name != "coco2017":
            target = folder / f"{stem}{'_gtFine_labelIds' if end else ''}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            (numbered(label) if "segment_anno" in str(folder) else picture_of(name, label)).save(target)
    if name == "coco2017":
        write_instances(folder / "instances_val2017.json", labels)
    if "segment_anno" in str(folder):
        write_context_names(root / ("PascalContext" if i == 1 else ""), classes.read(name).names)
    elif name in LISTS:
        place = folder.parent / LISTS[name]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(f"{stem}\n" for stem in labels))
    return photographs


def write_context_names(folder: Path, names) -> None:
    """labels.txt and labels_59.txt of PASCAL Context; numbers of `numbered`, among others that are no class."""
    lines = [f"{7 * i}: {name}" for i, name in enumerate(names, 1)]
    (folder / "labels.txt").write_text("\n".join(["1: accordion", *lines, "431: unknown"]) + "\n")
    (folder / "labels_59.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(names, 1)))


def numbered(label: np.ndarray) -> Image.Image:
    """A label as PASCAL Context's whole list of classes has it: 7, 14, ... are the 59, and 1 and 431 are others."""
    other = np.where(np.arange(label.shape[1]) % 2, 1, 431)
    return Image.fromarray(np.where(label > 0, 7 * label, other).astype(np.uint16))


def picture_of(name: str, label: np.ndarray) -> Image.Image:
    """A label as the files of a data set store it."""
    facts = classes.facts(name)
    if name == "coca":
        return Image.fromarray(np.where(label > 0, 255, 0).astype(np.uint8))
    if name == "cityscapes_object":
        return Image.fromarray(np.array([0, *facts["source_ids"]], np.uint8)[label])
    stored = np.where(label < 0, facts["ignore_index"], label)
    if name.startswith("imagenet_s"):
        return Image.fromarray(np.stack([stored % 256, stored // 256, 0 * stored], -1).astype(np.uint8))
    picture = Image.fromarray(stored.astype(np.uint8))
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    return picture


def write_instances(place: Path, labels: dict[str, np.ndarray]) -> None:
    """COCO's annotations whose objects are the classes of label maps; every second one is a crowd."""
    ids, images, annotations = classes.facts("coco2017")["source_ids"], [], []
    for i, (stem, label) in enumerate(labels.items()):
        images.append({"id": i, "file_name": f"{stem}.jpg", "height": label.shape[0], "width": label.shape[1]})
        for number in np.unique(label[label > 0]).tolist():
            mask = label == number
            entry = {"id": len(annotations), "image_id": i, "iscrowd": number % 2, "category_id": ids[number - 1]}
            annotations.append(entry | {"area": int(mask.sum()), "segmentation": outlines(mask, number % 2)})
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"images": images, "annotations": annotations}))


def outlines(mask: np.ndarray, is_crowd: int) -> dict | list:
    """A mask as COCO has it: run lengths of a crowd, as numbers, and else a polygon for each run of pixels in a row."""
    height, width = mask.shape
    if is_crowd:
        pixels = [0, *mask.T.ravel().tolist()]
        starts = [i for i in range(1, len(pixels)) if pixels[i] != pixels[i - 1]]
        return {"size": [height, width], "counts": np.diff([1, *starts, len(pixels)]).tolist()}
    found = []
    for y in range(height):
        edges = np.flatnonzero(np.diff(np.r_[False, mask[y], False])).tolist()
        found += [[x, y, end, y, end, y + 1, x, y + 1] for x, end in zip(edges[::2], edges[1::2], strict=True)]
    return found
