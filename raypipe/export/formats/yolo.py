"""YOLO segmentation: images/, labels/ with polygons between 0 and 1, data.yaml."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator

import numpy as np

from raypipe import masks
from raypipe.export.about import About
from raypipe.export.target import Target
from raypipe.inputs.originals import portable

ORIGINALS, CATEGORIES = portable, True
POINTS = 3  # a line with fewer is read as a box


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write images/KEY.jpg or .png, its `label_path` with a line per connected part of a mask, and data.yaml."""
    import yaml

    remarks = Counter()
    for row in images:
        content, suffix = row["picture"]
        image = target.name(row, suffix, folder="images", twin=label_path)
        target.put(content, image)
        lines = []
        for segment in row["segments"]:
            parts, holes = polygons(masks.decode_rle(segment))
            for points in parts:
                values = " ".join(f"{value:.6f}" for value in points.ravel())
                lines.append(f"{about.number(segment) - 1} {values}\n")
            remarks["masks have holes, which polygons fill"] += holes > 0
            remarks["masks have several parts: each is a line of its own"] += len(parts) > 1
        target.put("".join(lines).encode(), label_path(image))
    data = {"train": "images", "val": "images", "names": dict(enumerate(about.categories))}
    target.put(yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode(), "data.yaml")
    return remarks


def label_path(image: str) -> str:
    """Where Ultralytics looks for the labels of a picture: the last folder `images` of its path becomes `labels`."""
    above, _, name = f"/{image}".rpartition("/images/")
    return posixpath.splitext(f"{above}/labels/{name}"[1:])[0] + ".txt"


def polygons(mask: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Outlines of the 8-connected parts of a mask, and the number of holes, which are not in them.

    mask: bool (H, W). Each outline is float64 (P, 2), P >= 3: (x, y) of border pixels' centres in [0, 1] of width and
    height. Filling the polygon with its border gives the part with its holes filled.
    """
    import cv2

    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not len(contours):
        return [], 0
    is_hole = hierarchy[0, :, 3] >= 0
    size = np.array(mask.shape[::-1], np.float64)
    outer = [contour[:, 0] for contour, hole in zip(contours, is_hole, strict=True) if not hole]
    outer = [np.pad(points, ((0, max(0, POINTS - len(points))), (0, 0)), "edge") for points in outer]
    return [(points + 0.5) / size for points in outer], int(is_hole.sum())
