"""GloPER's optimisation: each image is rebuilt from two colours per tile, for all local sizes and seeds.

Only the difference of the two classes' logits matters, so one logistic draw per pixel replaces two Gumbel draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from raypipe import networks
from raypipe.segmenters.gloper import unet

# Pixels of all problems that are optimised side by side. On one thread of an EPYC (Zen 4) four sizes together are 1.1
# to 1.4 times as fast as in turns at 64 px, 1.0 to 1.1 times at 128 px, 1.1 at 256 px: there not worth their memory.
CPU_PIXELS = 4 * 128 * 128
GPU_PIXELS = 1024 * 1024  # one problem of the paper's size fills a GPU
SMALLEST = 1e-30  # of a squared distance
WARM_UP = 3  # steps before a CUDA graph is captured, as torch's documentation asks for


@dataclass(frozen=True)
class Settings:
    """How to optimise."""

    widths: tuple[int, ...]  # channels of the five levels
    steps: int
    lr: float
    weight_decay: float
    tau: float  # temperature of the assignment's gradient
    dtype: str  # auto, float32 or bfloat16: of the U-Net; losses and colours are float32


class Fitted(NamedTuple):
    """What the last forward pass and all steps gave, for one local size, R seeds and B images."""

    fine: Tensor  # (R, B, 2, 3, H/s, W/s) colours in (0, 1)
    coarse: Tensor  # (R, B, 2, 3, H/2s, W/2s)
    losses: Tensor  # (steps, R, B, 2) fine and coarse, before the step's update


class Fitter:
    """Optimises images of one shape at a time. Keeps networks, and on a GPU captured steps, for the next images."""

    def __init__(self, seeds: Sequence[int], settings: Settings):
        self._seeds, self._settings = tuple(seeds), settings
        self._shape: torch.Size | None = None
        self._problems: dict[tuple, Problems] = {}
        self._pool: tuple[int, int] | None = None  # memory of the captured steps; they take turns, so one will do

    def images_at_once(self, shape: Sequence[int], sizes: Sequence[int], device: str) -> int:
        """How many images of shape (3, H, W) to give at a time: one on a CPU, where no neighbour may change a bit."""
        problems = len(sizes) * len(self._seeds)
        return max(1, GPU_PIXELS // (shape[1] * shape[2] * problems)) if device == "cuda" else 1

    def __call__(self, x: Tensor, foreground: Tensor, sizes: Sequence[int], seeds: Sequence[int] = ()) -> list[Fitted]:
        """One result per local size.

        x: (B, 3, H, W) in [0, 1]. foreground: (B, H, W) 0 or 1. seeds: as many others.
        """
        self._seeds = tuple(seeds) or self._seeds
        if x.shape[1:] != self._shape:
            self._forget()
            self._shape = x.shape[1:]
        try:
            parts = [self._fit(x, foreground, *part) for part in self._parts(x, sizes)]
        except BaseException:  # a step that was left half done holds memory and spoils the pool for other captures
            self._forget()
            raise
        found = []
        for size in sizes:
            runs = [part[size] for part in parts if size in part]
            fine, coarse = torch.cat([run.fine for run in runs]), torch.cat([run.coarse for run in runs])
            found.append(Fitted(fine, coarse, torch.cat([run.losses for run in runs], 1)))
        return found

    def _forget(self) -> None:
        self._problems, self._pool = {}, None

    def _parts(self, x: Tensor, sizes: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Sizes and seeds to optimise side by side, one part after the other; the seeds of a size in their order."""
        room = (GPU_PIXELS if x.is_cuda else CPU_PIXELS) // x[:, 0].numel()
        if len(sizes) * len(self._seeds) <= room:
            return [(tuple(sizes), self._seeds)]
        room = max(1, room)
        return [(tuple(sizes[i : i + room]), (seed,)) for seed in self._seeds for i in range(0, len(sizes), room)]

    def _fit(self, x: Tensor, foreground: Tensor, sizes: tuple, seeds: tuple) -> dict[int, Fitted]:
        key = (len(x), sizes, len(seeds))
        if key not in self._problems:
            if x.is_cuda and self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._problems[key] = Problems(x.shape, sizes, len(seeds), self._settings, x.device, self._pool)
        return dict(zip(sizes, self._problems[key].fit(x, foreground, seeds), strict=True))


class Problems:
    """All pairs of K local sizes, R seeds and B images of one shape, optimised side by side, in this order."""

    def __init__(self, shape: Sequence[int], sizes: Sequence[int], seeds: int, settings: Settings, device, pool=None):
        """shape: (B, 3, H, W) of the images. pool: memory of CUDA graphs to share with others, `graph_pool_handle`."""
        images, _, height, width = shape
        self._pool = pool
        self._settings, self._sizes, self._grid = settings, sizes, (len(sizes), seeds, images)
        with torch.device("meta"):
            self.networks = unet.Unets(settings.widths, len(sizes) * seeds * images)
        self.networks.to_empty(device=device)
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "capturable": device.type == "cuda"}
        self._optimiser = torch.optim.AdamW(self.networks.parameters(), **options, fused=True)
        self._x = torch.empty(shape, device=device)
        self._foreground = torch.empty((images, height, width), device=device)
        self._noise = torch.empty((seeds, height, width), device=device)
        self._generators = [torch.Generator(device) for _ in range(seeds)]
        self._losses = torch.empty((settings.steps, *self._grid, 2), device=device)
        self._at = torch.zeros(1, dtype=torch.long, device=device)  # the step, on the device: nothing waits for it
        self._colours: tuple[list[Tensor], list[Tensor]] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def fit(self, x: Tensor, foreground: Tensor, seeds: Sequence[int], noise: Tensor | None = None) -> list[Fitted]:
        """Optimise from the seeds' initial weights. One result per size.

        x: (B, 3, H, W) in [0, 1]. foreground: (B, H, W) 0 or 1. noise: (steps, R, H, W) logistic noise to use instead
        of the seeds' own, which all sizes and images share. Raises ValueError for noise on a GPU, whose steps are
        captured with their own.
        """
        if x.is_cuda and noise is not None:
            raise ValueError("gloper: steps on a GPU draw their own noise")
        self._x.copy_(x)
        self._foreground.copy_(foreground)
        initial = [initial_weights(self._settings.widths, seed, x.device) for seed in seeds]
        self._reset(initial, seeds)
        if x.is_cuda:
            self._replay(initial, seeds)
        else:
            with one_thread():
                for step in range(self._settings.steps):
                    self._draw() if noise is None else self._noise.copy_(noise[step])
                    self._step()
        split = [[c.unflatten(0, self._grid[1:]).clone() for c in colours] for colours in self._colours]
        return [Fitted(*each) for each in zip(*split, self._losses.clone().unbind(1), strict=True)]

    def load_weights(self, weights: Sequence[dict[str, Tensor]]) -> None:
        """Start from these weights, one set per seed."""
        sizes, _, images = self._grid
        stacked = unet.stack([each for each in weights for _ in range(images)] * sizes)
        self.networks.load_state_dict(stacked)

    def _reset(self, weights: Sequence[dict[str, Tensor]], seeds: Sequence[int]) -> None:
        """Back to the first step, in place, as a captured graph needs it."""
        self.load_weights(weights)
        for state in self._optimiser.state.values():
            for tensor in state.values():
                tensor.zero_()
        for generator, seed in zip(self._generators, seeds, strict=True):
            generator.manual_seed(seed)
        self._at.zero_()

    def _replay(self, weights: Sequence[dict[str, Tensor]], seeds: Sequence[int]) -> None:
        """All steps as replays of one captured step: at small sizes starting the kernels takes longer than they do."""
        if self._graph is None:
            self._capture(weights, seeds)
            self._reset(weights, seeds)
        for _ in range(self._settings.steps):
            self._graph.replay()

    def _capture(self, weights: Sequence[dict[str, Tensor]], seeds: Sequence[int]) -> None:
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            for _ in range(WARM_UP):
                self._draw()
                self._step()
                self._reset(weights, seeds)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        self._optimiser.zero_grad()  # gradients are to lie in the graph's memory
        with torch.cuda.graph(graph, pool=self._pool):
            self._draw()
            self._step()
        self._graph = graph

    def _draw(self) -> None:
        for plane, generator in zip(self._noise, self._generators, strict=True):
            plane.uniform_(generator=generator).logit_()  # logistic: the difference of two Gumbel draws

    def _step(self) -> None:
        self._optimiser.zero_grad()
        with networks.autocast(self._x.device.type, self._settings.dtype):
            logits, *self._colours = self.networks(self._tiled(), self._sizes)
        with networks.autocast(self._x.device.type, "float32"):  # the gradients' convolutions as those above
            losses = self._rebuild(logits)
            losses.sum().backward()
        self._losses.index_copy_(0, self._at, losses.detach()[None])
        self._at += 1
        self._optimiser.step()
        self._colours = [[c.detach() for c in colours] for colours in self._colours]

    def _tiled(self) -> Tensor:
        """The images once for every size and seed, in the channels: (1, P*3, H, W)."""
        sizes, seeds, _ = self._grid
        tiled = self._x.repeat(sizes * seeds, 1, 1, 1).flatten(0, 1)[None]
        return tiled.contiguous(memory_format=torch.channels_last) if tiled.is_cuda else tiled

    def _rebuild(self, logits: Tensor) -> Tensor:
        """Fine and coarse losses (K, R, B, 2) of logits (P, 2, H, W) and the current colours."""
        logits = (logits[:, 1] - logits[:, 0]).unflatten(0, self._grid) + self._noise[:, None]  # (K, R, B, H, W)
        soft = torch.sigmoid(logits / self._settings.tau)
        assignment = (logits > 0) + (soft - soft.detach())  # straight-through: hard values, soft gradients
        found = [
            torch.stack([distance(self._x, self._foreground, each, c.unflatten(0, self._grid[1:])) for c in pair], -1)
            for each, *pair in zip(assignment, *self._colours, strict=True)
        ]
        return torch.stack(found)


@lru_cache(maxsize=8)
def initial_weights(widths: tuple[int, ...], seed: int, device: torch.device) -> dict[str, Tensor]:
    """`gloper.initial_weights` on a device, drawn once: on a GPU that takes as long as many steps."""
    return {name: tensor.to(device) for name, tensor in unet.initial_weights(widths, seed).items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, so that an image gets the same masks however many cores there are.

    The number of threads decides in which order gradients are summed, and the steps magnify the difference.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def distance(x: Tensor, foreground: Tensor, assignment: Tensor, colours: Tensor) -> Tensor:
    """Mean distance between images and their reconstruction, over all pixels: (R, B).

    x: (B, 3, H, W). foreground: (B, H, W). assignment: (R, B, H, W), 0 or 1 = the class. colours: (R, B, 2, 3, h, w).
    """
    first, second = colours[..., None, :, None].unbind(2)  # (R, B, 3, h, 1, w, 1)
    rebuilt = torch.lerp(first, second, tiles(assignment[:, :, None], colours))
    return (norm(tiles(x, colours) - rebuilt) * tiles(foreground, colours)).mean((2, 3, 4, 5))


def margin(x: Tensor, colours: Tensor) -> Tensor:
    """How much farther each pixel is from its tile's lighter colour than from the darker one: (..., H, W).

    x: (3, H, W) in [0, 1]. colours: (..., 2, 3, h, w). Darker is the smaller sum of red, green and blue, the first
    class where they are equal. The fur weight is the sigmoid of the margin.
    """
    first, second = colours[..., None, :, None].unbind(-6)  # (..., 3, h, 1, w, 1)
    pixels = tiles(x, colours)  # (3, h, s, w, s)
    to_first, to_second = (norm(pixels - colour) for colour in (first, second))
    swapped = second.sum(-5) < first.sum(-5)
    return torch.where(swapped, to_first - to_second, to_second - to_first).flatten(-2).flatten(-3, -2)


def norm(difference: Tensor) -> Tensor:
    """Euclidean norm over RGB: (..., 3, h, s, w, s) -> (..., h, s, w, s). Its gradient at 0 is 0, not infinite."""
    return difference.square().sum(-5).clamp_min(SMALLEST).sqrt()  # far faster than torch's norm over such an axis


def tiles(planes: Tensor, colours: Tensor) -> Tensor:
    """A view of planes (..., H, W) as tiles (..., h, s, w, s) that fits colours (..., h, w)."""
    height, width = colours.shape[-2:]
    return planes.unflatten(-1, (width, -1)).unflatten(-3, (height, -1))
