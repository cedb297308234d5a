"""CLIPSeg in the plainest form: one image at a time, the prompt each time, all blocks kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import squeezed, with_network


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """In full batches, against one image at a time."""
    fields, against = ("prompt", "size", "threshold"), "the prompt each time, all blocks, one image at a time"
    return with_network(method, device, images, repeats, kind=PlainClipseg, fields=fields, against=against)


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

        pixels = squeezed(image, size, device=self._device)
        with torch.inference_mode():
            words = self._tokenizer([prompt], padding=True, return_tensors="pt").to(self._device)
            probability = self._network(pixel_values=pixels, **words).logits.sigmoid().squeeze(0).cpu().numpy()
        low, high = probability.min(), probability.max()
        if high == low:
            return np.zeros((1, *image.shape[:2]), bool)
        mask = (probability - low) / (high - low) > threshold
        return np.asarray(Image.fromarray(mask).resize(image.shape[1::-1], Image.Resampling.NEAREST))[None]
