"""Options by name: the dataclasses of a job, of a method and of a refiner as one flat set, for YAML and for Python."""

from __future__ import annotations

import operator
import os
from dataclasses import fields
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from raypipe import lookup, refiners, segmenters
from raypipe.pipeline.job import Label
from raypipe.types import Segmenter

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "None"}


def build(method: str, values: dict) -> tuple[Label, Segmenter, object | None]:
    """The job, the method and the refiner (or None) from flat values.

    A pathlib.Path is fine where text is expected, and an int for a float. Raises ValueError for an unknown method or a
    wrong choice, TypeError for a value of the wrong type and for an unknown option, with the nearest known one.
    """
    kinds = [Label, segmenters.find(method)]
    if values.get("refine") is not None:
        kinds.append(refiners.find(values["refine"]))
    values = checked(values, kinds)
    parts = [kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}) for kind in kinds]
    return parts[0], parts[1], parts[2] if len(parts) == 3 else None


def checked(values: dict, kinds: list[type]) -> dict:
    """The values as the fields of the dataclasses want them. Raises TypeError or ValueError that names the option."""
    known = {name: hint for kind in kinds for name, hint in types(kind).items()}
    for name, value in values.items():
        if name in known:
            continue
        if owners := refiners_with(name):
            text = f"has no effect without a refiner; set refine to {' or '.join(map(repr, owners))}"
            raise TypeError(f"option {name!r} (value {value!r}) {text}")
        if owners := methods_with(name):
            text = f"option {name!r} (value {value!r}) is one of {', '.join(owners)}, not of this method; leave it out"
            raise TypeError(text)
        raise TypeError(f"unknown option {name!r} (value {value!r}); {lookup.suggest(name, known)}")
    return {name: _checked(name, value, known[name]) for name, value in values.items()}


def flags(name: str, value, hint: object) -> list[str]:
    """An option as words of a command line.

    value: a bool, a sequence, or what `str` writes as tyro reads it. hint: the field's type; a `bool | None` is no
    switch but has a value.
    """
    option = name.replace("_", "-")
    if hint is bool:
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", *map(str, value if isinstance(value, list | tuple) else [value])]


def refiners_with(name: str) -> list[str]:
    """The refiners that have an option."""
    return [each for each in refiners.names() if name in types(refiners.find(each))]


def methods_with(name: str) -> list[str]:
    """The methods that have an option."""
    return [each for each in segmenters.names() if name in types(segmenters.find(each))]


def types(kind: type) -> dict[str, object]:
    """The types of a dataclass's fields by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _checked(name: str, value, hint):
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for choice in choices:
        try:
            return _as(value, choice)
        except TypeError:
            continue
    expected = " or ".join(_word(choice) for choice in choices)
    is_wrong_choice = isinstance(value, str) and any(get_origin(choice) is Literal for choice in choices)
    advice = "; write the paths into a .txt file, one per line" if name == "input" and isinstance(value, list) else ""
    raise (ValueError if is_wrong_choice else TypeError)(f"option {name!r}: expected {expected}, got {value!r}{advice}")


def _as(value, kind):
    """The value as one simple type wants it. Raises TypeError when it does not fit."""
    if get_origin(kind) is Literal:
        fits = value in get_args(kind)
    elif get_origin(kind) in (tuple, list):
        fits = isinstance(value, tuple | list)
        value = get_origin(kind)(_as(each, get_args(kind)[0]) for each in value) if fits else value
    elif kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif kind is int and not isinstance(value, bool):
        return operator.index(value)  # numpy's integers too
    elif kind is float and not isinstance(value, bool | str):
        return float(value)
    else:
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)  # True is an int otherwise
    if not fits:
        raise TypeError
    return value


def _word(kind) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (tuple, list):
        return f"a list of {_word(get_args(kind)[0])}"
    return WORDS.get(kind, str(kind))
