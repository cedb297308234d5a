"""`raypipe methods`: what there is and what it needs."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro

from raypipe import segmenters
from raypipe.types import PatternSegmenter

FACTS = ("needs", "licence", "source", "caution")
WIDTH = 17  # of the column of names; the longest is spectral_voting


@dataclass(frozen=True)
class Methods:
    """What there is and what it needs."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()  # only these; all without a name


class Listed(list):
    """A dict per method: name, summary, needs, licence, source, caution."""

    def text(self) -> str:
        """Four lines per method, and one more where a caution is due."""
        lines = []
        for row in self:
            lines.append(f"{row['name']:<{WIDTH}}{row['summary']}")
            lines += [f"{'':<{WIDTH}}{name:<9}{row[name]}" for name in FACTS if row[name]]
        return "\n".join(lines)


def methods(options: Methods) -> Listed:
    """The named methods, or all, sorted by name. Raises ValueError for an unknown one, with the nearest name."""
    return Listed(_row(segmenters.find(name)) for name in options.names or segmenters.names())


def _row(kind: type) -> dict:
    method, module = kind(), sys.modules[kind.__module__]
    needs = [method.needs] if method.needs else []
    if isinstance(method, PatternSegmenter):
        needs.append(f"a foreground (default {method.foreground})")
    if method.gpus:
        needs.append("a GPU is used where there is one")
    return {
        "name": method.name,
        "summary": (module.__doc__ or "").strip().splitlines()[0],
        "needs": "; ".join(needs) or "nothing",
        "licence": method.licence,
        "source": method.source,
        "caution": method.caution,
    }
