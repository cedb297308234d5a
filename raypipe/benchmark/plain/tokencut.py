"""TokenCut as published: the whole network with all its blocks, one image at a time, a dense generalised solver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.plain._dino import SIDE, PlainDino
from raypipe.benchmark.plain.spectral import halves, second_eigenvector
from raypipe.benchmark.turns import in_turns, segment, with_features, with_plain


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """On photographs of at most SIDE px a side; and ours alone on one at its full size."""
    small = [reduced(image) for image in images]
    against = f"{small[0].shape[1]} x {small[0].shape[0]} px; scipy.linalg.eigh in float64, one image at a time"
    if method.networks:
        plain = partial(of_network, method, PlainDino(method._dino.network))
        figures = with_plain(method, device, small, repeats, plain, f"{against}, all of the network")
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


def of_network(method, dino: PlainDino, image: np.ndarray) -> np.ndarray:
    """What is set apart, bool (1, H, W), by the keys of all of a network, of RGB uint8 (H, W, 3)."""
    keys, grid = keys_of(dino, image)
    part = separated(keys, grid, tau=method.tau, eps=method.eps, graph=method.graph)
    rows, columns = (np.arange(side) * cells // side for side, cells in zip(image.shape, grid, strict=False))
    return part[rows[:, None], columns][None]


def keys_of(dino: PlainDino, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """The keys of the last block, float32 (P, D), of an image resized to whole patches, and their grid."""
    height, width = (max(1, round(side / dino.patch)) * dino.patch for side in image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    seen = dino(np.asarray(resized), "constant")
    return seen.keys[1:].cpu().numpy(), seen.grid


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
