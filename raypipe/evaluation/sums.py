"""Sums of measures over images, from which a task makes its values: exact, and without those that are no measure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

UNIT_BITS = 1074  # every float is a whole multiple of 2 ** -1074, the smallest one above 0


class Sums:
    """Totals of some columns and in how many images each has a value; the same whatever the order of the images.

    Null and what is not finite are no measure: they have no part in that column, and `lacking` counts them.
    """

    def __init__(self, columns: Iterable[str], rows: Iterable[dict] = (), *, places: Iterable[str] = ()):
        """columns: what is summed, numbers or lists of numbers. rows: images to begin with, as `add` takes them.

        places: columns of counts by place, such as those of a confusion matrix: pairs of a place and a whole number.
        What is not in them is 0.
        """
        self.images = 0
        self.lacking: Counter[str] = Counter()  # images by column: no value, or a list in which one is missing
        self._totals: dict[str, list[int]] = {name: [] for name in columns}  # by element, in units of 2 ** -UNIT_BITS
        self._counts: dict[str, list[int]] = {name: [] for name in self._totals}  # images that have the element
        self._lists: set[str] = set()
        self._places: dict[str, Counter[int]] = {name: Counter() for name in places}
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        """Count one image. row: its measures; a column that it lacks is null.

        Raises ValueError when a column's list has another length than before; an empty one is no measure.
        """
        self.images += 1
        for name, counts in self._places.items():
            counts.update(dict(row.get(name) or ()))
        for name, totals in self._totals.items():
            value, counts = row.get(name), self._counts[name]
            elements = value if isinstance(value, list) else [value]
            if isinstance(value, list) and value:
                if name in self._lists and len(value) != len(totals):
                    raise ValueError(f"{name}: lists of {len(totals)} and of {len(value)} numbers do not add up")
                self._lists.add(name)
            for i, element in enumerate(elements):
                if i == len(totals):
                    totals.append(0), counts.append(0)
                if is_measure(element):
                    over, under = element.as_integer_ratio()  # under: a power of two
                    totals[i] += over << (UNIT_BITS + 1 - under.bit_length())
                    counts[i] += 1
            self.lacking[name] += not elements or not all(map(is_measure, elements))

    def total(self, name: str) -> float | list[float | None] | None:
        """The sum of a column, rounded once, by element where it holds lists; None without any image that has it."""
        pairs = zip(self._totals[name], self._counts[name], strict=True)
        known = [total / (1 << UNIT_BITS) if count else None for total, count in pairs]
        return known if name in self._lists else (known or [None])[0]

    def places(self, name: str) -> dict[int, int]:
        """The sums of a column of counts by place, exact, of the places that occur."""
        return dict(self._places[name])

    def count(self, name: str) -> int | list[int]:
        """The images that have a value in a column, by element where it holds lists."""
        counts = self._counts[name]
        return list(counts) if name in self._lists else sum(counts)

    def mean(self, name: str) -> float | list[float | None] | None:
        """The mean of a column over the images that have it, by element where it holds lists; None without any."""
        total, count = self.total(name), self.count(name)
        if name not in self._lists:
            return None if total is None else total / count
        return [None if each is None else each / n for each, n in zip(total, count, strict=True)]


def is_measure(value) -> bool:
    """Whether a cell holds a number that can be summed."""
    return value is not None and math.isfinite(value)
