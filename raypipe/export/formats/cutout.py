"""Cut-outs: one PNG per segment, at the image's size, transparent outside the mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from raypipe import masks
from raypipe.export.about import About
from raypipe.export.target import Target
from raypipe.images import encode_png
from raypipe.inputs.originals import decode

ORIGINALS, CATEGORIES = decode, False


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write KEY.png, or KEY_0.png, KEY_1.png, ... in a run where an image has several segments."""
    for row in images:
        for segment in row["segments"]:
            mask = masks.decode_rle(segment)[..., None]
            picture = np.concatenate([row["picture"] * mask, mask * np.uint8(255)], 2)  # (H, W, 4); 0 compresses best
            suffix = f"_{segment['segment']}.png" if about.most > 1 else ".png"
            target.put(encode_png(picture), target.name(row, suffix))
    return Counter()
