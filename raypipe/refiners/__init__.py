"""One file per refiner; the file's name is the refiner's name. Looking one up imports that refiner only.

A refiner is a dataclass whose fields are its parameters, all named `refine_...`. Calling it with (masks, image) returns
(soft masks, note): float32 (N, H, W) in [0, 1] and comma-joined remarks.
"""

from raypipe import lookup


def names() -> list[str]:
    """All refiners, sorted."""
    return lookup.modules(__path__)


def find(name: str) -> type:
    """The refiner's dataclass. Raises ValueError with the nearest known name for an unknown one."""
    return lookup.module(__name__, name, names(), kind="refiner").REFINER
