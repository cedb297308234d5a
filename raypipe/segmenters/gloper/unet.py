"""GloPER's U-Net, several side by side: independent problems of one shape share one pass (GloPER, Chen, Koh, Dobbie).

P networks stand in the channels of one batch entry: convolutions have P groups, and batch normalisation of that one
entry normalises each channel over its image's pixels, as it does for a single network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 5  # of the U-Net; four poolings in between
# CPU only, all measured on one thread of an AMD EPYC (Zen 4):
SMALL_MAP = 64  # pixels: oneDNN convolves maps up to this at a third of its speed, slower than patches times weights
TAPS_SIDE = 128  # px: up to this side, convolving before enlarging (`_convolve_enlarged`) is faster than after it


class Block(nn.Module):
    """Twice convolution, batch normalisation and ReLU, for P problems.

    below: channels that come from the level below, enlarged. A convolution of joined channels is the sum of two, so
    they have weights of their own. No biases: the normalisation that follows would subtract them.
    """

    def __init__(self, inputs: int, outputs: int, problems: int, *, below: int = 0):
        super().__init__()
        channels, options = problems * outputs, {"padding": 1, "groups": problems, "bias": False}
        self.conv1 = nn.Conv2d(problems * inputs, channels, 3, **options)
        self.below = nn.Parameter(torch.empty(problems, 3, outputs, 3, below)) if below else None  # taps' rows, columns
        self.bn1 = nn.BatchNorm2d(channels, track_running_stats=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, **options)
        self.bn2 = nn.BatchNorm2d(channels, track_running_stats=False)

    def forward(self, x: Tensor, below: Tensor | None = None) -> Tensor:
        """x: (1, P*C, H, W). below: (1, P*D, H/2, W/2) where there are such channels. Returns (1, P*E, H, W)."""
        joined = _convolve(x, self.conv1)
        if below is not None:
            joined = joined + _convolve_enlarged(below, self.below)
        x = F.relu(_normalise(joined, self.bn1), inplace=True)
        return F.relu(_normalise(_convolve(x, self.conv2), self.bn2), inplace=True)


class Unets(nn.Module):
    """P U-Nets that give assignment logits and, at two scales, two colours per tile. widths: channels of the levels.

    Made to be loaded with `stack`; its own initial weights are nobody's.
    """

    def __init__(self, widths: Sequence[int], problems: int):
        super().__init__()
        for name, inputs, outputs, below in _blocks(widths):
            self.add_module(name, Block(inputs, outputs, problems, below=below))
        for name, inputs, outputs in _heads(widths):
            self.add_module(name, nn.Conv2d(problems * inputs, problems * outputs, 1, groups=problems))

    def forward(self, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """x: (1, P*3, H, W) in [0, 1]. sizes: sides of the tiles; the first P/len(sizes) problems have the first one.

        Returns logits (P, 2, H, W) and, for each size s, colours in (0, 1), class before channel: fine ones
        (P/len(sizes), 2, 3, H/s, W/s) and coarse ones (P/len(sizes), 2, 3, H/2s, W/2s), all float32.
        """
        problems = self.head.groups
        e0 = self.enc0(x)
        e1 = self.enc1(F.max_pool2d(e0, 2))
        e2 = self.enc2(F.max_pool2d(e1, 2))
        e3 = self.enc3(F.max_pool2d(e2, 2))
        d = self.enc4(F.max_pool2d(e3, 2))
        for skip, block in ((e3, self.dec3), (e2, self.dec2), (e1, self.dec1), (e0, self.dec0)):
            d = block(skip, d)
        logits = self.head(d).float().reshape(problems, 2, *x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            return logits, _colours(e0, self.centroid_fine, sizes), _colours(e1, self.centroid_coarse, sizes)


@lru_cache(maxsize=4)
def initial_weights(widths: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """The published network's weights before the first step, by its names: torch's initialisation from a seed (CPU).

    The biases of its 3 x 3 convolutions are drawn, since the draws after them depend on it, and left out.
    """
    weights = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch the GPUs'
        for name, inputs, outputs, below in _blocks(widths):
            for i, channels in ((1, inputs + below), (2, outputs)):
                weights[f"{name}.conv{i}.weight"] = nn.Conv2d(channels, outputs, 3).weight.detach()
                weights[f"{name}.bn{i}.weight"] = torch.ones(outputs)
                weights[f"{name}.bn{i}.bias"] = torch.zeros(outputs)
        for name, inputs, outputs in _heads(widths):
            head = nn.Conv2d(inputs, outputs, 1)
            weights |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
    return weights


def stack(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weights of published networks, one per problem, as those of one `Unets`."""
    stacked = {name: torch.cat([each[name] for each in weights]) for name in weights[0]}
    for level in ("dec3", "dec2", "dec1", "dec0"):
        both = stacked[f"{level}.conv1.weight"]
        kept = len(stacked[f"{level}.bn1.weight"]) // len(weights)  # as many channels as the level gives
        stacked[f"{level}.conv1.weight"] = both[:, :kept]
        stacked[f"{level}.below"] = both[:, kept:].unflatten(0, (-1, kept)).permute(0, 3, 1, 4, 2)
    return stacked


def _blocks(widths: Sequence[int]) -> list[tuple[str, int, int, int]]:
    """Name, input channels, output channels and channels from below of each block, in the published order."""
    down = [(f"enc{i}", before, after, 0) for i, (before, after) in enumerate(zip((3, *widths), widths, strict=False))]
    up = [(f"dec{i}", widths[i], widths[i], widths[i + 1]) for i in reversed(range(LEVELS - 1))]
    return down + up


def _heads(widths: Sequence[int]) -> list[tuple[str, int, int]]:
    """Name, input and output channels of each 1 x 1 convolution: two logits, twice two RGB colours."""
    return [("head", widths[0], 2), ("centroid_fine", widths[0], 6), ("centroid_coarse", widths[1], 6)]


def _colours(features: Tensor, head: nn.Conv2d, sizes: Sequence[int]) -> list[Tensor]:
    """Colours of the tiles of each size. features: (1, P*C, H, W). Mean features of each tile, then the head."""
    found, share = [], head.groups // len(sizes)
    parts = (tensor.chunk(len(sizes), axis) for tensor, axis in ((features, 1), (head.weight, 0), (head.bias, 0)))
    for part, weight, bias, size in zip(*parts, sizes, strict=True):
        colours = F.conv2d(F.avg_pool2d(part.float(), size), weight, bias, groups=share)
        found.append(colours.sigmoid().reshape(share, 2, 3, *colours.shape[2:]))
    return found


def _normalise(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    """The layer's normalisation of each channel. x: (1, C, H, W)."""
    if x.device.type != "cpu":
        return layer(x)
    return F.group_norm(x, x.shape[1], layer.weight, layer.bias, layer.eps)  # the same, three times as fast there


def _convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """The layer's convolution. x: (1, P*C, H, W). Returns (1, P*D, H, W)."""
    height, width = x.shape[2:]
    if x.device.type != "cpu" or height * width > SMALL_MAP:
        return layer(x)
    patches = F.unfold(x, 3, padding=1).view(layer.groups, -1, height * width)  # (P, C*9, H*W)
    return (layer.weight.view(layer.groups, -1, patches.shape[1]) @ patches).view(1, -1, height, width)


def _convolve_enlarged(x: Tensor, taps: Tensor) -> Tensor:
    """3 x 3 convolution of x at twice its size (bilinear, corners aligned), with zeros around.

    x: (1, P*C, h, w). taps: (P, 3, D, 3, C). Returns (1, P*D, 2h, 2w). On small maps each of the nine taps is applied
    before enlarging, to a quarter of the pixels; enlarging, shifting and adding up then is one matrix per axis: the
    same sum in another order.
    """
    (height, width), (problems, _, outputs, _, inputs) = x.shape[2:], taps.shape
    if x.device.type != "cpu" or 2 * max(height, width) > TAPS_SIDE:
        enlarged = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return F.conv2d(enlarged, taps.permute(0, 2, 4, 1, 3).flatten(0, 1), padding=1, groups=problems)
    tapped = taps.flatten(1, 3) @ x.view(problems, inputs, -1)  # (P, 9*D, h*w)
    tapped = tapped.view(problems, 3, outputs, 3, height, width).transpose(3, 4)
    rows = tapped.reshape(-1, 3 * width) @ _shifted(width)  # (P*3*D*h, 2w)
    rows = rows.view(problems, 3, outputs, height, 2 * width).transpose(1, 2)  # (P, D, 3, h, 2w)
    columns = _shifted(height).T @ rows.reshape(-1, 3 * height, 2 * width)  # (P*D, 2h, 2w)
    return columns.view(1, -1, 2 * height, 2 * width)


@lru_cache
def _shifted(side: int) -> Tensor:
    """Matrices (3*n, 2n) that enlarge n values to 2n and move them by +1, 0, -1 with zeros coming in, stacked."""
    enlarge = F.interpolate(torch.eye(side)[None], size=2 * side, mode="linear", align_corners=True)[0]  # (n, 2n)
    padded = F.pad(enlarge, (1, 1))
    return torch.cat([padded[:, i : i + 2 * side] for i in range(3)])
