"""`raypipe label`: images -> masks in Parquet. The options, the course of a run, and the graph on Ray Data."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pyarrow.compute as pc

from raypipe import storage
from raypipe.pipeline.graph import label_here, label_on_ray
from raypipe.pipeline.job import Label, check_job, frozen_settings, list_images, plan_work, public_options
from raypipe.run import Run, provenance
from raypipe.runtime.interruption import on_signals
from raypipe.storage import hold
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")


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
    check_job(job, segmenter, refiner)
    start, run = time.monotonic(), Run(job.output, segmenter.name)
    settings = frozen_settings(segmenter, refiner, refine=job.refine, keep_soft=job.keep_soft)
    standard = frozen_settings(type(segmenter)(), refiner and type(refiner)(), refine=None, keep_soft=False)
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
            record = {
                "options": public_options(job),
                "settings": settings,
                "images": len(manifest),
                "planned": len(pending),
            }
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


def _summary_text(summary, retry: str) -> str:
    """What a run did. retry: the command that tries failed images again; "" leaves it out."""
    from raypipe.runtime.progress import images, speed

    failed = sum(summary.errors.values())
    time = f"in {summary.seconds:.1f} s ({speed(summary.labelled / summary.seconds)})"
    lines = [f"{summary.labelled:,} of {images(summary.images)} labelled {time}"]
    if failed:
        lines = [f"{summary.labelled:,} of {images(summary.images)} done {time}: "]
        lines[0] += f"{summary.labelled - failed:,} labelled, {failed:,} failed"
    if not summary.labelled:
        lines = [f"nothing to do: all of {images(summary.images)} were done before"]
    if summary.pending:
        verb = "is" if summary.pending == 1 else "are"
        lines.append(f"{images(summary.pending)} {verb} left; the same command goes on")
    if summary.failed:
        lines.append(f"{images(summary.failed)} failed in this run so far, see {summary.output}/errors.parquet")
        lines += [f"  {count:>7,}  {reason}" for reason, count in sorted(summary.errors.items(), key=lambda e: -e[1])]
        lines += [f"to try again: {retry}"] if retry else []
    if summary.sheet:
        lines.append(f"picture sheet: {summary.sheet}")
    lines.append(f"masks: {summary.output}/masks/**/*.parquet, or raypipe.load({summary.output!r}) in Python")
    return "\n".join(lines)
