"""A step of Sempart's training as its published code takes it: two whole passes, matrices of floats, convolutions.

The backbone runs once per view, to its end and with its attention in memory; the teacher's decoder keeps what only a
gradient would need; the cut takes five N x N matrices, neighbours come from convolutions with a map for each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks
from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, ratios, timed
from raypipe.features import dino

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.training.sempart.student import SempartStudent

NAME = "train_sempart"
BACKBONE = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}  # ViT-S
CPU, GPU = (320, 1), (320, 8)  # px a side and images per step: eight seconds on one core; the published recipe's
FLOOR = 5.4e-3  # s, of a step at 320 px, 8 images, on an H200: its operations at the GPU's full rate
NEIGHBOURS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def compare(_subject, _device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """Steps on random weights of a ViT-S/8's shape, in float32 on the CPU; on a GPU, where there is one, as usual."""
    import torch

    figures = _figures("cpu", *CPU, images, repeats)
    return figures + (_figures("cuda", *GPU, images, 10 * repeats) if torch.cuda.is_available() else [])


def _figures(device: str, side: int, batch: int, images: Sequence[np.ndarray], rounds: int) -> list[Figure]:
    import torch

    student = made(device, side)
    views = _views(student, images, batch)
    arms = [_step(student), PlainLoop(student).step]
    kept = [_kept(arm, views) / 1e6 for arm in arms]  # also warms up
    (seconds, found), case = _in_turns(arms, views, rounds, device), f", {side} px, {batch} per step, {device}"
    unlike = [max(abs(one[name] / other[name] - 1) for name in other) for one, other in zip(*found, strict=True)]
    figures = compared(NAME, seconds, "the published code's formulation", per="step", case=case)
    figures += [
        Figure(NAME, f"steps per second{case}", "steps/s", [1 / each for each in seconds[0]]),
        Figure(NAME, f"largest relative difference of a loss to plain{case}", "", unlike),
        Figure(NAME, f"kept for the way back{case}", "MB", kept[:1]),
        Figure(NAME, f"kept for the way back, plain{case}", "MB", kept[1:]),
        *_parts(student, views, rounds, case),
    ]
    if device == "cuda":
        peaks = [_peak(arm, views) / 1e6 for arm in arms]
        figures += [Figure(NAME, f"peak memory{case}", "MB", peaks[:1])]
        figures += [Figure(NAME, f"peak memory, plain{case}", "MB", peaks[1:])]
        note = f"{torch.cuda.get_device_name()}; {FLOOR * 1e3} ms is that of an H200 at its full rate"
        figures += [Figure(NAME, f"times the floor{case}", "x", [each / FLOOR for each in seconds[0]], note)]
    return figures


def made(device: str, side: int) -> SempartStudent:
    """A student whose backbone has random weights, at the side of its images."""
    import torch
    from transformers import ViTConfig, ViTModel

    from raypipe.segmenters.sempart.network import Head
    from raypipe.training.sempart import Sempart
    from raypipe.training.sempart.student import SempartStudent

    recipe = Sempart(image_size=side, resize=side + side // 20)
    torch.manual_seed(recipe.seed)
    network = ViTModel(ViTConfig(**BACKBONE, image_size=side, patch_size=8), add_pooling_layer=False).eval()
    network = network.requires_grad_(False).to(device)
    backbone = dino.Dino(network, method=NAME, device=device)
    return SempartStudent(recipe, Head(backbone.width, patch=backbone.patch), backbone, device)


def _views(student: SempartStudent, images: Sequence[np.ndarray], batch: int) -> tuple[Tensor, ...]:
    recipe, random = student.recipe, np.random.default_rng(0)
    samples = [recipe.prepare({}, images[i % len(images)]) for i in range(batch)]
    return student.views(samples, [recipe.draw(random, sample) for sample in samples])


def _step(student: SempartStudent) -> Callable[..., dict[str, float]]:
    optimizer = student.optimizer(student.recipe.lr)
    return lambda *views: stepped(student(*views), optimizer)


def stepped(terms: dict[str, Tensor], optimizer) -> dict[str, float]:
    """The terms as numbers, after a step of the optimiser down their total."""
    optimizer.zero_grad()
    terms["total"].backward()
    optimizer.step()
    return {name: float(term.detach()) for name, term in terms.items()}


def _in_turns(arms: Sequence[Callable], views: tuple[Tensor, ...], rounds: int, device: str) -> tuple[list, list]:
    """Seconds and results of each arm, called `rounds` times in turns."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds, found = [[] for _ in arms], [[] for _ in arms]
    for _ in range(rounds):
        for times, results, arm in zip(seconds, found, arms, strict=True):
            wait()
            spent, result = timed(lambda arm=arm: (arm(*views), wait())[0])
            times.append(spent)
            results.append(result)
    return seconds, found


def _kept(arm: Callable, views: tuple[Tensor, ...]) -> int:
    """Bytes that a step keeps for the way back, each piece of memory once."""
    import torch

    sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        arm(*views)
    return sum(sizes.values())


def _peak(arm: Callable, views: tuple[Tensor, ...]) -> int:
    import torch

    torch.cuda.reset_peak_memory_stats()
    arm(*views)
    return torch.cuda.max_memory_allocated()


def _parts(student: SempartStudent, views: tuple[Tensor, ...], rounds: int, case: str) -> list[Figure]:
    """The losses alone, after the same masks and features, and the head alone, both with their way back."""
    import torch

    images, zoomed, windows = views
    with networks.autocast(student.device, "auto"):
        features, of_zoomed = student.features(torch.cat([images, zoomed])).chunk(2)
        with torch.no_grad():
            masks = [mask.sigmoid() for mask in student.head(features, images)]

    def losses_of(formulation: Callable) -> Callable:
        def run() -> None:
            coarse, fine = (mask.clone().requires_grad_() for mask in masks)
            sum(formulation(student.recipe, coarse, fine, images, features).values()).backward()

        return run

    def head() -> None:
        with networks.autocast(student.device, "auto"):
            coarse, fine = student.head(features, images)
        (coarse.mean() + fine.mean()).backward()

    arms = [losses_of(_quick_terms), losses_of(plain_terms), head]
    (ours, other, of_head), _ = _in_turns(arms, (), rounds, student.device)
    return [
        Figure(NAME, f"losses alone{case}", "s", ours, "the four of the baseline, after masks and features"),
        Figure(NAME, f"losses alone, times faster than plain{case}", "x", ratios(other, ours)),
        Figure(NAME, f"head alone{case}", "s", of_head, "forward and back"),
    ]


def _quick_terms(recipe, coarse: Tensor, fine: Tensor, images: Tensor, features: Tensor) -> dict[str, Tensor]:
    from raypipe.segmenters.sempart import losses

    alike = losses.edges(features, tau=recipe.tau)
    return {
        "ncut": losses.ncut(coarse, alike, eps=recipe.eps),
        "gtv_fine": losses.gtv_fine(fine, images, sigma=recipe.sigma),
        "gtv_coarse": losses.gtv_coarse(coarse, alike, eps=recipe.eps),
        "consistency": losses.consistency(coarse, fine),
    }


class PlainLoop:
    """Training in its plainest form, from a copy of a student's weights."""

    def __init__(self, student: SempartStudent):
        import torch

        self.recipe, self.device = student.recipe, student.device
        self.head = copy.deepcopy(student.head).to(memory_format=torch.contiguous_format)
        self.network = copy.deepcopy(student.dino.network)
        self.network.set_attn_implementation("eager")
        last = dino.projection(dino.layers(self.network)[-1], "key")
        last.register_forward_hook(lambda _module, _given, keys: setattr(self, "_keys", keys))
        self.optimizer = torch.optim.AdamW(self.head.parameters(), 1e-4, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, images: Tensor, zoomed: Tensor | None = None, windows: Tensor | None = None) -> dict[str, float]:
        """A step: the terms before it."""
        return stepped(self.terms(images, zoomed, windows), self.optimizer)

    def terms(self, images: Tensor, zoomed: Tensor | None, windows: Tensor | None) -> dict[str, Tensor]:
        """All terms and their total, with gradients of the head."""
        from torch.nn.functional import interpolate

        recipe, features = self.recipe, self.features(images)
        with networks.autocast(self.device, "auto"):
            coarse, fine = (logits.sigmoid() for logits in self.head(features, images))
        found = plain_terms(recipe, coarse, fine, images, features)
        if zoomed is not None:
            features, half = self.features(zoomed), images.shape[2] // 2
            with networks.autocast(self.device, "auto"):
                coarse, teacher = (logits.sigmoid() for logits in self.head(features, zoomed))
            guide = sum(zoomed[:, i] * networks.IMAGENET_STD[i] + networks.IMAGENET_MEAN[i] for i in range(3)) / 3
            target = guided(teacher[:, 0], guide, recipe.gf_radius, recipe.gf_eps).clamp(1e-6, 1 - 1e-6).detach()
            cut = [mask[:, y : y + half, x : x + half] for mask, (y, x) in zip(fine, windows.tolist(), strict=True)]
            large = [interpolate(each[None], scale_factor=2, mode="bilinear")[0, 0] for each in cut]
            squares = [(one - other).square().mean() for one, other in zip(large, target, strict=True)]
            found |= {"crop_zoom": sum(squares) / len(squares), "ncut_crop": ncut(coarse, features, recipe)}
        return found | {"total": sum(getattr(recipe, f"w_{name}") * term for name, term in found.items())}

    def features(self, images: Tensor) -> Tensor:
        """Keys of the last block, (B, D, h, w): the network runs to its end."""
        import torch

        with torch.no_grad(), networks.autocast(self.device, "auto"):
            self.network(images)
        height, width = (side // self.network.config.patch_size for side in images.shape[2:])
        return self._keys[:, 1:].float().transpose(1, 2).unflatten(2, (height, width))


def plain_terms(recipe, coarse: Tensor, fine: Tensor, images: Tensor, features: Tensor) -> dict[str, Tensor]:
    """The baseline's four terms (methods and symbols: `segmenters.sempart.losses`)."""
    import torch
    from torch.nn.functional import interpolate, normalize

    colours, unit = pulled(images), pulled(normalize(features, dim=1, eps=1e-12))
    near = (-(colours - images[:, :, None]).square().sum(1) / recipe.sigma).exp()  # (B, 8, H, W)
    cosines = (unit * normalize(features, dim=1, eps=1e-12)[:, :, None]).sum(1)
    alike = torch.where(cosines > recipe.tau, 1.0, recipe.eps)
    return {
        "ncut": ncut(coarse, features, recipe),
        "gtv_fine": (near * (pulled(fine) - fine[:, :, None])[:, 0].square()).mean(),
        "gtv_coarse": (alike * (pulled(coarse) - coarse[:, :, None])[:, 0].square()).mean(),
        "consistency": (coarse - interpolate(fine, size=coarse.shape[2:], mode="bilinear")).square().mean(),
    }


def ncut(mask: Tensor, features: Tensor, recipe) -> Tensor:
    """The cut's mean from N x N matrices: similarity, clamped, compared, weights, and these with a diagonal of 1."""
    import torch
    from torch.nn.functional import normalize

    unit = normalize(features.flatten(2), dim=1, eps=1e-12)
    similarity = (unit.mT @ unit).clamp(min=1e-9)
    weights = torch.where(similarity > recipe.tau, torch.ones_like(similarity), recipe.eps)
    own = torch.eye(weights.shape[1], device=weights.device)
    weights = weights * (1 - own) + own
    inside = mask.flatten(1)[:, None].clamp(recipe.eps, 1 - recipe.eps)  # (B, 1, N)
    outside, every = 1 - inside, torch.ones_like(inside)
    cut = inside @ weights @ outside.mT
    sizes = [(side @ weights @ every.mT).clamp(min=1e-6) for side in (inside, outside)]
    return (cut / sizes[0] + cut / sizes[1]).mean()


def pulled(values: Tensor) -> Tensor:
    """The eight neighbours of every pixel, mirrored at the border, by a convolution with 8 C maps: (B, C, 8, H, W)."""
    import torch
    from torch.nn.functional import conv2d, pad

    channels = values.shape[1]
    kernel = torch.zeros(8, 1, 3, 3, device=values.device)
    for i, (y, x) in enumerate(NEIGHBOURS):
        kernel[i, 0, 1 + y, 1 + x] = 1
    padded = pad(values, (1, 1, 1, 1), "reflect")
    return conv2d(padded, kernel.repeat(channels, 1, 1, 1), groups=channels).unflatten(1, (channels, 8))


def guided(masks: Tensor, guides: Tensor, radius: int, eps: float) -> Tensor:
    """The guided filter (He et al., TPAMI 2013) of (B, H, W), by running sums."""

    def mean(planes: Tensor) -> Tensor:
        return box(planes, radius) / box(planes.new_ones(planes.shape), radius)

    slope = mean(guides * masks) - mean(guides) * mean(masks)
    slope = slope / (mean(guides * guides) - mean(guides).square() + eps)
    return mean(slope) * guides + mean(mean(masks) - slope * mean(guides))


def box(planes: Tensor, radius: int) -> Tensor:
    """Sums over windows of 2 * radius + 1 px a side, cut off at the border, of (B, H, W)."""
    from torch.nn.functional import pad

    kind = planes.dtype
    for dim in (1, 2):
        sums = pad(planes.double().transpose(dim, 2).cumsum(2), (1, 0))  # sums of the first 0, 1, ... values
        size = planes.shape[dim]
        ends = [min(size, i + radius + 1) for i in range(size)]
        starts = [max(0, i - radius) for i in range(size)]
        planes = (sums[..., ends] - sums[..., starts]).transpose(dim, 2)
    return planes.to(kind)
