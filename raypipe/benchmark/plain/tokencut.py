"""TokenCut as published: the whole network with all its blocks, one image at a time, a dense generalised solver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from raypipe import networks
from raypipe.benchmark.figures import Figure
from raypipe.benchmark.plain.spectral import halves, second_eigenvector
from raypipe.benchmark.turns import in_turns, segment, with_features, with_network

SIDE = 480  # px; with patches of 8 px 3600 of them, which the dense solver takes ten seconds for


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """On photographs of at most SIDE px a side; and ours alone on one at its full size."""
    small = [reduced(image) for image in images]
    against = f"{small[0].shape[1]} x {small[0].shape[0]} px; scipy.linalg.eigh in float64, one image at a time"
    if method.networks:
        options = {"kind": PlainTokencut, "fields": ("tau", "eps", "graph")}
        figures = with_network(method, device, small, repeats, **options, against=f"{against}, all of the network")
    else:
        figures = with_features(method, device, small, repeats, plain=partial(cut_out, method), against=against)
    batch = method.batch_size if device == "cuda" else 1
    ((seconds,), _) = in_turns([lambda image: segment(method, [image] * batch)], images[:1], repeats)
    name = f"time per image, {images[0].shape[1]} x {images[0].shape[0]} px"
    return [*figures, Figure(method.name, name, "s", [total / batch for total in seconds], f"{device}; ours alone")]


def reduced(image: np.ndarray) -> np.ndarray:
    """An image with its longer side at SIDE px at most."""
    import cv2

    factor = min(1, SIDE / max(image.shape[:2]))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def cut_out(method, image: np.ndarray, features) -> np.ndarray:
    """What is set apart, bool (1, H, W), by the features that a method has of an image."""
    patches = features.patches.cpu().numpy()
    part = separated(patches, features.grid, tau=method.tau, eps=method.eps, graph=method.graph)
    return features.enlarged(part, image.shape[:2])[None]


class PlainTokencut:
    """The keys of the last block of a DINO model of transformers, cut with SciPy."""

    def __init__(self, weights: str, device: str):
        from transformers import ViTModel

        self._network = ViTModel.from_pretrained(weights, add_pooling_layer=False).eval().to(device)
        self._network.embeddings.interpolate_pos_encoding = self._positions
        self._network.layers[-1].attention.k_proj.register_forward_hook(self._keep)
        self._device = device

    def __call__(self, image: np.ndarray, **options) -> np.ndarray:
        """What is set apart, bool (1, H, W), of RGB uint8 (H, W, 3)."""
        import torch
        from PIL import Image

        patch = self._network.config.patch_size
        grid = tuple(max(1, round(side / patch)) for side in image.shape[:2])
        size = (grid[1] * patch, grid[0] * patch)
        levels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), np.float32) / 255
        levels = (levels - np.float32(networks.IMAGENET_MEAN)) / np.float32(networks.IMAGENET_STD)
        pixels = torch.from_numpy(levels.transpose(2, 0, 1)[None]).to(self._device)
        with torch.inference_mode():
            self._network(pixels, interpolate_pos_encoding=True)
        part = separated(self._keys[0, 1:].cpu().numpy(), grid, **options)
        rows, columns = (np.arange(side) * cells // side for side, cells in zip(image.shape, grid, strict=False))
        return part[rows[:, None], columns][None]

    def _keep(self, _layer, _given, keys):
        self._keys = keys

    def _positions(self, tokens, height: int, width: int):
        """The position embedding as DINO's code enlarges it. tokens: (1, 1 + P, D). height, width: of the image."""
        import torch
        from torch.nn.functional import interpolate

        stored, patch = self._network.embeddings.position_embeddings, self._network.config.patch_size
        side = round((stored.shape[1] - 1) ** 0.5)
        if (height // patch, width // patch) == (side, side):
            return stored
        factors = tuple((pixels // patch + 0.1) / side for pixels in (height, width))
        grid = stored[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([stored[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def separated(
    patches: np.ndarray, grid: tuple[int, int], *, tau: float = 0.2, eps: float = 1e-5, graph: str = "binary"
) -> np.ndarray:
    """The part of the cut that holds its seed: bool (h, w), of the features of patches (P, D)."""
    from skimage.measure import label

    unit = patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    if graph == "binary":
        affinity = np.where(similarity > tau, 1.0, eps)
    else:
        affinity = np.where(similarity >= tau, similarity, eps).astype(np.float64)
    vector, _ = second_eigenvector(affinity)
    upper, seed = halves(vector)
    parts = label(upper.reshape(grid), background=-1, connectivity=1)
    return parts == parts.flat[seed]
