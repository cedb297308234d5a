"""The words of a command line: how options look in the help, and what is said about words that fit none."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from raypipe.pipeline.options import WORDS, methods_with
from raypipe.types import PatternSegmenter, Segmenter, name_of

OVER = {"tau": "0.2,0.4", "n_max": "1,2,4", "seed": "0,1"}  # what the example of a sweep over trainings tries
NAMES = {str: "TEXT", int: "INT", float: "NUMBER"}  # of a value, in the help
REGISTRY = ConstructorRegistry()


EXAMPLES = {  # of each verb, for its help, one a line; METHOD stands for the one that was named
    "label": "raypipe label METHOD --input photos/ --output runs/METHOD --foreground grabcut --sheet",
    "report": "raypipe report runs/kmeans",
    "explain": "raypipe explain zero_guidance --input photo.jpg --point 320,200 --segment point --output page.html",
    "export": """raypipe export runs/kmeans --format coco --where "share > 0.01\"
  raypipe export runs/maskclip --format png --classes voc2012""",
    "verify": "raypipe verify runs/kmeans",
    "compact": "raypipe compact runs/kmeans",
    "methods": "raypipe methods kmeans",
    "doctor": "raypipe doctor",
    "weights": "raypipe weights clipseg --to weights/clipseg",
    "demo": "raypipe demo",
    "evaluate": """raypipe evaluate runs/kmeans --labels labels/
  raypipe evaluate runs/maskclip --task semantic --labels labels/ --classes cat,dog""",
    "sweep": "raypipe sweep kmeans --input photos/ --labels labels/ --output sweep --foreground grabcut --over k=2,3",
    "sweep --train": "raypipe sweep METHOD --train --input photos/ --validate ecssd --root data/ --output sweep "
    "--over OPTION",
    "train": "raypipe train METHOD --input photos/ --output weights/METHOD --workers 2",
    "archive": "raypipe archive --input photos/ --output archive --classes cat,dog --concepts default --faces none",
    "agree": "raypipe agree runs/kmeans runs/watershed",
    "trust": """raypipe trust runs/kmeans runs/watershed runs/gloper
  raypipe trust runs/kmeans runs/watershed --labels labels/ --task pattern""",
    "benchmark": "raypipe benchmark --quick --only kmeans guided",
}


@REGISTRY.primitive_rule
def plain(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Text, numbers and lists of them, each also where it may be None, in plain words; None for other types."""
    kinds, is_list, may_be_none = _taken_apart(info.type)
    if not kinds or not set(kinds) <= set(NAMES):
        return None

    def read(words: list[str]):
        if may_be_none and words == ["None"]:
            return None
        values = [_value(word, kinds) for word in words]
        return tuple(values) if is_list else values[0]

    return PrimitiveConstructorSpec(
        nargs="*" if is_list else 1,
        metavar=NAMES[kinds[-1]] + " ..." * is_list,
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, (list, tuple) if is_list else (*kinds, int)),
        str_from_instance=lambda value: (
            [str(each) for each in (value if is_list and value is not None else [value])] or ["none"]
        ),
    )


def example(verb: str, method: type | None) -> str:
    """Command lines to copy. method: of the method or recipe that was named, if any."""
    usual = "sempart" if verb.endswith("train") else "kmeans"
    text = EXAMPLES[verb].replace("METHOD", name_of(method) if method else usual)
    if verb == "label" and method:
        if not issubclass(method, PatternSegmenter):
            text = text.replace(" --foreground grabcut", "")
        if getattr(method, "weights", "") == "none":  # nobody has published any
            text = text.replace(" --sheet", f" --weights weights/{name_of(method)} --sheet")
    if verb == "sweep --train":
        names = method.__dataclass_fields__ if method else OVER
        text = text.replace("OPTION", next(f"{name}={values}" for name, values in OVER.items() if name in names))
        if method and not (hasattr(method, "image_size") and hasattr(method, "resize")):
            text = text.replace("--validate ecssd", f"--dataset {'voc2012' if 'classes' in names else 'ecssd'}")
    if verb.endswith("train") and method:
        options = {"archive": "--archive archive/", "masks": "--masks runs/tokencut"}
        if given := [option for name, option in options.items() if name in method.__dataclass_fields__]:
            text = text.replace("--input photos/", " ".join(given))
        text = text if method.has_steps else text.replace(" --workers 2", "")
    return text


def without(kind: type, name: str) -> type:
    """The dataclass with one option that has its default and is left out of the help."""
    hidden = Annotated[get_type_hints(kind)[name], tyro.conf.Suppress, tyro.conf.Fixed]
    members = {"__annotations__": {name: hidden}, name: kind.__dataclass_fields__[name].default}
    kept = {each: getattr(kind, each) for each in ("__module__", "__doc__")}
    is_frozen = kind.__dataclass_params__.frozen
    return dataclass(type(kind.__name__, (kind,), members | kept), frozen=is_frozen)


def arranged(words: list[str], kinds: list[type]) -> tuple[list[str], list[str]]:
    """A command line as the words that stand alone, and the options; what is given to a list in several places is one.

    Raises ValueError for words that no option takes, such as a pattern that the shell has spread, and for an option of
    another method. With other unknown options it comes back as it is: tyro knows the nearest one.
    """
    room_of, alone = room(kinds)
    options, stray = {}, {}  # the options by name, those that take one value by their place
    behind, group, left = "", [], 0.0
    for word in words:
        flag, equals, value = word.partition("=")
        if re.match(r"-[A-Za-z]", word) or word == "--help":
            return [], words
        if flag.startswith("--"):
            name = flag[2:].replace("-", "_")
            if name not in room_of:
                _refuse_of_other(name, flag, kinds)
                return [], words
            is_list = room_of[name] == math.inf
            group = options.setdefault(name if is_list else len(options), [flag if is_list else word])
            group += [value] * bool(is_list and equals)
            behind, left = flag, 0 if equals else room_of[name]
        elif left:
            group.append(word)
            left -= 1
        else:
            stray.setdefault(behind, []).append(word)
    if sum(map(len, stray.values())) > sum(alone.values()):
        behind, more = list(stray.items())[-1]
        if not behind:
            raise ValueError(f"{more[0]!r} belongs to no option; write it behind one, such as --input {more[0]}")
        text = f"no option takes {' '.join(more)!r} behind the value of {behind}"
        raise ValueError(f"{text}; quote what has blanks or stars, as in {behind} 'my photos/*.jpg'")
    return list(chain.from_iterable(stray.values())), list(chain.from_iterable(options.values()))


def _refuse_of_other(name: str, flag: str, kinds: list[type]) -> None:
    method = next((name_of(kind) for kind in kinds if issubclass(kind, Segmenter)), None)
    if method and (owners := methods_with(name)):
        raise ValueError(f"{flag} is an option of {', '.join(owners)}; {method} has none of that name")


def _taken_apart(hint) -> tuple[list, bool, bool]:
    """Of a type: what one value may be, whether it is a list, whether it may be None."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [choice for choice in choices if choice is not NoneType]
    is_list = bool(kinds) and get_origin(kinds[0]) in (tuple, list)
    return ([get_args(kinds[0])[0]] if is_list else kinds), is_list, NoneType in choices


def _value(word: str, kinds: list[type]):
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return kind(word)
    raise ValueError(f"expected {' or '.join(WORDS[kind] for kind in kinds)}, got {word!r}")


def room(kinds: Iterable[type]) -> tuple[dict[str, float], dict[str, float]]:
    """How many words each option takes behind it, by name, and each option without a flag."""
    behind, alone = {}, {}
    for kind in kinds:
        hints = get_type_hints(kind, include_extras=True)
        for name in (field.name for field in fields(kind)):
            values, is_list, _ = _taken_apart(hints[name])
            takes = math.inf if is_list else float(values != [bool])
            if tyro.conf.Positional in getattr(hints[name], "__metadata__", ()):
                alone[name] = takes
            else:
                behind |= {name: takes} if takes else {name: takes, f"no_{name}": takes}
    return behind, alone
