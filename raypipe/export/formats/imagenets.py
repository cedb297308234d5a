"""ImageNet-S: one RGB picture per image whose values are R + 256 G, as its evaluation and its test server take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from raypipe import images
from raypipe.export.about import About
from raypipe.export.formats.png import label_map
from raypipe.export.target import Target

LISTS = ("imagenet_s50", "imagenet_s300", "imagenet_s919")  # of --classes, one of which has to be there
UNDONE = {6: 8, 8: 6}  # what undoes a turn; the others undo themselves


def turn_of(row: dict, content: bytes) -> int:
    """How the photograph was turned, as a key of `images.UPRIGHT`: the data set's labels are as it is stored."""
    return images.orientation(content)


ORIGINALS, CATEGORIES = turn_of, True


def write(rows: Iterator[dict], target: Target, about: About) -> Counter:
    """Write KEY.png per image, in the folders of the keys: 0 = other, 1, 2, ... = a class, by its wnid in order."""
    remarks = Counter()
    for row in rows:
        back = images.UPRIGHT[UNDONE.get(row["picture"], row["picture"])]
        values = back(label_map(row, about, remarks)).astype(np.uint16)
        picture = np.stack([values & 255, values >> 8, np.zeros_like(values)], -1).astype(np.uint8)
        target.put(images.encode_png(picture), target.name(row, ".png"))
        remarks["pictures are turned back, as the photographs are stored"] += row["picture"] > 1
    return remarks
