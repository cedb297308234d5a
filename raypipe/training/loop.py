"""What each worker of a training does: steps from the newest checkpoint, or the start, to the exported network.

Without Ray: on one worker it needs nothing but torch, on several a process group that torch knows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raypipe import networks
from raypipe.run import refuse_other
from raypipe.storage import fence, map_ahead
from raypipe.training import checkpoints, data, page, record
from raypipe.training.checkpoints import State
from raypipe.training.recipe import Student
from raypipe.training.work import LOOK_SECONDS, Place, Work, of_all

PICTURES = 8  # of the fixed sample
AHEAD = 6  # batches made while the network works, by a thread each: a GPU is quicker than a core that scales images
MOST_IN_A_ROW = 10  # steps without a finite gradient; one alone is harmless
MEASURED = ("_runs", "measured.parquet")  # the rows of `Validator.measure` of all workers, for the driver


class Stopped(Exception):
    """A stop was asked for where nothing is left to save."""


class Diverged(RuntimeError):
    """The loss is no number any more."""


class Outcome(NamedTuple):
    """What came of a step, alike on all workers."""

    terms: dict[str, float]  # means over the whole batch
    is_finite: bool
    is_stopped: bool


@dataclass
class Run:
    """A training under way on one worker."""

    work: Work
    place: Place
    student: Student
    model: Callable  # the student, or what averages its gradients over the workers
    optimizer: object
    state: State
    networks: Mapping[str, str]  # checksums of the files that the student was made of
    log: record.Log | None  # of the first worker
    rates: list[float] = field(default_factory=list)  # of the optimiser's groups of parameters, at rate 1
    flushed: float = 0.0


def run(work: Work, place: Place) -> bool:
    """Train to the end and export. Returns whether it came there: False where it was stopped, behind a checkpoint.

    Raises ValueError for a checkpoint that does not fit, Diverged after MOST_IN_A_ROW steps without a finite loss, and
    storage.Locked when another attempt has taken the folder.
    """
    try:
        if work.is_trained:
            validate(work, place, work.recipe.student(place.device))
            return True
        return _train(begun(work, place))
    except Stopped:
        return False


def _train(it: Run) -> bool:
    work = it.work
    if work.recipe.rounds and it.state.step == 0:
        keep_pictures(it)
    for epoch in range(it.state.epoch, work.recipe.rounds):
        if epoch > it.state.epoch:
            it.state.epoch, it.state.step_in_epoch = epoch, 0
        if not train_epoch(it):
            return False
        end_epoch(it)
    finish(it)
    return True


def begun(work: Work, place: Place) -> Run:
    """The student with the weights of the newest checkpoint, or its first ones."""
    student = work.recipe.student(place.device)
    if work.workers > 1 and work.synchronised:
        from raypipe.training.batchnorm import across_workers

        across_workers(student)
    optimizer, state = student.optimizer(work.lr) if work.recipe.has_steps else None, State()
    rates = [group["lr"] for group in optimizer.param_groups] if optimizer else []
    sums = networks.checksums_of_each(networks.locate_each(work.recipe))
    newest = of_all(checkpoints.newest_step(work.folder), work)[0]  # machines may see the latest files at other times
    if newest is not None:
        state, content = checkpoints.read(work.folder, newest)
        _restore(content, work, place, student, optimizer, sums)
    if place.is_first:
        fence(work.folder, work.attempt)
    log = record.Log(work.folder, after=state.step) if place.is_first else None
    return Run(work, place, student, _averaging(student, work), optimizer, state, sums, log, rates)


def _restore(content: dict, work: Work, place: Place, student: Student, optimizer, sums: Mapping[str, str]) -> None:
    """Load a checkpoint. Raises OtherConfiguration where it is of another training, ValueError where it does not fit"""
    step = content["state"]["step"]
    where = f"checkpoint {checkpoints.name_of(step)} in {work.folder}"
    there = content["settings"] | {"images": content["images"]} | content["networks"]
    refuse_other(f"{where} is of another training", there, work.settings | {"images": work.samples.digest} | sums)
    try:
        student.load_state_dict(content["student"])
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{where} does not fit the network: {' '.join(str(error).split())[:200]}") from error
    if len(content["random"]) == work.workers:  # all that decides a step follows from (seed, epoch, image) instead
        checkpoints.set_random_state(content["random"][place.rank])


def _averaging(student: Student, work: Work) -> Callable:
    """The student as a step calls it: on several workers its gradients are averaged while they are computed."""
    if work.workers == 1:
        return student
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        student, broadcast_buffers=False, find_unused_parameters=False, gradient_as_bucket_view=True
    )


def train_epoch(it: Run) -> bool:
    """The steps of the epoch that are left, and a checkpoint. Returns False where it was stopped."""
    work, state, recipe = it.work, it.state, it.work.recipe
    last, steps, per_epoch = math.nan, work.steps, len(work.shares(state.epoch))
    for chosen, drawn in map_ahead(lambda ready: ready(), _batches(it), depth=AHEAD):
        rate = recipe.rate(state.step, steps)
        for group, lr in zip(it.optimizer.param_groups, it.rates, strict=True):
            group["lr"] = max(lr * rate, recipe.least_lr)
        outcome = step(it, it.student.views(chosen, drawn))
        state.step, state.step_in_epoch = state.step + 1, state.step_in_epoch + 1
        state.samples += work.batch * work.workers
        state.skipped += not outcome.is_finite
        state.in_a_row = 0 if outcome.is_finite else state.in_a_row + 1
        now = time.monotonic()
        _log(it, outcome, lr=max(work.lr * rate, recipe.least_lr), seconds=now - last)
        last = now
        if state.in_a_row == MOST_IN_A_ROW:
            raise Diverged(_diverged(it))
        if outcome.is_stopped or state.step % work.checkpoint_steps == 0 or state.step_in_epoch == per_epoch:
            save(it)
        if outcome.is_stopped:
            return False
    return True


def _batches(it: Run) -> Iterator[Callable]:
    """Of each step of the epoch that is left, what gives this worker's samples with their random choices."""
    recipe, samples, epoch = it.work.recipe, it.work.samples, it.state.epoch

    def ready(numbers: np.ndarray) -> tuple[list, list]:
        pairs = [recipe.choose(data.generator(recipe.seed, epoch, each), samples, each) for each in numbers.tolist()]
        return tuple(map(list, zip(*pairs, strict=True)))

    for numbers in it.work.shares(epoch)[it.state.step_in_epoch :, it.place.rank]:
        yield lambda numbers=numbers: ready(numbers)


def step(it: Run, views: tuple) -> Outcome:
    """One forward pass, one backward pass, and a step of the optimiser unless loss or gradient are not finite.

    The gradients are those of the whole batch by then, so all workers decide alike. Then the buffers, which the
    forward pass may have spoilt, are what they were before. The terms of the loss travel in one small sum over the
    workers, and with them whether to stop.
    """
    import torch

    before = [buffer.clone() for buffer in it.student.buffers()]
    terms = it.model(*views)
    it.optimizer.zero_grad(set_to_none=True)
    terms["total"].backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in it.student.parameters() if each.grad is not None])
    is_stopped = it.place.is_first and it.place.is_stopped()
    values = torch.stack([*(terms[name].detach().float() for name in sorted(terms))])
    values = torch.cat([values / it.work.workers, values.new_tensor([is_stopped])])
    if it.work.workers > 1:
        torch.distributed.all_reduce(values)
    *means, stopped, norm = torch.cat([values, norm.float()[None]]).tolist()
    means = dict(zip(sorted(terms), means, strict=True))
    is_finite = math.isfinite(norm) and math.isfinite(means["total"])
    if is_finite:
        it.optimizer.step()
    else:
        with torch.no_grad():
            for buffer, old in zip(it.student.buffers(), before, strict=True):
                buffer.copy_(old)
    return Outcome(means, is_finite, stopped > 0)


def _log(it: Run, outcome: Outcome, *, lr: float, seconds: float) -> None:
    """Add a step to the log, and write it where a line is due, but not more often than somebody could read."""
    if it.log is None:
        return
    state, is_skipped = it.state, not outcome.is_finite
    it.log.add(step=state.step, epoch=state.epoch + 1, lr=lr, seconds=seconds, terms=outcome.terms, skipped=is_skipped)
    is_due = state.step % it.work.log_steps == 0 and time.monotonic() - it.flushed > LOOK_SECONDS
    if is_due or state.in_a_row == MOST_IN_A_ROW:
        fence(it.work.folder, it.work.attempt)
        it.log.flush()
        it.flushed = time.monotonic()


def _diverged(it: Run) -> str:
    has_checkpoint = checkpoints.newest_step(it.work.folder) is not None
    kept = "; what the last checkpoint holds is still good" if has_checkpoint else ""
    text = f"the loss or its gradient was not finite in {MOST_IN_A_ROW} steps in a row, up to step {it.state.step:,}"
    return f"{it.work.recipe.name}: {text}; train with a smaller --lr into another --output{kept}"


def save(it: Run) -> None:
    """A checkpoint of all workers. Raises Locked on the first one when another attempt holds the folder by now."""
    work, state = it.work, it.state
    states = of_all(checkpoints.random_state(), work)
    if it.place.is_first:
        fence(work.folder, work.attempt)
        it.log.flush()
        content = {
            "student": it.student.state_dict(),
            "optimizer": it.optimizer.state_dict(),
            "random": states,
            "settings": json.loads(json.dumps(work.settings)),  # plain values: no class is read back
            "images": work.samples.digest,
            "networks": dict(it.networks),
            "rate": work.recipe.rate(state.step, work.steps),
        }
        checkpoints.save(work.folder, state, content)
    it.place.report({"step": state.step, "epoch": state.epoch})


def keep_pictures(it: Run) -> None:
    """Keep the fixed sample, and what an untrained network makes of it."""
    if it.place.is_first:
        samples, indices = it.work.samples, _fixed(it.work)
        record.keep_pictures(it.work.folder, {samples.keys[i]: samples[i]["image"] for i in indices})
        _keep_masks(it, 0)


def end_epoch(it: Run) -> None:
    """What shows how an epoch went: masks of the fixed sample, the measures where they are due, the page.

    Done again where a training goes on from the end of an epoch.
    """
    work, state, epoch = it.work, it.state, it.state.epoch + 1
    rows = _measured(work, it.place, it.student) if work.is_validated(epoch) else None
    if not it.place.is_first:
        return
    _keep_masks(it, epoch)
    if rows is not None:
        score = work.validator.keep(work.folder, rows, epoch=epoch)
        if work.selects and score is None and state.best is None:
            text = f"--select: none of its images could be measured after epoch {epoch:,}, so none is the best"
            raise ValueError(f"{text}; see that they can be read, and start again")
        if score is not None and (state.best is None or score > state.best["value"]):
            state.best = {"value": score, "epoch": epoch, "step": state.step}
    page.write_page(work.folder, method=work.recipe.name, settings=work.settings, steps=work.steps)


def _keep_masks(it: Run, epoch: int) -> None:
    samples, indices = it.work.samples, _fixed(it.work)
    masks = it.student.predict([samples[i]["image"] for i in indices])
    record.keep_masks(it.work.folder, epoch, dict(zip([samples.keys[i] for i in indices], masks, strict=True)))


def _fixed(work: Work) -> list[int]:
    """The samples that are shown over the epochs, spread evenly over the keys."""
    return sorted({*np.linspace(0, len(work.samples) - 1, PICTURES).astype(int).tolist()})


def finish(it: Run) -> None:
    """What comes after the last step: the student's own end and the export, on the first worker; then the validation.

    Exported is the best epoch, where there is a measure for that, else the last.
    """
    work, student, best = it.work, it.student, it.state.best
    if it.place.is_first:
        if best:
            student.load_state_dict(checkpoints.read(work.folder, best["step"])[1]["student"])
        if work.samples:
            student.finish(work.samples)
        fence(work.folder, work.attempt)
        student.export(work.folder)
        checkpoints.save_finished(work.folder, student.state_dict(), dict(it.networks))
    of_all(None, work)  # wait for it
    if work.validator:
        validate(work, it.place, student)


def validate(work: Work, place: Place, student: Student) -> None:
    """Measure what was exported. The first worker leaves the rows in a file, and a point for the curves."""
    content = checkpoints.read_finished(work.folder)
    sums = networks.checksums_of_each(networks.locate_each(work.recipe))
    refuse_other(f"{work.folder} was trained with other networks", content["networks"], sums)
    student.load_state_dict(content["student"])
    rows = _measured(work, place, student)
    if place.is_first:
        if work.recipe.rounds and not work.selects:
            work.validator.keep(work.folder, rows, epoch=work.recipe.rounds)
        work.folder.write_table(rows, *MEASURED)


def _measured(work: Work, place: Place, student: Student) -> pa.Table:
    """The rows of all workers, each of which measures its batches."""

    def probabilities(pixels, *, batch_statistics: bool):
        if place.is_first and place.is_stopped():
            raise Stopped
        return student.probabilities(pixels, batch_statistics=batch_statistics)

    found = work.validator.measure(probabilities, device=place.device, rank=place.rank, workers=work.workers)
    return pa.concat_tables(of_all(found, work))
