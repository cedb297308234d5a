"""Two ways to one result, called in turns: what every comparison is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from raypipe import networks
from raypipe.benchmark.figures import Figure
from raypipe.types import PatternSegmenter

THUMBNAIL = 96  # px a side of the image that warms up every arm


def segment(method, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The masks of each image, the whole of it being foreground."""
    is_pattern = isinstance(method, PatternSegmenter)
    wholes = [np.ones(image.shape[:2], bool) for image in images] if is_pattern else None
    return [found.masks for found in method.segment(images, wholes)]


def timed(function: Callable, *arguments, **options) -> tuple[float, object]:
    """Seconds of a call, and its result."""
    start = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - start, result


def in_turns(arms: Sequence[Callable], images: Sequence[np.ndarray], repeats: int) -> tuple[list, list]:
    """Seconds and results of each arm, called with each image in turns (A B A B ...) after a warm-up.

    Returns two lists with one list per arm: repeats * len(images) seconds, and the last result of each image.
    """
    for arm in arms:
        arm(np.ascontiguousarray(images[0][:THUMBNAIL, :THUMBNAIL]))
    seconds, results = [[] for _ in arms], [[None] * len(images) for _ in arms]
    for _ in range(repeats):
        for i, image in enumerate(images):
            for times, kept, arm in zip(seconds, results, arms, strict=True):
                spent, kept[i] = timed(arm, image)
                times.append(spent)
    return seconds, results


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Each of the first divided by its partner."""
    return np.divide(first, second).tolist()


def compared(
    name: str, seconds: Sequence[Sequence[float]], against: str, *, per: str = "image", case: str = ""
) -> list[Figure]:
    """Both arms' times and how many times faster the first one is, pair by pair. case: goes behind their names."""
    ours, other = seconds
    return [
        Figure(name, f"time per {per}{case}", "s", ours),
        Figure(name, f"time per {per}, plain{case}", "s", other, against),
        Figure(name, f"times faster than plain{case}", "x", ratios(other, ours), "pairs in turns"),
    ]


def with_network(
    method, device: str, images: Sequence[np.ndarray], repeats: int, *, kind: type, fields: Sequence[str], against: str
) -> list[Figure]:
    """A method in full batches on a GPU, or one by one, against its plain formulation, and how their masks differ.

    kind: the plain formulation, of weights and a device; its calls take an image and these fields of the method.
    """
    plain_one = kind(networks.locate(method.weights, method=method.name), device)
    options = {name: getattr(method, name) for name in fields}
    return with_plain(method, device, images, repeats, lambda image: plain_one(image, **options), against)


def with_features(
    method, device: str, images: Sequence[np.ndarray], repeats: int, *, plain: Callable, against: str
) -> list[Figure]:
    """The same for a method on dense features, which its plain formulation gets from it, one image at a time.

    plain: from an image and its features to masks, bool (N, H, W).
    """

    def plain_one(image: np.ndarray) -> np.ndarray:
        (features,) = method.features([image])
        return plain(image, features)

    return with_plain(method, device, images, repeats, plain_one, f"after the same features: {against}")


def with_plain(
    method, device: str, images: Sequence[np.ndarray], repeats: int, plain_one: Callable, against: str
) -> list[Figure]:
    """The same for a plain formulation that is there already: from an image to masks, bool (N, H, W)."""
    batch = method.batch_size if device == "cuda" else 1
    arms = [lambda image: segment(method, [image] * batch)[0], plain_one]
    (ours, other), found = in_turns(arms, images, repeats)
    threshold = 0.5 if method.threshold is None else method.threshold
    differences = [float(((a > threshold) != b).mean()) for a, b in zip(*found, strict=True)]
    return [
        *compared(method.name, [[total / batch for total in ours], other], f"{device}; {against}"),
        Figure(method.name, "share of pixels unlike plain", "", differences, f"ours in batches of {batch}"),
    ]


def squeezed(image: np.ndarray, size: int, *, device: str, normalize: bool = True):
    """RGB uint8 (H, W, 3) by Pillow alone: float32 (1, 3, size, size) in [0, 1], or as ImageNet is normalised."""
    import torch
    from PIL import Image

    square = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    colours = np.asarray(square).astype(np.float32) / 255
    if normalize:
        colours = (colours - np.float32(networks.IMAGENET_MEAN)) / np.float32(networks.IMAGENET_STD)
    return torch.from_numpy(colours.transpose(2, 0, 1)[None]).to(device)


def halves(image: np.ndarray) -> np.ndarray:
    """Two masks to refine, bool (2, H, W): the darker and the brighter pixels of RGB uint8 (H, W, 3)."""
    bright = image[..., 1] >= 128
    return np.stack([~bright, bright])
