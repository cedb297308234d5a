"""SelfMask in the plainest form: masks of all queries after every block, on enlarged patches; losses query by query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, in_turns, with_features

BATCH = (8, 6, 20)  # images, blocks of the decoder, queries (the authors' configuration)
SIDE = 480  # px: 3600 patches of 8 px; photographs of 1024 px would take minutes on a CPU


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """At a small size, in full batches, against one image at a time."""
    import cv2

    def plain(image: np.ndarray, features) -> np.ndarray:
        return saliency(method._network, features, image.shape[:2])[None] > 0.5

    images = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in images]
    against = f"{SIDE} px a side; the masks of all queries after every block, float32"
    figures = with_features(method, device, images, repeats, plain=plain, against=against)
    return figures + compare_losses(device, images, repeats)


def compare_losses(device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """Losses and gradients of a training step of the published sizes."""
    import torch

    from raypipe.segmenters.selfmask.losses import losses as fast

    random = torch.Generator().manual_seed(0)
    masks, objectness = (torch.rand(*BATCH, *each, generator=random).to(device) for each in ((56, 56), (1,)))
    targets = torch.rand(BATCH[0], 224, 224, generator=random).to(device) > 0.5

    def step(function) -> list:
        given = masks.requires_grad_(), objectness.requires_grad_()
        gradients = torch.autograd.grad(sum(function(*given, targets).values()), given)
        return [gradient.sum().item() for gradient in gradients]  # waits for a GPU

    (ours, other), _ = in_turns([lambda _: step(fast), lambda _: step(losses)], images[:1], repeats)
    against = f"{device}; a batch of {BATCH[0]}, {BATCH[1]} blocks, {BATCH[2]} queries; masks enlarged, pairs in a loop"
    return compared("selfmask", [ours, other], against, per="step", case=", losses in training")


def saliency(network, features, size: tuple[int, int]) -> np.ndarray:
    """Probabilities (H, W) of the surest query, from an image's features, seen at its own size."""
    import torch
    from torch.nn.functional import interpolate

    with torch.inference_mode():
        patches = features.patches[None]
        picture = patches.transpose(1, 2).reshape(1, -1, *features.grid)
        picture = interpolate(picture, scale_factor=2, mode="bilinear")  # (1, D, 2h, 2w)
        queries = network.decoder(patches, network.query_embed)  # (1, L, Q, D)
        masks = torch.einsum("blqd,bdhw->blqhw", queries, picture).sigmoid()
        best = network.ffn(queries)[0, -1, :, 0].argmax()
        whole = interpolate(masks[:, -1, best][None], scale_factor=features.patch / 2, mode="bilinear")
    return whole[0, 0, : size[0], : size[1]].cpu().numpy()


def losses(masks, objectness, targets, *, order: str = "corrected") -> dict:
    """As `segmenters.selfmask.losses.losses`, as the paper says it: at the targets' size, pair by pair."""
    import torch
    from torch.nn.functional import interpolate

    dice = ranking = torch.zeros((), dtype=masks.dtype, device=masks.device)
    for image, sure, target in zip(masks, objectness[..., 0], targets.to(masks.dtype), strict=True):
        for level in range(len(image)):
            large = interpolate(image[level][None], size=target.shape, mode="bilinear")[0]  # (Q, H, W)
            both, each = (large * target).sum((1, 2)), large.sum((1, 2)) + target.sum()
            costs = 1 - (2 * both + 1) / (each + 1)
            dice = dice + costs.sum() / len(masks)
            by_cost = costs.argsort(descending=order == "reference").tolist()
            for place, first in enumerate(by_cost):
                for other in by_cost[place + 1 :]:
                    ranking = ranking + (sure[level, other] - sure[level, first]).clamp(min=0) / len(masks)
    return {"dice": dice, "ranking": ranking}
