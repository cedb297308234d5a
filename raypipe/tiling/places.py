"""How an image is cut: tiles of one size, where they lie, and how much each counts where they overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

GRAMMAR = "SIZE:OVERLAP in pixels, such as 1024:256 or 1024:25%"
SMALLEST = 32  # px of a side; below, no network sees anything


class Place(NamedTuple):
    """Where a tile lies: its number from the top and from the left, and its pixels, bottom and right exclusive."""

    row: int
    col: int
    top: int
    left: int
    bottom: int
    right: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its pixels, of an array of the image's size."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def of(self, part: Place) -> tuple[slice, slice]:
        """The pixels of a part of it, of an array of its own size."""
        rows, columns = part.slices
        return (
            slice(rows.start - self.top, rows.stop - self.top),
            slice(columns.start - self.left, columns.stop - self.left),
        )

    def shared(self, other: Place) -> Place | None:
        """What two tiles have in common."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Place(0, 0, top, left, bottom, right) if top < bottom and left < right else None

    def weight(self, part: Place) -> np.ndarray:
        """How much it counts in a part of it: the distance to its borders, a tent each way, float32 (h, w)."""
        tents = []
        for pixels, first, last in zip(part.slices, (self.top, self.left), (self.bottom, self.right), strict=True):
            places = np.arange(pixels.start, pixels.stop)
            tents.append(np.minimum(places - first + 1, last - places).astype(np.float32))
        return np.outer(*tents)


@dataclass(frozen=True)
class Tiling:
    """How an image is cut: tiles of `size` px a side that share at least `overlap` px with each neighbour."""

    size: int
    overlap: int

    @classmethod
    def parse(cls, text: str) -> Tiling:
        """Read the grammar of `--tiles`. Raises ValueError that shows it."""
        size, _, overlap = text.partition(":")
        share = overlap.endswith("%")
        if not (size.isdecimal() and overlap.removesuffix("%").isdecimal()):
            raise ValueError(f"--tiles {text!r}: write {GRAMMAR}")
        size, overlap = int(size), int(overlap.removesuffix("%"))
        overlap = round(size * overlap / 100) if share else overlap
        if size < SMALLEST:
            raise ValueError(f"--tiles {text!r}: SIZE must be at least {SMALLEST} px")
        if overlap >= size:
            raise ValueError(f"--tiles {text!r}: OVERLAP must be below SIZE; write {GRAMMAR}")
        return cls(size, overlap)

    def __str__(self) -> str:
        return f"{self.size}:{self.overlap}"

    def places(self, size: tuple[int, int]) -> list[Place]:
        """The tiles of an image of (height, width), row by row; one where it is not larger than a tile.

        They are spread evenly, so that the last ones end at the border and all overlap alike.
        """
        rows, columns = map(self._spans, size)
        return [
            Place(row, col, top, left, bottom, right)
            for row, (top, bottom) in enumerate(rows)
            for col, (left, right) in enumerate(columns)
        ]

    def most(self, pixels: int) -> int:
        """About how many tiles an image of so many pixels has, if no side of it is shorter than a tile."""
        return max(1, math.ceil(pixels / (self.size - self.overlap) ** 2))

    def _spans(self, length: int) -> list[tuple[int, int]]:
        if length <= self.size:
            return [(0, length)]
        gaps = -((self.size - length) // (self.size - self.overlap))  # at least one
        return [(start, start + self.size) for start in (i * (length - self.size) // gaps for i in range(gaps + 1))]
