"""The plainest formulation of methods, refiners and solvers, one file of the same name each: for speed and tests.

A file has `compare(subject, device, images, repeats) -> list[Figure]`, for a loaded method, a refiner, or None for a
solver. It knows nothing of runs or jobs, and takes from a method only what both must share: weights and constants.
"""

from types import ModuleType

from raypipe import lookup


def find(name: str) -> ModuleType | None:
    """The plain twin of a method, refiner or solver; None where there is no other formulation."""
    known = lookup.modules(__path__)
    return lookup.module(__name__, name, known, kind="twin") if name in known else None
