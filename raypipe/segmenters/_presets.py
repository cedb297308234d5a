"""Named sets of options: a field left at None takes the value that the method's preset has for it."""

from __future__ import annotations

from raypipe import lookup
from raypipe.types import Segmenter


def fill(method: Segmenter) -> None:
    """Set every field of the method that is None to the value in `method.presets[method.preset]`.

    To be called first in `__post_init__`, so that runs record values and not a name whose meaning may change. Raises
    ValueError for an unknown preset.
    """
    if method.preset not in method.presets:
        known = lookup.suggest(method.preset, method.presets)
        raise ValueError(f"{method.name}: unknown preset {method.preset!r}; {known}")
    for name, value in method.presets[method.preset].items():
        if getattr(method, name) is None:
            setattr(method, name, value)
