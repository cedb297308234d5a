"""A step of NamedMask's training as its published code takes it, from the photographs to the optimiser.

torchvision changes each image by itself, on Pillow's images, with filters of two dimensions; objects are pasted pixel
by pixel; Adam has its defaults; and after every step a confusion matrix is counted on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks
from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, halves, timed
from raypipe.training import data

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.training.namedmask import NamedMask
    from raypipe.training.namedmask.student import NamedMaskStudent
    from raypipe.training.namedmask.views import Draw

NAME = "train_namedmask"
CPU, GPU = (64, 4), (384, 16)  # px a side and samples per step: of a test on photographs; the published recipe's
SIDE, SAMPLES = 384, 16  # of the augmentation alone
NETWORK: dict = {}  # options of the recipe in the place of its defaults
NEAR = 2  # levels of 255 that a colour may be off, as in the stored arrays
IGNORED = 255


def compare(_subject, _device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """Augmentation alone, then steps on random weights, in float32 on the CPU; on a GPU, if there is one, as usual."""
    import torch

    figures = _augmented(images, repeats) + _steps("cpu", *CPU, images, repeats)
    return figures + (_steps("cuda", *GPU, images, 10 * repeats) if torch.cuda.is_available() else [])


def made(images: Sequence[np.ndarray], side: int, batch: int) -> tuple[NamedMask, list[dict]]:
    """A recipe, and its samples of photographs whose brighter halves are the objects."""
    from raypipe.training.namedmask import NamedMask

    where = {"archive": "archive.json", "classes": "[one]", "masks": "masks", "backbone": "random"}
    recipe = NamedMask(**where | {"crop": side, "batch_size": batch} | NETWORK)
    return recipe, [{"image": image, "mask": np.packbits(halves(image)[1]), "label": np.int16(1)} for image in images]


def batch_of(student: NamedMaskStudent, samples: Sequence[dict], numbers: Sequence[int]) -> tuple[Tensor, ...]:
    """The samples of these numbers as the loop makes them: images, labels and seeds."""
    recipe = student.recipe
    pairs = [recipe.choose(data.generator(recipe.seed, 0, number), samples, number) for number in numbers]
    return student.views(*map(list, zip(*pairs, strict=True)))


def plain_batch(recipe: NamedMask, samples: Sequence[dict], numbers: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
    """The same in its plain form: float32 (B, 3, S, S), int64 (B, S, S) with IGNORED, and seeds."""
    import torch

    made = [_sample(recipe, samples, data.generator(recipe.seed, 0, number)) for number in numbers]
    images, labels, seeds = zip(*made, strict=True)
    return torch.stack(images), torch.stack(labels), list(seeds)


def _sample(recipe: NamedMask, samples: Sequence[dict], random: np.random.Generator) -> tuple[Tensor, Tensor, int]:
    count = int(random.integers(1, recipe.n_max + 1))
    chosen = [samples[int(index)] for index in random.integers(len(samples), size=count)]
    drawn = [recipe.draw(random, sample) for sample in chosen]
    seed = int(random.integers(2**62))
    (image, labels), *others = (plain_square(*pair, recipe.crop) for pair in zip(chosen, drawn, strict=True))
    for other, its in others:
        at, (rows, columns) = random.random(2), ((its > 0) & (its < IGNORED)).nonzero().T
        if not len(rows):
            continue
        free = (recipe.crop - int(each.max() - each.min()) for each in (rows, columns))
        top, left = (int(share * length) for share, length in zip(at, free, strict=True))
        new_rows, new_columns = rows - rows.min() + top, columns - columns.min() + left
        image[:, new_rows, new_columns] = other[:, rows, columns]
        labels[new_rows, new_columns] = its[rows, columns]
    return image, labels, seed


def plain_square(sample: dict, draw: Draw, side: int) -> tuple[Tensor, Tensor]:
    """One image of a sample and its labels, by torchvision: float32 (3, S, S), normalised, and int64 (S, S)."""
    import torch
    import torchvision.transforms.functional as TF
    from PIL import Image

    shape = sample["image"].shape[:2]
    labels = np.unpackbits(sample["mask"], count=shape[0] * shape[1]).reshape(shape) * sample["label"]
    image = TF.resize(Image.fromarray(sample["image"]), draw[:2], TF.InterpolationMode.BILINEAR)
    labels = TF.resize(torch.from_numpy(labels).long()[None], draw[:2], TF.InterpolationMode.NEAREST)
    wide, high = (max(0, side - length) for length in image.size)
    left, top = wide * draw.corner[1], high * draw.corner[0]
    padding, colour = [left, top, wide - left, high - top], np.asarray(image).mean((0, 1)).astype(np.uint8)
    image = TF.crop(TF.pad(image, padding, tuple(colour.tolist())), *draw.offset, side, side)
    labels = TF.crop(TF.pad(labels, padding, IGNORED), *draw.offset, side, side)
    image, labels = (TF.hflip(each) if draw.is_flipped else each for each in (image, labels))
    changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for which in draw.jitter.order if draw.jitter else ():
        image = changes[which](image, draw.jitter[which])
    image = TF.rgb_to_grayscale(image, 3) if draw.is_grey else image
    if draw.sigma is not None:
        image = TF.gaussian_blur(image, int(0.1 * side // 2 * 2) + 1, draw.sigma)
    return TF.normalize(TF.to_tensor(image), networks.IMAGENET_MEAN, networks.IMAGENET_STD), labels[0]


def _augmented(images: Sequence[np.ndarray], rounds: int) -> list[Figure]:
    """Seconds per sample on one core, and how many colours are apart."""
    recipe, samples = made(images, SIDE, SAMPLES)
    student = recipe.student("cpu")
    arms = (lambda numbers: batch_of(student, samples, numbers), lambda numbers: plain_batch(recipe, samples, numbers))
    seconds, unlike = [[], []], []
    for first in range(0, (rounds + 1) * SAMPLES, SAMPLES):
        (ours, found), (other, plain) = (timed(arm, range(first, first + SAMPLES)) for arm in arms)
        apart = (found[0] - plain[0]).abs().mul_(255 * min(networks.IMAGENET_STD))
        unlike.append(float((apart > NEAR).double().mean()))
        if first:  # the first round warms up
            for times, spent in zip(seconds, (ours, other), strict=True):
                times.append(spent / SAMPLES)
    case = f", augmentation, {SIDE} px, one core"
    figures = compared(NAME, seconds, "torchvision on Pillow's images, one by one", per="sample", case=case)
    note = f"by more than {NEAR} of 255 levels"
    return [*figures, Figure(NAME, f"share of colours unlike plain{case}", "", unlike, note)]


def _steps(device: str, side: int, batch: int, images: Sequence[np.ndarray], rounds: int) -> list[Figure]:
    """Whole steps, augmentation included, in turns, from the same weights."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    recipe, samples = made(images, side, batch)
    student = recipe.student(device)
    other = PlainLoop(student, samples)
    images, labels, seeds = batch_of(student, samples, range(batch))
    plain = other.learn(images, labels.where(labels >= 0, IGNORED), seeds.tolist())  # both also warm up
    ours, seconds = _step(student, samples), [[], []]
    unlike = abs(ours(range(batch)) / plain - 1)
    for first in range(batch, (rounds + 1) * batch, batch):
        for arm, times in zip((ours, other.step), seconds, strict=True):
            wait()
            times.append(timed(lambda arm=arm, first=first: (arm(range(first, first + batch)), wait()))[0])
    case = f", {side} px, {batch} per step, {device}"
    return [
        *compared(NAME, seconds, "the published code's formulation", per="step", case=case),
        Figure(NAME, f"steps per second{case}", "steps/s", [1 / each for each in seconds[0]]),
        Figure(NAME, f"relative difference of a loss to plain{case}", "", [unlike], "of the same weights and samples"),
    ]


def _step(student: NamedMaskStudent, samples: Sequence[dict]) -> Callable[[Sequence[int]], float]:
    optimizer = student.optimizer(student.recipe.lr)

    def step(numbers: Sequence[int]) -> float:
        optimizer.zero_grad()
        loss = student(*batch_of(student, samples, numbers))["total"]
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


class PlainLoop:
    """Training in its plainest form, from a copy of a student's weights."""

    def __init__(self, student: NamedMaskStudent, samples: Sequence[dict]):
        import torch

        from raypipe.segmenters.namedmask.network import Separable

        self.recipe, self.samples = student.recipe, samples
        self.device = next(student.parameters()).device.type
        self.network = copy.deepcopy(student.network).to(memory_format=torch.contiguous_format)
        (self.dropped,) = (each for each in self.network.modules() if type(each) is type(student.dropped))
        for name, module in list(self.network.named_modules()):
            if isinstance(module, Separable):
                self.network.set_submodule(name, module.body)  # convolutions alone, however far they reach
        rates = ((self.network.backbone, self.recipe.lr * self.recipe.backbone_factor),)
        rates += ((self.network.classifier, self.recipe.lr),)
        groups = [{"params": part.parameters(), "lr": lr} for part, lr in rates]
        self.optimizer = torch.optim.Adam(groups, weight_decay=self.recipe.weight_decay)
        self.confusion = np.zeros((self.network.classes, self.network.classes), np.int64)

    def step(self, numbers: Sequence[int]) -> float:
        """A step on the samples of these numbers: the loss before it."""
        return self.learn(*plain_batch(self.recipe, self.samples, numbers))

    def learn(self, images: Tensor, labels: Tensor, seeds: list[int]) -> float:
        """A step on what `plain_batch` gives."""
        from torch.nn import functional as F

        self.dropped.seeds = seeds
        images, labels = images.to(self.device), labels.to(self.device)
        with networks.autocast(self.device, self.recipe.dtype):
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        found, true = logits.argmax(1).cpu().numpy(), labels.cpu().numpy()
        counted = true != IGNORED
        number = len(self.confusion)
        self.confusion += np.bincount(true[counted] * number + found[counted], minlength=number**2).reshape(number, -1)
        return loss.item()
