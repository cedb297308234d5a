"""Label Studio: `tasks.json` with brush masks as predictions, their pictures, and the interface, `config.xml`.

What people make of it is read again by `inputs.corrections`.
"""

from __future__ import annotations

import colorsys
import json
import re
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from raypipe import masks
from raypipe.export import doubtful
from raypipe.export.about import About
from raypipe.export.formats.coco import EMPTY
from raypipe.export.target import Target
from raypipe.inputs.originals import portable

ORIGINALS, CATEGORIES = portable, True
RUN_BITS = (8, 16)  # the two sizes of a run's length that are written
# Of a file's tasks: Label Studio takes 250 MiB (its DATA_UPLOAD_MAX_MEMORY_SIZE), and a task is below 10.
MOST_BYTES = 200 << 20
NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, 2.2: what no document holds
LOCAL_FILES = "/data/local-files/?d="  # Label Studio's address of LOCAL_FILES_DOCUMENT_ROOT


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write images/KEY.jpg or .png and the tasks, streamed, which name them: as local files or by their remote URI.

    The document root is the export's folder. So the pictures are there wherever the originals were (in tars, tables,
    on other machines), browsers can show them, and the masks fit. Embeddings, which it cannot show, are left out.
    Doubtful ones are in `tasks-00001.json`, ..., 5,000 each, fewer where their masks take MOST_BYTES, with their
    `trust`, by which its table can be sorted.
    """
    remarks, written = Counter(), Counter()
    for ending, rows in doubtful.files(images, about, is_full=lambda: written["bytes"] > MOST_BYTES):
        written.clear()
        with target.stream(f"tasks{ending}.json") as file:
            file.write(b"[")
            for i, row in enumerate(rows):
                content, suffix = row["picture"]
                image = target.name(row, suffix, folder="images")
                target.put(content, image)
                where = LOCAL_FILES + quote(image) if target.folder.is_local else str(target.folder.location(image))
                written["bytes"] += file.write((b",\n" if i else b"\n") + json.dumps(_task(row, where, about)).encode())
                remarks[EMPTY] += sum(not segment["area"] for segment in row["segments"])
            file.write(b"\n]\n")
    target.put(_config(about).encode(), "config.xml")
    return remarks


def brush(mask: np.ndarray) -> list[int]:
    """Label Studio's run lengths of a mask: the RGBA picture of it in the format of @thi.ng/rle-pack, as bytes.

    mask: bool (H, W). Stored: number of values (32 bits), word size - 1 (5), four length sizes - 1 (4 each), then per
    run 1 (a run), which size (2), length - 1, value (8). Only runs are written, with 8 or 16 bits of length.
    """
    flat = mask.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths, longest = 4 * np.diff(starts, append=flat.size), 1 << RUN_BITS[1]
    pieces = -(-lengths // longest)  # (runs,): of at most 65,536 values
    piece_of = np.repeat(np.arange(len(lengths)), pieces)
    last = np.cumsum(pieces) - 1
    sizes = np.full(len(piece_of), longest)
    sizes[last] = lengths - (pieces - 1) * longest
    long = sizes > 1 << RUN_BITS[0]
    word = ((0b100 | np.where(long, 3, 2)) << np.where(long, 16, 8) | (sizes - 1)) << 8  # 19 or 27 bits
    word = word | flat[starts][piece_of] * 255
    bits = np.unpackbits(word.astype(">u4").view(np.uint8)).reshape(-1, 32)
    kept = bits[np.arange(32) >= np.where(long, 32 - 27, 32 - 19)[:, None]]
    head = np.array([(7 << 16) | (2 << 12) | (3 << 8) | ((RUN_BITS[0] - 1) << 4) | (RUN_BITS[1] - 1)], ">u4")
    head_bits = np.unpackbits(np.array([4 * flat.size], ">u4").view(np.uint8)), np.unpackbits(head.view(np.uint8))[11:]
    return np.packbits(np.concatenate([*head_bits, kept])).tolist()


def _task(row: dict, where: str, about: About) -> dict:
    scores = [segment["score"] for segment in row["segments"] if segment["score"] is not None]
    scored = {"score": sum(scores) / len(scores)} if scores else {}
    regions = [_region(row, segment, about) for segment in row["segments"] if segment["area"]]
    prediction = {"model_version": about.method, "result": regions} | scored
    category = about.name_of_first(row)
    data = {"image": where, "category": category and name_of(category)}
    data |= {name: row[name] for name in ("image_id", "key", "width", "height")}
    data |= {"trust": round(row["trust"], 4)} if about.doubtful else {}
    return {"data": data, "predictions": [prediction]}


def _region(row: dict, segment: dict, about: About) -> dict:
    return {
        "id": f"{row['image_id'][:12]}-{segment['segment']}",
        "type": "brushlabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": row["width"],
        "original_height": row["height"],
        "image_rotation": 0,
        "value": {
            "format": "rle",
            "rle": brush(masks.decode_rle(segment)),
            "brushlabels": [name_of(about.name(segment))],
        },
    }


def name_of(category: str) -> str:
    """A category's name as the interface can hold it, which the masks have to name in the same letters."""
    return NO_XML.sub("\ufffd", category)


def _config(about: About) -> str:
    labels = ""
    for i, name in enumerate(dict.fromkeys(map(name_of, about.categories))):
        red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(i / len(about.categories), 0.9, 0.9))
        labels += f'    <Label value={quoteattr(name)} background="#{red:02x}{green:02x}{blue:02x}"/>\n'
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="label" toName="image">\n{labels}  </BrushLabels>\n</View>\n'
    )
