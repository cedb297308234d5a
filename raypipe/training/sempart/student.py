"""Sempart's head under training, on a backbone that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from raypipe import networks
from raypipe.features.dino import Dino
from raypipe.segmenters.sempart import losses, network
from raypipe.storage import Folder
from raypipe.training import augment, batchnorm, data
from raypipe.training.recipe import Sample, Student
from raypipe.training.sempart import Draw, Sempart

FINISH_SAMPLES = 512  # that tell the sign
VIEWS = 2  # of each image that makes precise averages: 1,024 crops of 512, as about the 1,000 of methods/sempart


def build(recipe: Sempart, device: str) -> SempartStudent:
    """A recipe's head, new or that of `start_from`, on its backbone. Raises ValueError where they do not fit."""
    name, paths = recipe.name, networks.locate_each(recipe)
    dino = Dino(paths["backbone"], method=name, device=device, dtype=recipe.dtype)
    side, patch = recipe.image_size, dino.patch
    if side % patch or side < 2 * patch:
        text = f"a multiple of the {patch} px of a patch of the backbone, at least two of them"
        near = max(2, side // patch) * patch
        raise ValueError(f"{name}: image_size must be {text}, got {side!r}; {near} is one")
    if recipe.start_from is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return SempartStudent(recipe, network.Head(dino.width, hidden=recipe.hidden, patch=patch), dino, device)
    head, config = network.read(paths["start_from"], method=name)
    _check_fit(recipe, head, config, dino)
    return SempartStudent(recipe, head, dino, device, sign=config.get("polarity"))


def _check_fit(recipe: Sempart, head: network.Head, config: dict, dino: Dino) -> None:
    """Raise ValueError for a head that was made for other features than the recipe's."""
    for what, of_head, of_backbone in (
        ("channels", head.width, dino.width), ("px a side of a patch", head.patch, dino.patch)
    ):  # fmt: skip
        if of_head != of_backbone:
            text = f"start_from is a head for {of_head} {what}, the backbone has {of_backbone}; pass its --backbone"
            raise ValueError(f"{recipe.name}: {text}")
    if (digest := config.get("backbone_digest")) and digest != dino.digest():
        text = f"start_from was trained on {config.get('backbone')!r}, whose weights are not those of the backbone"
        raise ValueError(f"{recipe.name}: {text} {recipe.backbone!r}; pass --backbone with the former")
    if (feature := config.get("feature", recipe.feature)) != recipe.feature:
        raise ValueError(f"{recipe.name}: start_from was trained on the feature {feature!r}; pass --feature {feature}")


class SempartStudent(nn.Module, Student):
    """The head, and out of torch's sight the backbone, which is no module of it."""

    def __init__(self, recipe: Sempart, head: network.Head, dino: Dino, device: str, *, sign: int | None = None):
        """sign: -1 where the head marks the background, None while nobody knows."""
        super().__init__()
        self.recipe, self.sign, self.device = recipe, sign, device
        self.head, self.dino = head.to(device).train(), dino
        if device == "cuda":
            self.head.to(memory_format=torch.channels_last)  # as tensor cores want convolutions

    def views(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> tuple[Tensor, ...]:
        """Crops of the images, float32 (B, 3, S, S), normalised; with trick 2 also their enlarged windows, alike, and
        the windows' top and left, int64 (B, 2) on the CPU."""
        planes = augment.pixels([sample["image"] for sample in samples], self.device)
        planes = augment.jitter(planes, [draw.jitter for draw in draws])
        planes = augment.grey(planes, [draw.is_grey for draw in draws])
        images = augment.crop(planes, [draw.corner for draw in draws], self.recipe.image_size)
        images = augment.normalise(augment.flip(images, [draw.is_flipped for draw in draws]))
        if not self.recipe.crop_zoom:
            return (images,)
        windows = torch.tensor([draw.zoom for draw in draws])
        return images, losses.zoom(images, *windows.T.tolist()), windows

    def forward(self, images: Tensor, zoomed: Tensor | None = None, windows: Tensor | None = None):
        """The terms of the loss and their weighted sum. What `views` gives; both views share a pass of the backbone."""
        if zoomed is None:
            return self.terms(images, self.features(images))
        features = self.features(torch.cat([images, zoomed])).chunk(2)
        return self.terms(images, features[0], zoomed, features[1], windows)

    def features(self, pixels: Tensor) -> Tensor:
        """Of the frozen backbone: float32 (B, D, h, w)."""
        return network.keys(self.dino, pixels, facet=self.recipe.feature)

    def terms(
        self, images: Tensor, features: Tensor, zoomed: Tensor | None = None, zoomed_features: Tensor | None = None,
        windows: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`forward` once the features are there. All probabilities and losses are float32."""
        recipe = self.recipe
        with self._precision():
            coarse, fine = (logits.sigmoid() for logits in self.head(features, images))
        alike = losses.edges(features, tau=recipe.tau)
        found = {
            "ncut": losses.ncut(coarse, alike, eps=recipe.eps),
            "gtv_fine": losses.gtv_fine(fine, images, sigma=recipe.sigma),
            "gtv_coarse": self._gtv_coarse(coarse, features, alike),
            "consistency": losses.consistency(coarse, fine),
        }
        if zoomed is not None:
            found |= self._zoom_terms(fine, zoomed, zoomed_features, windows)
        total = sum(getattr(recipe, f"w_{name}") * term for name, term in found.items())
        return found | {"total": total}

    def _gtv_coarse(self, coarse: Tensor, features: Tensor, alike: Tensor) -> Tensor:
        if self.recipe.gtv_coarse == "kernel":
            return losses.gtv_kernel(coarse, features, sigma=self.recipe.sigma)
        return losses.gtv_coarse(coarse, alike, eps=self.recipe.eps)

    def _zoom_terms(self, fine: Tensor, zoomed: Tensor, features: Tensor, windows: Tensor) -> dict[str, Tensor]:
        """Those of trick 2. fine: the mask of the whole crop.

        The teacher's gradient ends at its coarse mask, so that its decoder keeps nothing for the way back.
        """
        recipe = self.recipe
        with self._precision():
            tokens = self.head.encode(features)
            coarse = self.head.coarse_of(tokens).sigmoid()
            with torch.no_grad():
                teacher = self.head.fine_of(tokens, zoomed).sigmoid()
        target = losses.teacher_target(teacher, zoomed, radius=recipe.gf_radius, eps=recipe.gf_eps)
        alike = losses.edges(features, tau=recipe.tau)
        return {
            "crop_zoom": losses.crop_zoom(losses.zoom(fine, *windows.T.tolist()), target),
            "ncut_crop": losses.ncut(coarse, alike, eps=recipe.eps),
        }

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """AdamW of the head."""
        recipe, is_fused = self.recipe, self.device == "cuda"
        options = {"betas": tuple(recipe.betas), "weight_decay": recipe.weight_decay, "fused": is_fused}
        return torch.optim.AdamW(self.parameters(), lr, **options)

    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Masks of images squeezed to `image_size`, at their own size, as `label sempart` makes them without a filter.

        Until `finish` knows the sign they may mark the background.
        """
        found = []
        for image in images:
            mask = self.probabilities(self._squeezed([image]), batch_statistics=False)
            mask = 1 - mask if self.sign == -1 else mask
            found.append(interpolate(mask[None], size=image.shape[:2], mode="bilinear")[0, 0].cpu().numpy())
        return found

    def probabilities(self, pixels: Tensor, *, batch_statistics: bool) -> Tensor:
        """Fine masks as the head gives them, float32 (B, H, W). pixels: float32 (B, 3, H, W), normalised.

        batch_statistics: whether batch norms take the statistics of these images, instead of the running averages. The
        averages stay as they are.
        """
        norms = batchnorm.by_batch if batch_statistics else _in_eval
        with torch.no_grad(), norms(self.head), self._precision():
            pixels = pixels.to(self.device)
            return self.head(self.features(pixels), pixels)[1].sigmoid()[:, 0]

    def finish(self, samples: Sequence[Sample]) -> None:
        """Find the masks' sign, by what share of these images they cover, and before it precise averages if asked for.

        A head that stays as it was and whose sign is known keeps it.
        """
        recipe = self.recipe
        is_changed = recipe.epochs > 0 or recipe.precise_bn
        if not samples or not (is_changed or self.sign is None):
            return
        samples = [samples[i] for i in range(min(FINISH_SAMPLES, len(samples)))]
        if recipe.precise_bn:
            self._average(samples)
        batches = _batches([sample["image"] for sample in samples], recipe.batch_size)
        means = [self.probabilities(self._squeezed(some), batch_statistics=False).mean((1, 2)) for some in batches]
        self.sign = -1 if torch.cat(means).mean() > 0.5 else 1

    @torch.no_grad()
    def _average(self, samples: Sequence[Sample]) -> None:
        """Replace batch norms' running averages by the mean over VIEWS views of each sample."""
        recipe, views = self.recipe, []
        for epoch in range(recipe.epochs, recipe.epochs + VIEWS):
            views += [
                (each, recipe.draw(data.generator(recipe.seed, epoch, i), each)) for i, each in enumerate(samples)
            ]
        with batchnorm.averaged(self.head), self._precision():
            for some in _batches(views, recipe.batch_size):
                images = self.views(*zip(*some, strict=True))[0]
                self.head(self.features(images), images)

    def export(self, folder: Folder) -> None:
        """head.safetensors and config.json."""
        recipe, known = self.recipe, {} if self.sign is None else {"polarity": self.sign}
        config = known | {
            "backbone": recipe.backbone, "backbone_digest": self.dino.digest(), "feature": recipe.feature,
            "training": asdict(recipe),
        }  # fmt: skip
        for name, content in network.files(self.head, config).items():
            folder.write(content, name)

    def _squeezed(self, images: Sequence[np.ndarray]) -> Tensor:
        return networks.pixels(images, self.recipe.image_size, device=self.device, normalize=True)

    def _precision(self):
        return networks.autocast(self.device, self.recipe.dtype)


@contextmanager
def _in_eval(head: nn.Module) -> Iterator[None]:
    """A context in which a network is in eval mode."""
    head.eval()
    try:
        yield
    finally:
        head.train()


def _batches(values: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
