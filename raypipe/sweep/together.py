"""Trials that differ only in what comes after an image's features (`Segmenter.after_features`), labelled side by side.

They use one network, and the features of an image are computed once for all of them. Each stays a run of its own.
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
    """The trials by what they share the features of; one that shares nothing is alone."""
    found: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        options = settings(trial.segmenter)
        before = {name: options[name] for name in options.keys() - {*trial.segmenter.after_features}}
        found[canonical(before)].append(trial)
    return list(found.values())


def label_together(group: list[Trial], forget: Callable[[], None]) -> None:
    """Label the images that each trial lacks, batch by batch, in a plain loop here.

    forget: of `share_features`. Raises what labelling raises; then the others stop too, and what was committed stays.
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


def share_features(methods: Sequence[Segmenter]) -> Callable[[], None]:
    """Let methods that differ only in `after_features` load one network and compute the features of an image once.

    Changes the methods. Returns what forgets the features so far; to be called while none of them is at work.
    """
    lead, kept, loaded, none = methods[0], {}, {}, object()
    load, compute = lead.load, lead.features

    def load_once(device: str) -> dict:
        if not loaded:
            before = dict(vars(lead))
            load(device)
            loaded.update((name, value) for name, value in vars(lead).items() if before.get(name, none) is not value)
        return loaded

    def features(images: Sequence[np.ndarray]) -> Iterator:
        keys = [(image.shape, hashlib.sha256(np.ascontiguousarray(image)).digest()) for image in images]
        lacking = {key: image for key, image in zip(keys, images, strict=True) if key not in kept}
        computed = iter(compute(list(lacking.values()))) if lacking else iter(())
        for key in keys:
            if key not in kept:
                kept[key] = next(computed)
            yield kept[key]

    for method in methods:
        method.load = lambda device, method=method: vars(method).update(load_once(device))
        method.features = features
    return kept.clear
