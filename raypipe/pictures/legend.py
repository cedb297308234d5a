"""What the colours of a picture stand for, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from raypipe.pictures.overlay import COLOURS
from raypipe.types import Segmenter


def names(segmenter: type[Segmenter] | None, found: Iterable[list[dict]]) -> list[str]:
    """What each mask of an image is called, by its index, as far as there are colours.

    segmenter: what found the masks; None where that is not known. found: the `segments` of some rows. A label counts
    where all images have the same one at an index.
    """
    labels: list[set] = []
    for segments in found:
        labels += [set() for _ in segments[len(labels) :]]
        for here, segment in zip(labels, segments, strict=False):
            here.add(segment.get("label"))
    ends, parts = (segmenter.ends, segmenter.parts) if segmenter else (("", ""), ())
    return [_name(i, len(labels), here, ends, parts) for i, here in enumerate(labels)][: len(COLOURS)]


def has_names(found: Iterable[list[dict]]) -> bool:
    """Whether masks are told apart by their labels: at some index two images have different ones, or no other image
    says that these go by the index."""
    first: dict[int, str] = {}
    images = [labels for segments in found if any(labels := [segment.get("label") for segment in segments])]
    pairs = ((i, label) for labels in images for i, label in enumerate(labels) if label)
    return len(images) == 1 or any(first.setdefault(i, label) != label for i, label in pairs)


def by_label(found: Iterable[list[dict]]) -> list[str]:
    """The labels of all masks, those that cover most first; what a mask without one is called is ""."""
    areas: Counter[str] = Counter()
    for segment in chain.from_iterable(found):
        areas[segment.get("label") or ""] += segment["area"]
    return [label for label, _ in areas.most_common()]


def _name(i: int, count: int, labels: set, ends: tuple[str, str], parts: Sequence[str]) -> str:
    label = next(iter(labels)) if len(labels) == 1 else None
    name = label or (parts[i] if i < len(parts) else "mask" if count == 1 else f"mask {i + 1}")
    end = ends[0] if i == 0 else ends[1] if i == count - 1 else ""
    return f"{name}: {end}" if end and count > 1 else name
