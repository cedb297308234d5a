"""Commands over one folder of images, in turns: how fast, in how much memory, and whether they leave the same masks.

They are measured from outside and with all cores, as somebody waits for them. Against each stands the same command for
a few images, so that starting up can be left out.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raypipe.benchmark import processes
from raypipe.benchmark.figures import Figure, Sizes
from raypipe.benchmark.methods import photographs
from raypipe.benchmark.processes import Ran
from raypipe.benchmark.turns import ratios

FEW = 2  # images of the command that stands for starting up: one for each of two workers
SIDES = (0.6, 0.95)  # of a crop, as a share of its photograph's
RATE, AFTER = "images per second", "images per second, start left out"


class Arm(NamedTuple):
    """A command, and the masks that it leaves."""

    name: str
    command: Callable[[str, str], list[str]]  # of a folder of images and an output that is not there yet
    masks: Callable[[str], dict[str, np.ndarray]]  # of the output: bool (N, H, W) by the image's name without suffix


def compared(name: str, ours: Sequence[Arm], other: Arm, photos: str, folder: str, repeats: int) -> list[Figure]:
    """The figures of commands on the same images, and how many times faster ours are. folder: an empty one."""
    arms, count, few = [*ours, other], len(os.listdir(photos)), os.path.join(folder, "few")
    os.mkdir(few)
    for file in sorted(os.listdir(photos))[:FEW]:
        shutil.copy(os.path.join(photos, file), few)
    outputs = (os.path.join(folder, str(i)) for i in itertools.count())
    for arm in arms:  # compiles modules, and brings files into memory
        processes.ran(arm.command(few, next(outputs)))
    starts, wholes, last = [[] for _ in arms], [[] for _ in arms], [""] * len(arms)
    for _ in range(repeats):
        for i, arm in enumerate(arms):
            starts[i].append(processes.ran(arm.command(few, next(outputs))))
            last[i] = next(outputs)
            wholes[i].append(processes.ran(arm.command(photos, last[i])))
    found = [arm.masks(output) for arm, output in zip(arms, last, strict=True)]
    figures, rates = [], [_rates(*runs, count) for runs in zip(wholes, starts, strict=True)]
    for arm, rate, whole, start in zip(arms, rates, wholes, starts, strict=True):
        figures += _of_arm(name, arm.name, rate, whole, start, count)
    for arm, rate, masks in zip(ours, rates, found, strict=False):
        for title, mine, others in zip((RATE, AFTER), rate, rates[-1], strict=True):
            figures.append(_known(name, f"{title}: {arm.name} / {other.name}", "x", ratios(mine, others), "in turns"))
        figures += alike(name, masks, found[-1], case=f", {arm.name}")
    return figures


def _rates(wholes: Sequence[Ran], starts: Sequence[Ran], count: int) -> tuple[list[float], list[float]]:
    """Images per second of each run, with its start and without what the command for a few images took.

    The latter is not a number where a busy machine made that one take longer than the other.
    """
    seconds = [whole.seconds - start.seconds for whole, start in zip(wholes, starts, strict=True)]
    after = [(count - FEW) / each if each > 0 else float("nan") for each in seconds]
    return [count / whole.seconds for whole in wholes], after


def _of_arm(name: str, arm: str, rate: tuple[list, list], wholes: Sequence[Ran], starts: Sequence[Ran], count: int):
    costs = [(whole.cpu - start.cpu) / (count - FEW) for whole, start in zip(wholes, starts, strict=True)]
    memory, against = [whole.memory for whole in wholes], f"against a run of {FEW} images"
    return [
        _known(name, f"{RATE}, {arm}", "", rate[0], f"{count} images, as somebody waits for them"),
        _known(name, f"{AFTER}, {arm}", "", rate[1], against),
        _known(name, f"CPU of the start, {arm}", "s", [start.cpu for start in starts], f"{FEW} images"),
        _known(name, f"CPU per image, {arm}", "s", costs, against),
        _known(name, f"peak memory, {arm}", "MB", memory, "all its processes, what each has of its own"),
    ]


def _known(name: str, title: str, unit: str, values: Sequence[float], note: str) -> Figure:
    """A figure of those values that are numbers."""
    return Figure(name, title, unit, [value for value in values if np.isfinite(value)], note)


def alike(name: str, ours: dict[str, np.ndarray], others: dict[str, np.ndarray], *, case: str = "") -> list[Figure]:
    """How alike masks are, bool (N, H, W) by image, those in the same place: share of equal ones, and the least IoU.

    An image that one has not, or with another number of masks, is unlike with IoU 0; two empty masks have IoU 1.
    """
    equal, overlaps = [], []
    for image in sorted({*ours, *others}):
        a, b = ours.get(image), others.get(image)
        if a is None or b is None or a.shape != b.shape:
            equal.append(0.0)
            overlaps.append(0.0)
            continue
        equal.append(float((a == b).all()))
        union = (a | b).sum((1, 2))
        overlaps += np.where(union, (a & b).sum((1, 2)) / np.maximum(union, 1), 1.0).tolist()
    share, least = [sum(equal) / len(equal)], [min(overlaps, default=1.0)]
    note = f"{len(equal)} images"
    return [
        Figure(name, f"share of images with equal masks{case}", "", share, note),
        Figure(name, f"least IoU of two masks{case}", "", least, note),
    ]


def crops(folder: str, sizes: Sizes) -> str:
    """A new folder of different JPEG files: crops of photographs, every second one as in a mirror."""
    import cv2

    place, rng, originals = Path(folder, "photographs"), np.random.default_rng(0), photographs(sizes)
    place.mkdir()
    for i in range(sizes.peers):
        original = originals[i % len(originals)][..., ::-1]  # OpenCV writes BGR
        height, width = (np.array(original.shape[:2]) * rng.uniform(*SIDES)).astype(int)
        y, x = rng.integers(0, [original.shape[0] - height + 1, original.shape[1] - width + 1])
        crop = original[y : y + height, x : x + width]
        cv2.imwrite(str(place / f"{i:04d}.jpg"), crop[:, ::-1] if i % 2 else crop)
    return str(place)
