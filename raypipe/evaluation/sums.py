"""Sums of measures over images, from which a task makes its values: exact, and without those that are no measure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction


class Sums:
    """Totals of some columns and in how many images each has a value; the same whatever the order of the images.

    Null and what is not finite are no measure: they have no part in that column, and `lacking` counts them.
    """

    def __init__(self, columns: Iterable[str], rows: Iterable[dict] = ()):
        """columns: what is summed, numbers or lists of numbers. rows: images to begin with, as `add` takes them."""
        self.images = 0
        self.lacking: Counter[str] = Counter()  # images by column: no value, or a list in which one is missing
        self._sums: dict[str, list[tuple[Fraction, int]]] = {name: [] for name in columns}  # by element, of how many
        self._lists: set[str] = set()
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        """Count one image. row: its measures; a column that it lacks is null.

        Raises ValueError when a column's list has another length than before; an empty one is no measure.
        """
        self.images += 1
        for name, sums in self._sums.items():
            value = row.get(name)
            elements = value if isinstance(value, list) else [value]
            if isinstance(value, list) and value:
                if name in self._lists and len(value) != len(sums):
                    raise ValueError(f"{name}: lists of {len(sums)} and of {len(value)} numbers do not add up")
                self._lists.add(name)
            sums += [(Fraction(), 0)] * (len(elements) - len(sums))
            for i, element in enumerate(elements):
                if is_measure(element):
                    sums[i] = sums[i][0] + Fraction(element), sums[i][1] + 1
            self.lacking[name] += not elements or not all(map(is_measure, elements))

    def total(self, name: str) -> float | list[float | None] | None:
        """The sum of a column, rounded once, by element where it holds lists; None without any image that has it."""
        return self._shown(name, [float(total) if count else None for total, count in self._sums[name]])

    def count(self, name: str) -> int | list[int]:
        """The images that have a value in a column, by element where it holds lists."""
        return self._shown(name, [count for _, count in self._sums[name]]) or 0

    def mean(self, name: str) -> float | list[float | None] | None:
        """The mean of a column over the images that have it, by element where it holds lists; None without any."""
        return self._shown(name, [float(total) / count if count else None for total, count in self._sums[name]])

    def _shown(self, name: str, values: list):
        return values if name in self._lists else (values or [None])[0]


def is_measure(value) -> bool:
    """Whether a cell holds a number that can be summed."""
    return value is not None and math.isfinite(value)
