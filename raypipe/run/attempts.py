"""The records of a run's attempts: how fast each was and how it ended."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.run.run import Run
from raypipe.storage import Folder, locate

# Options of one start, not of the rows: a redo does all that is pending and only that.
START_OPTIONS = {"limit", "retry_errors", "sheet", "dry_run", "timing", "price"}


class Attempt(NamedTuple):
    """One start of the job."""

    name: str
    started: str  # UTC, ISO 8601; "" when unknown
    seconds: float | None  # None while it runs, or when it was killed
    rows: int  # of the run today that it made
    exit_code: int | None  # None while it runs, or when it was killed
    reason: str  # why it failed; "" when it did not
    record: dict  # the whole record

    @property
    def rate(self) -> float | None:
        """Images per second, start and end of the job included; None when unknown."""
        labelled = self.record.get("labelled")
        return labelled / self.seconds if labelled and self.seconds else None

    @property
    def end(self) -> str:
        """How it ended, in words."""
        if self.exit_code is None:
            return "running or killed"
        known = {0: "done", 3: "done, too many bad images", 130: "interrupted", 143: "interrupted"}
        return known.get(self.exit_code, "failed")

    @property
    def how(self) -> str:
        """Where it ran, in words; "" when unknown."""
        if self.record.get("options", {}).get("local"):
            cpus = (self.record.get("environment") or {}).get("machine", {}).get("cpus")
            return f"one process, {cpus} cores" if cpus else "one process"
        given = (self.record.get("ray") or {}).get("place") or {}
        return f"Ray, {given['max_actors']} actors, {given['device']}" if given.get("max_actors") else ""


def read(run: Run, figures: pa.Table) -> list[Attempt]:
    """All attempts of a run, oldest first. figures: its rows with the column `attempt`."""
    rows = {entry["values"]: entry["counts"] for entry in pc.value_counts(figures["attempt"]).to_pylist()}
    return [attempt._replace(rows=rows.get(attempt.name, 0)) for attempt in of(run.folder)]


def of(folder: Folder) -> list[Attempt]:
    """All attempts on a folder, oldest first, without their rows."""
    attempts = []
    for file in sorted(name for name in folder.files("_runs") if name.startswith("2") and name.endswith(".json")):
        name, record = file.removesuffix(".json"), read_record(folder, file) or {}
        started, seconds = (record.get("environment") or {}).get("time") or "", record.get("seconds")
        if seconds is None and started and record.get("finished"):
            seconds = (datetime.fromisoformat(record["finished"]) - datetime.fromisoformat(started)).total_seconds()
        end = record.get("exit_code"), record.get("reason") or ""
        attempts.append(Attempt(name, started, seconds, 0, *end, record))
    return attempts


def read_record(folder: Folder, name: str) -> dict | None:
    """The content of an attempt's record `_runs/<name>`; None when it is not readable, as after a full disk."""
    try:
        record = folder.read_json("_runs", name)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class InputAttempt(NamedTuple):
    """The newest attempt that labelled one input."""

    attempt: str
    values: dict  # options of the job, the method and the refiner by name, as `pipeline.options.build` takes them
    labelled: int | None  # images of this input that had a row when it ended; None when it was killed


def newest_by_input(run: Run) -> list[InputAttempt]:
    """The newest attempt on each input that was labelled into the run, oldest first."""
    newest = {}
    for name in sorted(run.folder.files("_runs")):
        record = read_record(run.folder, name) if name.endswith(".json") else None
        if record is None or "input" not in record.get("options", {}):
            continue
        options = {key: value for key, value in record["options"].items() if key not in START_OPTIONS}
        # the record has no credentials and no endpoint; an input on the run's own store takes over the run's
        uris = {"input": locate(run.folder.uri, options["input"]).uri, "output": run.folder.uri}
        labelled = record["images"] - record["pending"] if "labelled" in record else None
        if old := options.get("moved_from"):  # what was labelled there is found at this input now
            newest = {key: each for key, each in newest.items() if not f"{key[0]}/".startswith(f"{old.rstrip('/')}/")}
        newest.pop((uris["input"], options["column"]), None)
        newest[uris["input"], options["column"]] = InputAttempt(
            name.removesuffix(".json"), options | record["settings"] | uris, labelled
        )
    return list(newest.values())
