"""The text of a list as records: whatever encoding, line ends and separators programs write."""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import posixpath
import re
from collections.abc import Iterator

from raypipe.inputs.items import PICTURES, Unusable

log = logging.getLogger("raypipe")

LINE = ""  # the column of a record without columns
FIELD_CHARACTERS = 1 << 30  # of a CSV field: a column beside the URIs may hold whole documents or encoded images
MARKS = {  # the first bytes of a text; the longer ones first
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
Record = tuple[str, dict | Unusable]  # where it stands, such as `line 3`; and its cells by column, or what is wrong


def decode(content: bytes, name: str) -> tuple[str, str]:
    """A list's text and its encoding: UTF-8, UTF-16 or UTF-32, with or without a mark.

    Lines that are not UTF-8 are read as Windows-1252, and a line is logged about the list `name`. Raises ValueError.
    """
    mark = next((mark for mark in MARKS if content.startswith(mark)), b"")
    encoding = MARKS.get(mark, "utf-8")
    if not mark and b"\0" in content:
        encoding = "utf-16-le" if content[1::2].count(0) > content[::2].count(0) else "utf-16-be"
    content = content.removeprefix(mark)
    try:
        text = content.decode(encoding)
        if "\0" in text:
            raise ValueError("it holds null characters, so it is no text; if it is one, save it as UTF-8")
        return text, encoding
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise ValueError(f"it looks like {encoding.upper()} and is not: {error}; save it as UTF-8") from None
        number = content.count(b"\n", 0, error.start) + 1
        log.warning("%s: line %s is not UTF-8; such lines are read as Windows-1252", name, number)
    return "".join(map(_line, io.BytesIO(content))), encoding


def _line(content: bytes) -> str:
    for encoding in ("utf-8", "cp1252"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")


def records(text: str, suffix: str) -> Iterator[Record]:
    """The records of a list in their order. suffix: `.txt`, `.csv`, `.tsv`, `.json`, `.jsonl` or `.ndjson`.

    Blank lines are none, nor are comments (`#`) of a .txt. Raises ValueError with the line where the text is damaged.
    """
    if suffix == ".json":
        return _array(text)
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(text)
    if suffix == ".txt" and "\t" not in text.lstrip().partition("\n")[0]:  # else what Excel calls Unicode text
        return _lines(text)
    return _separated(text)


def _lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip() and not line.startswith("#"):
            yield f"line {number}", {LINE: line}


def _separated(text: str) -> Iterator[Record]:
    """Rows of columns. Where tabs separate them there is no quoting: a field may begin with a quotation mark."""
    csv.field_size_limit(FIELD_CHARACTERS)
    lines = io.StringIO(text, newline="").readlines()
    first = next((line for line in lines if line.strip()), "")
    told = re.fullmatch(r'"?sep=(.)"?\s*', lines[0], re.IGNORECASE) if lines else None
    skipped = 1 if told else 0
    separator = told[1] if told else _separator(first)
    dialect = {"delimiter": separator, "quoting": csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL}
    rows = csv.reader(lines[skipped:], **dialect)
    names, begin = None, skipped
    for cells in rows:
        place, last, begin = f"line {begin + 1}", begin, skipped + rows.line_num
        if begin == len(lines):
            _check_end(lines[last:], place, **dialect)
        if not any(map(str.strip, cells)):
            continue
        if names is None:
            names = [_bare(cell) for cell in cells]
            if not any(posixpath.splitext(name)[1].lower() in PICTURES for name in names):
                continue
            names = [str(i) for i in range(1, len(cells) + 1)]  # no headings: it is a record already
        is_longer = any(map(str.strip, cells[len(names) :]))
        yield place, Unusable("more fields than columns") if is_longer else dict(zip(names, cells, strict=False))


def _separator(headings: str) -> str:
    """What parts the headings most often."""
    counts = {each: len(next(csv.reader([headings], delimiter=each), [])) for each in ",;\t|"}
    return max(counts, key=counts.get)


def _check_end(lines: list[str], place: str, **dialect) -> None:
    """Raise ValueError when the last record is one only because its quotation mark is never closed."""
    try:
        list(csv.reader(lines, strict=True, **dialect))
    except csv.Error as error:
        if "end of data" in str(error):
            raise ValueError(f"{place}: a quotation mark opens a field and none closes it") from None


def _bare(name: str) -> str:
    name = name.strip()
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] == '"' else name


def _json_lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            try:
                yield f"line {number}", _cells(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None


def _array(text: str) -> Iterator[Record]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if isinstance(content, dict):  # as COCO has them
        content = content.get("images")
    if not isinstance(content, list):
        raise ValueError("expected a list of objects, or an object with such a list named images")
    for number, each in enumerate(content, 1):
        yield f"entry {number}", _cells(each)


def _cells(value: object) -> dict:
    return value if isinstance(value, dict) else {LINE: value}
