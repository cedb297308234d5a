"""PNG label maps: one picture per image, whose values are categories or segments, in colours to look at."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

from raypipe import masks
from raypipe.export.about import About, csv_line
from raypipe.export.target import Target
from raypipe.images import encode_png

ORIGINALS, CATEGORIES = None, True
IGNORE = 255  # by custom the value of pixels that do not count; never a segment
# The palette of PASCAL VOC, by which many tools show label maps: the bits of a value, lowest first, are in turn the
# highest bits of red, green and blue.
PALETTE = [
    sum((value >> (3 * i + channel) & 1) << (7 - i) for i in range(3)) for value in range(256) for channel in range(3)
]
OVERLAP = "images have overlapping masks: the smaller one lies on top"


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write KEY.png per image, in the folders of the keys, and `values.csv` with the meaning of the values.

    With a palette, so that people see something: who reads the values (Pillow, mode P) gets 0, 1, 2. Grey where they
    need 16 bits.
    """
    remarks = Counter()
    for row in images:
        values = label_map(row, about, remarks)
        target.put(_with_palette(values) if values.dtype == np.uint8 else encode_png(values), target.name(row, ".png"))
    lines = [("value", "name"), (0, "background")]
    lines += [(value_of(number, about), name) for number, name in enumerate(value_names(about), 1)]
    target.put(b"".join(map(csv_line, lines)), "values.csv")
    return remarks


def label_map(row: dict, about: About, remarks: Counter) -> np.ndarray:
    """A row's masks as (H, W) uint8, or uint16 if the run needs values above 254. Adds to the remarks.

    0 is background. The value is the number of the category; where nothing but their index tells the segments of an
    image apart (SAM's library), that of the segment: its index + 1. 255 is left out, but for --classes. Where masks of
    different values overlap, the smaller mask lies on top.
    """
    values = np.zeros((row["height"], row["width"]), np.uint16 if len(value_names(about)) >= IGNORE else np.uint8)
    is_hidden = False
    for segment in sorted(row["segments"], key=lambda segment: (-segment["area"], segment["segment"])):
        mask = masks.decode_rle(segment)
        value = value_of(segment["segment"] + 1 if about.instances else about.number(segment), about)
        is_hidden |= bool((mask & (values != 0) & (values != value)).any())
        values[mask] = value
    remarks[OVERLAP] += is_hidden
    return values


def value_names(about: About) -> list[str]:
    """What the values 1, 2, ... stand for (255 is skipped). Raises ValueError for more than 16 bits can hold."""
    found = [f"segment {i}" for i in range(about.most)] if about.instances else about.categories
    if len(found) > 65534:
        raise ValueError(f"a PNG label map holds 65,534 values, the run needs {len(found):,}; choose --format coco")
    return found


def _with_palette(values: np.ndarray) -> bytes:
    """A label map, uint8 (H, W), as PNG of mode P."""
    picture = Image.fromarray(values)
    picture.putpalette(PALETTE)
    picture.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def value_of(number: int, about: About) -> int:
    """What stands for a number in a label map."""
    return number if number < IGNORE or about.classes else number + 1
