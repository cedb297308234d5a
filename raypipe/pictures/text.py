"""Text in pictures, in the fonts that OpenCV carries.

They know Latin, Greek, Cyrillic, Hebrew, Arabic, Chinese, Japanese and Korean. Other letters are shown as
escapes, such as \\u0939: none is lost in a box.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np

REGULAR, BOLD = 400, 600  # weights of the font
INK, MUTED = (34, 36, 40), (95, 99, 105)


def write(picture: np.ndarray, text: str, at: tuple[int, int], *, size: int, colour=INK, weight: int = REGULAR) -> None:
    """Draw a line of text into RGB uint8 (H, W, 3). at: (x, y) of its left end on the baseline. size: in pixels."""
    import cv2

    cv2.putText(picture, visible(text), at, colour, _font(), size, weight)


def width(text: str, *, size: int, weight: int = REGULAR) -> int:
    """How many pixels a line of text takes."""
    import cv2

    return cv2.getTextSize((1 << 20, 64), visible(text), (0, 32), _font(), size, weight)[2]


def shortened(text: str, limit: int, *, size: int) -> str:
    """The end of a long name, which tells files apart better than its beginning, at most `limit` pixels wide."""
    text = visible(text)
    if width(text, size=size) <= limit:
        return text
    while width("…" + text, size=size) > limit:
        text = text[1:]
    return "…" + text


def begun(text: str, limit: int, *, size: int) -> str:
    """The beginning of a long text, at most `limit` pixels wide."""
    kept = text = visible(text)
    while kept and width(text, size=size) > limit:
        kept = kept[:-1]
        text = f"{kept.rstrip()}…"
    return text


def wrapped(text: str, limit: int, *, size: int) -> list[str]:
    """Lines of at most `limit` pixels, broken at spaces; a longer word is shortened."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width(longer, size=size) <= limit:
            lines[-1] = longer
        else:
            lines.append(shortened(word, limit, size=size))
    return lines


def visible(text: str) -> str:
    """Composed characters of which each has a glyph: any blank as a space, all others as escapes."""
    return "".join(map(_visible, unicodedata.normalize("NFC", text)))


@cache
def _visible(character: str) -> str:
    if character.isascii() and character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":
        return " "
    has_glyph = character.isprintable() and not np.array_equal(_drawn(character), _drawn("?"))
    return character if has_glyph else character.encode("unicode_escape").decode()


@cache
def _drawn(character: str) -> np.ndarray:
    """A character as pixels; one that no font has is drawn as a question mark."""
    import cv2

    canvas = np.zeros((48, 48, 3), np.uint8)
    cv2.putText(canvas, character, (16, 32), (255, 255, 255), _font(), 20, REGULAR)
    return canvas


@cache
def _font():
    import cv2

    return cv2.FontFace("sans")
