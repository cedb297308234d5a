"""Options by name: the dataclasses of a job, of a method and of a refiner as one flat set, for YAML and for Python."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches

from raypipe import refine, segmenters
from raypipe.pipeline import Label
from raypipe.types import Segmenter


def build(method: str, values: dict) -> tuple[Label, Segmenter, object | None]:
    """The job, the method and the refiner (or None) from flat values.

    Raises TypeError that names an unknown option and the nearest known one, ValueError for an unknown method.
    """
    kinds = [Label, segmenters.find(method)]
    if values.get("refine") is not None:
        kinds.append(refine.find(values["refine"]))
    check_names(values, kinds)
    parts = [kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}) for kind in kinds]
    return parts[0], parts[1], parts[2] if len(parts) == 3 else None


def check_names(values: dict, kinds: list[type]) -> None:
    """Raise TypeError for a key of `values` that is a field of none of the dataclasses."""
    known = [f.name for kind in kinds for f in fields(kind)]
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(sorted(known))}"
            raise TypeError(f"unknown option {name!r} (value {values[name]!r}); {hint}")
