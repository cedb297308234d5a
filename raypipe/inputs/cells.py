"""What a cell of a list or table holds: the picture itself, as bytes or as base64 text, or where it is."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from raypipe.formats import SIGNATURES
from raypipe.types import BadImage

LONGEST_PATH = 4096  # characters; longer text is no address
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{40,}={0,2}\s*")  # the first characters of a picture are enough
HEAD = 400  # characters of base64 that tell
DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
ADDRESS_FIELDS = ("path", "uri", "url", "file_name", "filename", "file", "image", "image_path", "image_url", "src")


class Unusable(ValueError):
    """A value that is no picture and no address; the text says what it is."""


def leaves(value: object) -> list[bytes | str | None]:
    """The pictures of one cell: bytes, or text, which is base64 (`is_picture`) or an address; None for a missing one.

    value: bytes, text, an object with `bytes` or an address, or a list of these. An object's bytes count before its
    address. [] for a cell without picture. Raises Unusable for anything else.
    """
    if isinstance(value, list | tuple):
        return [_leaf(each) for each in value]
    leaf = _leaf(value)
    return [] if leaf is None else [leaf]


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
    return any(re.match(pattern, content, re.DOTALL) for pattern, _ in SIGNATURES)


def picture_of(text: str) -> bytes:
    """The bytes of a picture in base64 or a data URI. Raises BadImage("fetch", "invalid", message)."""
    uri = DATA_URI.match(text)
    try:
        if uri and not uri[0].lower().endswith(";base64,"):
            return unquote_to_bytes(text[uri.end() :])
        return _decoded(text[uri.end() :] if uri else text)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise BadImage("fetch", "invalid", f"base64 text that is cut or damaged: {error}") from error


def checked_size(content: bytes, max_bytes: int) -> bytes:
    """The bytes as they are. Raises BadImage("fetch", "too_large", message)."""
    if len(content) > max_bytes:
        raise BadImage("fetch", "too_large", f"{len(content)} bytes, the limit is {max_bytes}")
    return content


def _decoded(text: str, *, whole: bool = True) -> bytes:
    """Base64 of either alphabet, with line breaks, with or without the `=` at its end. whole: else a beginning."""
    text = "".join(text.split()).rstrip("=")
    text = text + "=" * (-len(text) % 4) if whole else text[: len(text) // 4 * 4]
    return base64.b64decode(text.encode("ascii").translate(bytes.maketrans(b"-_", b"+/")), validate=True)
