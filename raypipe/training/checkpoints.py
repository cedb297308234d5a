"""Checkpoints: all that a training needs to go on where it was, one file each, written whole or not at all."""

from __future__ import annotations

import io
import random
import re
from dataclasses import asdict, dataclass

import numpy as np

from raypipe.lookup import one_line
from raypipe.run import provenance
from raypipe.storage import Folder

ROOM = "checkpoints"
FINISHED = "finished.pt"  # the student's state alone, as it was exported
OURS = re.compile(r"step-(\d{8})\.pt")
FORMAT = 1
KEPT = 2  # the newest ones, besides the best
HOLDS = {"format", "student", "optimizer", "state", "random", "settings", "images", "networks", "rate", "versions"}


@dataclass
class State:
    """How far a training is."""

    epoch: int = 0  # that is under way or, with all of its steps done, has just ended; the first is 0
    step_in_epoch: int = 0  # of it, done
    step: int = 0  # of all, done
    samples: int = 0  # seen by all workers together
    skipped: int = 0  # steps whose gradient was not finite
    in_a_row: int = 0  # of them, the last ones
    best: dict | None = None  # `value`, `epoch` and `step` of the epoch to keep, where there is a measure for that


def save(folder: Folder, state: State, content: dict) -> None:
    """Write a checkpoint and delete older ones, but for the newest and the best.

    content: `student` and `optimizer` (their states), `random` (of each worker, see `random_state`), `settings`,
    `images` (what was trained on, by digest), `networks` (checksums by file) and `rate` (the factor of the next step).
    """
    versions = provenance.environment()["packages"]
    _write(folder, name_of(state.step), content | {"format": FORMAT, "state": asdict(state), "versions": versions})
    kept = {*_steps(folder)[-KEPT:], state.best and state.best["step"]}
    for step in set(_steps(folder)) - kept:
        folder.delete(ROOM, name_of(step))


def newest_step(folder: Folder) -> int | None:
    """The step of the newest checkpoint; None where there is none."""
    return max(_steps(folder), default=None)


def read(folder: Folder, step: int) -> tuple[State, dict]:
    """The checkpoint of a step. Raises ValueError that names a file that is cut short or foreign, and what to do."""
    content = _read(folder, name_of(step), HOLDS)
    return State(**content["state"]), content


def save_finished(folder: Folder, student: dict, networks: dict[str, str]) -> None:
    """Write the state of the student that is exported. networks: as of `save`."""
    _write(folder, FINISHED, {"format": FORMAT, "student": student, "networks": networks})


def read_finished(folder: Folder) -> dict:
    """What `save_finished` wrote. Raises what `read` raises."""
    return _read(folder, FINISHED, {"format", "student", "networks"})


def _write(folder: Folder, name: str, content: dict) -> None:
    import torch

    file = io.BytesIO()
    torch.save(content, file)
    folder.write(file.getvalue(), ROOM, name)


def _read(folder: Folder, name: str, holds: set[str]) -> dict:
    import torch

    where = f"checkpoint {folder.location(ROOM, name)}"
    way_out = "delete it, and the same command goes on from the one before, or from the start"
    if name == FINISHED:
        way_out = "delete _runs/finished.json, and the same command makes it anew from the newest checkpoint"
    elif name != max(folder.files(ROOM).keys() - {FINISHED}, default=name):  # the best one; older ones are gone
        way_out = f"delete {ROOM}/, and the same command trains anew from the start"
    try:
        content = torch.load(io.BytesIO(folder.read(ROOM, name) or b""), map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds: cut short, no zip file, objects that are no tensors
        reason = str(error).split(". ")[0]  # torch adds how to trust the file, which nobody should
        reason = one_line(ValueError(reason), limit=120)
        raise ValueError(f"{where} cannot be read, as after a copy that broke off ({reason}); {way_out}") from error
    if not isinstance(content, dict) or not holds <= content.keys() or content["format"] != FORMAT:
        raise ValueError(f"{where} is none of this version of raypipe; {way_out}")
    return content


def name_of(step: int) -> str:
    """The name of the checkpoint after a step."""
    return f"step-{step:08}.pt"


def random_state() -> dict:
    """The states of all global random generators of this process."""
    import torch

    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: dict) -> None:
    """Put back what `random_state` gave; that of a GPU only where there is one."""
    import torch

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _steps(folder: Folder) -> list[int]:
    return sorted(int(found[1]) for name in folder.files(ROOM) if (found := OURS.fullmatch(name)))
