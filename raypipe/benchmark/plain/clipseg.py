"""CLIPSeg and DINOv2-PCA in the plainest form: one image at a time, nothing cached, everything kept.

References for tests and for the benchmark: from the same weights they must give the same masks.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from raypipe.networks import IMAGENET_MEAN, IMAGENET_STD


class PlainClipseg:
    """CLIPSeg as its model card shows it: prompt and image through the whole network, the rest on the CPU."""

    def __init__(self, weights: str, device: str):
        from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

        self._tokenizer = CLIPTokenizer.from_pretrained(weights)
        self._network = CLIPSegForImageSegmentation.from_pretrained(weights).eval().to(device)
        self._device = device

    def __call__(self, image: np.ndarray, *, prompt: str, size: int, threshold: float) -> np.ndarray:
        """Bool (1, H, W) of RGB uint8 (H, W, 3)."""
        import torch

        colours = (squeezed(image, size) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        pixels = torch.from_numpy(colours.transpose(2, 0, 1)[None]).to(self._device)
        with torch.inference_mode():
            words = self._tokenizer([prompt], padding=True, return_tensors="pt").to(self._device)
            probability = self._network(pixel_values=pixels, **words).logits.sigmoid().squeeze(0).cpu().numpy()
        low, high = probability.min(), probability.max()
        if high == low:
            return np.zeros((1, *image.shape[:2]), bool)
        mask = (probability - low) / (high - low) > threshold
        return np.asarray(Image.fromarray(mask).resize(image.shape[1::-1], Image.Resampling.NEAREST))[None]


class PlainDinoPca:
    """DINOv2 with all its hidden states, and scikit-learn's full solver: a singular value decomposition in numpy."""

    def __init__(self, weights: str, device: str):
        from transformers import Dinov2WithRegistersModel

        self._network = Dinov2WithRegistersModel.from_pretrained(weights).eval().to(device)
        self._device = device

    def __call__(self, image: np.ndarray, *, size: int, layers: int, normalize: bool) -> np.ndarray:
        """Bright and dark: bool (2, H, W) of RGB uint8 (H, W, 3)."""
        import cv2

        features = self._features(squeezed(image, size), layers, normalize)
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

    def _features(self, colours: np.ndarray, layers: int, normalize: bool) -> np.ndarray:
        """Float64 (P, D) of colours (size, size, 3) in [0, 1]."""
        import torch

        if normalize:
            colours = (colours - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        pixels = torch.from_numpy(colours.transpose(2, 0, 1)[None]).to(self._device)
        with torch.inference_mode():
            states = self._network(pixels, output_hidden_states=True).hidden_states[-layers:]
            mean = torch.stack([self._network.layernorm(state) for state in states]).mean(0)
        return mean[0, 1 + self._network.config.num_register_tokens :].double().cpu().numpy()


def squeezed(image: np.ndarray, size: int) -> np.ndarray:
    """RGB uint8 (H, W, 3) as float32 (size, size, 3) in [0, 1], by Pillow."""
    square = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).astype(np.float32) / 255
