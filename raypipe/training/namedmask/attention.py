"""Language attention on masks: of what was found in an image only what CLIP takes for its category is kept.

The authors suggest it against objects that usually come together, such as riders and horses: what stands out is both.
It is no part of the published system.
"""

from __future__ import annotations

import functools

import numpy as np

from raypipe.runtime.cores import device_here
from raypipe.segmenters.maskclip import Maskclip
from raypipe.segmenters.reco.cosegment import TEXT_TEMPERATURE, likeness


def attend(mask: np.ndarray, image: np.ndarray, method: Maskclip, text: np.ndarray, threshold: float) -> np.ndarray:
    """A mask without the places that fit a text less than others of the image do (NamedMask supplement, sec. 5).

    mask: bool (H, W). image: RGB uint8 (H, W, 3). method: loaded. text: of its `vectors`, float32 (D,). threshold: in
    0..1, which the fit spans over the image. Returns bool (H, W): the mask as it was where nothing of it would be left,
    as where all places fit equally well.
    """
    import torch

    (dense,) = method.features([image])
    vectors = torch.tensor(text, device=dense.patches.device)[None]
    grid = likeness(dense.patches[None], vectors, temperature=TEXT_TEMPERATURE)[0]  # (1, h, w)
    fit = method.enlarged(grid, dense, mask.shape)(0, len(mask))[0].cpu().numpy()
    low, high = fit.min(), fit.max()
    kept = mask & (fit - low > threshold * (high - low))
    return kept if kept.any() else mask


@functools.lru_cache(1)
def reader(clip: str, dtype: str) -> Maskclip:
    """MaskCLIP with its defaults, loaded once in a process. clip: a CLIP's id or folder."""
    method = Maskclip(weights=clip, dtype=dtype, classes="[object]")  # texts are those of `vectors`
    method.load(device_here("auto", gpus=method.gpus))
    return method
