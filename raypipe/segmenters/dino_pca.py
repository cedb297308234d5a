"""DINOv2 features reduced to three principal components and read as a grey image (GloPER supplement, "DINO")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raypipe import networks
from raypipe.features import dino
from raypipe.segmenters import _inside
from raypipe.types import PatternSegmenter, Segments

PATCH = 14  # px, of every DINOv2
COMPONENTS = 3  # read as red, green and blue
FLAT = 1e-5  # spread of the components, relative to the features, up to which there is none: float32 rounding


@dataclass
class DinoPca(PatternSegmenter):
    """Two soft masks: where the components of an image's features are bright as a picture, and where they are dark."""

    # Weights are the GloPER supplement's (dinov2_vitg14_reg), all else its reference's.
    weights: str = "facebook/dinov2-with-registers-giant"  # a Hugging Face id, a folder or dinov2_..._reg4_pretrain.pth
    size: int = 1008  # side of the network's square input in px, a multiple of 14: 72 x 72 patches
    layers: int = 4  # last blocks whose normed outputs are averaged; 1 to 4 are worth a sweep
    normalize: bool = False  # ImageNet mean and deviation, as in training
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto = bfloat16 on a GPU

    source = "Oquab et al. 2023 and Darcet et al. 2023, as read by the GloPER supplement (Chen, Koh, Dobbie)"
    licence = "Apache-2.0 (weights)"
    networks, licences = ("weights",), {"weights": "Apache-2.0"}
    model_types = {"weights": "dinov2_with_registers"}
    parts = ("bright", "dark")
    needs = (
        "facebook/dinov2-with-registers-giant, 4.5 GB: fetched on the first run, or by `raypipe weights dino_pca`; "
        "minutes per image without a GPU"
    )
    soft = True
    gpus = 1.0
    batch_size = 8
    timeout = 1800.0  # 20 TFLOP per image: minutes on one CPU core

    def __post_init__(self):
        super().__post_init__()
        networks.settle_options(self)
        _inside.check_size(self.name, self.size, smallest=2 * PATCH)
        if self.size % PATCH:
            raise ValueError(f"dino_pca: size must be a multiple of {PATCH}, got {self.size!r}")
        if self.layers < 1:
            raise ValueError(f"dino_pca: layers must be at least 1, got {self.layers!r}")

    def untiled(self) -> str:
        return "whose components in one tile are not those in another"

    def load(self, device: str) -> None:
        self._device, self._path = device, networks.locate(self.weights, method=self.name)
        network = dino.read(self._path, method=self.name, device=device)
        if (family := network.config.model_type) != self.model_types["weights"]:
            raise ValueError(f"dino_pca: {self._path} holds a network of type {family!r}, not a DINOv2 with registers")
        if self.layers > (depth := network.config.num_hidden_layers):
            raise ValueError(f"dino_pca: layers must be at most {depth} with these weights, got {self.layers!r}")
        if network.config.patch_size != PATCH:
            raise ValueError(f"dino_pca: patches of the weights must be {PATCH} px, got {network.config.patch_size!r}")
        self._network = network

    def checksums(self) -> dict[str, str]:
        return networks.checksums(self._path)

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        for foreground, features in zip(foregrounds, self._features(images), strict=True):
            yield masked(components(features), foreground)

    def _features(self, images: Sequence[np.ndarray]) -> Iterator:
        """Float32 (P, D) on the device for each image."""
        for batch in networks.batches(images, self._device):
            pixels = networks.pixels(batch, self.size, device=self._device, normalize=self.normalize)
            yield from self.features(pixels)

    def features(self, pixels):
        """Mean of the last blocks' normed patch tokens: float32 (B, P, D).

        pixels: a tensor (B, 3, size, size) on the device of `load`. The blocks are called here one by one: asked for
        its hidden states, the model would keep those of all 40.
        """
        import torch

        network, total = self._network, 0
        first = len(network.encoder.layer) - self.layers
        with torch.inference_mode(), networks.autocast(self._device, self.dtype):
            tokens = network.embeddings(pixels)
            for i, block in enumerate(network.encoder.layer):
                tokens = block(tokens)  # (B, 1 + registers + P, D)
                if i >= first:
                    total = total + network.layernorm(tokens).float()
        return total[:, 1 + network.config.num_register_tokens :] / self.layers


def components(features) -> np.ndarray | None:
    """The principal components of features (P, D) over a square of patches, as a picture: float32 (h, w, 3).

    One range of values over all three is stretched to 0..1. None when the features are all the same.
    """
    scores, _ = project(features)
    low, high = scores.min(), scores.max()
    if high - low <= FLAT * features.abs().max():
        return None
    side = int(len(features) ** 0.5)
    return ((scores - low) / (high - low)).float().reshape(side, side, COMPONENTS).cpu().numpy()


def project(features):
    """Scores (P, 3) and components (3, D) of an exact principal component analysis, float64, of a tensor (P, D).

    By the eigenvectors of the covariance. Signs as in scikit-learn: a component's largest loading is positive.
    """
    import torch

    values = features.double()
    values = values - values.mean(0)
    _, vectors = torch.linalg.eigh(values.T @ values)  # ascending
    axes = vectors[:, -COMPONENTS:].flip(1).T  # (3, D)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return values @ axes.T, axes


def masked(picture: np.ndarray | None, foreground: np.ndarray) -> Segments:
    """Brightness of a picture of components at the image's size, and 255 minus it, both 0 outside the foreground.

    picture: float32 (h, w, 3), None for no variance. foreground: bool (H, W). Values are n / 255, so that the two masks
    complement each other exactly at the threshold 0.5.
    """
    note = _inside.unusable(foreground) or ("no_variance" if picture is None else "")
    if note:
        return Segments(np.zeros((2, *foreground.shape), np.float32), note=note)
    grey = read_as_grey(picture, foreground.shape)
    return Segments(np.stack([grey, 255 - grey]).astype(np.float32) / 255 * foreground)


def read_as_grey(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture in 0..1, float32 (h, w, 3), at a size (H, W) in 8 bits and then as grey, as OpenCV does all of it."""
    import cv2

    large = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_CUBIC)
    # The cubic overshoots; the reference casts that to uint8 as it is, and bright spots turn black.
    return cv2.cvtColor((large.clip(0, 1) * 255).astype(np.uint8), cv2.COLOR_RGB2GRAY)


SEGMENTER = DinoPca
