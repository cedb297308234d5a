"""`raypipe benchmark`: ratios measured in one run on this machine, as a table in Markdown and Parquet."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from raypipe import lookup, refiners, segmenters
from raypipe.benchmark import commands, methods, peers, pipeline, processes
from raypipe.benchmark.figures import FAILED, QUICK, Figure, Sizes, environment, load, markdown, table
from raypipe.benchmark.turns import timed
from raypipe.runtime.interruption import on_signals
from raypipe.storage import Folder

log = logging.getLogger("raypipe")
FILES = ("benchmark.md", "benchmark.parquet")
HELP_STARTS = 5  # starts of `raypipe --help` per round


@dataclass(frozen=True)
class Benchmark:
    """Measure methods against plain formulations, and what the pipeline costs and loses, on this machine."""

    output: str = "raypipe-benchmark"  # a folder for benchmark.md and benchmark.parquet: a path or a URI
    quick: bool = False  # fewer and smaller runs: about three minutes on two idle cores, less exact
    # methods, refiners, spectral train_sempart train_namedmask archive_ranking cosegment clip_masked naming
    # ward naming_evaluation, or efficiency scaling overhead memory resume first-row help
    only: tuple[str, ...] = ()
    weights: str | None = None  # for the methods named by --only instead of their own; also a folder of several
    peers: bool = False  # instead: other tools for the same work; rembg ray-data mask-generation segment-anything ncut
    photos: str | None = None  # with --peers: a folder of images that all tools can read, instead of 100 of our own


@dataclass(frozen=True)
class Result:
    """All figures and what they were measured on."""

    figures: tuple[Figure, ...]
    environment: dict
    markdown: str  # where the tables are
    parquet: str
    exit_code: int  # 1 when a measurement broke

    def text(self) -> str:
        """The table, and where it is."""
        return f"{markdown(self.figures, self.environment)}\nwritten to {self.markdown} and {self.parquet}"


def benchmark(options: Benchmark, sizes: Sizes | None = None) -> Result:
    """Measure, write both files, and return the figures. sizes: how much; by default what `quick` says.

    Benchmarks that cannot run here (no Ray, no weights) are rows that say why. Raises ValueError for an unknown name,
    RuntimeError when a measuring process fails.
    """
    chosen = _chosen(options)
    folder, found = Folder(options.output), environment()
    folder.write(b"being measured\n", FILES[0])  # a place that cannot be written to should say so now
    with on_signals():  # a signal ends the measuring processes too
        figures = _measured(chosen, sizes or (QUICK if options.quick else Sizes()), options)
    found["load_after"] = load()
    folder.write(markdown(figures, found).encode(), FILES[0])
    folder.write_table(table(figures, found), FILES[1])
    written = (folder.path(name) if folder.is_local else str(folder.location(name)) for name in FILES)
    return Result(tuple(figures), found, *written, int(any(figure.note.startswith(FAILED) for figure in figures)))


def names() -> list[str]:
    """All benchmarks: every method and refiner, the solvers, then those of whole jobs."""
    return [*segmenters.names(), *refiners.names(), *methods.SOLVERS, *pipeline.JOBS, "help"]


def _chosen(options: Benchmark) -> list[str]:
    """The named benchmarks in the usual order; all without a name. Raises ValueError for `weights` without effect."""
    known = peers.names() if options.peers else names()
    for name in options.only:
        if name not in known:
            raise ValueError(f"unknown benchmark {name!r}; {lookup.suggest(name, known)}")
    chosen = [name for name in known if not options.only or name in options.only]
    for option, reached in (("photos", peers.COMMANDS), ("weights", peers.OF_A_SAM)) if options.peers else ():
        if getattr(options, option) and not set(chosen) & set(reached):
            raise ValueError(f"--{option} has no effect on {' '.join(chosen)}; it is for {' and '.join(reached)}")
    if options.photos and not options.peers:
        raise ValueError("--photos has no effect without --peers")
    if options.photos and (not os.path.isdir(options.photos) or len(_files(options.photos)) <= commands.FEW):
        text = f"a folder with more than {commands.FEW} image files and nothing else"
        raise ValueError(f"--photos: expected {text}, got {options.photos!r}")
    if options.peers:
        return chosen
    named = [segmenters.find(name) for name in options.only if name in segmenters.names()]
    if options.weights and not any("weights" in kind.networks for kind in named):
        raise ValueError("--weights has no effect without --only METHOD of a method that has the option --weights")
    return chosen


def _measured(chosen: Sequence[str], sizes: Sizes, options: Benchmark) -> list[Figure]:
    if options.peers:
        return _of_peers(chosen, sizes, options)
    figures: list[Figure] = []
    of_pipeline = [name for name in chosen if name in pipeline.JOBS]
    for name in chosen:
        if name not in of_pipeline and name != "help":
            log.info("measuring %s", name)
            figures += processes.call(methods.measure, name, sizes, bool(options.only), options.weights)
    if of_pipeline:
        log.info("measuring %s", ", ".join(of_pipeline))
        with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as folder:
            figures += pipeline.measure(of_pipeline, sizes, folder)
    if "help" in chosen:
        command = [sys.executable, "-m", "raypipe", "--help"]  # a command that does nothing
        starts = range(HELP_STARTS * sizes.repeats)
        seconds = [timed(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)[0] for _ in starts]
        figures.append(Figure("help", "raypipe --help", "s", seconds, "with the start of Python"))
    return figures


def _of_peers(chosen: Sequence[str], sizes: Sizes, options: Benchmark) -> list[Figure]:
    figures: list[Figure] = []
    for name in chosen:
        log.info("measuring %s", name)
        with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as folder:
            figures += peers.measure(name, sizes, folder, photos=options.photos, weights=options.weights)
    return figures


def _files(folder: str) -> list[str]:
    """The files of a folder; none where it holds folders too, of which the tools make different things."""
    entries = list(os.scandir(folder))
    return [entry.name for entry in entries] if all(entry.is_file() for entry in entries) else []
