"""What labelled a run, from the records of its attempts, so that removed images can be labelled again the same way."""

from __future__ import annotations

import shlex
from dataclasses import fields

from raypipe.pipeline import options
from raypipe.pipeline.label import label
from raypipe.run import Run
from raypipe.run.attempts import InputAttempt, newest_by_input
from raypipe.run.rows import refuse_other_than_masks
from raypipe.storage import without_secrets


def label_again(run: Run) -> int:
    """Label what is pending of each input; returns the images. Raises what `pipeline.label.label` raises."""
    refuse_other_than_masks(run)
    return sum(label(*options.build(run.method, each.values)).labelled for each in newest_by_input(run))


def commands(run: Run) -> list[str]:
    """The command lines that do what `label_again` does; options at their defaults are left out."""
    if run.table != "masks":
        return [f"raypipe archive --input INPUT --output {run} --classes CLASSES  # with the settings in run.json"]
    try:
        found = [_command(run.method, each) for each in newest_by_input(run)]
    except (ValueError, TypeError):  # a method or an option that this version does not know
        found = []
    return found or [f"raypipe label {run.method} --input INPUT --output {run}  # with the settings in run.json"]


def _command(method: str, attempt: InputAttempt) -> str:
    words = ["raypipe", "label", method]
    for part in filter(None, options.build(method, attempt.values)):
        for field in fields(part):
            value, hint = getattr(part, field.name), options.types(type(part))[field.name]
            words += [] if value == field.default else options.flags(field.name, value, hint)
    return shlex.join(map(without_secrets, words))
