"""Small trainings of Sempart: on a DINO of random weights, on photographs made of noise."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import distributed

from raypipe import networks
from raypipe.storage import Folder
from raypipe.training import data, loop
from raypipe.training.sempart import Sempart

SIDE = 64
ATTEMPT = "one"  # that holds the folder


def small(backbone: str, /, **options) -> Sempart:
    """A recipe. options: other ones, also another backbone."""
    sizes = {"hidden": 8, "image_size": SIDE, "resize": 70, "batch_size": 2}
    return Sempart(**{"backbone": backbone} | sizes | options)


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) as networks see them."""
    mean, std = np.float32(networks.IMAGENET_MEAN), np.float32(networks.IMAGENET_STD)
    return torch.from_numpy(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


def photographs(count: int, *, seed: int = 0) -> list[np.ndarray]:
    """Blurred noise with a bright square in it, of different sizes."""
    random, found = np.random.default_rng(seed), []
    for i in range(count):
        size = (80 + 7 * i, 96 - 5 * i)
        noise = Image.fromarray(random.integers(0, 120, (9, 9, 3), dtype=np.uint8))
        image = np.array(noise.resize(size[::-1]))
        image[20:50, 25:60] += 120
        found.append(image)
    return found


def samples_of(recipe: Sempart, count: int) -> list:
    return [recipe.prepare({}, image) for image in photographs(count)]


def views_of(student, count: int = 2, *, epoch: int = 0) -> tuple[torch.Tensor, ...]:
    recipe = student.recipe
    samples = samples_of(recipe, count)
    return student.views(samples, [recipe.draw(data.generator(0, epoch, i), each) for i, each in enumerate(samples)])


def work_of(recipe: Sempart, folder: str, *, workers: int, images: int = 6) -> loop.Work:
    """A training on made photographs, as its workers are told."""
    rows = [{"key": f"{i}", "uri": f"{i}", "error": "", "digest": f"{i}"} for i in range(images)]
    samples = data.Samples(rows, samples_of(recipe, images))
    return loop.Work(
        recipe=recipe, samples=samples, folder=Folder(folder), attempt=ATTEMPT, settings={}, workers=workers,
        batch=recipe.batch_size // workers, lr=recipe.lr, tail="pad", synchronised=True, checkpoint_steps=500,
        log_steps=50,
    )  # fmt: skip


def work_beside(rank: int, recipe: Sempart, folder: str, workers: int) -> None:
    """One of several workers of a training on the CPU, in a process of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=rank, world_size=workers)
    loop.run(work_of(recipe, folder, workers=workers), loop.Place(rank=rank))
    distributed.barrier()  # nobody closes connections that others still have
    distributed.destroy_process_group()
