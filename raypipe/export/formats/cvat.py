"""CVAT: `annotations/instances_default.json` (COCO 1.0), its pictures and labels, and the command that uploads them."""

from __future__ import annotations

import json
import posixpath
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from raypipe import masks
from raypipe.export import doubtful
from raypipe.export.about import About
from raypipe.export.formats.coco import EMPTY
from raypipe.export.target import Target
from raypipe.inputs.originals import portable

ORIGINALS, CATEGORIES = portable, True
ANNOTATIONS = "annotations/instances_default.json"  # where Datumaro looks for them, beside images/
TRUST = {"name": "trust", "mutable": False, "input_type": "text", "default_value": "-", "values": ["-"]}
NAME_LENGTH = 64  # characters of a label's name that CVAT's database keeps


def write(images: Iterator[dict], target: Target, about: About) -> Counter:
    """Write images/, labels.json and the annotations, streamed. The remarks end with the upload command.

    Pictures lie in one folder, since CVAT's client sends names without folders: `a/b.jpg` becomes `a__b.jpg`, and the
    image's entry has its key. Masks are run lengths written out as numbers, with `iscrowd` 1, as CVAT itself writes
    them: Datumaro turns masks that are no crowds into polygons. Names are cut to the 64 characters that CVAT keeps.
    Embeddings are left out, and masks without pixels, which CVAT refuses.

    Doubtful images are in folders `task-00001`, ..., 5,000 each, with the trust of each mask as its attribute. There
    names begin with a number, since CVAT shows pictures by name: `00001__a__b.jpg`.
    """
    remarks, names = Counter(), label_names(about.categories)
    remarks["names are cut or completed for CVAT"] = sum(map(str.__ne__, names, about.categories))
    attributes = [] if about.doubtful is None else [TRUST]
    labels = _json([{"name": name, "type": "mask", "attributes": attributes} for name in names])
    categories = [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(names, 1)]
    where = "" if target.folder.is_local else ", from a local copy of the folder,"
    for ending, rows in doubtful.files(images, about):
        folder = f"task{ending}" if ending else ""
        target.put(labels, posixpath.join(folder, "labels.json"))
        count = _write_task(rows, target, about, folder, categories, remarks)
        place = posixpath.join(str(target.folder), folder).rstrip("/")
        remarks[f"images to send{where} with: {command(place, about.method + ending)}"] = count
    return remarks


def _write_task(
    images: Iterator[dict], target: Target, about: About, folder: str, categories: list[dict], remarks: Counter
) -> int:
    """Write the annotations and pictures of one task into a folder. Returns how many pictures."""
    annotation_id = count = 0
    with target.stream(posixpath.join(folder, ANNOTATIONS)) as file, tempfile.TemporaryFile() as entries:
        file.write(b'{"info": ' + _json({"description": about.text()}) + b',\n"licenses": [],\n"categories": ')
        file.write(_json(categories) + b',\n"annotations": [')
        for count, row in enumerate(images, 1):
            name = _put(row, target, folder, f"{count:05}__" * bool(folder))
            entry = {"id": count, "file_name": name, "width": row["width"], "height": row["height"], "key": row["key"]}
            entries.write((b",\n" if count > 1 else b"\n") + _json(entry))
            found = [segment for segment in row["segments"] if segment["area"]]
            remarks[EMPTY] += len(row["segments"]) - len(found)
            for segment, counts in zip(found, run_lengths(found), strict=True):
                annotation_id += 1
                annotation = _annotation(segment, counts, annotation_id, count, about)
                file.write((b",\n" if annotation_id > 1 else b"\n") + _json(annotation))
        file.write(b'\n],\n"images": [')
        entries.seek(0)
        shutil.copyfileobj(entries, file)
        file.write(b"\n]}\n")
    return count


def command(folder: str, name: str) -> str:
    """What sends the folder to CVAT as a new task (cvat-cli 2.80), for a shell."""
    return (
        f"cd {shlex.quote(folder)} && cvat-cli task create {shlex.quote(name)} local images/* --labels labels.json "
        f"--annotation_path {ANNOTATIONS} --annotation_format 'COCO 1.0'"
    )


def label_names(categories: Sequence[str]) -> list[str]:
    """A name for each category that CVAT keeps as it is: trimmed, not empty, at most NAME_LENGTH long, and its own.

    Where two would have the same, the later one ends with its number.
    """
    names: dict[str, None] = {}
    for number, category in enumerate(categories, 1):
        name = " ".join(category.split())[:NAME_LENGTH].rstrip() or f"category {number}"
        if name in names:
            ending = f" #{number}"
            name = name[: NAME_LENGTH - len(ending)] + ending
        names[name] = None
    return list(names)


def run_lengths(segments: Sequence[dict]) -> Iterator[list[int]]:
    """COCO's uncompressed counts of masks: lengths of runs in column-major order, the first of background.

    segments: with `size` and `counts`, each with a pixel at least.
    """
    if not segments:
        return
    starts, ends, which = masks.runs(segments)
    firsts = np.searchsorted(which, np.arange(len(segments) + 1))
    for segment, first, last in zip(segments, firsts[:-1], firsts[1:], strict=True):
        edges = np.stack([starts[first:last], ends[first:last]], 1).ravel()
        pixels = segment["size"][0] * segment["size"][1]
        counts = np.diff(edges, prepend=0, append=pixels)
        yield counts[: len(counts) - (counts[-1] == 0)].tolist()


def _put(row: dict, target: Target, folder: str, prefix: str) -> str:
    """Write a row's picture. Returns its name inside images/."""
    content, suffix = row["picture"]
    flat = prefix + row["key"].replace("/", "__")
    if posixpath.splitext(flat)[1].lower().replace("jpeg", "jpg") != suffix:
        flat += suffix  # `a.webp` becomes `a.webp.png`, and is told apart from `a.png` when it comes back
    path = target.name(row | {"key": flat}, suffix, folder=posixpath.join(folder, "images"))
    target.put(content, path)
    return posixpath.basename(path)


def _annotation(segment: dict, counts: list[int], annotation_id: int, image_id: int, about: About) -> dict:
    scored = {} if segment["score"] is None else {"score": segment["score"]}
    if segment.get("trust") is not None:
        scored["attributes"] = {TRUST["name"]: f"{segment['trust']:.2f}"}
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": about.number(segment),
        "segmentation": {"size": segment["size"], "counts": counts},
        "area": segment["area"],
        "bbox": segment["bbox"],
        "iscrowd": 1,
    } | scored


def _json(content) -> bytes:
    return json.dumps(content, default=str).encode()
