"""The encoded images behind a run's rows: found again, and proven to be those that were labelled."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa

from raypipe import images, schema
from raypipe.inputs import manifest
from raypipe.types import BadImage

MAX_BYTES = 1 << 34  # of one file; `label` had its own limit, which the file passed
ROWS_AT_ONCE = 64
UPRIGHT = (0, 1)  # orientations that mean: as it is stored; 0 is what some cameras write
PNG_METADATA = re.compile(rb"eXIf|XML:com\.adobe\.xmp|Raw profile type")  # where a PNG can store an orientation
XMP_TURN = re.compile(rb"tiff:Orientation\W{1,4}[2-8]")  # as an attribute or as an element


class Originals:
    """Finds the originals of rows: by `uri`, or by a new listing of the input.

    A row's `uri` holds no credentials, query or byte range. So images in tars and tables, behind signed addresses, or
    moved since need the input. Of a listing, `image_id` counts first, then `key`.
    """

    def __init__(self, source: str | None = None, *, column: str | None = None, allow_private: bool = False):
        """source, column, allow_private: as `manifest.list_inputs` takes them. Raises what it raises."""
        self._allow_private = allow_private
        self._listed: pa.Table | None = None
        if source is not None:
            self._listed = manifest.list_inputs(source, column=column, allow_private=allow_private)

    def fetch(self, rows: Iterable[dict]) -> Iterator[tuple[dict, bytes | BadImage]]:
        """Each row with its original's bytes, whose sha256 is the row's, or with a BadImage.

        Its kind is `missing`, `changed`, or another of `manifest.fetch`. Remote files are read up to 16 ahead.
        """
        rows = iter(rows)
        while group := list(itertools.islice(rows, ROWS_AT_ONCE)):
            listed = [self._manifest_row(row) for row in group]
            contents = manifest.fetch([each for each in listed if each], max_bytes=MAX_BYTES)
            for row, found in zip(group, listed, strict=True):
                if found is None:
                    text = f"{row['key']!r} is not in the --input, by id or by key"
                    yield row, BadImage("fetch", "missing", text)
                else:
                    yield row, self._proven(row, next(contents))

    def _manifest_row(self, row: dict) -> dict | None:
        """The manifest row of an image; None when the listing does not hold it."""
        if self._listed is None:
            return dict.fromkeys(schema.MANIFEST.names) | {"location": row["uri"], "public": not self._allow_private}
        index = self._by_id.get(row["image_id"], self._by_key.get(row["key"]))
        return None if index is None else self._listed.slice(index, 1).to_pylist()[0]

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {image_id: i for i, image_id in enumerate(self._listed["image_id"].to_pylist())}

    @cached_property
    def _by_key(self) -> dict[str, int]:
        return {key: i for i, key in enumerate(self._listed["key"].to_pylist())}

    def _proven(self, row: dict, content: bytes | BadImage) -> bytes | BadImage:
        if isinstance(content, BadImage):
            if self._listed is None and content.kind not in ("io", "memory"):
                return BadImage(content.stage, content.kind, f"{content.message}; give the label job's --input")
            return content
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            return BadImage("fetch", "changed", f"{row['uri']} is not the file that was labelled: its sha256 differs")
        return content


def decode(row: dict, content: bytes) -> np.ndarray:
    """The original of a row as upright RGB uint8 (H, W, 3), at its masks' size. Raises BadImage when it has another."""
    image = images.decode(content, max_pixels=row["height"] * row["width"])
    if image.shape[:2] != (size := (row["height"], row["width"])):
        text = f"{row['uri']} has the size {image.shape[:2]}, its masks have {size}; label it again"
        raise BadImage("decode", "wrong_size", text)
    return image


def portable(row: dict, content: bytes) -> tuple[bytes, str]:
    """The original as a file that every reader shows upright: (content, ".jpg" or ".png").

    JPEG and PNG without a stored orientation stay as they are. All else becomes an RGB PNG: some readers apply an
    orientation and others do not, and masks fit the upright picture. Raises BadImage as `decode` does.
    """
    for start, name, suffix in ((b"\xff\xd8\xff", "JPEG", ".jpg"), (b"\x89PNG\r\n\x1a\n", "PNG", ".png")):
        if content.startswith(start) and _fits(row, content, name):
            return content, suffix
    return images.encode_png(decode(row, content)), ".png"


def _fits(row: dict, content: bytes, name: str) -> bool:
    """Whether a row's masks fit the stored picture, and nothing tells a reader to turn it. name: JPEG or PNG."""
    try:
        image = images.READERS[name](io.BytesIO(content))
        if image.size != (row["width"], row["height"]):
            return False
        if name == "PNG" and not PNG_METADATA.search(content):
            return True
        if image.getexif().get(images.ORIENTATION, 1) not in UPRIGHT or b"Raw profile type xmp" in content:
            return False
        texts = [value if isinstance(value, bytes) else str(value).encode() for value in image.info.values()]
        return not any(map(XMP_TURN.search, texts))
    except Exception:  # metadata in ruins, of which each reader makes something else
        return False
