"""The command line: verbs to functions, options to dataclasses, errors to exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but with too many bad images, 4 output locked or of another
configuration, 130 and 143 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from raypipe import lookup
from raypipe.cli.methods import _methods

log = logging.getLogger("raypipe")
WAY_ON = "this command goes on:"  # begins the note that an error of a run carries
VERBS = {
    "label": "images -> masks in Parquet; resumable, incremental",
    "report": "one HTML page about a run: pictures, figures, errors, provenance",
    "export": "masks as COCO, PNG, YOLO, Label Studio, Hugging Face, WebDataset, cut-outs or CSV",
    "verify": "whether a run still holds what was committed; --repair mends it",
    "compact": "a run's many small files as few large ones",
    "methods": "what there is and what it needs",
    "weights": "fetch a method's weights into a folder, for machines without internet",
    "demo": "a run on sample photographs, without any download",
    "evaluate": "a run against labels -> measures per image and their means",
    "sweep": "a method's parameters against labels -> a table of trials and the best setting",
    "agree": "runs of several methods against each other: which masks to trust, without labels",
    "benchmark": "measured ratios on this machine",
}
# Verbs of one dataclass of options and one function of it: the module and both names. The function returns a dataclass
# with the method `text()` and, where it is not always 0, the field `exit_code`.
MODULES = {
    "weights": ("cli.weights", "Weights", "weights"),
    "demo": ("cli.demo", "Demo", "demo"),
    "verify": ("maintenance.verify", "Verify", "verify"),
    "compact": ("maintenance.compact", "Compact", "compact"),
    "report": ("report.report", "Report", "report"),
    "export": ("export.export", "Export", "export"),
    "evaluate": ("evaluation.evaluate", "Evaluate", "evaluate"),
    "agree": ("evaluation.agree", "Agree", "agree"),
    "benchmark": ("benchmark.benchmark", "Benchmark", "benchmark"),
}


@dataclass(frozen=True)
class Terminal:
    """How the command itself behaves."""

    config: str | None = None  # YAML file with any other option (underscores in names); flags win over it
    print_config: bool = False  # print all options as such a file and stop
    json: bool = False  # print the result as JSON, as the last line of stdout
    debug: bool = False  # show the traceback of an error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code; wrong flags leave through SystemExit(2)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"raypipe {version('raypipe')}")
        return 0
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    verb, rest = argv[0], argv[1:]
    log.setLevel("DEBUG" if "--debug" in rest else "INFO")
    if verb not in VERBS:
        return _wrong(f"unknown command {verb!r}; {lookup.suggest(verb, VERBS)}")
    try:
        return {"label": _label, "methods": _methods, "sweep": _sweep}.get(verb, partial(_simple, verb))(rest)
    except SystemExit:
        raise
    except BaseException as error:
        if log.isEnabledFor(logging.DEBUG):
            traceback.print_exception(error)
        return _failed(error)


def _label(argv: list[str]) -> int:
    from raypipe.pipeline.dry_run import _estimate_text
    from raypipe.pipeline.job import Label
    from raypipe.pipeline.label import _summary_text, label

    if not argv or argv[0].startswith("-"):
        return _choose_method("label METHOD --input PATH --output FOLDER [OPTIONS]", argv)
    job, segmenter, refiner, terminal = _with_method("label", Label, argv)
    if terminal.print_config:
        return _print_config(job, segmenter, refiner)
    try:
        result = label(job, segmenter, refiner)
    except BaseException as error:
        if _has_begun(job):
            error.add_note(f"{WAY_ON}\n  {_command(argv)}")
        raise
    if job.dry_run:
        print(json.dumps(result) if terminal.json else _estimate_text(result))
        return 0
    print(_summary_text(result, "" if job.retry_errors else f"{_command(argv)} --retry-errors"))
    if terminal.json:
        print(json.dumps(dataclasses.asdict(result)))
    return result.exit_code


def _sweep(argv: list[str]) -> int:
    from raypipe.sweep import sweep
    from raypipe.sweep.plan import Sweep, refuse_given

    if not argv or argv[0].startswith("-"):
        usage = "sweep METHOD --input PATH --labels FOLDER --output FOLDER --over NAME=VALUES ... [OPTIONS]"
        return _choose_method(usage, argv)
    job, segmenter, refiner, terminal = _with_method("sweep", Sweep, argv)
    if terminal.print_config:
        return _print_config(job, segmenter, refiner)
    given = {word[2:].partition("=")[0].removeprefix("no-") for word in argv if word.startswith("--")}
    refuse_given(job, given)
    given |= {name for name, value in _config(argv, type(segmenter)).items() if value is not None}
    try:
        result = sweep.sweep(job, segmenter, refiner, given=given)
    except BaseException as error:
        if sweep.has_begun(job):
            error.add_note(f"{WAY_ON}\n  {_command(argv, 'sweep')}")
        raise
    print(result.text())
    if terminal.json:
        print(json.dumps(dataclasses.asdict(result)))
    return result.exit_code


def _choose_method(usage: str, argv: list[str]) -> int:
    """Tell how to go on without a method's name."""
    from raypipe import segmenters

    verb, names = usage.split()[0], "\n".join(f"  {name}" for name in segmenters.names())
    print(f"usage: raypipe {usage}\n\nMethods:\n{names}\n")
    print(f"All options: raypipe {verb} METHOD --help        What each method needs: raypipe methods")
    return 0 if argv and argv[0] in ("-h", "--help") else 2


def _with_method(verb: str, options: type, argv: list[str]) -> tuple:
    """The options of a verb, the method that argv begins with, the refiner or None, and Terminal."""
    from raypipe import refiners, segmenters

    method = segmenters.find(argv[0])
    values = _config(argv, method)
    refiner, kinds = _peek(argv, "--refine") or values.get("refine"), [options, method]
    if refiner not in (None, "None"):
        kinds.append(refiners.find(refiner))
    else:
        _refuse_refiner_options(argv)
    job, segmenter, *rest = _parse(f"raypipe {verb} {argv[0]}", method.__doc__, kinds, argv[1:], values)
    return job, segmenter, (rest[0] if len(rest) == 2 else None), rest[-1]


def _simple(verb: str, argv: list[str]) -> int:
    """A verb of MODULES."""
    module, options, function = MODULES[verb]
    module = import_module(f"raypipe.{module}")
    kind = getattr(module, options)
    arguments, terminal = _parse(f"raypipe {verb}", kind.__doc__, [kind], argv, _config(argv))
    if terminal.print_config:
        return _print_config(arguments)
    result = getattr(module, function)(arguments)
    print(result.text())
    if terminal.json:
        print(json.dumps(dataclasses.asdict(result)))
    return getattr(result, "exit_code", 0)


def _parse(prog: str, description: str | None, kinds: list[type], argv: list[str], values: dict) -> list:
    """Instances of the dataclasses and of Terminal from one flat command line.

    `values`, those of a file, count as earlier flags.
    """
    import tyro

    kinds, words = [*kinds, Terminal], argv
    if values:
        from raypipe.pipeline.options import flags

        values = _checked_config(values, kinds, _peek(argv, "--config"))
        words = [*(word for name, value in values.items() for word in flags(name, value)), *argv]
    merged = dataclasses.make_dataclass(
        "Options", [(kind.__name__.lower(), tyro.conf.OmitArgPrefixes[kind]) for kind in kinds]
    )
    found = tyro.cli(merged, prog=prog, description=description, args=words)
    log.setLevel("DEBUG" if found.terminal.debug else "INFO")
    return [getattr(found, f.name) for f in dataclasses.fields(merged)]


def _config(argv: list[str], method: type | None = None) -> dict:
    """The flat content of the --config file; {} without one.

    A preset of the method on the command line goes before what the file holds of it, for flags win.
    """
    path = _peek(argv, "--config")
    if path is None:
        return {}
    from raypipe.cli.config import read
    from raypipe.storage import without_secrets

    try:
        values = read(path)
    except ValueError as error:
        raise ValueError(f"--config {without_secrets(path)}: {error}") from error
    if method is None or not any(word == "--preset" or word.startswith(("--preset=", "preset=")) for word in argv):
        return values  # `preset=` is what `--over` takes
    chosen = {name for preset in method.presets.values() for name in preset}
    return {name: value for name, value in values.items() if name not in chosen}


def _checked_config(values: dict, kinds: list[type], path: str) -> dict:
    """The values of a config file. Raises ValueError that names the file and the option."""
    from raypipe.pipeline.options import checked

    if "config" in values:
        raise ValueError(f"--config {path}: a config file cannot name another one, got config: {values['config']!r}")
    try:
        return checked(values, kinds)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--config {path}: {error}") from error


def _refuse_refiner_options(argv: list[str]) -> None:
    """Raise ValueError for a refiner's option where there is no refiner."""
    from raypipe.pipeline import options

    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and (refiner := options.refiner_with(name[2:].replace("-", "_"))):
            raise ValueError(f"{name} has no effect without a refiner; add --refine {refiner}")


def _peek(argv: list[str], flag: str) -> str | None:
    """The value of a flag that decides which other flags there are."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _print_config(*parts) -> int:
    import yaml

    values = {name: value for part in parts if part for name, value in dataclasses.asdict(part).items()}
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    return 0


def _has_begun(job) -> bool:
    """Whether there is a run in the job's output that the same command would go on with."""
    from raypipe.run import Run

    try:
        return not job.dry_run and Run(job.output).configuration() is not None
    except Exception:  # an output that cannot be read: the error at hand says why
        return False


def _command(argv: list[str], verb: str = "label") -> str:
    """The command line as it was typed, after the verb, but without credentials."""
    from raypipe.storage import without_secrets

    shown = [without_secrets(word) for word in argv]
    is_script = os.path.basename(sys.argv[0]) == f"{verb}.py"
    program = ["python", f"jobs/{verb}.py"] if is_script else ["raypipe", verb]
    left_out = "" if shown == argv else "  # with the credentials, which are left out here"
    return shlex.join([*program, *shown]) + left_out


def _failed(error: BaseException) -> int:
    """Print an error and, where there is one, the command that goes on. Returns the exit code."""
    from raypipe.run import OtherConfiguration
    from raypipe.runtime.interruption import Interrupted
    from raypipe.storage import Locked

    way_on = "".join(note for note in getattr(error, "__notes__", []) if note.startswith(WAY_ON))
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(2)
    if isinstance(error, Interrupted):
        print("\ninterrupted" + (f"; all committed rows are kept, {way_on}" if way_on else ""), file=sys.stderr)
        return error.exit_code
    if isinstance(error, (Locked, OtherConfiguration)):
        print(f"raypipe: {error}", file=sys.stderr)
        return 4
    if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
        return _wrong(_message(error))
    print(f"raypipe: {_message(error)}", file=sys.stderr)
    if way_on:
        print(f"all committed rows are kept; once the cause is gone, {way_on}", file=sys.stderr)
    return 1


def _message(error: BaseException) -> str:
    """An error's own words, without the number of an operating system's error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _wrong(message: str) -> int:
    print(f"raypipe: {message}", file=sys.stderr)
    return 2


def _help() -> str:
    verbs = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
    return (
        "usage: raypipe COMMAND [OPTIONS]\n\nSegmentation masks for large image collections without labels.\n\n"
        f"{verbs}\n\nOptions of a command: raypipe COMMAND --help        Start here: raypipe demo"
    )
