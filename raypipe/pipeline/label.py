"""`raypipe label`: images -> masks in Parquet. The options, the course of a run, and the graph on Ray Data."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.inputs import manifest as inputs
from raypipe.pipeline import foregrounds, stages
from raypipe.pipeline.stages import Work
from raypipe.run import provenance
from raypipe.run.run import Run, new_attempt
from raypipe.runtime import cores
from raypipe.runtime.interruption import on_signals
from raypipe.runtime.progress import Progress
from raypipe.storage.lock import hold
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")
DECODED = 4  # images that a decoding task holds at a time
BLOCK_BATCHES = 4  # batches per block; a block is the unit of commit and of lost work
BLOCK_SECONDS = 64 * 60.0  # without a GPU, of a block's images that all take as long as they may


@dataclass(frozen=True)
class Label:
    """What to label and how the job runs."""

    input: str  # folder, glob, image, list (.txt .csv .jsonl), Parquet or tar: a path or a URI (s3://...)
    output: str  # the run's folder, made or resumed: a path or a URI
    column: str | None = None  # column of a list or table that holds URIs or images; None finds it
    refine: Literal["guided"] | None = None  # sharpen the masks along the image's edges
    keep_soft: bool = False  # also store the probabilities that were thresholded (16-bit PNG)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks run
    actors: int | None = None  # processes that run the method; None = one per core, or as many as the GPUs hold
    batch_size: int | None = None  # images per call of the method; None = the method's own
    timeout: float | None = None  # seconds for one image before it becomes an error row; None = the method's own
    max_pixels: int = 100_000_000  # images with more pixels become error rows, before they are decoded
    max_bytes: int = 500_000_000  # files with more bytes become error rows, before they are read
    max_bad_fraction: float = 0.05  # end with exit code 3 if more than this share of the run's rows are errors
    limit: int | None = None  # label at most this many of the pending images now; the next run goes on
    retry_errors: bool = False  # label the images again that ended in an error row
    local: bool = False  # a plain loop in this process, without Ray: for a handful of images and for debugging
    sheet: bool = False  # write sheet.png into the output: a sample of originals with their masks
    dry_run: bool = False  # only tell what would be done: images, workers, memory, time, size
    timing: bool = True  # dry run: time up to three images in a child process


@dataclass(frozen=True)
class Summary:
    """How a call of `label` ended."""

    output: str
    attempt: str
    images: int  # in the input
    labelled: int  # rows of this attempt, error rows included
    pending: int  # left for another attempt
    errors: dict[str, int]  # error rows of this attempt, by `stage: kind`
    failed: int  # error rows of the whole run
    seconds: float
    exit_code: int  # 0, or 3 when the share of error rows is above max_bad_fraction
    sheet: str | None = None  # where the picture sheet is


def label(job: Label, segmenter: Segmenter, refiner: Callable | None = None) -> Summary | dict:
    """Label every image of the input that has no committed row yet. All rows are durable on return.

    Raises ValueError or FileNotFoundError for wrong options and missing input, runs.OtherConfiguration and lock.Locked
    when the output belongs to another run, interruption.Interrupted after a signal and RuntimeError when the job
    failed; after the last two the same call resumes. With dry_run returns the estimate as a dict.
    """
    check(job, segmenter, refiner)
    start, run = time.monotonic(), Run(job.output, segmenter.name)
    settings = provenance.settings(segmenter, refiner, refine=job.refine, keep_soft=job.keep_soft)
    standard = provenance.settings(type(segmenter)(), refiner and type(refiner)(), refine=None, keep_soft=False)
    run.check_configuration(settings, defaults=standard)
    work = plan_work(job, segmenter, refiner)
    manifest = list_images(job, work)
    if job.dry_run:
        from raypipe.pipeline.dry_run import estimate

        return estimate(job, work, run, manifest)
    with on_signals(), hold(run.folder, work.attempt):
        run.clean()
        pending = run.plan(manifest, retry_errors=job.retry_errors, limit=job.limit)
        log.info("%s of %s images to label", f"{len(pending):,}", f"{len(manifest):,}")
        if len(pending) or not run.is_complete():
            record = {"options": _public(job), "settings": settings, "images": len(manifest), "planned": len(pending)}
            with _recorded(run, work.attempt, record):
                run.mark_complete(None)
                execute = label_here if job.local else label_on_ray
                errors = execute(job, work, run, pending, record) if len(pending) else Counter()
                summary = _summary(job, work.attempt, manifest, run.finish(work.attempt), errors, len(pending), start)
                record |= asdict(summary)
                if not summary.pending:
                    run.mark_complete(asdict(summary))
        else:
            summary = _summary(job, work.attempt, manifest, run.commits(), Counter(), 0, start)
        if job.sheet:
            from raypipe.pictures.sheet import write_sheet

            place = write_sheet(run, manifest, max_bytes=job.max_bytes, max_pixels=job.max_pixels)
            summary = replace(summary, sheet=place)
    return summary


def check(job: Label, segmenter: Segmenter, refiner: Callable | None) -> None:
    """Raise ValueError for options that cannot work or have no effect, before anything starts."""
    if (job.refine is None) != (refiner is None):
        raise ValueError("refine and the refiner's options must be given together")
    if not segmenter.soft and refiner is None:
        for option, is_set in (("threshold", segmenter.threshold is not None), ("keep-soft", job.keep_soft)):
            if is_set:
                raise ValueError(f"--{option} has no effect: {segmenter.name} gives binary masks; add --refine guided")
    for option in ("actors", "batch_size", "timeout", "max_pixels", "max_bytes", "limit"):
        value = getattr(job, option)
        if value is not None and value <= 0:
            raise ValueError(f"--{option.replace('_', '-')} must be positive, got {value}")
    if segmenter.threshold is not None and not 0 <= segmenter.threshold < 1:
        raise ValueError(f"--threshold must be at least 0 and below 1, got {segmenter.threshold}")
    if not 0 <= segmenter.seed < 2**31:
        raise ValueError(f"--seed must be in 0..{2**31 - 1}, got {segmenter.seed}")
    if not 0 <= job.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction must be in 0..1, got {job.max_bad_fraction}")
    if job.device == "cuda" and not plan_work(job, segmenter, refiner).gpus:
        raise ValueError(
            f"--device cuda has no effect: {segmenter.name} runs on the CPU only"
            " (a rembg foreground would use a GPU if onnxruntime-gpu were installed instead of onnxruntime)"
        )
    for option, other in (("actors", "local"), ("timeout", "local"), ("sheet", "dry_run")):
        if getattr(job, option) and getattr(job, other):
            raise ValueError(f"--{option} has no effect with --{other.replace('_', '-')}")
    if not job.timing and not job.dry_run:
        raise ValueError("--no-timing has no effect without --dry-run")
    if job.actors and "ray" not in sys.modules and not os.environ.get("RAY_ADDRESS"):
        cpus = cores.for_local_ray()
        if job.actors + 1 > cpus:
            raise ValueError(f"--actors {job.actors} leaves no CPU for reading and writing: at most {cpus - 1} here")
    check_places(job.input, job.output)


def check_places(source: str, output: str) -> None:
    """Raise ValueError for an output that is a file, or that a later listing of the input would find."""
    shown = storage.redact(output)
    place = storage.local_path(output) or "/"
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ValueError(f"the output {shown!r} is a file or lies below one; choose a folder")
    fixed = source.partition("**")[0] if "**" in source else source
    inside, outside = (storage.local_path(place) or storage.normalise(place) for place in (output, fixed))
    inside, outside = (os.path.realpath(place) if os.path.isabs(place) else place for place in (inside, outside))
    if f"{inside.rstrip('/')}/".startswith(f"{outside.rstrip('/')}/"):
        raise ValueError(f"the output {shown!r} lies inside the input: the next run would label its files")


def plan_work(job: Label, segmenter: Segmenter, refiner: Callable | None) -> Work:
    """What the workers need to know. Raises ValueError for a foreground that does not parse."""
    spec = getattr(segmenter, "foreground", None)
    return Work(
        attempt=new_attempt(),
        segmenter=segmenter,
        refiner=refiner,
        foreground=None if spec is None else foregrounds.parse(spec),
        device=job.device,
        batch_size=job.batch_size or segmenter.batch_size,
        keep_soft=job.keep_soft,
        max_pixels=job.max_pixels,
        max_bytes=job.max_bytes,
    )


def list_images(job: Label, work: Work) -> pa.Table:
    """The manifest of the whole input, with the places of given foregrounds."""
    listing = inputs.list_inputs(job.input, column=job.column)
    manifest = pa.concat_tables(listing.chunks)
    for remark in listing.remarks():
        log.warning("%s", remark)
    if work.foreground and work.foreground.is_read:
        return foregrounds.attach(manifest, work.foreground)
    return manifest


def label_here(job: Label, work: Work, run: Run, pending: pa.Table, record: dict) -> Counter:
    """The stages in a plain loop, with the same rows as on Ray. Returns the error rows by `stage: kind`."""
    work = replace(work, device=device_here(work))
    decode, segment, encode = stages.Decode(work), stages.Segment(work), stages.Encode(work)
    run.freeze(record["settings"], provenance.environment() | {"weights": segment.checksums()})
    counts, rows_per_block = Counter(), block_size(job, work, on_gpu=work.device == "cuda")
    with Progress(len(pending), lambda: (counts["rows"], counts["errors"])):
        errors = Counter()
        for task, start in enumerate(range(0, len(pending), rows_per_block)):
            manifest_rows = pending.slice(start, rows_per_block).to_pylist()
            rows = stages.table(encode(segment(decode(manifest_rows))))
            run.commit(work.attempt, task, rows)
            errors += stages.count_errors(rows)
            counts.update(rows=len(rows), errors=stages.count_errors(rows).total())
    return errors


def label_on_ray(job: Label, work: Work, run: Run, pending: pa.Table, record: dict) -> Counter:
    """The stages on Ray Data. Returns the error rows by `stage: kind`."""
    import ray

    from raypipe.pipeline import workers
    from raypipe.runtime import cluster

    timeout = job.timeout or work.segmenter.timeout
    # A batch may take timeout x batch size before its worker gives it up; Ray must not give the job up before.
    with cluster.connected(stall=max(1800.0, 3 * timeout * work.batch_size)):
        cluster.warn_of_local_paths(input=job.input, output=job.output)
        place = cluster.place(work, actors=job.actors)
        work = replace(work, device=place.device)
        run.freeze(record["settings"], provenance.environment() | {"weights": cluster.probe(work, place)})
        ledger = workers.Ledger.remote()
        sink = workers.CommitSink(run, work.attempt, ledger)
        rows = graph(job, work, run.write_pending(pending, work.attempt), len(pending), place, ledger)
        with Progress(len(pending), cluster.Asker(ledger)), cluster.plain_errors():
            rows.write_datasink(sink)
        record["ray"] = {"resources": ray.cluster_resources(), "place": asdict(place), "stats": rows.stats()}
    if sink.rows != len(pending):
        raise RuntimeError(f"{sink.rows} rows were committed for {len(pending)} images; run the same command again")
    return sink.errors


def graph(job: Label, work: Work, files, count: int, place, ledger):
    """The dataset of finished rows: pending images -> decode -> segment -> encode.

    A method without GPU runs all three stages in one actor, since images then never leave the process. A GPU method has
    its actors to itself, with decoding and encoding in tasks around them.
    """
    import ray.data
    from ray.data import ActorPoolStrategy

    from raypipe.pipeline import workers

    fs, paths = files
    few = -(-count // (4 * place.expected_actors))  # of few images each actor still gets some
    block = min(block_size(job, work, on_gpu=place.gpus > 0), few)
    batch = {"batch_size": min(work.batch_size, block), "batch_format": "pyarrow"}
    compute = ActorPoolStrategy(min_size=place.min_actors, max_size=place.max_actors, max_tasks_in_flight_per_actor=2)
    guard = (work, ledger, job.timeout or work.segmenter.timeout)
    rows = ray.data.read_parquet(paths, filesystem=fs).repartition(target_num_rows_per_block=block)
    if not place.gpus:
        return rows.map_batches(workers.LabelOnCpu, compute=compute, num_cpus=1, fn_constructor_args=guard, **batch)
    few = batch | {"batch_size": min(DECODED, block)}
    rows = rows.map_batches(workers.decode_on_cpu, num_cpus=1, fn_args=guard, **few)
    rows = rows.map_batches(
        workers.SegmentOnGpu, compute=compute, num_gpus=place.gpus, fn_constructor_args=guard, **batch
    )
    return rows.map_batches(workers.encode_on_cpu, num_cpus=1, fn_args=guard, **batch)


def block_size(job: Label, work: Work, *, on_gpu: bool) -> int:
    """Images per block. Without a GPU slow methods get few: an image may take hours, and a batch gains nothing."""
    batches = BLOCK_BATCHES * work.batch_size
    if on_gpu:
        return batches
    in_time = int(BLOCK_SECONDS / (job.timeout or work.segmenter.timeout))
    return min(batches, max(in_time, job.batch_size or 1))


def device_here(work: Work) -> str:
    """cpu or cuda for a run in this process. Raises ValueError for cuda where there is none."""
    if not work.gpus:
        return "cpu"
    import torch

    if work.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device on this machine")
    return "cuda" if work.device != "cpu" and torch.cuda.is_available() else "cpu"


def _public(job: Label) -> dict:
    """The options without credentials."""
    return asdict(job) | {"input": storage.redact(job.input), "output": storage.redact(job.output)}


def _summary(job: Label, attempt: str, manifest, commits, errors: Counter, labelled: int, start: float) -> Summary:
    committed = pc.is_in(manifest["image_id"], value_set=commits["image_id"].combine_chunks())
    failed = pc.sum(pc.not_equal(commits["error"], "")).as_py() or 0
    return Summary(
        output=storage.redact(job.output),
        attempt=attempt,
        images=len(manifest),
        labelled=labelled,
        pending=len(manifest) - (pc.sum(committed).as_py() or 0),
        errors=dict(errors),
        failed=failed,
        seconds=round(time.monotonic() - start, 3),
        exit_code=3 if failed > job.max_bad_fraction * len(commits) else 0,
    )


@contextlib.contextmanager
def _recorded(run: Run, attempt: str, record: dict) -> Iterator[None]:
    """Leave the attempt's record, however the attempt ends."""
    record |= {"environment": provenance.environment(), "exit_code": None}
    run.record_attempt(attempt, record)
    try:
        yield
    except BaseException as error:
        record |= {"exit_code": getattr(error, "exit_code", 1), "reason": f"{type(error).__name__}: {error}"}
        raise
    finally:
        record["finished"] = provenance.now()
        with contextlib.suppress(OSError):  # a full disk: the record must not hide the error that filled it
            run.record_attempt(attempt, record)
