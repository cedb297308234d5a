"""What the workers of a training are told, where each is, and what they say to each other."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raypipe.storage import Folder
from raypipe.training import data
from raypipe.training.recipe import Recipe

if TYPE_CHECKING:
    from raypipe.training.validate import Validator

LOOK_SECONDS = 1.0  # between looks for a request to stop, and between writes of the log
STOP = ("_runs", "STOP")  # a file that asks for a stop


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all workers of a training are told. Cheap to pickle, but for images that are not in Ray's store."""

    recipe: Recipe
    samples: data.Samples | None  # None where nothing is trained
    folder: Folder
    attempt: str
    settings: dict  # frozen ones, kept in each checkpoint
    workers: int
    batch: int  # per worker
    lr: float  # at rate 1
    tail: str
    synchronised: bool  # the statistics of batch normalisation are those of all workers
    checkpoint_steps: int
    log_steps: int
    is_trained: bool = False  # only the validation is left to do
    validator: Validator | None = None
    validate_every: int = 0  # epochs; 0 = only at the end
    selects: bool = False  # the best epoch is exported, by its validation

    @property
    def per_epoch(self) -> int:
        """Steps of the first epoch or round. Raises ValueError for fewer images than a batch."""
        return len(self.shares(0)) if self.recipe.rounds else 0

    @property
    def steps(self) -> int:
        """All steps of the training."""
        return self.recipe.iterations or self.recipe.epochs * self.per_epoch

    def is_validated(self, epoch: int) -> bool:
        """Whether there is a validation after an epoch, the first being 1. That of the end comes after the export."""
        is_last = epoch == self.recipe.rounds
        is_due = self.validate_every > 0 and epoch % self.validate_every == 0
        return (is_due or is_last) if self.selects else (is_due and not is_last)

    def shares(self, epoch: int) -> np.ndarray:
        """The samples of each step and worker in an epoch: (steps, workers, batch).

        They are indices, or where images are drawn with replacement, in a round, numbers of samples.
        """
        if self.recipe.iterations:
            recipe = self.recipe
            first, last = (min(each * recipe.round_steps, recipe.iterations) for each in (epoch, epoch + 1))
            order = np.arange(first * self.workers * self.batch, last * self.workers * self.batch)
        else:
            order = data.order(len(self.samples), seed=self.recipe.seed, epoch=epoch)
        return data.shares(order, workers=self.workers, batch=self.batch, tail=self.tail)


@dataclass(frozen=True)
class Place:
    """Where one worker is."""

    rank: int = 0
    device: str = "cpu"  # or cuda
    is_stopped: Callable[[], bool] = lambda: False  # asked at each step on the first worker; all follow
    report: Callable[[dict], None] = lambda figures: None  # called on all workers behind each checkpoint

    @property
    def is_first(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0


def of_all(value: object, work: Work) -> list:
    """A value of each worker, by rank."""
    if work.workers == 1:
        return [value]
    from torch import distributed

    values = [None] * work.workers
    distributed.all_gather_object(values, value)
    return values


class StopFile:
    """Whether a stop was asked for by the file STOP in the folder, which a thread looks for once a second."""

    def __init__(self, folder: Folder):
        self._folder, self._found = folder, threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def __call__(self) -> bool:
        return self._found.is_set()

    def _look(self) -> None:
        while not self._found.is_set():
            with contextlib.suppress(OSError):  # a network that fails for a while
                if self._folder.read(*STOP) is not None:
                    self._found.set()
            time.sleep(LOOK_SECONDS)
