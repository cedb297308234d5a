"""SelfMask in the plainest form: the masks of all queries after every block of the decoder, on enlarged patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import with_features

SIDE = 480  # px: 3600 patches of 8 px; photographs of 1024 px would take minutes on a CPU


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """At a small size, in full batches, against one image at a time."""
    import cv2

    def plain(image: np.ndarray, features) -> np.ndarray:
        return saliency(method._network, features, image.shape[:2])[None] > 0.5

    images = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in images]
    against = f"{SIDE} px a side; the masks of all queries after every block, float32"
    return with_features(method, device, images, repeats, plain=plain, against=against)


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
