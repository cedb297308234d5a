"""Methods, refiners and solvers on photographs, one thread, in turns with plain formulations of the same. No Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe import refiners, segmenters
from raypipe.benchmark import plain
from raypipe.benchmark.figures import Figure, Sizes
from raypipe.benchmark.turns import halves, in_turns, segment
from raypipe.lookup import one_line
from raypipe.types import Segmenter, name_of

# what methods and jobs stand on, worth rows of their own
SOLVERS = (
    "spectral",
    "train_sempart",
    "train_namedmask",
    "archive_ranking",
    "cosegment",
    "clip_masked",
    "naming",
    "ward",
    "naming_evaluation",
)
PHOTOGRAPHS = ("coffee", "retina", "astronaut", "rocket")  # colour photographs in scikit-image's wheel


def measure(name: str, sizes: Sizes, fetch: bool, weights: str | None = None) -> list[Figure]:
    """The figures of one method, refiner or solver. OpenCV and torch use one thread in this process from now on.

    fetch: also measure a method that needs weights; loading it may download them. weights: instead of its own ones.
    """
    import cv2

    cv2.setNumThreads(1)
    images = photographs(sizes)
    if name in SOLVERS:
        import torch

        torch.set_num_threads(1)
        subject, device = None, "cpu"
    elif name in refiners.names():
        subject, device = refiners.find(name)(), "cpu"
    else:
        kind = segmenters.find(name)
        if kind.needs and not fetch:
            return [Figure(name, "time per image", note=f"skipped: needs {kind.needs}; then --only {name}")]
        try:
            subject, device = loaded(kind, weights)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            return [Figure(name, "time per image", note=f"skipped: {one_line(error)}")]
    twin = plain.find(name)
    return (twin.compare if twin else _alone)(subject, device, images, sizes.repeats)


def photographs(sizes: Sizes) -> list[np.ndarray]:
    """RGB uint8 (side, side, 3), the same ones each time. Raises ValueError for more than there are."""
    import cv2
    import skimage.data

    names = PHOTOGRAPHS[: sizes.photographs]
    size = (sizes.side, sizes.side)
    return [cv2.resize(getattr(skimage.data, name)(), size, interpolation=cv2.INTER_AREA) for name in names]


def loaded(kind: type, weights: str | None = None):
    """A method with its defaults, loaded where it would run: (method, device). Its foreground is the whole image.

    weights: for a method with the field `weights`, instead of its own ones; a folder of `raypipe weights` sets all.
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


def _alone(subject, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """A method or refiner without another formulation: its time alone; a method in full batches on a GPU."""
    batch, work, arm = 1, "two masks", lambda image: subject(halves(image), image)
    if isinstance(subject, Segmenter):
        batch = subject.batch_size if device == "cuda" else 1
        work, arm = f"batches of {batch}", lambda image: segment(subject, [image] * batch)
    ((seconds,), _) = in_turns([arm], images, repeats)
    note = f"{device}, {work}; no other formulation"
    return [Figure(name_of(type(subject)), "time per image", "s", [total / batch for total in seconds], note)]
