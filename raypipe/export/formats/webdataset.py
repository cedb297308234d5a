"""WebDataset: tars of samples, each an image, its label map and its masks as JSON."""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from raypipe.export.about import About
from raypipe.export.formats.png import label_map
from raypipe.export.target import Target
from raypipe.images import encode_png
from raypipe.inputs.originals import portable

ORIGINALS, CATEGORIES, EMBEDDINGS = portable, True, True
SHARD_BYTES = 500_000_000  # a shard is closed once it has this size


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write shard-000000.tar, ...: per image KEY.jpg or .png, KEY.mask.png (see `png.label_map`), KEY.json.

    Of a run that keeps embeddings KEY.embeddings.npy, float16 (N, D), a row per segment of the JSON; (0, 0) without
    segments, (N, 0) where people drew them. A key's dots become underscores, since the first one ends the key; the JSON
    has the original.
    """
    remarks, shard, size = Counter(), 0, SHARD_BYTES
    with ExitStack() as stack:
        for row in images:
            if size >= SHARD_BYTES:
                stack.close()
                file = stack.enter_context(target.stream(f"shard-{shard:06d}.tar"))
                archive = stack.enter_context(tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT))
                shard, size = shard + 1, 0
            values = label_map(row, about, remarks)
            content, suffix = row["picture"]
            stem = posixpath.splitext(row["key"])[0].replace(".", "_")
            key = target.name(row | {"key": f"{stem}.x"}, "")  # no other sample's
            members = {suffix: content, ".mask.png": encode_png(values), ".json": _json(row, about)}
            if about.embeddings:
                members[".embeddings.npy"] = _npy([each["embedding"] or [] for each in row["segments"]])
            for ending, member in members.items():
                entry = tarfile.TarInfo(key + ending)  # time and owner stay 0: the same export gives the same bytes
                entry.size = len(member)
                archive.addfile(entry, io.BytesIO(member))
                size += len(member)
    return remarks


def _npy(embeddings: list[list[float]]) -> bytes:
    np.save(file := io.BytesIO(), np.array(embeddings or np.zeros((0, 0)), np.float16))
    return file.getvalue()


def _json(row: dict, about: About) -> bytes:
    names = ("size", "counts", "bbox", "area", "score", "segment", *["stability"] * bool(about.settings.get("jitter")))
    found = [{name: each[name] for name in names} | {"category": about.name(each)} for each in row["segments"]]
    image = {name: row[name] for name in "key image_id sha256 height width note method foreground".split()}
    return json.dumps(image | {"segments": found}).encode()
