"""A recipe for the tests of training: a small network learns an image's brightness. Its options say how it fails."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raypipe.training.recipe import Recipe, Student
from raypipe.types import BadImage

SIDE = 16


@dataclass(kw_only=True)
class Toy(Recipe):
    """Learns where an image is bright."""

    epochs: int = 2
    batch_size: int = 4
    lr: float = 0.01
    sleep: float = 0.0  # seconds per step
    nan_from: int = -1  # the first step whose loss is no number; -1 = none
    nan_to: int = -1  # the one behind the last
    dies_at: int = -1  # the step at which the first worker's process dies, once
    raises_at: int = -1  # the step at which it raises an error
    image_size: int = 16  # of the squares of a validation
    resize: int = 18
    marks: str = ""  # folder where a worker leaves a file for each image that it prepares, and when it dies

    def rows(self, manifest):
        if manifest is None and self.epochs:
            raise ValueError("toy: --input is missing")
        return manifest

    def prepare(self, row, image):
        if image.shape[0] < 4:
            raise BadImage("decode", "too_small", "fewer than 4 rows")
        if self.marks:
            Path(self.marks, row["key"].replace("/", "_")).touch()
        return {"image": np.resize(image, (SIDE, SIDE, 3))}

    def draw(self, random, sample):
        return int(random.integers(2)), float(random.random())

    def rate(self, step, steps):
        self.step = step  # the loop asks before each step
        return 1 - 0.5 * step / steps

    def student(self, device):
        import torch

        from support.toy_student import ToyStudent

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return ToyStudent(self).to(device).train()


@dataclass(kw_only=True)
class Drawn(Toy):
    """As the toy, but images are drawn with replacement."""

    epochs: int = 0
    iterations: int = 6
    least_lr, round_steps = 0.008, 4

    def rows(self, manifest):
        return manifest

    def choose(self, random, samples, number):
        sample = samples[int(random.integers(len(samples)))]
        return sample, self.draw(random, sample)


def happens(recipe: Toy) -> bool:
    """Let fail what is to fail at this step. Returns whether its loss is no number."""
    step = recipe.step
    time.sleep(recipe.sleep)
    died = Path(recipe.marks, "died")
    if step == recipe.dies_at and not died.exists():
        died.touch()
        os.kill(os.getpid(), 9)
    if step == recipe.raises_at:
        raise ValueError("toy: this step is not liked")
    return recipe.nan_from <= step < recipe.nan_to


def exported(recipe: Toy, sign: float) -> bytes:
    return json.dumps({"model_type": "toy", "seed": recipe.seed, "sign": sign}).encode()


RECIPE = Toy
__all__ = ["RECIPE", "Drawn", "SIDE", "Student", "Toy", "exported", "happens"]
