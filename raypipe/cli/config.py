"""The options of a command as one flat set: the flags, and what a `--config` file holds; flags win."""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from typing import NamedTuple

import yaml

from raypipe import refiners, segmenters, storage
from raypipe.evaluation import tasks
from raypipe.pipeline.options import checked, flags, refiner_with
from raypipe.storage import without_secrets
from raypipe.types import BadImage

log = logging.getLogger("raypipe")
MOST_BYTES = 1 << 20  # of a config file; options take a few hundred
FIND = {"method": segmenters.find, "refine": refiners.find, "task": tasks.find}  # the dataclass of a part by its name


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
    """Reads 1e-3 as a number, which YAML 1.1 takes for text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(verb: str, options: type, parts: tuple[str, ...], argv: list[str]) -> Command:
    """Read a command line. A method is its first word; a refiner and a task are named by a flag or by the config file.

    Raises ValueError or TypeError that names what is wrong and what is right; wrong flags leave through SystemExit(2).
    """
    method = segmenters.find(argv[0]) if "method" in parts else None
    words = argv[1:] if method else argv
    path = _peek(words, "--config")
    values = _of_file(path) if path else {}
    chosen = {"method": argv[0] if method else None, "task": _default(options, "task")}
    chosen |= {name: _peek(words, f"--{name}") or values.get(name, chosen.get(name)) for name in ("refine", "task")}
    kinds = {name: FIND[name](chosen[name]) for name in parts if chosen[name] not in (None, "None")}
    if "refine" in parts and "refine" not in kinds:
        _refuse_refiner_options(words)
    values = _without_presets(values, kinds, words)
    found = _parsed(f"raypipe {verb}" + (f" {argv[0]}" if method else ""), options, kinds, words, values, path)
    log.setLevel("DEBUG" if found["terminal"].debug else "INFO")
    typed = {word[2:].partition("=")[0].removeprefix("no-").replace("-", "_") for word in words if word[:2] == "--"}
    given = typed | {name for name, value in values.items() if value is not None}
    return Command(found["options"], [found.get(name) for name in parts], found["terminal"], typed, given)


def as_yaml(command: Command) -> str:
    """All options of a command as a config file."""
    set_parts = [part for part in (command.options, *command.parts) if part is not None]
    values = {name: value for part in set_parts for name, value in dataclasses.asdict(part).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def read(uri: str) -> dict:
    """The options in a YAML file by name. uri: a path or a URI. Raises ValueError, without the file's name."""
    try:
        values = yaml.load(_content(uri).decode(), Loader) or {}
    except OSError as error:
        raise ValueError(error.strerror) from error
    except BadImage as error:
        raise ValueError(error.message) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid YAML: {error}") from error
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise ValueError("expected flat lines such as `batch_size: 8`, one option each")
    return values


def _content(uri: str) -> bytes:
    path = storage.local_path(uri)
    if path is None:
        return storage.read_bytes(uri, max_bytes=MOST_BYTES)
    with open(path, "rb") as file:  # also a pipe, such as <(...) of a shell
        return file.read()


def _of_file(path: str) -> dict:
    """The content of the --config file."""
    try:
        values = read(path)
    except ValueError as error:
        raise ValueError(f"--config {without_secrets(path)}: {error}") from error
    if "config" in values:
        raise ValueError(f"--config {path}: a config file cannot name another one, got config: {values['config']!r}")
    return values


def _without_presets(values: dict, kinds: dict[str, type], words: list[str]) -> dict:
    """What a config file holds but for what a preset on the command line sets, for flags win."""
    named = {"method": "preset", "refine": "refine-preset"}
    typed = [kinds[part] for part in kinds if part in named and _is_typed(words, named[part])]
    chosen = {name for kind in typed for preset in getattr(kind, "presets", {}).values() for name in preset}
    return {name: value for name, value in values.items() if name not in chosen}


def _is_typed(words: list[str], option: str) -> bool:
    """Whether a flag, or a value of `--over`, names the option."""
    name = option.replace("-", "_")
    return any(word == f"--{option}" or word.startswith((f"--{option}=", f"{name}=")) for word in words)


def _parsed(prog: str, options: type, kinds: dict[str, type], words: list[str], values: dict, path: str | None) -> dict:
    """Instances of the verb's dataclass, of its parts and of Terminal, by name. `values` count as earlier flags."""
    import tyro

    kinds = {"options": options, **kinds, "terminal": Terminal}
    if values:
        try:
            values = checked(values, list(kinds.values()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--config {path}: {error}") from error
        words = [*(word for name, value in values.items() for word in flags(name, value)), *words]
    merged = dataclasses.make_dataclass(
        "Options", [(name, tyro.conf.OmitArgPrefixes[kind]) for name, kind in kinds.items()]
    )
    description = kinds.get("method", options).__doc__
    found = tyro.cli(merged, prog=prog, description=description, args=words)
    return {name: getattr(found, name) for name in kinds}


def _default(options: type, name: str) -> str | None:
    return next((field.default for field in dataclasses.fields(options) if field.name == name), None)


def _refuse_refiner_options(words: list[str]) -> None:
    """Raise ValueError for a refiner's option where there is no refiner."""
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and (refiner := refiner_with(name[2:].replace("-", "_"))):
            raise ValueError(f"{name} has no effect without a refiner; add --refine {refiner}")


def _peek(words: list[str], flag: str) -> str | None:
    """The value of a flag that decides which other flags there are."""
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
