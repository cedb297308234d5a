"""Methods with tiny made-up weights, found by the method's name: a file of that name with `options(folder) -> dict`."""

from importlib import import_module
from pathlib import Path

from raypipe.lookup import modules


def options(method: str, folder: Path) -> dict:
    """The options with which a method runs on made-up weights, written into the folder; {} if it needs none."""
    return import_module(f"{__name__}.{method}").options(folder) if method in modules(__path__) else {}
