"""Which column of a list or table holds the images: told by its first values, then by its name."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence

from raypipe import storage
from raypipe.inputs.addresses import Addresses
from raypipe.inputs.cells import Unusable, is_known, is_picture, leaves
from raypipe.inputs.items import PICTURES

LOOKED_AT = 3  # files that are looked for on the disk, per column
USUAL = {"uri", "url", "path", "file", "filename", "filepath", "filelocation", "location"}
PICTURE = re.compile(r"(img|image|photo|picture|pic|media)(s|path|file|filename|name|uri|url|link|address|location)?")
BESIDE = re.compile(r"mask|label|segm|annot|thumb|preview|depth|caption")  # in names of what lies beside an image
PAGES = {".html", ".htm", ".php", ".asp", ".aspx", ".jsp"}

# How sure a value or a column is the image. FOUND: its files are on this disk.
UNLIKELY, POSSIBLE, BYTES, EVIDENT, FOUND, PICTURES_THEMSELVES = 0.0, 1.0, 1.5, 2.0, 2.5, 3.0


def find_column(
    columns: Mapping[str, Sequence[object]], column: str | None, addresses: Addresses, *, shown: str = ""
) -> str:
    """The asked-for column, or the one whose values are pictures or their addresses.

    columns: name -> its first values. shown: all columns with their types, for the error. Raises ValueError when the
    column is not there, and when none or several may be meant.
    """
    shown = shown or ", ".join(map(repr, columns))
    if column is not None:
        if column in columns:
            return column
        raise ValueError(f"no column {column!r}; the columns are {shown}; choose one with --column")
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    scores = {name: _score(name, records, addresses) for name in columns}
    best = max(scores.values(), default=UNLIKELY)
    names = [name for name in columns if scores[name] == best]
    if best == UNLIKELY:
        raise ValueError(
            f"no column is named like one of images, or holds any; the columns are {shown}; choose one with --column"
        )
    rank = max(map(_rank, names))
    names = [name for name in names if _rank(name) == rank]
    if len(names) > 1:
        several = f"several columns may hold the image: {', '.join(names)}; choose one with --column"
        raise ValueError(f"{several}; the columns are {shown}")
    return names[0]


def find_folder(records: Sequence[dict], column: str, addresses: Addresses) -> str | None:
    """The column with the folders of the files that another column names; None when there is none, or none is needed.

    It is the one beneath whose folders the first files are, which are not where their names alone lead. Of a web
    address, of which that is not known, it must end in `/`.
    """
    for other in records[0] if records else ():
        cells = [(_text(record, other), _text(record, column)) for record in records if other != column]
        pairs = [(folder, name) for folder, name in cells if folder and name][:LOOKED_AT]
        is_needed = pairs and not any(storage.split(name) or addresses.finds(name) for _, name in pairs)
        is_page = any((parts := storage.split(each)) and parts.is_web and not each.endswith("/") for each, _ in pairs)
        if is_needed and not is_page and all(addresses.finds(joined(folder, name)) for folder, name in pairs):
            return other
    return None


def _text(record: dict, name: str) -> str:
    value = record.get(name)
    return value.strip() if isinstance(value, str) else ""


def joined(folder: object, name: str) -> str:
    """The address of a file by the cells of its folder, which may be empty, and of its name."""
    if not isinstance(folder, str) or not folder.strip() or storage.split(name):
        return name
    return folder.strip().rstrip("/\\") + "/" + name


def _score(name: str, records: Sequence[dict], addresses: Addresses) -> float:
    """How sure a column is the image, by the better half of its first values."""
    found = []
    for record in records:
        try:
            found += [leaf for leaf in leaves(record[name]) if leaf is not None]
        except Unusable:
            found.append(None)
    if not found:
        return POSSIBLE if _rank(name) > 0 else UNLIKELY
    scores, is_named = sorted(map(_likelihood, found), reverse=True), _rank(name) > 0
    score = scores[(len(found) - 1) // 2] or (min(scores[0], POSSIBLE) if is_named else UNLIKELY)
    if score not in (POSSIBLE, EVIDENT):
        return score
    if score == POSSIBLE and not is_named:
        return UNLIKELY
    looked_at = [leaf for leaf in found if isinstance(leaf, str) and _likelihood(leaf) >= score][:LOOKED_AT]
    if all(map(storage.split, looked_at)):
        return score
    if all(map(addresses.finds, looked_at)) or (score == EVIDENT and find_folder(records, name, addresses)):
        return FOUND
    return score if is_named else UNLIKELY


def _likelihood(leaf: bytes | str | None) -> float:
    if leaf is None:
        return UNLIKELY
    if isinstance(leaf, bytes):
        return PICTURES_THEMSELVES if is_known(leaf) else BYTES
    if is_picture(leaf):
        return PICTURES_THEMSELVES
    parts = storage.split(leaf)
    path = parts.key.partition("?")[0].partition("#")[0] if parts and parts.is_web else leaf
    suffix = posixpath.splitext(path.rstrip("\"'"))[1].lower()
    if suffix in PICTURES:
        return EVIDENT
    is_number = re.fullmatch(r"[-+.,:\d\s]*", leaf)
    return UNLIKELY if is_number or (parts and parts.is_web and (suffix in PAGES or not path)) else POSSIBLE


def _rank(name: str) -> int:
    """How much a column's name says that it is the image."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    if plain == "image":
        return 3
    if BESIDE.search(plain):
        return -1
    return 2 if PICTURE.fullmatch(plain) else 1 if plain in USUAL else 0
