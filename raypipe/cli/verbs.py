"""`raypipe VERB`: verbs to functions, errors to exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but with too many bad images or a category without any, 4 output
locked or of another configuration, 130 and 143 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import NamedTuple

from raypipe import lookup

log = logging.getLogger("raypipe")
GOES_ON = "this command goes on:"  # begins the note that an error of a run carries
OF_TRAININGS = "sweep --train"  # with this flag anywhere, `sweep` is another verb


class Verb(NamedTuple):
    """A verb's room, where a file of its name holds a dataclass and a function of that name, and its line in the help.

    The function takes the dataclass and an instance of each part, and returns what has the method `text()` and, where
    it is not always 0, the field `exit_code`.
    """

    room: str
    help: str
    parts: tuple[str, ...] = ()  # what has options of its own: method or recipe (the first word), refine, task (flags)
    file: str = ""  # the file's name where it is not the verb's own

    def load(self, verb: str) -> tuple[ModuleType, type, Callable]:
        """The file of the verb, the dataclass of its options and its function."""
        name = self.file or verb
        module = import_module(f"raypipe.{self.room}.{name}")
        return module, getattr(module, name.capitalize()), getattr(module, name)


VERBS = {
    "label": Verb("pipeline", "images -> masks in Parquet; resumable, incremental", ("method", "refine")),
    "report": Verb("report", "one HTML page about a run: pictures, figures, errors, provenance"),
    "explain": Verb("report", "where a method's network looks in one image, as one HTML page", ("method",)),
    "export": Verb("export", "masks as COCO, PNG, YOLO, Label Studio, Hugging Face, WebDataset, cut-outs or CSV"),
    "verify": Verb("maintenance", "whether a run still holds what was committed; --repair mends it"),
    "compact": Verb("maintenance", "a run's many small files as few large ones"),
    "methods": Verb("cli", "what there is and what it needs"),
    "doctor": Verb("cli", "this machine, the weights at hand, what runs where, what is missing and how to get it"),
    "weights": Verb("cli", "fetch a method's weights into a folder, for machines without internet"),
    "demo": Verb("cli", "a run on sample photographs, without any download"),
    "evaluate": Verb("evaluation", "a run against labels -> measures per image and their means", ("task",)),
    "sweep": Verb(
        "sweep",
        "a method's parameters against labels -> a table of trials and the best setting",
        ("method", "refine", "task"),
    ),
    OF_TRAININGS: Verb(
        "sweep",
        "a training's options against labels -> a table of trials and the best setting",
        ("recipe",),
        "training",
    ),
    "train": Verb("training", "images without labels -> weights of a method; resumable", ("recipe",)),
    "archive": Verb("archive", "names of categories -> the images of a corpus that show them, found by CLIP"),
    "agree": Verb("evaluation", "runs of several methods against each other, pair by pair"),
    "trust": Verb(
        "evaluation", "which masks of a run to trust, by all that agrees; with a few labels, how good they are"
    ),
    "benchmark": Verb("benchmark", "measured ratios on this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code; wrong flags leave through SystemExit(2).

    A reader of stdout that has gone, as of `raypipe ... | head`, is no error: the code is then a shell's own, 141.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still flushes at its end
        return 141


def _main(argv: list[str]) -> int:
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"raypipe {version('raypipe')}")
        return 0
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    verb, rest = argv[0], argv[1:]
    if verb == "sweep" and "--train" in rest:
        verb, rest = OF_TRAININGS, [word for word in rest if word != "--train"]
    log.setLevel("DEBUG" if "--debug" in rest else "INFO")
    if verb not in VERBS:
        return _said(f"unknown command {verb!r}; {_instead(verb, rest)}", 2)
    try:
        return _run(verb, rest)
    except (SystemExit, BrokenPipeError):
        raise
    except BaseException as error:
        return _failed(error)


def _instead(verb: str, rest: list[str]) -> str:
    """What to write instead of an unknown command."""
    from raypipe import segmenters

    if verb in segmenters.names():
        return f"it is a method: {shlex.join(['raypipe', 'label', verb, *rest])}"
    return lookup.suggest(verb, VERBS)


def _run(verb: str, argv: list[str]) -> int:
    """Any verb: parse, call its function, print the result."""
    from raypipe.cli import config

    module, options, function = VERBS[verb].load(verb)
    if (first := config.first_word(VERBS[verb].parts)) and (not argv or argv[0].startswith("-")):
        known = getattr(module, "methods", config.ROOMS[first].names)
        return _choose_method(verb, options, known(), argv)
    command = config.parse(verb, options, VERBS[verb].parts, argv)
    if command.terminal.print_config:
        print(config.as_yaml(command), end="")
        return 0
    more = {name: getattr(command, name) for name in ("given", "flags") if name in signature(function).parameters}
    try:
        result = function(command.options, *command.parts, **more)
    except BaseException as error:
        if hasattr(module, "has_begun") and module.has_begun(command.options):  # the same command would go on
            error.add_note(f"{GOES_ON}\n  {_typed(verb, argv)}")
        if isinstance(error, BrokenPipeError):  # of a connection: the verbs' functions do not write to stdout
            return _failed(error)
        raise
    plain = result if isinstance(result, dict | list) else dataclasses.asdict(result)
    if not (command.terminal.json and plain is result):  # a list or a dict has only one of the two forms
        print(result.text())
    if getattr(result, "failed", 0) and not getattr(command.options, "retry_errors", True):
        when = "to try the failed images again" if result.retryable else "once they have another file or setting"
        print(f"{when}: {_typed(verb, argv)} --retry-errors")
    if command.terminal.json:
        print(json.dumps(plain))
    return getattr(result, "exit_code", 0)


def _choose_method(verb: str, options: type, known: list[str], argv: list[str]) -> int:
    """Tell how to go on without a method's name. known: those to choose from."""
    from raypipe.cli import words as plain_words

    needed = [f.name for f in dataclasses.fields(options) if f.default is f.default_factory is dataclasses.MISSING]
    words = " ".join(f"--{name} {name.upper()}" for name in needed)
    names = "\n".join(f"  {name}" for name in known)
    if named := [word for word in argv if word in known]:
        rest = [word for word in argv if word != named[0]]
        return _said(f"the method comes first: {_typed(verb, [named[0], *rest])}", 2)
    print(f"usage: raypipe {verb} METHOD {words} [OPTIONS]\n\nMethods:\n{names}\n")
    print(f"For example:\n  {plain_words.example(verb, None)}\n")
    print(f"All options: raypipe {verb} METHOD --help        What each method needs: raypipe methods")
    return 0 if argv and argv[0] in ("-h", "--help") else 2


def _typed(verb: str, argv: list[str]) -> str:
    """The command line as it was typed, but without credentials."""
    from raypipe.storage import without_secrets

    shown = [without_secrets(word) for word in argv]
    is_script = os.path.basename(sys.argv[0]) == f"{verb}.py"
    program = ["python", f"jobs/{verb}.py"] if is_script else ["raypipe", *verb.split()]
    left_out = "" if shown == argv else "  # with the credentials, which are left out here"
    return shlex.join([*program, *shown]) + left_out


def _failed(error: BaseException) -> int:
    """Print an error and, where there is one, the command that goes on. Returns the exit code."""
    from raypipe.run import OtherConfiguration
    from raypipe.runtime.interruption import Interrupted
    from raypipe.storage import Locked

    if log.isEnabledFor(logging.DEBUG):
        traceback.print_exception(error)
    way_on = "".join(note for note in getattr(error, "__notes__", []) if note.startswith(GOES_ON))
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(2)
    if isinstance(error, Interrupted):
        print("\ninterrupted" + (f"; what is committed is kept, {way_on}" if way_on else ""), file=sys.stderr)
        return error.exit_code
    if isinstance(error, (Locked, OtherConfiguration)):
        return _said(error, 4)
    text = lookup.one_line(error, limit=None) if isinstance(error, OSError) else str(error) or type(error).__name__
    if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
        return _said(text, 2)
    _said(text, 1)
    if way_on:
        print(f"what is committed is kept; once the cause is gone, {way_on}", file=sys.stderr)
    return 1


def _said(message: object, code: int) -> int:
    print(f"raypipe: {message}", file=sys.stderr)
    return code


def _help() -> str:
    verbs = "\n".join(f"  {name:<15}{verb.help}" for name, verb in VERBS.items())
    return (
        "usage: raypipe COMMAND [OPTIONS]\n\nSegmentation masks for large image collections without labels.\n\n"
        f"{verbs}\n\nOptions of a command: raypipe COMMAND --help        Start here: raypipe demo"
    )
