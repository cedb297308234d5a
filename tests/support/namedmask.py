"""Small trainings of NamedMask: photographs of bright discs and squares, their archive, their masks as a run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import distributed
from torchvision.models.resnet import Bottleneck, ResNet

from raypipe.inputs import archives
from raypipe.storage import Folder
from raypipe.training import data, loop
from raypipe.training.namedmask import NamedMask
from support.archives import make
from support.written import masks_row, write_run

ATTEMPT = "one"  # that holds the folder
CATEGORIES = ("disc", "square")


def write_backbone(file: Path) -> str:
    """A residual network of one narrow block a stage, of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)
    torch.save({name: each for name, each in made.state_dict().items() if not name.startswith("fc.")}, file)
    return str(file)


def draw_photos(folder: Path, count: int) -> dict[Path, np.ndarray]:
    """Noisy photographs of different sizes with a bright object each, and its mask, by file; every other is a disc."""
    folder.mkdir(parents=True)
    rng, found = np.random.default_rng(0), {}
    for i in range(count):
        height, width = 48 + 2 * i, 64 - i
        rows, columns = np.mgrid[:height, :width]
        y, x = rng.integers(16, height - 16), rng.integers(18, width - 18)
        mask = (rows - y) ** 2 + (columns - x) ** 2 < 144
        if i % 2:
            mask = np.maximum(abs(rows - y), abs(columns - x)) < 11
        image = np.where(mask[..., None], rng.integers(140, 200, 3), 60) + rng.integers(0, 56, (height, width, 3))
        file = folder / f"{i:02}.png"
        Image.fromarray(image.astype(np.uint8)).save(file)
        found[file] = mask
    return found


def write_pool(folder: Path, count: int = 8) -> dict[str, str]:
    """Options of a recipe: `archive` and `masks` of drawn photographs, and a tiny `backbone`."""
    photos = draw_photos(folder / "photos", count)
    archive = make(folder / "archive", dict(zip(CATEGORIES, (list(photos)[::2], list(photos)[1::2]), strict=True)))
    write_masks(str(archive), str(folder / "run"), photos)
    return {"archive": str(archive), "masks": str(folder / "run"), "backbone": write_backbone(folder / "resnet.pth")}


def write_masks(archive: str, run: str, masks: dict[Path, np.ndarray], **cells) -> None:
    """A run over an archive's images with the mask of each. cells: of all, such as `labels`."""
    table = []
    for row in archives.read(archive).images.to_pylist():
        file = Path(row["location"])
        if file in masks:
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            made = masks_row(row["key"], np.stack([masks[file]]), uri=row["uri"], sha256=sha256, **cells)
            table.append(made | {"image_id": row["image_id"]})
    write_run(run, table)


def small(pool: dict[str, str], /, **options) -> NamedMask:
    """A recipe of few channels and small samples."""
    sizes = {"channels": 16, "crop": 32, "batch_size": 4, "iterations": 6, "min_scale": 0.4, "experts": False}
    return NamedMask(**pool | sizes | options)


def work_of(recipe: NamedMask, folder: str, *, workers: int = 1) -> loop.Work:
    """A training as its workers are told."""
    samples = data.gather(recipe, recipe.rows(None), max_bytes=10**9, max_pixels=10**9)
    return loop.Work(
        recipe=recipe, samples=samples, folder=Folder(folder), attempt=ATTEMPT, settings={}, workers=workers,
        batch=recipe.batch_size // workers, lr=recipe.lr, tail="pad", synchronised=True, checkpoint_steps=500,
        log_steps=50,
    )  # fmt: skip


def work_beside(rank: int, recipe: NamedMask, folder: str, workers: int) -> None:
    """One of several workers of a training on the CPU, in a process of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=rank, world_size=workers)
    loop.run(work_of(recipe, folder, workers=workers), loop.Place(rank=rank))
    distributed.barrier()  # nobody closes connections that others still have
    distributed.destroy_process_group()
