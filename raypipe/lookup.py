"""Words: modules of a package by name, lists of texts, what to say about an unknown name or an error; nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

MOST_SAID = 40  # names


def suggest(name: object, known: Iterable[object]) -> str:
    """What to write instead of an unknown name: the nearest known one, else all of them, or the first of very many."""
    known = [str(each) for each in known]
    near = get_close_matches(str(name), known, 1)
    known = known if len(known) <= MOST_SAID else [*known[:MOST_SAID], f"... ({len(known):,} in all)"]
    return f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"


def modules(path: Iterable[str]) -> list[str]:
    """The modules of a package by its `__path__`, sorted, but for what they share, whose names begin with `_`."""
    return sorted(module.name for module in iter_modules(path) if not module.name.startswith("_"))


def module(package: str, name: object, known: list[str], *, kind: str) -> ModuleType:
    """Import one of the known modules of a package. Raises ValueError, with the right name, for an unknown one."""
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {suggest(name, known)}")
    return import_module(f"{package}.{name}")


def json_list(text: str, *, option: str) -> list[str]:
    """The texts of a JSON list, into which options turn what files hold. Raises ValueError for anything else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}: {text[:80]!r} is no JSON list ({error})") from error
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{option}: expected a list of texts, got {text[:80]!r}")
    return found


def one_line(error: BaseException, *, limit: int | None = 250) -> str:
    """What an error says, its start and end where it is longer than `limit`; its kind where it says nothing.

    An operating system's error without its number, and with the file that it is about.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(text.split()) or type(error).__name__
    if limit is None or len(text) <= limit:
        return text
    return f"{text[: limit * 3 // 5]} ... {text[5 - limit * 2 // 5 :]}"
