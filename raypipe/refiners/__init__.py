"""One file or package per refiner; its name is the refiner's name. Looking one up imports that refiner only.

A refiner knows arrays: masks, bool or float32 (N, H, W) in [0, 1], and their RGB image in; soft masks, float32
(N, H, W) in [0, 1], and a note of comma-joined remarks out. It is a dataclass whose fields are its options, all named
`refine_...`. It may import `types`, `masks`, `networks` and libraries; never storage, inputs, run, runtime, pipeline
or Ray, and no method.

A whole refiner, which would be the file `refiners/harden.py`:

>>> from dataclasses import dataclass
>>> import numpy as np
>>> from raypipe.types import fill_preset
>>> @dataclass
... class Harden:
...     '''Move soft masks away from one half.'''
...
...     refine_preset: str = "gentle"  # what is None below
...     refine_gain: float | None = None  # slope at one half
...
...     presets = {"gentle": {"refine_gain": 2.0}, "steep": {"refine_gain": 8.0}}
...
...     def __post_init__(self):
...         fill_preset(self, "refine_preset")
...
...     def __call__(self, masks, image):
...         return np.clip((masks - 0.5) * self.refine_gain + 0.5, 0, 1).astype(np.float32), ""
>>> REFINER = Harden

What the pipeline makes of it:

>>> soft, note = Harden()(np.array([[[0.375, 0.5, 1.0]]], np.float32), np.zeros((1, 3, 3), np.uint8))
>>> soft.tolist(), note
([[[0.25, 0.5, 1.0]]], '')
"""

from raypipe import lookup


def names() -> list[str]:
    """All refiners, sorted."""
    return lookup.modules(__path__)


def find(name: str) -> type:
    """The refiner's dataclass. Raises ValueError with the nearest known name for an unknown one."""
    return lookup.module(__name__, name, names(), kind="refiner").REFINER
