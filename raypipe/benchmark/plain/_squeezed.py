"""What networks see, by Pillow alone."""

from __future__ import annotations

import numpy as np
from PIL import Image


def squeezed(image: np.ndarray, size: int) -> np.ndarray:
    """RGB uint8 (H, W, 3) as float32 (size, size, 3) in [0, 1], by Pillow."""
    square = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).astype(np.float32) / 255
