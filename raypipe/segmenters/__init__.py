"""One file or folder per method; its name is the method's name. Looking one up imports that method only.

A method knows arrays: RGB images and foregrounds in, `Segments` out; one whose masks never overlap says `exclusive`,
and may give a `LabelMap`. It may import `types`, `lookup`, `networks`, `images`, `masks`, `spectral`, `classes`,
`features` and libraries of mathematics and networks, the heavy ones where they are used; never storage, inputs, run,
runtime, pipeline or Ray. Files whose names begin with `_` hold what several methods share.

A whole method, which would be the file `segmenters/shade.py`:

>>> from dataclasses import dataclass
>>> import numpy as np
>>> from raypipe.types import PatternSegmenter, Segments
>>> @dataclass
... class Shade(PatternSegmenter):  # Segmenter, if it needs no foreground
...     '''One soft mask: how dark each pixel of the foreground is.'''
...
...     gamma: float = 1.0  # above 1 only the darkest count; a field is an option: shown, recorded, swept
...
...     source, licence, soft = "this page", "none needed: own code, no weights", True
...
...     def segment(self, images, foregrounds):
...         for image, foreground in zip(images, foregrounds, strict=True):
...             dark = (1 - image.mean(2) / 255) ** self.gamma  # (H, W)
...             yield Segments((dark * foreground)[None].astype(np.float32))
>>> SEGMENTER = Shade

What the pipeline makes of it:

>>> black, diagonal = np.zeros((2, 3, 3), np.uint8), np.eye(2, 3, dtype=bool)
>>> (found,) = Shade().segment([black], [diagonal])
>>> found.masks.tolist()
[[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
"""

from raypipe import lookup
from raypipe.types import Segmenter


def names() -> list[str]:
    """All methods, sorted."""
    return lookup.modules(__path__)


def find(name: str) -> type[Segmenter]:
    """The method's dataclass. Raises ValueError with the nearest known name for an unknown one."""
    return lookup.module(__name__, name, names(), kind="segmenter").SEGMENTER


def is_exclusive(name: str) -> bool:
    """Whether a method's masks never overlap, so that one without a pixel says no more than its absence.

    With soft masks a run holds those too. False for a method that is not here.
    """
    return name in names() and find(name).exclusive
