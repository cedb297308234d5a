"""One file per method; the file's name is the method's name. Looking one up imports that method only."""

from raypipe import lookup
from raypipe.types import Segmenter


def names() -> list[str]:
    """All methods, sorted."""
    return lookup.modules(__path__)


def find(name: str) -> type[Segmenter]:
    """The method's dataclass. Raises ValueError with the nearest known name for an unknown one."""
    return lookup.module(__name__, name, names(), kind="segmenter").SEGMENTER
