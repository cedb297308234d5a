"""DINOv2-PCA in the plainest form: all hidden states kept, a singular value decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import squeezed, with_network
from raypipe.features import dino


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """In full batches, against one image at a time."""
    against = "all hidden states, SVD of the features in numpy, one image at a time"
    fields = ("size", "layers", "normalize")
    return with_network(method, device, images, repeats, kind=PlainDinoPca, fields=fields, against=against)


class PlainDinoPca:
    """DINOv2 with all its hidden states, and scikit-learn's full solver: a singular value decomposition in numpy."""

    def __init__(self, weights: str, device: str):
        self._network = dino.read(Path(weights), method="dino_pca", device=device)
        self._device = device

    def __call__(self, image: np.ndarray, *, size: int, layers: int, normalize: bool) -> np.ndarray:
        """Bright and dark: bool (2, H, W) of RGB uint8 (H, W, 3)."""
        import cv2
        import torch

        pixels = squeezed(image, size, device=self._device, normalize=normalize)
        with torch.inference_mode():
            states = self._network(pixels, output_hidden_states=True).hidden_states[-layers:]
            mean = torch.stack([self._network.layernorm(state) for state in states]).mean(0)
        features = mean[0, 1 + self._network.config.num_register_tokens :].double().cpu().numpy()  # float64 (P, D)
        centred = features - features.mean(0)
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        axes = axes[:3]
        axes = axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
        scores = centred @ axes.T
        side = int(len(scores) ** 0.5)
        picture = ((scores - scores.min()) / (scores.max() - scores.min())).reshape(side, side, 3).astype(np.float32)
        large = cv2.resize(picture, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        grey = cv2.cvtColor((large.clip(0, 1) * 255).astype(np.uint8), cv2.COLOR_RGB2GRAY)
        return np.stack([grey > 127, grey <= 127])
