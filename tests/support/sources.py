"""Folders, tars and tables to list, and what is listed from them. Shared by tests."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raypipe.inputs.manifest import fetch, list_inputs


def write(folder, *names: str) -> None:
    """Files whose content is their own name."""
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(os.fsencode(name))


def photographs(folder, count: int, *, names: str = "{}.jpg") -> list[bytes]:
    """JPEG files 0.jpg, 1.jpg, ... with some colours, or by another pattern of names. Returns their contents."""
    contents = []
    for i in range(count):
        path = Path(folder, names.format(i))
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((32, 24)).save(path, "JPEG")
        contents.append(path.read_bytes())
    return contents


def listed(source, **options) -> list[dict]:
    return list_inputs(str(source), **options).to_pylist()


def keys(source, **options) -> list[str]:
    return [row["key"] for row in listed(source, **options)]


def contents(source, *, max_bytes: int = 1000, **options) -> list:
    return list(fetch(listed(source, **options), max_bytes=max_bytes))


def left_out(caplog) -> set[str]:
    """What a listing said that it left out, each with its count."""
    (message,) = [record.getMessage() for record in caplog.records if ": left out " in record.getMessage()]
    return set(message.partition(": left out ")[2].split(", "))


def tar_of(path, members: dict[str, bytes], **options) -> None:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def huggingface(path, cells: list[dict], **options) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"label": range(len(cells)), "image": pa.array(cells, image)}), path, **options)
