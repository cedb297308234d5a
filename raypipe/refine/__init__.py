"""One file per refiner; the file's name is the refiner's name. Looking one up imports that refiner only.

A refiner is a dataclass whose fields are its parameters, all named `refine_...`. Calling it with (masks, image) returns
(soft masks, note): float32 (N, H, W) in [0, 1] and comma-joined remarks.
"""

from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules


def names() -> list[str]:
    """All refiners, sorted."""
    return sorted(module.name for module in iter_modules(__path__))


def find(name: str) -> type:
    """The refiner's dataclass. Raises ValueError with the known names for an unknown one."""
    if name not in names():
        near = get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown refiner {name!r}; {hint}choose one of: {', '.join(names())}")
    return import_module(f"{__name__}.{name}").REFINER
