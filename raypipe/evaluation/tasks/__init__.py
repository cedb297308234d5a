"""One file per task; the file's name is the task's name. A task scores the masks of one image against its label.

Each file has SCHEMA (the columns of its table), MEANS (those that are averaged), LEAVES (the fields of a segment that
it reads) and `score(row, label) -> dict`, all pure: counts that add up first, ratios last.
"""

from types import ModuleType

from raypipe import lookup


def names() -> list[str]:
    """All tasks, sorted."""
    return lookup.modules(__path__)


def find(name: str) -> ModuleType:
    """The task's module. Raises ValueError with the nearest known name for an unknown one."""
    return lookup.module(__name__, name, names(), kind="task")
