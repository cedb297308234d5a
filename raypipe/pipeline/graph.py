"""The stages of a job as a graph on Ray Data, and as a plain loop."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace

import pyarrow as pa

from raypipe.pipeline import foregrounds, stages
from raypipe.pipeline.job import Label
from raypipe.pipeline.stages import Work
from raypipe.run import Run, provenance
from raypipe.runtime.cores import device_here
from raypipe.runtime.progress import Counts, Progress
from raypipe.storage import Spool, portions
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")
DECODED = 4  # images that a decoding task holds at a time
BLOCK_BATCHES = 4  # batches per block; a block is the unit of commit and of lost work
PORTION_SECONDS = 10.0  # between commits of the plain loop, which may take minutes for an image
BLOCK_SECONDS = 64 * 60.0  # without a GPU, of a block's images that all take as long as they may


def label_here(
    job: Label, work: Work, run: Run, pending: Spool | pa.Table, settings: dict, *, before: int
) -> tuple[Counter, dict]:
    """The stages in a plain loop, with the same rows as `label_on_ray`, and {} instead of what there is of Ray."""
    here, errors = Here(job, work, run, pending, settings), Counter()
    with Progress(before + len(pending), lambda: here.count(before), before=before):
        here.label(pending, errors)
    return errors, {}


class Here:
    """The stages in this process, the networks loaded once; commits the rows of one run."""

    def __init__(self, job: Label, work: Work, run: Run, pending: Spool | pa.Table, settings: dict):
        """pending: all that is to be labelled. settings: what run.json freezes."""
        self._done = Counter()  # `rows` and, of these, `errors` so far
        self._run, self._work = run, replace(work, device=device_here(job.device, gpus=work.gpus))
        self._size, self._parts = block_size(job, work, on_gpu=self._work.device == "cuda"), itertools.count()
        self._segment, known = stages.Segment(self._work), _known(work, pending)
        self._work = replace(self._work, **self._work.learned())
        run.freeze(settings, known | {"weights": self._segment.checksums()})

    def count(self, before: int) -> Counts:
        """What is done so far. before: added to the rows."""
        return Counts(before + self._done["rows"], self._done["errors"])

    def label(self, pending: Spool | pa.Table, errors: Counter) -> None:
        """Label and commit some images. errors: to which the error rows are added by `stage: kind`."""
        size, work = self._size, self._work
        blocks = (block.to_pylist() for block in portions(pending.to_batches(), size))
        rows = (row for block in blocks for row in stages.encode(self._segment(stages.decode(block, work)), work))
        for portion in _portions(rows, size, self._done):
            table = stages.table(portion, work)
            self._run.commit(work.attempt, next(self._parts), table)
            errors.update(stages.count_errors(table))


def _known(work: Work, pending: Spool | pa.Table) -> dict:
    """What run.json says of a run besides its settings and weights. `soft`: whether masks were probabilities first."""
    return provenance.environment() | foregrounds.mask_kind(pending) | {"soft": work.is_soft}


def _portions(rows: Iterable[dict], size: int, done: Counter) -> Iterator[list[dict]]:
    """Rows by up to `size`, or as many as came in some seconds: little is lost by a Ctrl-C. Counts them in `done`."""
    portion, start = [], time.monotonic()
    for row in rows:
        done.update(rows=1, errors=row["error"] != "")
        portion.append(row)
        if len(portion) == size or time.monotonic() - start > PORTION_SECONDS:
            yield portion
            portion, start = [], time.monotonic()
    if portion:
        yield portion


def label_on_ray(
    job: Label, work: Work, run: Run, pending: Spool | pa.Table, settings: dict, *, before: int
) -> tuple[Counter, dict]:
    """The stages on Ray Data. Returns the error rows by `stage: kind`, and what the attempt's record says of Ray.

    before: images that earlier starts have done, for the progress.
    """
    if "ray" not in sys.modules:
        address = os.environ.get("RAY_ADDRESS")
        log.info("joining Ray at %s" if address else "starting Ray", *filter(None, [address]))
    import ray

    from raypipe.pipeline import workers
    from raypipe.runtime import cluster

    # A batch may take timeout x batch size before its worker gives it up; Ray must not give the job up before.
    with cluster.connected(stall=max(1800.0, 3 * work.patience * work.batch_size)):
        cluster.warn_of_local_paths(input=job.input, output=job.output)
        resources = cluster.resources(gpus=work.gpus, device=job.device, actors=job.actors)
        work = replace(work, device=resources.device)
        known = _known(work, pending)
        weights, learned = probe(work, gpus=resources.gpus)
        run.freeze(settings, known | {"weights": weights})
        work = replace(work, **learned)
        ledger = workers.Ledger.remote()
        sink = workers.CommitSink(run, work.attempt, ledger)
        rows = graph(job, work, run.write_pending(pending, work.attempt), len(pending), resources, ledger)
        count = workers.asker(ledger, before=before)
        with Progress(before + len(pending), count, before=before), cluster.plain_errors():
            rows.write_datasink(sink)
        # "place" is the resources' name in the records on disk
        facts = {"resources": ray.cluster_resources(), "place": asdict(resources), "stats": rows.stats()}
    if sink.rows != len(pending):
        raise RuntimeError(f"{sink.rows} rows were committed for {len(pending)} images; run the same command again")
    return sink.errors, {"ray": facts}


def graph(job: Label, work: Work, files, count: int, resources, ledger):
    """The dataset of finished rows: pending images -> decode -> segment -> encode.

    A method without GPU runs all three stages in one actor, since images then never leave the process. A GPU method has
    its actors to itself, with decoding and encoding in tasks around them.
    """
    import ray.data

    from raypipe.pipeline import workers

    fs, paths = files
    share = -(-count // (4 * resources.expected_actors))  # of few images each actor still gets some
    block = min(block_size(job, work, on_gpu=resources.gpus > 0), share)
    batch = {"batch_size": min(work.batch_size, block), "batch_format": "pyarrow"}
    sizes = {"min_size": resources.min_actors, "max_size": resources.max_actors}
    compute = ray.data.ActorPoolStrategy(**sizes, max_tasks_in_flight_per_actor=2)
    guard = (work, ledger)
    rows = ray.data.read_parquet(paths, filesystem=fs).repartition(target_num_rows_per_block=block)
    if not resources.gpus:
        return rows.map_batches(workers.LabelOnCpu, compute=compute, num_cpus=1, fn_constructor_args=guard, **batch)
    few = batch | {"batch_size": min(DECODED, block)}
    rows = rows.map_batches(workers.decode_on_cpu, num_cpus=1, fn_args=guard, **few)
    actors = {"compute": compute, "num_gpus": resources.gpus, "fn_constructor_args": guard}
    rows = rows.map_batches(workers.SegmentOnGpu, **actors, **batch)
    return rows.map_batches(workers.encode_on_cpu, num_cpus=1, fn_args=guard, **batch)


def block_size(job: Label, work: Work, *, on_gpu: bool) -> int:
    """Images per block. Without a GPU slow methods get few: an image may take hours, and a batch gains nothing."""
    batches = BLOCK_BATCHES * work.batch_size
    if on_gpu:
        return batches
    return min(batches, max(int(BLOCK_SECONDS / work.timeout), job.batch_size or 1))


def probe(work: Work, *, gpus: float) -> tuple[dict[str, str], dict]:
    """Load the method once on a worker, before the job starts. gpus: of the worker.

    Returns its weights' checksums and what the work learns by loading, of which warnings are logged here.

    Raises ValueError with the method's own message when loading fails, RuntimeError when it kills its process.
    """
    import ray

    from raypipe.runtime.cluster import cause, overheard, told

    if all(method is None or type(method).load is Segmenter.load for method in (work.segmenter, work.finder)):
        return {}, {}
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(overheard)
    try:
        return told(task.remote(_loaded, work))
    except ray.exceptions.WorkerCrashedError as error:
        raise RuntimeError(f"{work.segmenter.name}: loading it killed the worker process: {error}") from error
    except ray.exceptions.RayError as error:
        prefix = f"{work.segmenter.name}: "
        raise ValueError(prefix + str(cause(error)).removeprefix(prefix)) from error


def _loaded(work: Work) -> tuple[dict[str, str], dict]:
    return stages.Segment(work).checksums(), work.learned()
