"""A run whose keys, names and masks are the worst that an export gets, and what its formats have to hold of it."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from support.written import masks_row, random_masks, write_run

KEYS = ("a/x.jpg", "b/x.jpg", "b/x.png", "sub/ünï 'code' & <b>.png", "../../escape.png", "=cmd|' /C calc'!A0.png")
NAMES = ('the "left" <b>cat</b> & its\n shadow, at dusk', "=1+1", "ünï, 猫", "a" * 80, "a" * 80 + "b", "  ")
EMPTY_KEY, BROKEN = "nothing here.png", "broken.png"


def write_worst(folder: Path) -> dict[str, tuple[np.ndarray, list[str], list[float]]]:
    """Write `folder/run` over pictures in `folder/in`: keys -> masks (N, H, W), labels and scores.

    Each image of KEYS has two masks that overlap and have holes, and one without pixels; EMPTY_KEY has none; BROKEN
    failed and is not in the answer.
    """
    rng, table, expected = np.random.default_rng(0), [], {}
    (folder / "in").mkdir()
    for i, key in enumerate((*KEYS, EMPTY_KEY)):
        size, path = (9 + i, 14 - i), folder / f"in/{i}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
        found = np.concatenate([random_masks(rng, size, 2), np.zeros((1, *size), bool)])[: 0 if key == EMPTY_KEY else 3]
        labels, scores = [NAMES[i % 6], NAMES[(i + 1) % 6], "cat"][: len(found)], [0.25, 1.5, 0.5][: len(found)]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        table.append(masks_row(key, found, uri=str(path), sha256=sha256, labels=labels, scores=scores))
        expected[key] = (found, labels, scores)
    table.append(masks_row(BROKEN, np.zeros((0, 1, 1)), error="decode: truncated: it ends early"))
    write_run(str(folder / "run"), table)
    return expected
