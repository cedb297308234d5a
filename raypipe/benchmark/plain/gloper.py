"""GloPER's optimisation step by step as published: one local size, two Gumbel noises, tiles repeated to full size.

What `segmenters/gloper/` are tested and measured against. Torch, one problem at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, in_turns

STEPS = {"cpu": 5, "cuda": 100}  # of one measurement; on a GPU fewer would take no longer than their set-up


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """Steps of the optimisation: of one local size where that fills the device, and of four sizes side by side."""
    figures = []
    for side, sizes in ((1024 if device == "cuda" else 128, (8,)), (64, (4, 8, 16, 32))):
        arms = [partial(run, method, device, side, sizes) for run in (ours, plain)]
        seconds, _ = in_turns(arms, images, repeats)
        against = f"{device}; float32, {len(sizes)} local size(s), one after the other"
        each = [[total / STEPS[device] for total in arm] for arm in seconds]
        figures += compared("gloper", each, against, per="step", case=f", {side} px, {len(sizes)} size(s)")
    return figures


def plain(method, device: str, side: int, sizes: Sequence[int], image: np.ndarray) -> None:
    """Steps of each local size, one after the other. method: a Gloper. image: RGB uint8 (H, W, 3)."""
    x = photograph(image, side).to(device)
    options = {"steps": STEPS[device], "tau": method.tau, "lr": method.lr}
    for size in sizes:
        fit(made(method.widths, device), x, torch.ones_like(x[:, 0]), size, **options)


def ours(method, device: str, side: int, sizes: Sequence[int], image: np.ndarray) -> None:
    """The same by `segmenters/gloper/fit.py`."""
    x = photograph(image, side).to(device)
    for each in fitter(method.widths, method.seed, STEPS[device])(x, torch.ones_like(x[:, 0]), sizes):
        each.losses.cpu()  # waits for the GPU


@lru_cache
def made(widths: tuple[int, ...], device: str) -> PlainUnet:
    """One for all images: making it is no part of a step."""
    return PlainUnet(widths).to(device)


@lru_cache
def fitter(widths: tuple[int, ...], seed: int, steps: int):
    """One for all images, as in a job: it keeps networks and captured steps."""
    from raypipe.segmenters.gloper.fit import Fitter, Settings

    return Fitter((seed,), Settings(widths, steps, lr=1e-3, weight_decay=0.01, tau=0.1, dtype="auto"))


def photograph(image: np.ndarray, side: int) -> Tensor:
    """RGB uint8 (H, W, 3) as a square: (1, 3, side, side) in [0, 1]."""
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True)


class Block(nn.Module):
    """Twice convolution, batch normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class PlainUnet(nn.Module):
    """Assignment logits, fine and coarse tile colours of one image for one local size. widths: channels of 5 levels."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        n = widths
        self.enc0, self.enc1, self.enc2 = Block(3, n[0]), Block(n[0], n[1]), Block(n[1], n[2])
        self.enc3, self.enc4 = Block(n[2], n[3]), Block(n[3], n[4])
        self.dec3, self.dec2 = Block(n[3] + n[4], n[3]), Block(n[2] + n[3], n[2])
        self.dec1, self.dec0 = Block(n[1] + n[2], n[1]), Block(n[0] + n[1], n[0])
        self.head = nn.Conv2d(n[0], 2, 1)
        self.centroid_fine, self.centroid_coarse = nn.Conv2d(n[0], 6, 1), nn.Conv2d(n[1], 6, 1)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """x: (1, 3, H, W). Returns logits (1, 2, H, W), colours (1, 2, 3, H/s, W/s) and (1, 2, 3, H/2s, W/2s)."""
        height, width = x.shape[2:]
        e0 = self.enc0(x)
        e1 = self.enc1(self.pool(e0))
        e2 = self.enc2(self.pool(e1))
        e3 = self.enc3(self.pool(e2))
        d = self.enc4(self.pool(e3))
        for skip, block in ((e3, self.dec3), (e2, self.dec2), (e1, self.dec1), (e0, self.dec0)):
            d = block(torch.cat([skip, self.up(d)], 1))
        fine = F.adaptive_avg_pool2d(e0, (height // size, width // size))
        coarse = F.adaptive_avg_pool2d(e1, (height // (2 * size), width // (2 * size)))
        colours = [
            torch.sigmoid(head(pooled)).view(1, 2, 3, *pooled.shape[2:])
            for head, pooled in ((self.centroid_fine, fine), (self.centroid_coarse, coarse))
        ]
        return self.head(d), *colours


def gumbel(like: Tensor) -> Tensor:
    """Gumbel noise of one step from the global generator, as the reference draws it."""
    return -torch.empty_like(like).exponential_().log()


def losses(x: Tensor, foreground: Tensor, outputs: Sequence[Tensor], noise: Tensor, tau: float) -> Tensor:
    """Fine and coarse reconstruction loss: (2,). x: (1, 3, H, W). foreground: (1, H, W). noise: (1, 2, H, W)."""
    logits, *scales = outputs
    soft = F.softmax((logits + noise) / tau, 1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    assignment = hard - soft.detach() + soft  # straight-through: hard values, soft gradients
    found = []
    for colours in scales:
        side = x.shape[2] // colours.shape[3]
        tiles = colours.repeat_interleave(side, 3).repeat_interleave(side, 4)  # (1, 2, 3, H, W)
        rebuilt = (assignment[:, :, None] * tiles).sum(1)
        found.append((foreground * torch.norm(x - rebuilt, dim=1)).mean())
    return torch.stack(found)


def fur_weight(x: Tensor, colours: Tensor) -> Tensor:
    """How much nearer each pixel is to its tile's darker colour: (H, W). x: (1, 3, H, W). colours: (1, 2, 3, h, w)."""
    side = x.shape[2] // colours.shape[3]
    order = colours.sum(2).argsort(dim=1, stable=True)[:, :, None].expand_as(colours)
    tiles = colours.gather(1, order).repeat_interleave(side, 3).repeat_interleave(side, 4)
    dark, light = ((x - tiles[:, k]).norm(dim=1) for k in (0, 1))
    return (torch.exp(-dark) / (torch.exp(-dark) + torch.exp(-light)))[0]


def fit(
    network: PlainUnet, x: Tensor, foreground: Tensor, size: int, *, steps: int, tau: float, lr: float,
    noise: Callable[[int, Tensor], Tensor] = lambda _, logits: gumbel(logits),
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:  # fmt: skip
    """Optimise the network on one image. noise(step, logits): Gumbel noise (1, 2, H, W).

    Returns the fur weight (H, W) and the fine and coarse colours of the last forward pass, and the losses of all steps
    before their updates, (steps, 2).
    """
    optimiser, curve = torch.optim.AdamW(network.parameters(), lr=lr), []
    for step in range(steps):
        outputs = network(x, size)
        loss = losses(x, foreground, outputs, noise(step, outputs[0].detach()), tau)
        weight = fur_weight(x, outputs[1])  # in every step, with its graph, as published
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        curve.append(loss.tolist())
    return weight.detach(), tuple(colours.detach() for colours in outputs[1:]), torch.tensor(curve)
