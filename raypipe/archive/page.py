"""The page of an archive: its figures and the first images of each category."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import pyarrow.compute as pc

from raypipe import images
from raypipe.archive.making import Tables
from raypipe.classes import Classes
from raypipe.inputs.manifest import fetch
from raypipe.pages import html
from raypipe.pictures.overlay import jpeg, resized, scaled
from raypipe.types import BadImage

SIDE, QUALITY = 256, 80  # of a picture: px of its longer side
MOST_PICTURES = 3_000  # on one page: about 40 MB


def page(tables: Tables, classes: Classes, settings: Mapping, *, examples: int, max_pixels: int, max_bytes: int) -> str:
    """The page as text: the same for the same archive. settings: shown by name. examples: images per category."""
    examples = max(1, min(examples, MOST_PICTURES // len(classes.names)))
    shown = tables.members.filter(pc.less(tables.members["rank"], examples))
    ids = pc.unique(shown["image_id"])
    rows = tables.images.filter(pc.is_in(tables.images["image_id"], value_set=ids)).to_pylist()
    contents = fetch(rows, max_bytes=max_bytes)
    pictures = {row["image_id"]: _picture(content, max_pixels) for row, content in zip(rows, contents, strict=True)}
    by_category = {name: [] for name in classes.names}
    for row in shown.to_pylist():
        by_category[row["category"]].append(row | {"picture": pictures[row["image_id"]]})
    counts = {each["values"]: each["counts"] for each in pc.value_counts(tables.members["category"]).to_pylist()}
    listed = [
        {"name": name, "query": query, "count": counts.get(name, 0), "images": by_category[name]}
        for name, query in zip(classes.names, classes.queries, strict=True)
    ]
    return html.render(
        "archive.html.j2",
        "sweep.js",
        figures=tables.summary.to_pylist(),
        categories=listed,
        columns=examples + 1,
        settings=_told(settings),
        number=number,
        version=version("raypipe"),
    )


def _told(settings: Mapping) -> dict[str, str]:
    """Settings by name for people: those of one that has several each by itself, and none that is not set."""
    told = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            told |= {f"{name}: {part}": text for part, text in _told(value).items()}
        elif value not in (None, ""):
            told[name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return told


def number(value: float | None) -> str:
    """A figure for people."""
    if value is None or value != value:
        return "" if value is None else "none"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}" if value > 1 else f"{value:.3f}"


def _picture(content: bytes | BadImage, max_pixels: int) -> str:
    """An image as a data URI; "" where it cannot be read any more."""
    try:
        if isinstance(content, BadImage):
            return ""
        image = images.decode(content, max_pixels=max_pixels)
        return jpeg(resized(image, scaled(image.shape[:2], SIDE)), QUALITY)
    except BadImage:
        return ""
