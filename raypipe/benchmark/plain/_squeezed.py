"""What networks see, by Pillow alone."""

from __future__ import annotations

import numpy as np
from PIL import Image

from raypipe.networks import IMAGENET_MEAN, IMAGENET_STD


def squeezed(image: np.ndarray, size: int, *, device: str, normalize: bool = True):
    """RGB uint8 (H, W, 3) as float32 (1, 3, size, size) in [0, 1], or with ImageNet's mean 0 and deviation 1."""
    import torch

    square = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    colours = np.asarray(square).astype(np.float32) / 255
    if normalize:
        colours = (colours - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    return torch.from_numpy(colours.transpose(2, 0, 1)[None]).to(device)
