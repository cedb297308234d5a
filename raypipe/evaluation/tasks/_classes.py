"""What tasks about classes share: which classes there are, and how their labels are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from raypipe.classes import Classes
from raypipe.evaluation import classmaps
from raypipe.inputs import maskfiles
from raypipe.types import BadImage


class OfClasses:
    """What a task is besides whose labels are maps of the numbers of classes."""

    HOLDS = "classes"
    name: str
    _known: Classes | None  # which `of_classes` sets

    @property
    def known(self) -> Classes:
        """The classes of the labels. Raises ValueError where nobody said which."""
        if self._known is None:
            advice = "add --classes (of a sweep --label-classes) with a list's name, a file or names"
            raise ValueError(f"task {self.name} needs the classes of the labels: {advice}")
        return self._known

    def match(self, folder: str, keys: Iterable[str]) -> maskfiles.Matches:
        """Label maps of class numbers, or masks in a folder per class."""
        return classmaps.match(folder, keys, self.known)

    def read(
        self, location: str, *, max_bytes: int, max_pixels: int, form: str | Mapping[int, int] = "indices"
    ) -> np.ndarray:
        """A label as int32 (H, W): 0 = background, 1, 2, ... = a class, -1 = ignored. Raises BadImage.

        form: how a data set's files store it, as in `classmaps.read`.
        """
        return classmaps.read(location, self.known, form=form, max_bytes=max_bytes, max_pixels=max_pixels)

    def checksum(self, location: str, *, max_bytes: int) -> str:
        """Of all files of an image's label."""
        try:
            return hashlib.sha256(classmaps.contents(location, max_bytes=max_bytes)).hexdigest()
        except BadImage:
            return ""
