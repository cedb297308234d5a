"""What labelled a run, from the records of its attempts, so that removed images can be labelled again the same way."""

from __future__ import annotations

import shlex
from dataclasses import fields

from raypipe.run import Run
from raypipe.run.attempts import Job, jobs


def label_again(run: Run) -> None:
    """Label what is pending of each input. Raises what `pipeline.label` raises."""
    from raypipe.pipeline import options
    from raypipe.pipeline.label import label

    for job in jobs(run):
        label(*options.build(_method(run), job.values))


def commands(run: Run) -> list[str]:
    """The command lines that do what `label_again` does; options at their defaults are left out."""
    try:
        found = [_command(_method(run), job) for job in jobs(run)]
    except (ValueError, TypeError):  # a method or an option that this version does not know
        found = []
    return found or [f"raypipe label {_method(run)} --input INPUT --output {run}  # with the settings in run.json"]


def _command(method: str, job: Job) -> str:
    from raypipe.pipeline import options

    words = ["raypipe", "label", method]
    for part in filter(None, options.build(method, job.values)):
        for field in fields(part):
            value = getattr(part, field.name)
            words += [] if value == field.default else options.flags(field.name, value)
    return shlex.join(words)


def _method(run: Run) -> str:
    return run.masks.rpartition("=")[2]
