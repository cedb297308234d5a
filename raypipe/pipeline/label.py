"""`raypipe label`: images -> masks in Parquet. The course of a run, from the plan to the record of how it ended."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.pipeline.dry_run import Estimate, estimate
from raypipe.pipeline.graph import label_here, label_on_ray
from raypipe.pipeline.job import Label, check_job, list_images, open_run, plan_work
from raypipe.pipeline.stages import Work
from raypipe.run import Run, new_attempt, provenance
from raypipe.runtime.interruption import held
from raypipe.runtime.progress import count_of_images, speed
from raypipe.storage import Folder, Location
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

    def text(self) -> str:
        """What was labelled, what failed, what is left, and where the masks are."""
        failed = sum(self.errors.values())
        time = f"in {self.seconds:.1f} s ({speed(self.labelled / self.seconds)})"
        images, counts = count_of_images(self.images), f"{self.labelled - failed:,} labelled, {failed:,} failed"
        lines = [f"{self.labelled:,} of {images} " + (f"done {time}: {counts}" if failed else f"labelled {time}")]
        if not self.labelled:
            lines = [f"nothing to do: all of {images} were done before"]
        if self.pending:
            verb = "is" if self.pending == 1 else "are"
            lines.append(f"{count_of_images(self.pending)} {verb} left; the same command goes on")
        if self.failed:
            lines.append(f"{count_of_images(self.failed)} failed in this run so far, see {self.output}/errors.parquet")
            lines += [f"  {count:>7,}  {reason}" for reason, count in sorted(self.errors.items(), key=lambda e: -e[1])]
        if self.sheet:
            lines.append(f"picture sheet: {self.sheet}")
        lines.append(f"masks: {self.output}/masks/**/*.parquet, or raypipe.load({self.output!r}) in Python")
        return "\n".join(lines)


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
    images = list_images(job, work)
    summary = attempt(job, work, run, images, settings=settings, start=start)
    if job.sheet:
        from raypipe.pictures.sheet import write_sheet

        with held(run.folder, summary.attempt):
            sheet = write_sheet(run, images, type(segmenter), max_bytes=job.max_bytes, max_pixels=job.max_pixels)
        summary = replace(summary, sheet=sheet)
    return summary


def has_begun(job: Label) -> bool:
    """Whether there is a run in the job's output that the same command would go on with."""
    try:
        return not job.dry_run and Run(job.output).configuration() is not None
    except Exception:  # an output that cannot be read: the error at hand says why
        return False


def attempt(
    job: Label,
    work: Work,
    run: Run,
    images: pa.Table,
    *,
    settings: dict,
    start: float | None = None,
    among: pa.Table | None = None,
) -> Summary:
    """One attempt on a run, as `label` and the trials of a sweep make it: hold, clean, plan, label, finish.

    images: the manifest of all that the run is about. among: label only pending rows of this part of it. settings: what
    run.json freezes. start: when the work on it began, by `time.monotonic`. The attempt's record is written first and
    ended last, however the attempt ends. Raises what `label` raises.
    """
    start, work = start or time.monotonic(), replace(work, attempt=new_attempt())
    execute = label_here if job.local else label_on_ray
    with held(run.folder, work.attempt):
        run.clean()
        pending = run.plan(images if among is None else among, retry_errors=job.retry_errors, limit=job.limit)
        log.info("%s of %s images to label", f"{len(pending):,}", f"{len(images):,}")
        if not len(pending) and run.is_complete():
            return _summary(job, work.attempt, images, run.commits(), Counter(), 0, start)
        options = asdict(job) | {"input": Location(job.input), "output": Location(job.output)}  # without credentials
        begun = {"options": options, "settings": settings, "images": len(images), "planned": len(pending)}
        with _recorded(run, work.attempt, begun) as facts:
            run.mark_complete(None)
            errors = Counter()
            if len(pending):
                errors, of_ray = execute(job, work, run, pending, settings)
                facts |= of_ray
            summary = _summary(job, work.attempt, images, run.finish(work.attempt), errors, len(pending), start)
            facts |= asdict(summary)
            if not summary.pending:
                run.mark_complete(asdict(summary))
    return summary


def _summary(job: Label, attempt: str, images, commits, errors: Counter, labelled: int, start: float) -> Summary:
    committed = pc.is_in(images["image_id"], value_set=commits["image_id"].combine_chunks())
    failed = pc.sum(pc.not_equal(commits["error"], "")).as_py() or 0
    return Summary(
        output=str(Folder(job.output)),
        attempt=attempt,
        images=len(images),
        labelled=labelled,
        pending=len(images) - (pc.sum(committed).as_py() or 0),
        errors=dict(errors),
        failed=failed,
        seconds=round(time.monotonic() - start, 3),
        exit_code=3 if failed > job.max_bad_fraction * len(commits) else 0,
    )


@contextlib.contextmanager
def _recorded(run: Run, attempt: str, begun: dict) -> Iterator[dict]:
    """Leave the attempt's record with what the block adds to the dict that it is given, however the block ends."""
    facts = begun | {"environment": provenance.environment(), "exit_code": None}
    run.record_attempt(attempt, facts)
    try:
        yield facts
    except BaseException as error:
        facts |= {"exit_code": getattr(error, "exit_code", 1), "reason": f"{type(error).__name__}: {error}"}
        raise
    finally:
        facts["finished"] = provenance.now()
        with contextlib.suppress(OSError):  # a full disk: the record must not hide the error that filled it
            run.record_attempt(attempt, facts)
