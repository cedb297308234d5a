"""Whole jobs on small images: what the pipeline adds to a method's own work. Needs Ray, on this machine.

All jobs of one measurement run in one child process on one local Ray, while this process watches CPU time and memory of
the child and everything below it. Rates are taken between commits, so that starting up does not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raypipe.benchmark import processes
from raypipe.benchmark.figures import FAILED, Figure, Sizes
from raypipe.benchmark.processes import Sample
from raypipe.benchmark.turns import ratios, timed
from raypipe.storage import open_table

SHORT, LONG = 0.005, 0.02  # seconds per image of the sleeping methods
HEIGHT, WIDTH = 120, 160  # px of the small images
WORKERS = 2  # of every run but one
BATCH = 32  # images per call of the empty method
FIRST = 64  # images of the job whose first row is waited for
STALL = 300.0  # seconds without any finished task after which a job is given up
NO_PROC = "needs /proc (Linux)"
ACTOR = "LabelOnCpu"  # in the command line of Ray's processes that run the method


@dataclass(frozen=True)
class Spec:
    """One run of the sleeping method, on Ray or as bare loops over the same stages."""

    images: int
    sleep: float = 0.0
    workers: int = WORKERS
    batch: int = BATCH
    bare: bool = False


class Outcome(NamedTuple):
    """How a run went. Times in seconds since the epoch."""

    start: float
    output: str  # the run's folder; "" for bare loops
    commits: tuple[tuple[float, int], ...]  # (time, rows) of each, in order; () for bare loops
    rate: float  # images per second of all workers, start-up excluded
    cpu: float | None  # seconds per image of bare loops


class Measured(NamedTuple):
    """What the figures of one benchmark are made of."""

    runs: list[list[Outcome]]  # of each of the benchmark's specs, round by round
    samples: list[Sample]  # what the processes used during all runs
    driver: int  # pid of the child that made them
    sizes: Sizes
    photos: str  # the folders of the images and of all runs
    folder: str

    def slopes(self, values: Sequence[float]) -> list[float]:
        """How much a value, given at each sample, grows per image in each round of the first spec."""
        return [steady_slope(self.samples, outcome, values, self.sizes) for outcome in self.runs[0]]


def measure(names: Sequence[str], sizes: Sizes, folder: str) -> list[Figure]:
    """The figures of the named benchmarks. folder: an empty one for images and runs."""
    if find_spec("ray") is None:
        return [Figure(name, JOBS[name].title, note="needs Ray: pip install 'ray[data]'") for name in names]
    photos = os.path.join(folder, "photos")
    # Every round in the same order; a run that two benchmarks want comes once a round.
    wanted = specs_of(sizes)
    specs = [*dict.fromkeys(spec for name in names for spec in wanted[name])] * sizes.repeats
    assert max([FIRST, *(spec.images for spec in specs)]) <= sizes.corpus
    write_photographs(photos, sizes.corpus)
    outcomes, samples, driver = defaultdict(list), [], 0
    if specs:
        with processes.Watched(run_all, specs, photos, folder) as child:
            samples, driver = child.watched(), child.process.pid
            for spec, outcome in zip(specs, child.result(), strict=True):
                outcomes[spec].append(outcome)
    figures = []
    for name in names:
        runs = [outcomes[spec] for spec in wanted[name]]
        try:
            figures += JOBS[name].figures(Measured(runs, samples, driver, sizes, photos, folder))
        except RuntimeError as error:  # a row, since the others took minutes
            figures.append(Figure(name, JOBS[name].title, note=f"{FAILED}: {error}"))
    return figures


def write_photographs(folder: str, count: int) -> None:
    """JPEG files of 160 x 120 px, a thousand to a folder: crops of one photograph, 200 different ones in turns."""
    import cv2
    import skimage.data

    photograph = cv2.cvtColor(skimage.data.astronaut(), cv2.COLOR_RGB2BGR)
    rng = np.random.default_rng(0)
    corners = rng.integers(0, [len(photograph) - HEIGHT, photograph.shape[1] - WIDTH], (min(count, 200), 2))
    crops = [cv2.imencode(".jpg", photograph[y : y + HEIGHT, x : x + WIDTH])[1].tobytes() for y, x in corners]
    for i in range(count):
        file = Path(folder, f"{i // 1000:03d}", f"{i:06d}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(crops[i % len(crops)])


# Running


def run_all(specs: Sequence[Spec], photos: str, folder: str) -> list[Outcome]:
    """In the child: every run on one Ray."""
    from raypipe.runtime import cluster

    with cluster.connected(stall=STALL):
        on_ray(Spec(BATCH), photos, os.path.join(folder, "warm-up"))
        return [
            bare_loops(spec, photos) if spec.bare else on_ray(spec, photos, os.path.join(folder, f"run-{i}"))
            for i, spec in enumerate(specs)
        ]


def on_ray(spec: Spec, photos: str, output: str) -> Outcome:
    """`raypipe label` as a user has it."""
    from raypipe.benchmark.sleeper import Sleeper
    from raypipe.pipeline.job import Label
    from raypipe.pipeline.label import label

    job, start = Label(photos, output, limit=spec.images, actors=spec.workers, batch_size=spec.batch), time.time()
    label(job, Sleeper(sleep=spec.sleep))
    commits = commit_times(output)
    return Outcome(start, output, commits, steady_rate(commits, spec.workers), None)


def bare_loops(spec: Spec, photos: str) -> Outcome:
    """The same stages in plain loops, one process per worker, side by side."""
    start = time.time()
    with ThreadPoolExecutor(spec.workers) as pool:
        loops = [pool.submit(processes.call, bare_loop, spec, photos, i) for i in range(spec.workers)]
    rates, costs = zip(*(loop.result() for loop in loops), strict=True)
    return Outcome(start, "", (), sum(rates), float(np.mean(costs)))


def bare_loop(spec: Spec, photos: str, worker: int) -> tuple[float, float]:
    """In a child of its own: images per second and CPU seconds per image, after the first batch."""
    import cv2

    from raypipe.benchmark.sleeper import Sleeper
    from raypipe.pipeline import stages
    from raypipe.pipeline.job import Label, list_images, plan_work

    cv2.setNumThreads(1)
    job = Label(photos, "unused", batch_size=spec.batch)
    work = plan_work(job, Sleeper(sleep=spec.sleep), None)
    share = -(-spec.images // spec.workers)
    rows = list_images(job, work).slice(worker * share, share).read()
    segment = stages.Segment(work)
    for first in range(0, len(rows), spec.batch):
        if first == spec.batch:
            wall, cpu = time.perf_counter(), time.process_time()
        batch = rows.slice(first, spec.batch).to_pylist()
        stages.table(stages.encode(segment(stages.decode(batch, work)), work), work)
    count = len(rows) - spec.batch
    return count / (time.perf_counter() - wall), (time.process_time() - cpu) / count


def commit_times(output: str) -> tuple[tuple[float, int], ...]:
    """When each part of a run was committed, and its rows."""
    files = sorted(Path(output, "_commits").glob("part-*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    return tuple((file.stat().st_mtime, open_table(file.read_bytes()).metadata.num_rows) for file in files)


def steady_rate(commits: Sequence[tuple[float, int]], workers: int) -> float:
    """Images per second while all workers are busy: the slope of the rows over time, first and last commits left out.

    Workers that began together commit in rounds, so only whole rounds count: between two single commits lie up to half
    a round more or less rows than the time between them stands for. A run of too few commits counts all of them.
    """
    middle = commits[workers:-workers]
    middle = middle[: len(middle) // workers * workers]
    if len(middle) < 2 * workers or middle[0][0] == middle[-1][0]:
        middle = commits
    times = np.array([moment for moment, _ in middle])
    return float(np.polyfit(times - times[0], np.cumsum([rows for _, rows in middle]), 1)[0])


# Figures


def _efficiency(measured: Measured) -> list[Figure]:
    figures, rates = [], [[outcome.rate for outcome in outcomes] for outcomes in measured.runs]
    note = f"{WORKERS} workers, batches of {measured.sizes.batch}"
    for sleep, on_ray, bare in ((SHORT, *rates[:2]), (LONG, *rates[2:])):
        title = f"method of {sleep * 1000:g} ms: rate"
        figures.append(Figure("efficiency", title, "images/s", on_ray, note))
        figures.append(Figure("efficiency", f"{title} / bare loops", "x", ratios(on_ray, bare), "1 is no loss"))
    return figures


def _scaling(measured: Measured) -> list[Figure]:
    one, two = ([outcome.rate for outcome in outcomes] for outcomes in measured.runs)
    return [Figure("scaling", JOBS["scaling"].title, "x", ratios(two, one), "method of 20 ms; 2 is ideal")]


def _overhead(measured: Measured) -> list[Figure]:
    alone = [outcome.cpu * 1000 for outcome in measured.runs[1]]
    figures = [Figure("overhead", "CPU per image, bare loop", "ms", alone, "decode, empty method, encode")]
    title = JOBS["overhead"].title
    if not measured.samples:
        return [*figures, Figure("overhead", title, note=NO_PROC)]
    whole = [1000 * cost for cost in measured.slopes(processes.cpu_seconds(measured.samples))]
    added = np.subtract(whole, alone).tolist()
    note = f"all processes of the job while it ran; images of {WIDTH} x {HEIGHT}"
    figures.append(Figure("overhead", "CPU per image, pipeline", "ms", whole, note))
    return [*figures, Figure("overhead", title, "ms", added, f"empty method, batches of {BATCH}")]


def _memory(measured: Measured) -> list[Figure]:
    samples, sizes, title = measured.samples, measured.sizes, JOBS["memory"].title
    if not samples:
        return [Figure("memory", title, note=NO_PROC)]
    note = f"{sizes.corpus:,} images, the first {sizes.settled:,} left out"
    series = {
        "driver": memory_of(samples, lambda pid, _: pid == measured.driver),
        "2 actors": memory_of(samples, lambda _, used: ACTOR in used.command, number=2),
    }
    grown = {who: np.multiply(measured.slopes(used), 1000).tolist() for who, used in series.items()}
    return [Figure("memory", f"{title}, {who}", "MB", values, note) for who, values in grown.items()]


def _resume(measured: Measured) -> list[Figure]:
    output, sizes = measured.runs[0][-1].output, measured.sizes
    again = [timed(processes.call, start_again, measured.photos, output) for _ in range(sizes.repeats)]
    imported = any(ray_imported for _, ray_imported in again)
    note = f"{sizes.corpus:,} images, all done; with the start of Python; Ray {'IS' if imported else 'is not'} imported"
    return [Figure("resume", JOBS["resume"].title, "s", [seconds for seconds, _ in again], note)]


def start_again(photos: str, output: str) -> bool:
    """In a child: the same job once more. Returns whether that imported Ray. Raises RuntimeError if it did anything."""
    from raypipe.benchmark.sleeper import Sleeper
    from raypipe.pipeline.job import Label
    from raypipe.pipeline.label import label

    summary = label(Label(photos, output), Sleeper())
    if summary.labelled or summary.pending:
        raise RuntimeError(f"{summary.labelled} images of a finished run were labelled again")
    return "ray" in sys.modules


def _first_row(measured: Measured) -> list[Figure]:
    seconds = {"Ray": [], "--local": []}
    for i in range(measured.sizes.repeats):
        for arm in seconds:
            output, options = os.path.join(measured.folder, f"first-{i}{arm}"), ["--local"] * (arm == "--local")
            seconds[arm].append(processes.call(wait_for_first_row, measured.photos, output, options))
    note = "`raypipe label kmeans`, from the start of the process"
    title = JOBS["first-row"].title
    return [Figure("first-row", f"{title}, {arm}", "s", values, note) for arm, values in seconds.items()]


def wait_for_first_row(photos: str, output: str, options: Sequence[str]) -> float:
    """In a child: seconds from the start of the command to its first commit."""
    command = [sys.executable, "-m", "raypipe", "label", "kmeans", "--foreground", "whole", "--limit", str(FIRST)]
    start = time.time()
    subprocess.run([*command, "--input", photos, "--output", output, *options], check=True)
    return commit_times(output)[0][0] - start


def memory_of(samples: Sequence[Sample], counts: Callable, *, number: int = 1) -> list[float]:
    """MB of the processes that count, at each sample; not a number while fewer than `number` of them live.

    counts: whether (pid, Used) does. Actors end before their work is committed, and that is no gain in memory.
    """
    found = [[used.memory for (pid, _), used in sample.used.items() if counts(pid, used)] for sample in samples]
    return [sum(memory) if len(memory) >= number else float("nan") for memory in found]


def steady_slope(samples: Sequence[Sample], outcome: Outcome, values: Sequence[float], sizes: Sizes) -> float:
    """How much a value, given at each sample, grows per committed image of a run: the straight line that fits best.

    The first `settled` images do not count, nor the last fifth, where no new work begins, nor samples without a number.
    Raises RuntimeError for a run that is too short.
    """
    times = np.array([moment for moment, _ in outcome.commits])
    total = np.concatenate([[0], np.cumsum([rows for _, rows in outcome.commits])])
    moments = np.array([sample.time for sample in samples])
    rows = total[np.searchsorted(times, moments)]  # committed before each sample
    values = np.array(values)
    steady = (moments >= outcome.start) & (rows >= sizes.settled) & (rows <= 0.8 * total[-1]) & np.isfinite(values)
    if len(np.unique(rows[steady])) < 2:
        raise RuntimeError(f"{total[-1]:,} images are too few to see what one more costs")
    return float(np.polyfit(rows[steady], values[steady], 1)[0])


# What runs


def specs_of(sizes: Sizes) -> dict[str, list[Spec]]:
    """The runs that each benchmark needs in a round."""

    def sleeping(sleep: float) -> list[Spec]:  # on Ray and in bare loops, which need no long run
        images = round(sizes.steady * 2 / sleep)
        bare = Spec(max(images // 4, 4 * sizes.batch), sleep, batch=sizes.batch, bare=True)
        return [Spec(images, sleep, batch=sizes.batch), bare]

    long, whole = sleeping(LONG), Spec(sizes.corpus)
    return {
        "efficiency": sleeping(SHORT) + long,
        "scaling": [replace(long[0], images=long[0].images // 2, workers=1), long[0]],
        "overhead": [whole, Spec(sizes.corpus // 4, workers=1, bare=True)],
        "memory": [whole],
        "resume": [whole],
        "first-row": [],
    }


class Job(NamedTuple):
    """A benchmark: its main figure, and what makes its figures."""

    title: str
    figures: Callable[[Measured], list[Figure]]


JOBS = {
    "efficiency": Job("rate / bare loops", _efficiency),
    "scaling": Job("rate of 2 workers / 1 worker", _scaling),
    "overhead": Job("CPU per image added", _overhead),
    "memory": Job("growth per 1,000 images", _memory),
    "resume": Job("second start of a finished run", _resume),
    "first-row": Job("to the first committed row", _first_row),
}
