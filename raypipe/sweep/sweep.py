"""`raypipe sweep`: a method's parameters against labels, on Ray Tune -> a table of trials, a page, the best setting.

What acts inside the model makes trials, each a labelling run of its own; what acts after it (the threshold, the
refiner) is scored on the masks that a trial has stored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from raypipe.evaluation.task import Task
from raypipe.run import new_attempt, refuse_other
from raypipe.runtime.interruption import held
from raypipe.runtime.progress import count_of_images
from raypipe.storage import Folder, Location
from raypipe.sweep import ranking, search
from raypipe.sweep.plan import check, draw, plan, refuse_given, settled
from raypipe.sweep.ranking import shown
from raypipe.sweep.trials import Sweep, Trial, has_labelled, labelled, settings, with_images
from raypipe.sweep.tuning import run_trials
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")
TERMINAL_SETTINGS = 15


@dataclass(frozen=True)
class Swept:
    """How a sweep ended."""

    output: str
    method: str
    images: int  # labelled ones
    trials: dict[str, int]  # by status
    settings: int  # rows of the table
    metric: str
    value: float | None  # of the best setting; None when no trial succeeded
    tie: dict[str, float | None]  # of the best setting what tells equals apart (dice_fixed of dice_best), if anything
    best: dict  # its swept parameters
    rows: list[dict]  # the best settings: swept parameters, status, the metric, images
    errors: list[str]  # of the failed trials
    table: str
    config: str | None  # the best setting as a file for `label --config`
    page: str | None
    seconds: float
    exit_code: int  # 1 when no trial succeeded

    def text(self) -> str:
        """The best settings and where all of them are."""
        counts = ", ".join(f"{count:,} {status}" for status, count in self.trials.items() if count)
        lines = [f"{self.settings:,} settings of {self.method} on {count_of_images(self.images)}: trials {counts}"]
        lines += _columns(self.rows)
        if self.settings > len(self.rows):
            lines.append(f"and {self.settings - len(self.rows):,} more")
        lines += [f"failed: {error}" for error in self.errors]
        if not self.config:
            lines.append(f"no setting has a value; errors.parquet or trial.json in {self.output}/trials says why")
            return "\n".join(lines)
        chosen = ", ".join(f"{name} {value}" for name, value in self.best.items())
        values = {self.metric: self.value} | self.tie
        measured = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)
        lines += [f"best: {chosen} ({measured})", f"all trials: {self.table}", f"page: {self.page}"]
        return "\n".join([*lines, f"to use it: --config {shlex.quote(self.config)}"])


def sweep(
    job: Sweep,
    segmenter: Segmenter,
    refiner: Callable | None = None,
    task: Task | None = None,
    *,
    given: Iterable[str] = (),
    flags: Iterable[str] = (),
) -> Swept:
    """Try all settings, as far as that was not done before, and write the tables, best.yaml and the page.

    task: with its options; None = the one that the job names, with its defaults. given: fields of the method that a
    swept preset leaves alone, besides those that differ from the method's preset. flags: those of them that stand
    beside the swept fields, among which they must not be. Raises ValueError, TypeError or
    FileNotFoundError for wrong options and missing input before anything starts and for a method that cannot load,
    run.OtherConfiguration and storage.Locked when the output belongs to another sweep, and interruption.Interrupted
    after a signal; then the same call goes on. A trial that fails is listed and stops nothing.
    """
    start = time.monotonic()
    refuse_given(job, flags)
    job, task, source = settled(job, task, segmenter)
    common, folder = Trial(job, segmenter, refiner, task, source), Folder(job.output)
    space = check(common)
    planned = plan(common, draw(common, space), given)
    common = labelled(common)
    planned = with_images(planned, common)
    with held(folder, new_attempt()):
        known = merge(folder, configuration(common, space))
        folder.write_json(known | {"label_kind": common.labels.kind and str(common.labels.kind)}, "sweep.json")
        run_trials(planned)
        return report(common, known["swept"], start)


def configuration(common: Trial, space: search.Space) -> dict:
    """What all trials of a sweep's folder have in common, and the names of the swept fields."""
    job, segmenter, refiner = common.sweep, common.segmenter, common.refiner
    fixed = settings(segmenter) | {"threshold": segmenter.threshold} | (asdict(refiner) if refiner else {})
    fixed = {key: value for key, value in (fixed | common.task.options()).items() if key not in space}
    sources = {"input": Location(job.input), "labels": Location(job.labels)}
    common = {"method": segmenter.name, **sources, "dataset": job.dataset, "split": job.split, "column": job.column}
    common |= {"task": job.task, "refine": job.refine}
    return json.loads(json.dumps({"common": common, "fixed": fixed, "swept": list(space)}))


def has_begun(job: Sweep) -> bool:
    """Whether there is a sweep in the output that the same command would go on with."""
    with contextlib.suppress(Exception):  # an output that cannot be read: the error at hand says why
        return Folder(job.output).read("sweep.json") is not None
    return False


def merge(folder: Folder, now: dict) -> dict:
    """The configuration with that of the folder. Raises OtherConfiguration with a diff where they disagree.

    A sweep may grow: other values, and fields that were fixed before or are now. One that disagrees with attempts of
    which none has labelled an image takes their place: deletes their folders.
    """
    there = folder.read_json("sweep.json")
    if there is None:
        return now
    old, new = (each["common"] | each["fixed"] for each in (there, now))
    both = old.keys() & new.keys()
    old, new = ({key: each[key] for key in both} for each in (old, new))
    if old != new and not has_labelled(folder):
        for name in {"trials", "foreground"}.intersection(folder.folders()):
            folder.delete_folder(name)
        return now
    refuse_other(f"{folder} holds another sweep", old, new)
    swept = list(dict.fromkeys([*there["swept"], *now["swept"]]))
    fixed = {key: value for key, value in (there["fixed"] | now["fixed"]).items() if key not in swept}
    return now | {"fixed": fixed, "swept": swept}


def report(common: Trial, swept: list[str], start: float) -> Swept:
    """Write trials.parquet, per_image.parquet, best.yaml and the page; tell how the sweep ended."""
    job, task, images = common.sweep, common.task, common.images
    folder, tie, method = Folder(job.output), task.SHOWN[job.metric].tie, common.segmenter.name
    names = [job.metric, tie] if tie else [job.metric]
    every, measures = ranking.read(job.output, task=task, images=images, by=job.group)
    every, chosen = (choose(every, job.metric, job.goal, tie) for choose in (ranking.order, ranking.best))
    folder.write_table(ranking.table(every, swept, job.output), "trials.parquet")
    per_image = ranking.per_image(measures, every, swept)
    folder.write_table(per_image, "per_image.parquet")
    page = None
    if chosen:
        from raypipe.sweep.page import write_page

        text = ranking.config(chosen, method=method, refine=job.refine, names=names)
        folder.write(text.encode(), "best.yaml")
        page = write_page(common, every, per_image, swept)
    by_trial = {each.trial: each for each in every}
    columns = [*swept, *names, "images", "status"]
    facts = [each.values | each.means | {"images": each.images, "status": each.status} for each in every]
    return Swept(
        output=str(folder),
        method=method,
        images=len(images),
        trials={status: sum(each.status == status for each in by_trial.values()) for status in ranking.STATUSES},
        settings=len(every),
        metric=job.metric,
        value=chosen.means[job.metric] if chosen else None,
        tie={tie: chosen.means[tie]} if chosen and tie else {},
        best={key: chosen.values[key] for key in swept} if chosen else {},
        rows=[{name: fact.get(name) for name in columns} for fact in facts[:TERMINAL_SETTINGS]],
        errors=sorted({each.error for each in by_trial.values() if each.status == "failed"}),
        table=str(folder.location("trials.parquet")),
        config=str(folder.location("best.yaml")) if chosen else None,
        page=page,
        seconds=round(time.monotonic() - start, 3),
        exit_code=0 if chosen else 1,
    )


def _columns(rows: list[dict]) -> list[str]:
    """Rows of one shape as lines of a table."""
    cells = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]
