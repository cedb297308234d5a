"""Made data sets in each of the layouts that people have, and runs over their photographs."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

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
