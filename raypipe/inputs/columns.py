"""Which column of a list or table holds the images, told by its first values, then by its name; and what cells hold.

That is the picture itself, as bytes or as base64 text, or where it is.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
import re
from collections.abc import Collection, Sequence
from urllib.parse import unquote_to_bytes

from raypipe import storage
from raypipe.formats import SIGNATURES
from raypipe.inputs.addresses import Addresses
from raypipe.inputs.items import PICTURES, Unusable
from raypipe.types import BadImage

LONGEST_PATH = 4096  # characters; longer text is no address
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{40,}={0,2}\s*")  # the first characters of a picture are enough
HEAD = 400  # characters of base64 that tell
DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
ADDRESS_FIELDS = ("path", "uri", "url", "file_name", "filename", "file", "image", "image_path", "image_url", "src")

LOOKED_AT = 3  # files that are looked for on the disk, per column
USUAL = {"uri", "url", "path", "file", "filename", "filepath", "filelocation", "location"}
PICTURE = re.compile(r"(img|image|photo|picture|pic|media)(s|path|file|filename|name|uri|url|link|address|location)?")
BESIDE = re.compile(r"mask|label|segm|annot|thumb|preview|depth|caption")  # in names of what lies beside an image
PAGES = {".html", ".htm", ".php", ".asp", ".aspx", ".jsp"}

# How sure a value or a column is the image. FOUND: its files are on this disk.
UNLIKELY, POSSIBLE, BYTES, EVIDENT, FOUND, PICTURES_THEMSELVES = 0.0, 1.0, 1.5, 2.0, 2.5, 3.0


def leaves(value: object) -> list[bytes | str | Unusable | None]:
    """The pictures of one cell: bytes, or text, which is base64 (`is_picture`) or an address; None for a missing one.

    value: bytes, text, an object with `bytes` or an address, or a list of these. An object's bytes count before its
    address. [] for a cell without picture, and one Unusable for anything else.
    """
    try:
        if isinstance(value, list | tuple):
            return [_leaf(each) for each in value]
        leaf = _leaf(value)
        return [] if leaf is None else [leaf]
    except Unusable as error:
        return [error]


def _leaf(value: object) -> bytes | str | None:
    if isinstance(value, list) and len(value) == 1:
        return _leaf(value[0])
    if isinstance(value, dict):
        fields = [name for name in ("bytes", *ADDRESS_FIELDS) if name in value]
        if not fields:
            raise Unusable("an object without bytes or path")
        return next(filter(None, (_leaf(value[name]) for name in fields)), None)
    if value is None or value != value:  # pandas writes a missing text as not-a-number
        return None
    if isinstance(value, bytes):
        return value or None
    if not isinstance(value, str):
        words = {bool: "true or false", int: "a number", float: "a number", list: "a nested list"}
        raise Unusable(words.get(type(value), type(value).__name__))
    text = value.strip()
    if not is_picture(text) and (len(text) > LONGEST_PATH or "\n" in text):
        raise Unusable("text that is no address")
    return text or None


def is_picture(text: str) -> bool:
    """Whether a text is a picture in base64 or a data URI, and no address."""
    if DATA_URI.match(text):
        return True
    head = text[:HEAD]
    return BASE64.fullmatch(head) is not None and is_known(_decoded(head, whole=False))


def is_known(content: bytes) -> bool:
    """Whether bytes begin like a picture or another file whose kind can be told."""
    return any(re.match(pattern, content, re.DOTALL) for pattern, _, _ in SIGNATURES)


def picture_of(text: str) -> bytes:
    """The bytes of a picture in base64 or a data URI. Raises BadImage("fetch", "invalid", message)."""
    uri = DATA_URI.match(text)
    try:
        if uri and not uri[0].lower().endswith(";base64,"):
            return unquote_to_bytes(text[uri.end() :])
        return _decoded(text[uri.end() :] if uri else text)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise BadImage("fetch", "invalid", f"base64 text that is cut or damaged: {error}") from error


def _decoded(text: str, *, whole: bool = True) -> bytes:
    """Base64 of either alphabet, with line breaks, with or without the `=` at its end. whole: else a beginning."""
    text = "".join(text.split()).rstrip("=")
    text = text + "=" * (-len(text) % 4) if whole else text[: len(text) // 4 * 4]
    return base64.b64decode(text.encode("ascii").translate(bytes.maketrans(b"-_", b"+/")), validate=True)


def find_column(
    records: Sequence[dict], names: Collection[str], column: str | None, addresses: Addresses, *, shown: str = ""
) -> str:
    """The asked-for column, or the one whose values are pictures or their addresses.

    records: the first ones. names: columns that may be meant. shown: all columns with their types, for the error.
    Raises ValueError when the column is not there, and when none or several may be meant.
    """
    shown = shown or ", ".join(map(repr, names))
    if column in names:
        return column
    if column is not None:
        raise ValueError(f"no column {column!r}; the columns are {shown}; choose one with --column")
    scores = {name: _score(name, records, addresses) for name in names}
    best = max(scores.values(), default=UNLIKELY)
    found = [name for name in scores if scores[name] == best]
    if best == UNLIKELY:
        raise ValueError(
            f"no column is named like one of images, or holds any; the columns are {shown}; choose one with --column"
        )
    rank = max(map(_rank, found))
    found = [name for name in found if _rank(name) == rank]
    if len(found) > 1:
        several = f"several columns may hold the image: {', '.join(found)}; choose one with --column"
        raise ValueError(f"{several}; the columns are {shown}")
    return found[0]


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
    found = [leaf for record in records for leaf in leaves(record.get(name)) if leaf is not None]
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


def _likelihood(leaf: bytes | str | Unusable) -> float:
    if isinstance(leaf, Unusable):
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
