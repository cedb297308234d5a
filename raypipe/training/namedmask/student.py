"""NamedMask's network under training: its first weights, its loss, what is told of it, and the folder it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from raypipe import networks
from raypipe.features import resnet
from raypipe.segmenters.namedmask import network
from raypipe.training import augment
from raypipe.training.namedmask import views
from raypipe.training.recipe import Student

if TYPE_CHECKING:
    from raypipe.storage import Folder
    from raypipe.training.namedmask import NamedMask

WINDOW = 100  # steps that the measures of a training are about


class NamedMaskStudent(nn.Module, Student):
    """DeepLabv3+ with all of its weights in training."""

    def __init__(self, recipe: NamedMask, device: str):
        super().__init__()
        self.recipe, self._device = recipe, device
        self.network = first_network(recipe).to(device).train()
        if device == "cuda":
            self.network.to(memory_format=torch.channels_last)  # as tensor cores want convolutions
        self.dropped = Dropped.replace(self.network)
        # right, found and true pixels of each class in the last steps, and how many these are
        self.register_buffer("window", torch.zeros(3, self.network.classes, dtype=torch.int64, device=device))
        self.register_buffer("window_steps", torch.zeros((), dtype=torch.int64, device=device))

    def views(self, samples: Sequence[list[views.Square]], draws: Sequence[views.Placing]) -> tuple[Tensor, ...]:
        """Images float32 (B, 3, S, S), labels int64 (B, S, S), and the seed of what is dropped of each, on the CPU."""
        squares = [each for sample in samples for each in sample]
        images = views.coloured(squares, self._device)
        labels = torch.stack(augment.moved([each.labels for each in squares], self._device))
        first = 0
        for sample, draw in zip(samples, draws, strict=True):
            last = first + len(sample)
            views.paste_(images[first:last], labels[first:last], draw.places)
            first = last
        starts = np.cumsum([0, *map(len, samples[:-1])]).tolist()
        seeds = torch.tensor([draw.seed for draw in draws])
        return images[starts], labels[starts].long(), seeds

    def forward(self, images: Tensor, labels: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy over all pixels of all workers that count, and how the network does.

        What `views` gives. Not a number where no pixel counts: then the step is skipped.
        """
        self.dropped.seeds = seeds.tolist()
        if self._device == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        with networks.autocast(self._device, self.recipe.dtype):
            logits = self.network.coarse(images)
        logits = F.interpolate(logits.float(), size=images.shape[2:], mode="bilinear")
        loss = F.cross_entropy(logits, labels, ignore_index=views.IGNORED, reduction="sum")
        with torch.no_grad():
            counts = counted(logits, labels)
            if is_one_of_many():
                distributed.all_reduce(counts)
            workers = distributed.get_world_size() if is_one_of_many() else 1
            pixels = counts[2].sum()
        return {"total": loss * workers / pixels} | self.measures(counts)

    def measures(self, counts: Tensor) -> dict[str, Tensor]:
        """Accuracy and mIoU over each WINDOW of steps, at its end; else not a number."""
        self.window += counts
        self.window_steps += 1
        right, found, true = self.window.double()
        is_end, is_there = self.window_steps == WINDOW, (found + true) > 0
        iou = (right / (found + true - right).clamp(min=1)).sum() / is_there.sum()
        nan = torch.full_like(iou, torch.nan)
        told = {"miou": torch.where(is_end, iou, nan), "accuracy": torch.where(is_end, right.sum() / true.sum(), nan)}
        self.window *= ~is_end
        self.window_steps *= ~is_end
        return told

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Adam of the backbone, which learns more slowly, and of the head. The decay is a part of the gradient."""
        recipe = self.recipe
        groups = [
            {"params": self.network.backbone.parameters(), "lr": lr * recipe.backbone_factor},
            {"params": self.network.classifier.parameters(), "lr": lr},
        ]
        return torch.optim.Adam(groups, weight_decay=recipe.weight_decay, fused=True)

    @torch.no_grad()
    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Where it is not background. Images that are larger than `crop` are seen at that size."""
        self.network.eval()
        found = [self._foreground(image) for image in images]
        self.network.train()
        return found

    def _foreground(self, image: np.ndarray) -> np.ndarray:
        (picture,) = augment.pixels([image], self._device)
        scale = min(1.0, self.recipe.crop / max(image.shape[:2]))
        size = [max(1, int(side * scale)) for side in image.shape[:2]]
        picture = F.interpolate(picture[None], size=size, mode="bilinear", antialias=True)
        with networks.autocast(self._device, self.recipe.dtype):
            logits = self.network.coarse(augment.normalise(picture))
        values = 1 - logits.float().softmax(1)[:, :1]
        return F.interpolate(values, size=image.shape[:2], mode="bilinear")[0, 0].cpu().numpy()

    def finish(self, samples: Sequence) -> None:
        """Nothing is left to do."""

    def export(self, folder: Folder) -> None:
        recipe = self.recipe
        queries = recipe.names if recipe.only else recipe.known.queries
        config = {"classes": list(recipe.names), "queries": list(queries), "training": asdict(recipe)}
        for name, content in network.files(self.network, config).items():
            folder.write(content, name)


class Dropped(nn.Module):
    """torch's dropout, but what it drops of a sample follows from the sample's own seed: alike in any batch."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.seeds = p, []

    @classmethod
    def replace(cls, module: nn.Module) -> Dropped:
        """Take the place of the one dropout in a module."""
        (name,) = (name for name, each in module.named_modules() if isinstance(each, nn.Dropout))
        made = cls(module.get_submodule(name).p)
        module.set_submodule(name, made)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w), as many as there are `seeds`."""
        if not self.training or not self.p:
            return x
        random, kept = torch.Generator(x.device), torch.empty_like(x, memory_format=torch.contiguous_format)
        for sample, seed in zip(kept, self.seeds, strict=True):
            sample.bernoulli_(1 - self.p, generator=random.manual_seed(seed))
        return x * kept.div_(1 - self.p)


def first_network(recipe: NamedMask) -> network.DeepLab:
    """On the CPU: the backbone with a head that nothing was taught yet."""
    path, sizes = networks.locate_each(recipe).get("backbone"), {}
    if path is not None:
        body = resnet.read(path, method=recipe.name)
        sizes = {"blocks": [len(getattr(body, stage)) for stage in resnet.STAGES]}
        sizes |= {"width": len(body.layer1[0].conv1.weight)}
    options = {
        "output_stride": recipe.output_stride,
        "channels": recipe.channels,
        "fine": -(-3 * recipe.channels // 16),
    }
    made = network.DeepLab(len(recipe.names) + 1, **options, **sizes)
    network.initialise(made, path, recipe.seed, method=recipe.name)
    return made


def is_one_of_many() -> bool:
    """Whether several workers train together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def counted(logits: Tensor, labels: Tensor) -> Tensor:
    """Right, found and true pixels of each class, among those that count: int64 (3, C)."""
    number = logits.shape[1]
    found, is_counted = logits.argmax(1), labels != views.IGNORED
    kinds = torch.stack([torch.where(found == labels, labels, number), found, labels])
    kinds = torch.where(is_counted, kinds, number).flatten(1)
    counts = torch.zeros(3, number + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(1, kinds, torch.ones_like(kinds))[:, :number].contiguous()  # as others receive it
