"""A recipe for sweeps over trainings, and `trainable.py [OPTIONS]` for `raypipe sweep --train`."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from raypipe.networks import IMAGENET_MEAN, IMAGENET_STD
from support.toy import Toy


@dataclass(kw_only=True)
class Trainable(Toy):
    """As the toy, but what it finds is what is brighter than a level, however it is trained."""

    level: float = 0.5  # of grey values in 0..1
    is_soft: bool = False
    width: float = 0.0  # of the soft step
    image_size: int = 32
    resize: int = 33

    def __post_init__(self):
        if not 0 < self.level < 1:
            raise ValueError(f"trainable: level must be above 0 and below 1, got {self.level!r}")
        if self.width and not self.is_soft:
            raise ValueError("trainable: width has no effect without is_soft")

    def student(self, device):
        import torch

        from support.toy_student import ToyStudent

        class TrainableStudent(ToyStudent):
            def probabilities(self, pixels, *, batch_statistics):
                mean, std = (pixels.new_tensor(each).reshape(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
                grey = (pixels * std + mean).mean(1)
                return (grey > self.recipe.level).float()

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return TrainableStudent(self).to(device).train()


if __name__ == "__main__":
    from raypipe import training
    from raypipe.cli import verbs as cli
    from support import trainable

    training.find = lambda name: trainable.Trainable
    sys.exit(cli.main(["sweep", "trainable", "--train", *sys.argv[1:]]))
