"""What labelled a run, from the records of its attempts, so that removed images can be labelled again the same way."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields

from raypipe import storage
from raypipe.run.run import Run

# Options of one start, not of the rows: a redo does all that is pending and only that.
ONCE = {"limit", "retry_errors", "sheet", "dry_run", "timing"}


@dataclass(frozen=True)
class Job:
    """The newest attempt that labelled one input."""

    attempt: str
    values: dict  # options of the job, the method and the refiner by name, as `options.build` takes them
    labelled: int | None  # images of this input that had a row when it ended; None when it was killed


def read_attempt(run: Run, name: str) -> dict | None:
    """The content of an attempt's record `_runs/<name>`; None when it is not readable."""
    try:
        record = json.loads(run.folder.read("_runs", name) or b"")
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def jobs(run: Run) -> list[Job]:
    """One job per input that was labelled into the run, in the order of their newest attempts."""
    newest = {}
    for name in sorted(run.folder.files("_runs")):
        record = read_attempt(run, name) if name.endswith(".json") else None
        if record is None or "input" not in record.get("options", {}):
            continue
        options = {key: value for key, value in record["options"].items() if key not in ONCE}
        # the record has no credentials and no endpoint; an input on the run's own store takes over the run's
        place = {"input": storage.locate(run.folder.uri, options["input"]), "output": run.folder.uri}
        labelled = record["images"] - record["pending"] if "labelled" in record else None
        newest.pop((place["input"], options["column"]), None)
        newest[place["input"], options["column"]] = Job(
            name.removesuffix(".json"), options | record["settings"] | place, labelled
        )
    return list(newest.values())


def label_again(run: Run) -> None:
    """Label what is pending of each input. Raises what `pipeline.label` raises."""
    from raypipe.pipeline import label as pipeline
    from raypipe.pipeline import options

    for job in jobs(run):
        pipeline.label(*options.build(_method(run), job.values))


def commands(run: Run) -> list[str]:
    """The command lines that do what `label_again` does; options at their defaults are left out."""
    try:
        found = [_command(_method(run), job) for job in jobs(run)]
    except (ValueError, TypeError):  # a method or an option that this version does not know
        found = []
    return found or [f"raypipe label {_method(run)} --input INPUT --output {run}  # with the settings in run.json"]


def _command(method: str, job: Job) -> str:
    from raypipe.pipeline import options

    words = ["raypipe", "label", method]
    for part in filter(None, options.build(method, job.values)):
        for field in fields(part):
            value = getattr(part, field.name)
            words += [] if value == field.default else options.flags(field.name, value)
    return shlex.join(words)


def _method(run: Run) -> str:
    return run.masks.rpartition("=")[2]
