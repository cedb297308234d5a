"""The records of a run's attempts: how fast each was and how it ended."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.run.run import Run

# Options of one start, not of the rows: a redo does all that is pending and only that.
ONCE = {"limit", "retry_errors", "sheet", "dry_run", "timing"}


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
        options = self.record.get("options", {})
        cpus = (self.record.get("environment") or {}).get("machine", {}).get("cpus")
        if options.get("local"):
            return f"one process, {cpus} cores" if cpus else "one process"
        place = (self.record.get("ray") or {}).get("place") or {}
        return f"Ray, {place['actors']} actors, {place.get('device', 'cpu')}" if place.get("actors") else ""


def read(run: Run, figures: pa.Table) -> list[Attempt]:
    """All attempts of a run, oldest first. figures: its rows with the column `attempt`."""
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(figures["attempt"]).to_pylist()}
    names = sorted(name for name in run.folder.files("_runs") if name.startswith("2") and name.endswith(".json"))
    return [_attempt(name.removesuffix(".json"), run.folder.read("_runs", name), counts) for name in names]


def _attempt(name: str, content: bytes | None, counts: dict[str, int]) -> Attempt:
    try:
        record = json.loads(content or b"{}")
    except ValueError:  # torn by a full disk
        record = {}
    started = (record.get("environment") or {}).get("time") or ""
    seconds = record.get("seconds")
    if seconds is None and started and record.get("finished"):
        seconds = (datetime.fromisoformat(record["finished"]) - datetime.fromisoformat(started)).total_seconds()
    return Attempt(
        name, started, seconds, counts.get(name, 0), record.get("exit_code"), record.get("reason") or "", record
    )


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
