"""Round numbers beside an axis."""

from __future__ import annotations

import math

STEPS = 5  # between the lines of an axis, about


def levels(low: float, high: float, *, least: float = 0.01) -> list[float]:
    """Round numbers, evenly spaced, that begin at or below low and end at or above high.

    least: what the axis spans at least, above 0.
    """
    span = max(high - low, least)
    power = 10.0 ** math.floor(math.log10(span / STEPS))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * STEPS >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, max(last, first + 1) + 1)]
