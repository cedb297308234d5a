"""One file per format; the file's name is the format's name.

A format is a module with `write(images, target, about) -> Counter` (what the user should know, by sentence), ORIGINALS
(it needs the pictures, in each row's `content`) and CATEGORIES (it names what a segment shows).
"""

from types import ModuleType

from raypipe import lookup


def names() -> list[str]:
    """All formats, sorted."""
    return lookup.modules(__path__)


def find(name: str) -> ModuleType:
    """The format's module. Raises ValueError with the nearest known name for an unknown one."""
    return lookup.module(__name__, name, names(), kind="format")
