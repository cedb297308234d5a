"""One file per method; the file's name is the method's name. Looking one up imports that method only."""

from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules

from raypipe.types import Segmenter


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(module.name for module in iter_modules(__path__))


def find(name: str) -> type[Segmenter]:
    """The method's dataclass. Raises ValueError with the known names for an unknown one."""
    if name not in names():
        near = get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown segmenter {name!r}; {hint}choose one of: {', '.join(names())}")
    return import_module(f"{__name__}.{name}").SEGMENTER
