"""`raypipe label`: images -> masks in Parquet. The course of a run, from the plan to the record of how it ended."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.pipeline.dry_run import Estimate, estimate
from raypipe.pipeline.graph import label_here, label_on_ray
from raypipe.pipeline.job import Label, check_job, fetch_weights, list_images, open_run, plan_work
from raypipe.pipeline.moved import refuse_moved
from raypipe.pipeline.stages import Work
from raypipe.pipeline.summary import Summary, blocked, named, too_many
from raypipe.run import Ids, Run, new_attempt, provenance
from raypipe.runtime.interruption import held
from raypipe.runtime.progress import count_of_images, duration
from raypipe.storage import Folder, Location, Spool
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")
PLANNED_AT_ONCE = 10.0  # seconds that a plan takes without a word about it
PLACES = ("input", "moved_from", "output")  # options that are paths or URIs


def label(job: Label, segmenter: Segmenter, refiner: Callable | None = None) -> Summary | Estimate:
    """Label every image of the input that has no committed row yet. All rows are durable on return.

    With dry_run only tell what that would be. Raises ValueError or FileNotFoundError for wrong options and missing
    input, run.OtherConfiguration and storage.Locked when the output belongs to another run, interruption.Interrupted
    after a signal and RuntimeError when the job failed; after the last two the same call resumes.
    """
    check_job(job, segmenter, refiner)
    if job.dry_run:
        return estimate(job, segmenter, refiner)
    start, (run, settings) = time.monotonic(), open_run(job, segmenter, refiner)
    work = plan_work(job, segmenter, refiner)
    images = list_images(job, work, run)
    return attempt(job, work, run, images, settings=settings, start=start)


def has_begun(job: Label) -> bool:
    """Whether there is a run in the job's output that the same command would go on with."""
    with contextlib.suppress(Exception):  # an output that cannot be read: the error at hand says why
        return not job.dry_run and Run(job.output).configuration() is not None
    return False


def attempt(
    job: Label,
    work: Work,
    run: Run,
    images: Spool | pa.Table,
    *,
    settings: dict,
    start: float | None = None,
    among: Spool | pa.Table | None = None,
) -> Summary:
    """One attempt on a run, as `label` and the trials of a sweep make it: hold, clean, plan, label, finish.

    Arguments as of `begun`. Raises what `label` raises.
    """
    with begun(job, work, run, images, settings=settings, start=start, among=among) as it:
        if len(it.pending):
            execute = label_here if job.local else label_on_ray
            it.errors, it.of_ray = execute(job, it.work, run, it.pending, settings, before=it.before)
    return it.summary


@dataclass
class Attempt:
    """An attempt under way: what is to be done, and what the block that does it leaves."""

    work: Work
    pending: Spool | pa.Table  # images to label
    before: int  # images that earlier attempts have labelled
    errors: Counter = field(default_factory=Counter)  # for the block to fill: error rows by `stage: kind`
    of_ray: dict = field(default_factory=dict)  # and what the attempt's record says of Ray
    summary: Summary | None = None  # after the block


@contextlib.contextmanager
def begun(
    job: Label,
    work: Work,
    run: Run,
    images: Spool | pa.Table,
    *,
    settings: dict,
    start: float | None = None,
    among: Spool | pa.Table | None = None,
) -> Iterator[Attempt]:
    """An attempt around a block that labels what is pending, if anything is: hold, clean, plan; then finish.

    images: the manifest of all that the run is about. among: label only pending rows of this part of it. settings: what
    run.json freezes. start: when the work on it began, by `time.monotonic`. The attempt's record is written first and
    ended last, however the block ends. Raises what `label` raises.
    """
    start, work = start or time.monotonic(), replace(work, attempt=new_attempt())
    with held(run.folder, work.attempt):
        run.clean()
        listed = images if among is None else among
        pending = run.plan(listed, retry_errors=job.retry_errors)
        before, pending = len(listed) - len(pending), pending.slice(0, job.limit)
        if len(pending) or job.moved_from:
            refuse_moved(run, images, job.input, job.moved_from, max_bytes=job.max_bytes)
        planned = time.monotonic() - start
        took = f", listed and planned in {duration(planned)}" if planned > PLANNED_AT_ONCE else ""
        log.info("%s of %s to %s%s", f"{len(pending):,}", count_of_images(len(images)), work.verb, took)
        it = Attempt(work, pending, before)
        if not len(pending) and run.is_complete():
            yield it
            it.summary = _ended(job, it, run, images, run.settled(work.attempt), start)
            return
        if len(pending):
            fetch_weights(job, work)
        options = {name: value and Location(value) if name in PLACES else value for name, value in asdict(job).items()}
        record = {"options": options, "settings": settings, "images": len(images), "planned": len(pending)}
        with provenance.recorded(run.folder, work.attempt, record) as facts:
            run.mark_complete(None)
            yield it
            facts |= it.of_ray
            it.summary = _ended(job, it, run, images, run.finish(work.attempt), start)
            facts |= asdict(it.summary)


def _ended(job: Label, it: Attempt, run: Run, images: Spool | pa.Table, commits: Spool, start: float) -> Summary:
    """The summary of an attempt, with the picture sheet drawn if asked for, and a note if nothing is pending."""
    work, pending, errors = it.work, it.pending, it.errors
    committed, listed = Ids(commits.to_batches()).among(images).true_count, run.errors()
    failed = sum(pc.not_equal(batch["error"], "").true_count for batch in commits.to_batches())
    # what this start did counts: one that finds nothing new is fine, and one that tries again stands for the whole run
    bad, of = (failed, len(commits)) if job.retry_errors and len(pending) else (errors.total(), len(pending))
    reason = too_many(bad, of, allowed=job.max_bad_fraction)
    summary = Summary(
        output=str(Folder(job.output)),
        attempt=work.attempt,
        images=len(images),
        labelled=len(pending),
        pending=len(images) - committed,
        errors=dict(errors),
        failed=failed,
        seconds=round(time.monotonic() - start, 3),
        exit_code=3 if reason else 0,
        reason=reason,
        retryable=pc.sum(listed["retryable"]).as_py() or 0,
        failures=named(listed, pending),
        blocked=blocked(run) if work.segmenter.caution else {},
    )
    if job.sheet:
        from raypipe.pictures.sheet import write_sheet

        limits = {"max_bytes": job.max_bytes, "max_pixels": job.max_pixels}
        summary = replace(summary, sheet=write_sheet(run, images, type(work.segmenter), **limits))
    if not summary.pending:
        sheet = run.folder.location("sheet.png") if "sheet.png" in run.folder.files() else None
        kinds = Counter(f"{row['stage']}: {row['kind']}" for rows in listed.to_batches() for row in rows.to_pylist())
        of_run = {"labelled": len(commits) - failed, "errors": dict(kinds), "sheet": sheet}
        run.mark_complete(asdict(summary) | of_run)
    return summary
