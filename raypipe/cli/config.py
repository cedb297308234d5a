"""The options of a command as one flat set: the flags, and what a `--config` file holds; flags win."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import yaml

from raypipe import refiners, segmenters, storage, training
from raypipe.cli import words as plain_words
from raypipe.evaluation import datasets, tasks
from raypipe.pipeline.options import checked, flags, refiners_with, types
from raypipe.storage import without_secrets
from raypipe.types import BadImage, name_of

log = logging.getLogger("raypipe")
MOST_BYTES = 1 << 20  # of a config file; options take a few hundred
# where the dataclass of a part is found by its name
ROOMS = {"method": segmenters, "recipe": training, "refine": refiners, "task": tasks}
FIRST_WORDS = ("method", "recipe")  # parts that the first word of the command line names; flags name the others


@dataclass(frozen=True)
class Terminal:
    """How the command itself behaves."""

    config: str | None = None  # YAML file with any other option (underscores in names); flags win over it
    print_config: bool = False  # print all options as such a file and stop
    json: bool = False  # print the result as JSON, as the last line of stdout
    debug: bool = False  # show the traceback of an error


class Command(NamedTuple):
    """A command line as it was understood."""

    options: object  # the verb's dataclass
    parts: list  # an instance of each of the verb's parts; None where none was chosen
    terminal: Terminal
    flags: set[str]  # names of the options that were typed
    given: set[str]  # those, and the ones that the config file sets


class Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, which YAML 1.1 takes for text, and 512:32 as text, which it takes for one of base 60."""


NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))
for digit in "0123456789":
    Loader.yaml_implicit_resolvers[digit].insert(0, ("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")))


def parse(verb: str, options: type, parts: tuple[str, ...], argv: list[str]) -> Command:
    """Read a command line. A method or recipe is its first word; a flag or the config file names refiner and task.

    Raises ValueError or TypeError that names what is wrong and what is right; wrong flags leave through SystemExit(2).
    """
    first = first_word(parts)
    named = ROOMS[first].find(argv[0]) if first else None
    words = argv[1:] if first else argv
    typed = _typed_flags(words)
    path = typed.get("config")
    values = _of_file(path) if path else {}
    chosen = values | {name.replace("-", "_"): value for name, value in typed.items() if value}
    chosen = {name: chosen.get(name) for name in ("refine", "task", "dataset", "label_classes", "classes")}
    has_classes = bool(chosen["label_classes"] or chosen["classes"] or getattr(named, "exclusive", False))
    chosen |= {"task": chosen["task"] or datasets.task_of(chosen["dataset"], has_classes)}
    chosen |= {first: argv[0]} if first else {}
    kinds = {name: ROOMS[name].find(chosen[name]) for name in parts if chosen[name] not in (None, "None")}
    if "refine" in parts and "refine" not in kinds:
        for name in typed:
            if owners := refiners_with(name.replace("-", "_")):
                raise ValueError(f"--{name} has no effect without a refiner; add --refine {' or '.join(owners)}")
    names = {name.removeprefix("no-").replace("-", "_") for name in typed}
    swept = {word.partition("=")[0] for word in words if "=" in word}  # by `--over`
    values = _without_presets(values, kinds, names | swept)
    task, shared = kinds.get("task"), ()
    if task and "method" in kinds:  # an option of both, as `clip`, has one value: the method's
        shared = sorted(task.__dataclass_fields__.keys() & kinds["method"].__dataclass_fields__.keys())
    for name in shared:
        kinds["task"] = plain_words.without(kinds["task"], name)
    kinds = {"options": options, **kinds, "terminal": Terminal}
    prog = f"raypipe {verb}" + (f" {argv[0]}" if first else "")
    found = _parsed(prog, kinds, words, values, path, plain_words.example(verb, named))
    if shared:
        its = dataclasses.asdict(found["task"]) | {name: getattr(found["method"], name) for name in shared}
        found["task"] = task(**its)
    log.setLevel("DEBUG" if found["terminal"].debug else "INFO")
    given = names | {name for name, value in values.items() if value is not None}
    return Command(found["options"], [found.get(name) for name in parts], found["terminal"], names, given)


def first_word(parts: tuple[str, ...]) -> str | None:
    """Which of a verb's parts the first word of its command line names; None where it names none."""
    return next((part for part in parts if part in FIRST_WORDS), None)


def as_yaml(command: Command) -> str:
    """All options of a command as a config file."""
    set_parts = [part for part in (command.options, *command.parts) if part is not None]
    values = {name: value for part in set_parts for name, value in dataclasses.asdict(part).items()}
    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, allow_unicode=True)  # of plain types only


def _of_file(path: str) -> dict:
    """The options in the --config file by name. path: also a URI. Raises ValueError that names it."""
    where = f"--config {without_secrets(path)}"
    try:
        # Relative to the current folder also in a submitted job, whose folder may well bring it along.
        local = storage.local_path(path if "://" in path else os.path.abspath(os.path.expanduser(path)))
        # What is local may also be a pipe, such as <(...) of a shell.
        content = Path(local).read_bytes() if local else storage.read_bytes(path, max_bytes=MOST_BYTES)
        values = yaml.load(content.decode(), Loader) or {}
    except (OSError, BadImage) as error:
        reason = error.message if isinstance(error, BadImage) else error.strerror
        raise ValueError(f"{where}: {reason}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: not valid YAML: {error}") from error
    nested = [name for name, value in values.items() if isinstance(value, dict)] if isinstance(values, dict) else []
    if nested or not isinstance(values, dict):
        got = f"{nested[0]!r} with lines of its own below it" if nested else f"a {type(values).__name__}"
        advice = "; --print-config writes such a file"
        raise ValueError(f"{where}: expected flat lines such as `batch_size: 8`, one option each, got {got}{advice}")
    if "config" in values:
        raise ValueError(f"{where}: a config file cannot name another one, got config: {values['config']!r}")
    return values


def _without_presets(values: dict, kinds: dict[str, type], named: set[str]) -> dict:
    """What a config file holds but for what a preset that the command line names sets, for flags win."""
    presets = {"method": "preset", "refine": "refine_preset"}
    typed = [kind for part, kind in kinds.items() if presets.get(part) in named]
    chosen = {name for kind in typed for preset in getattr(kind, "presets", {}).values() for name in preset}
    return {name: value for name, value in values.items() if name not in chosen}


def _parsed(
    prog: str, kinds: dict[str, type], words: list[str], values: dict, path: str | None, example: str
) -> dict[str, object]:
    """Instances of the verb's dataclass, of its parts and of Terminal, by name. `values` count as earlier flags."""
    import tyro

    alone, words = plain_words.arranged(words, list(kinds.values()))
    if values:
        try:
            values = checked(values, list(kinds.values()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--config {without_secrets(path)}: {error}") from error
        hints = {name: hint for kind in kinds.values() for name, hint in types(kind).items()}
        for name in plain_words.room(kinds.values())[1].keys() & values.keys():
            said = flags(name, values.pop(name), hints[name])[1:]
            alone = alone or said
        words = [*(word for name, value in values.items() for word in flags(name, value, hints[name])), *words]
    if "method" in kinds and not kinds["method"].soft and "refine" not in kinds and {"-h", "--help"} & {*words}:
        kinds = kinds | {"method": plain_words.without(kinds["method"], "threshold")}  # refused
    titles = {name: name if name == "terminal" else name_of(kind) for name, kind in kinds.items()}
    titles["options"] = prog.split()[1]
    fields = [(titles[name], tyro.conf.OmitArgPrefixes[kind]) for name, kind in kinds.items()]
    found = tyro.cli(
        dataclasses.make_dataclass("Options", fields),
        prog=prog,
        description=f"For example:\n  {example}",
        args=[*alone, *words],
        registry=plain_words.REGISTRY,
        config=[tyro.conf.PositionalMetavarFromFieldName],
    )
    return {name: getattr(found, titles[name]) for name in kinds}


def _typed_flags(words: list[str]) -> dict[str, str | None]:
    """The flags of a command line without their dashes; of each the first value, the word behind it or behind `=`."""
    found: dict[str, str | None] = {}
    for word, following in zip_longest(words, words[1:]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            found.setdefault(flag[2:], value if equals else following)
    return found
