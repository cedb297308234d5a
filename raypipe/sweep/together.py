"""Trials that differ only in what comes after a stage of their method (`Segmenter.stages`), labelled side by side.

They use the same networks, and what a stage gives for an image is computed once for all that agree on what comes before
its end. Each stays a run of its own.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc

from raypipe.pipeline.graph import Here
from raypipe.pipeline.label import begun
from raypipe.sweep.search import canonical
from raypipe.sweep.trials import Trial, settings
from raypipe.types import Segmenter


def groups(trials: list[Trial]) -> list[list[Trial]]:
    """The trials by what they share a stage's results of; one that shares nothing is alone."""
    found: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        found[_before(trial.segmenter, next(iter(trial.segmenter.stages), None))].append(trial)
    return list(found.values())


def _before(method: Segmenter, stage: str | None) -> str:
    """The options that matter before the end of a stage, or all, as text."""
    later = method.stages.get(stage, ())
    return canonical({name: value for name, value in settings(method).items() if name not in later})


def label_together(group: list[Trial], forget: Callable[[], None]) -> None:
    """Label the images that each trial lacks, batch by batch, in a plain loop here.

    forget: of `share_stages`. Raises what labelling raises; then the others stop too, and what was committed stays.
    """
    ids, size = group[0].images["image_id"], group[0].job.batch_size
    with ExitStack() as runs:
        at_work = []
        for trial in group:
            if len(trial.run.plan(trial.images)):
                job = replace(trial.job, local=True)
                it = runs.enter_context(begun(job, trial.work, trial.run, trial.images, settings=trial.frozen))
                at_work.append((it, Here(job, it.work, trial.run, it.pending, trial.frozen)))
        for start in range(0, len(ids), size):
            batch = ids.slice(start, size).combine_chunks()
            for it, here in at_work:
                here.label(it.pending.filter(pc.is_in(it.pending["image_id"], value_set=batch)), it.errors)
            forget()


def share_stages(methods: Sequence[Segmenter]) -> Callable[[], None]:
    """Let methods of one group load their networks once, and compute each stage of an image once where they agree.

    Changes the methods. Returns what forgets all results so far; to be called while none of them is at work.
    """
    lead, loaded, none = methods[0], {}, object()
    load, results = lead.load, defaultdict(dict)

    def load_once(device: str) -> dict:
        if not loaded:
            before = dict(vars(lead))
            load(device)
            loaded.update((name, value) for name, value in vars(lead).items() if before.get(name, none) is not value)
        return loaded

    for method in methods:
        for stage in method.stages:
            setattr(method, stage, _once(getattr(method, stage), results[stage, _before(method, stage)]))
        method.load = lambda device, method=method: vars(method).update(load_once(device))

    def forget() -> None:
        for kept in results.values():
            kept.clear()

    return forget


def _once(compute: Callable, kept: dict) -> Callable:
    """A method's stage that takes from `kept` what was computed before, by the image."""

    def stage(images: Sequence[np.ndarray]) -> Iterator:
        keys = [(image.shape, hashlib.sha256(np.ascontiguousarray(image)).digest()) for image in images]
        lacking = {key: image for key, image in zip(keys, images, strict=True) if key not in kept}
        computed = iter(compute(list(lacking.values()))) if lacking else iter(())
        for key in keys:
            if key not in kept:
                kept[key] = next(computed)
            yield kept[key]

    return stage
