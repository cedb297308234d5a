"""What a benchmark measures and how it is shown: figures as a Parquet table and as Markdown."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from raypipe.run import provenance

FAILED = "failed"  # how the note of a figure begins whose measurement broke
SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),  # the name for --only
        ("figure", pa.string()),  # what was measured
        ("unit", pa.string()),  # "x" is a ratio
        ("median", pa.float64()),  # null when it could not be measured
        ("low", pa.float64()),  # the smallest and largest of the runs
        ("high", pa.float64()),
        ("runs", pa.int32()),
        ("note", pa.string()),  # how it was measured, or why it could not be
    ]
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    side: int = 1024  # px a side of the photographs for methods and refiners
    photographs: int = 4  # how many of them
    repeats: int = 3  # alternating rounds of every comparison
    batch: int = 16  # images per call of the sleeping methods
    steady: float = 16.0  # seconds that the sleeping methods of a run sleep, per worker
    corpus: int = 20_000  # images of the run whose CPU time and memory are watched and that is started again
    settled: int = 2_000  # images after which they should not change
    peers: int = 100  # different photographs that raypipe and its peers label


QUICK = Sizes(photographs=1, repeats=1, steady=6.0, corpus=4_000, settled=1_000, peers=20)


@dataclass(frozen=True)
class Figure:
    """One line of the result; without values, `note` says why."""

    benchmark: str
    figure: str
    unit: str = ""
    values: Sequence[float] = ()
    note: str = ""

    def row(self) -> dict:
        """As a row of SCHEMA."""
        values = self.values
        numbers = (statistics.median(values), min(values), max(values)) if values else (None,) * 3
        cells = (self.benchmark, self.figure, self.unit, *numbers, len(values), self.note)
        return dict(zip(SCHEMA.names, cells, strict=True))


def table(figures: Sequence[Figure], environment: dict) -> pa.Table:
    """All figures, with what they were measured on in the file's metadata."""
    rows = pa.Table.from_pylist([figure.row() for figure in figures], schema=SCHEMA)
    return rows.replace_schema_metadata({"raypipe.benchmark": json.dumps(environment)})


def markdown(figures: Sequence[Figure], environment: dict) -> str:
    """The figures for people: machine, date and versions, then a table."""
    head = "| benchmark | figure | median | lowest to highest | runs | note |"
    lines = [_measured_on(environment), "", head, "|---|---|---|---|---|---|"]
    for row in (figure.row() for figure in figures):
        shown = "- | -"
        if row["runs"]:
            median, low, high = (number(row[name]) for name in ("median", "low", "high"))
            shown = f"{median} {row['unit']}".strip() + f" | {low} to {high}"
        cells = (row["benchmark"], row["figure"], shown, row["runs"], row["note"].replace("|", "/"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Three digits that count, without an exponent from 0.0001 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def environment() -> dict:
    """Code, packages, machine and how busy it is with other work."""
    found = provenance.environment()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["machine"] |= {"processor": _processor(), "memory_gb": round(memory / 1e9), "gpu": _gpu()}
    return found | {"load": load()}


def load() -> list[float]:
    """Processes that ran or waited on average in the last 1, 5 and 15 minutes: how busy the machine is."""
    return [round(average, 2) for average in os.getloadavg()]


def _measured_on(environment: dict) -> str:
    machine = environment["machine"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    versions = ", ".join(map(" ".join, [("Python", environment["python"]), *environment["packages"].items()]))
    loads = f"{environment['load'][0]} to {environment['load_after'][0]}"
    return (
        f"Measured {environment['time']} on {machine['cpus']} x {machine['processor']}, {machine['memory_gb']} GB{gpu}"
        f" ({machine['system']}), load average {loads}; commit {environment['git_commit'] or 'unknown'}; {versions}."
    )


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


def _gpu() -> str:
    """The name of the first GPU, as its driver tells it; "" without one."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip()
