"""Methods and refiners on photographs, one thread, in turns with the plain formulation of the same result. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace

import numpy as np

from raypipe import networks, segmenters
from raypipe import refiners as refine
from raypipe.benchmark.figures import Figure, Sizes
from raypipe.benchmark.plain import kmeans as plain

PHOTOGRAPHS = ("coffee", "retina", "astronaut", "rocket")  # colour photographs in scikit-image's wheel
THUMBNAIL = 96  # px a side of the image that warms up every arm
RADIUS, EPS = 29, 1e-3  # of the guided filter: its default of 9 px at 320 px, for 1024 px


def measure(name: str, sizes: Sizes, fetch: bool, weights: str | None = None) -> list[Figure]:
    """The figures of one method or refiner. OpenCV and torch use one thread in this process from now on.

    fetch: also measure a method that needs weights; loading it may download them. weights: instead of its own ones.
    """
    import cv2

    cv2.setNumThreads(1)
    images = photographs(sizes)
    if name in refine.names():
        return REFINERS.get(name, _refiner)(name, images, sizes.repeats)
    kind = segmenters.find(name)
    if kind.needs and not fetch:
        return [Figure(name, "time per image", note=f"skipped: needs {kind.needs}; then --only {name}")]
    try:
        method, device = loaded(kind, weights)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return [Figure(name, "time per image", note=f"skipped: {networks.one_line(error)}")]
    return COMPARED.get(name, _method)(method, device, images, sizes.repeats)


def photographs(sizes: Sizes) -> list[np.ndarray]:
    """RGB uint8 (side, side, 3), the same ones each time. Raises ValueError for more than there are."""
    import cv2
    import skimage.data

    names = PHOTOGRAPHS[: sizes.photographs]
    size = (sizes.side, sizes.side)
    return [cv2.resize(getattr(skimage.data, name)(), size, interpolation=cv2.INTER_AREA) for name in names]


def loaded(kind: type, weights: str | None = None):
    """A method with its defaults, loaded where it would run: (method, device). Its foreground is the whole image.

    weights: for a method with the field `weights`, instead of its own ones.
    """
    chosen = {"foreground": "whole", "weights": weights} if weights else {"foreground": "whole"}
    method = kind(**{name: value for name, value in chosen.items() if name in kind.__dataclass_fields__})
    device = "cpu"
    if method.gpus:
        import torch

        torch.set_num_threads(1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
    method.load(device)
    return method, device


def segment(method, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The masks of each image, the whole of it being foreground."""
    if not hasattr(method, "foreground"):
        return [found.masks for found in method.segment(images)]
    wholes = [np.ones(image.shape[:2], bool) for image in images]
    return [found.masks for found in method.segment(images, wholes)]


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
                start = time.perf_counter()
                kept[i] = arm(image)
                times.append(time.perf_counter() - start)
    return seconds, results


def compared(name: str, seconds: Sequence[Sequence[float]], against: str) -> list[Figure]:
    """Both arms' times and how many times faster the first one is, pair by pair."""
    ours, other = seconds
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    return [
        Figure(name, "time per image", "s", ours),
        Figure(name, "time per image, plain", "s", other, against),
        Figure(name, "times faster than plain", "x", ratios, "pairs in turns"),
    ]


def _method(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """A method without another formulation: its time alone, in full batches on a GPU."""
    batch = method.batch_size if device == "cuda" else 1
    ((seconds,), _) = in_turns([lambda image: segment(method, [image] * batch)], images, repeats)
    note = f"{device}, batches of {batch}; no other formulation"
    return [Figure(method.name, "time per image", "s", [total / batch for total in seconds], note)]


def _kmeans(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    settings = {name: getattr(method, name) for name in ("k", "attempts", "max_iter", "eps")}
    arms = [lambda image: segment(method, [image])[0], lambda image: plain.opencv_kmeans(image, **settings)]
    seconds, found = in_turns(arms, images, repeats)
    against = f"cv2.kmeans, {method.attempts} attempts, k = {method.k}"
    objectives = [[plain.spread(*pair) for pair in zip(images, masks, strict=True)] for masks in found]
    ratios = [a / b for a, b in zip(*objectives, strict=True)]
    note = "sum of squared distances; 1 or less is as good or better"
    return [*compared("kmeans", seconds, against), Figure("kmeans", "objective, ours / plain", "x", ratios, note)]


def _clipseg(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    from raypipe.benchmark.plain.clipseg import PlainClipseg

    plain_one = PlainClipseg(networks.locate(method.weights, method=method.name), device)
    settings = {name: getattr(method, name) for name in ("prompt", "size", "threshold")}
    against = "the prompt each time, all blocks, one image at a time"
    return _with_network(method, device, images, repeats, lambda image: plain_one(image, **settings), against)


def _dino_pca(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    from raypipe.benchmark.plain.clipseg import PlainDinoPca

    plain_one = PlainDinoPca(networks.locate(method.weights, method=method.name), device)
    settings = {name: getattr(method, name) for name in ("size", "layers", "normalize")}
    against = "all hidden states, SVD of the features in numpy, one image at a time"
    return _with_network(method, device, images, repeats, lambda image: plain_one(image, **settings), against)


def _with_network(
    method, device: str, images: Sequence[np.ndarray], repeats: int, plain_one: Callable, against: str
) -> list[Figure]:
    """A method in full batches on a GPU, or one by one, against its plain formulation, and how their masks differ."""
    batch = method.batch_size if device == "cuda" else 1
    arms = [lambda image: segment(method, [image] * batch)[0], plain_one]
    (ours, other), found = in_turns(arms, images, repeats)
    threshold = 0.5 if method.threshold is None else method.threshold
    differences = [float(((a > threshold) != b).mean()) for a, b in zip(*found, strict=True)]
    return [
        *compared(method.name, [[total / batch for total in ours], other], f"{device}; {against}"),
        Figure(method.name, "share of pixels unlike plain", "", differences, f"ours in batches of {batch}"),
    ]


def _sam(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """The official generator's own points, without crops: a point of GloPER's 21 crops costs the same."""
    from raypipe.benchmark.plain import sam as plain_sam

    method = copy(method)
    method.points_per_side, method.crop_n_layers, method.result = 32, 0, "masks"
    arms = [lambda image: segment(method, [image])[0], lambda image: plain_sam.masks(method, image)]
    seconds, found = in_turns(arms, images[:1], repeats)  # the plain one takes minutes
    agreement = [plain_sam.agreement(*pair) for pair in zip(*found, strict=True)]
    against = f"{device}; 32 x 32 points; all candidates up-sampled, float32"
    return [
        *compared("sam", seconds, against),
        Figure("sam", "masks per image", "", [float(len(masks)) for masks in found[0]]),
        Figure("sam", "least best IoU with plain masks", "", agreement, "of any mask, both ways"),
    ]


def _gloper(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """Steps of the optimisation: of one local size where that fills the device, and of four sizes side by side."""
    from raypipe.benchmark.plain import gloper as plain_gloper

    figures = []
    for side, sizes in ((1024 if device == "cuda" else 128, (8,)), (64, (4, 8, 16, 32))):
        arms = [
            lambda image, run=run, side=side, sizes=sizes: run(method, device, image, side, sizes)
            for run in (plain_gloper.ours, plain_gloper.plain)
        ]
        seconds, _ = in_turns(arms, images, repeats)
        against = f"{device}; float32, {len(sizes)} local size(s), one after the other"
        each = [[total / plain_gloper.STEPS[device] for total in arm] for arm in seconds]
        for figure in compared("gloper", each, against):
            name = figure.figure.replace("time per image", "time per step")
            figures.append(replace(figure, figure=f"{name}, {side} px, {len(sizes)} size(s)"))
    return figures


def _refiner(name: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """A refiner without another formulation."""
    refiner = refine.find(name)()
    ((seconds,), _) = in_turns([lambda image: refiner(halves(image), image)], images, repeats)
    return [Figure(name, "time per image", "s", seconds, "two masks; no other formulation")]


def _guided(name: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """The filter itself: the refiner would keep a mask that vanishes, which the plain formulation does not."""
    from raypipe.refiners.guided import guided_filter

    filters = (guided_filter, plain.cumulative_guided_filter)
    arms = [lambda image, run=run: run(halves(image), image, radius=RADIUS, eps=EPS) for run in filters]
    seconds, (ours, other) = in_turns(arms, images, repeats)
    errors = [float(np.abs(a - b).max()) for a, b in zip(ours, other, strict=True)]
    against = f"cumulative sums in float64, two masks, radius {RADIUS}"
    return [
        *compared(name, seconds, against),
        Figure(name, "largest difference to plain", "", errors, "ours in float32"),
    ]


def halves(image: np.ndarray) -> np.ndarray:
    """Two masks to refine, bool (2, H, W): the darker and the brighter pixels of RGB uint8 (H, W, 3)."""
    bright = image[..., 1] >= 128
    return np.stack([~bright, bright])


COMPARED = {"clipseg": _clipseg, "dino_pca": _dino_pca, "gloper": _gloper, "kmeans": _kmeans, "sam": _sam}
REFINERS = {"guided": _guided}
