"""The command line: verbs to functions, options to dataclasses, errors to exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but with too many bad images, 4 output locked or of another
configuration, 130 and 143 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module

VERBS = {
    "label": "images -> masks in Parquet; resumable, incremental",
    "methods": "what there is and what it needs",
    "demo": "a run on sample photographs, without any download",
}
# Verbs of one dataclass of options and one function of it: the module and both names. The function returns a dataclass
# with the method `text()` and, where it is not always 0, the field `exit_code`.
MODULES = {
    "demo": ("demo", "Demo", "demo"),
}


@dataclass(frozen=True)
class Terminal:
    """How the command itself behaves."""

    config: str | None = None  # YAML file with any of these options (underscores in names); flags win over it
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
    logging.getLogger("raypipe").setLevel("INFO")
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        return _wrong(f"unknown command {verb!r}; {_choices(verb, VERBS)}")
    try:
        return {"label": _label, "methods": _methods}.get(verb, partial(_simple, verb))(rest)
    except BaseException as error:
        if "--debug" in rest or isinstance(error, SystemExit):
            raise
        return _failed(error, shlex.join(["raypipe", *argv]))


def _label(argv: list[str]) -> int:
    from raypipe import refine, segmenters

    if not argv or argv[0].startswith("-"):
        names = "\n".join(f"  {name}" for name in segmenters.names())
        print(f"usage: raypipe label METHOD --input PATH --output FOLDER [OPTIONS]\n\nMethods:\n{names}\n")
        print("All options: raypipe label METHOD --help        What each method needs: raypipe methods")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    from raypipe import options, pipeline

    method = segmenters.find(argv[0])
    values = _config(argv)
    refiner = _peek(argv, "--refine") or values.get("refine")
    kinds = [pipeline.Label, method] + ([refine.find(refiner)] if refiner not in (None, "None") else [])
    options.check_names(values, kinds)
    job, segmenter, *rest = _parse(f"raypipe label {argv[0]}", method.__doc__, [*kinds, Terminal], argv[1:], values)
    refiner, terminal = (rest[0] if len(rest) == 2 else None), rest[-1]
    if terminal.print_config:
        return _print_config(job, segmenter, refiner)
    result = pipeline.label(job, segmenter, refiner)
    if job.dry_run:
        print(json.dumps(result) if terminal.json else _estimate_text(result))
        return 0
    print(_summary_text(result, shlex.join(["raypipe", "label", *argv])))
    if terminal.json:
        print(json.dumps(dataclasses.asdict(result)))
    return result.exit_code


def _methods(argv: list[str]) -> int:
    from raypipe import segmenters

    terminal = _parse("raypipe methods", "What there is and what it needs.", [Terminal], argv, {})[0]
    rows = [_method_row(segmenters.find(name)) for name in segmenters.names()]
    if terminal.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(f"{row['name']:<12}{row['summary']}")
        for name in ("needs", "licence", "source"):
            print(f"{'':<12}{name:<9}{row[name]}")
    return 0


def _simple(verb: str, argv: list[str]) -> int:
    """A verb of MODULES."""
    from raypipe.options import check_names

    module, options, function = MODULES[verb]
    module = import_module(f"raypipe.{module}")
    kind, values = getattr(module, options), _config(argv)
    check_names(values, [kind])
    arguments, terminal = _parse(f"raypipe {verb}", kind.__doc__, [kind, Terminal], argv, values)
    if terminal.print_config:
        return _print_config(arguments)
    result = getattr(module, function)(arguments)
    print(result.text())
    if terminal.json:
        print(json.dumps(dataclasses.asdict(result)))
    return getattr(result, "exit_code", 0)


def _method_row(method: type) -> dict:
    defaults = {f.name: f.default for f in dataclasses.fields(method)}
    needs = [method.needs] if method.needs else []
    if "foreground" in defaults:
        needs.append(f"a foreground (default {defaults['foreground']})")
    if method.gpus:
        needs.append("a GPU is used where there is one")
    module = sys.modules[method.__module__]
    return {
        "name": method.__module__.rpartition(".")[2],
        "summary": (module.__doc__ or "").strip().splitlines()[0],
        "needs": ", ".join(needs) or "nothing",
        "licence": method.licence,
        "source": method.source,
    }


def _parse(prog: str, description: str | None, kinds: list[type], argv: list[str], values: dict) -> list:
    """Instances of the dataclasses from one flat command line; `values` from a file count as earlier flags."""
    import tyro

    merged = dataclasses.make_dataclass(
        "Options", [(kind.__name__.lower(), tyro.conf.OmitArgPrefixes[kind]) for kind in kinds]
    )
    flags = [flag for name, value in values.items() for flag in _flags(name, value)]
    found = tyro.cli(merged, prog=prog, description=description, args=[*flags, *argv])
    return [getattr(found, f.name) for f in dataclasses.fields(merged)]


def _flags(name: str, value) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{option}", *map(str, values)]


def _config(argv: list[str]) -> dict:
    """The flat content of the --config file; {} without one."""
    import yaml

    path = _peek(argv, "--config")
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise ValueError(f"{path}: expected flat lines such as `batch_size: 8`, one option each")
    return values


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


def _summary_text(summary, command: str) -> str:
    rate = summary.labelled / summary.seconds
    lines = [
        f"{summary.labelled:,} of {summary.images:,} images labelled in {summary.seconds:.1f} s ({rate:.1f} images/s)"
    ]
    if not summary.labelled:
        lines = [f"nothing to do: all {summary.images:,} images are labelled"]
    if summary.pending:
        lines.append(f"{summary.pending:,} images are left; the same command goes on with them")
    if summary.failed:
        lines.append(f"{summary.failed:,} images failed, see {summary.output}/errors.parquet")
        lines += [f"  {count:>7,}  {reason}" for reason, count in sorted(summary.errors.items(), key=lambda e: -e[1])]
        lines.append(f"to try them again: {command} --retry-errors")
    if summary.sheet:
        lines.append(f"picture sheet: {summary.sheet}")
    lines.append(f"masks: {summary.output}/masks/**/*.parquet, or raypipe.load({summary.output!r}) in Python")
    return "\n".join(lines)


def _estimate_text(estimate: dict) -> str:
    width = max(map(len, estimate))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in estimate.items())


def _failed(error: BaseException, command: str) -> int:
    """Print one line for an error and return its exit code."""
    from raypipe.interruption import Interrupted
    from raypipe.lock import Locked
    from raypipe.runs import OtherConfiguration

    if isinstance(error, KeyboardInterrupt):
        error = Interrupted(2)
    if isinstance(error, Interrupted):
        print(f"\ninterrupted; all committed rows are kept, this command goes on:\n  {command}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, (Locked, OtherConfiguration)):
        print(f"raypipe: {error}", file=sys.stderr)
        return 4
    if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
        return _wrong(str(error))
    print(f"raypipe: {error or type(error).__name__}", file=sys.stderr)
    print(f"all committed rows are kept; once the cause is gone, this command goes on:\n  {command}", file=sys.stderr)
    return 1


def _wrong(message: str) -> int:
    print(f"raypipe: {message}", file=sys.stderr)
    return 2


def _choices(word: str, known) -> str:
    near = get_close_matches(word, list(known), 1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"


def _help() -> str:
    verbs = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
    return (
        "usage: raypipe COMMAND [OPTIONS]\n\nSegmentation masks for large image collections without labels.\n\n"
        f"{verbs}\n\nOptions of a command: raypipe COMMAND --help        Start here: raypipe demo"
    )
