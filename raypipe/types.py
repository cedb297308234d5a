"""The types that all of raypipe shares: what a method is, what it finds, and what is wrong with an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

# Kinds of error that may go away by themselves; all others need another file or another setting.
RETRYABLE = frozenset({"network", "io", "crash", "timeout", "memory"})


class BadImage(Exception):
    """One input that cannot be labelled. It becomes the error row `stage: kind: message` and never stops a job.

    stage: fetch, decode, foreground, segment, refine or encode. kind: one stable word to count and filter by
    (`missing`, `truncated`, `unsupported`, ...); it says whether the same file may succeed another time: RETRYABLE.
    message: what is wrong and, if not obvious, what to do.
    """

    def __init__(self, stage: str, kind: str, message: str):
        super().__init__(stage, kind, message)
        self.stage, self.kind, self.message = stage, kind, message

    def __str__(self) -> str:
        return f"{self.stage}: {self.kind}: {' '.join(self.message.split())}"[:500]


@dataclass
class Segments:
    """What a segmenter found in one image. N may be 0: finding nothing is an answer, not an error."""

    masks: np.ndarray  # (N, H, W) at image size: bool, or float32 probability in [0, 1]
    labels: Sequence[str] = ()  # N names; () when the method does not name its segments
    scores: Sequence[float] = ()  # N confidences, higher is better; () when it has none
    note: str = ""  # comma-joined remarks on harmless degenerate cases, such as "empty_foreground"


@dataclass
class Segmenter(ABC):
    """One method. The fields are its parameters: shown by --help, checked on the driver, recorded, swept.

    A method that works inside a foreground mask also has the field `foreground: str` and then gets `foregrounds`.
    """

    threshold: float | None = None  # a soft mask is foreground where probability > threshold; None means 0.5
    seed: int = 0  # random numbers start from it anew for every image

    source: ClassVar[str] = ""  # the paper or library that defines the method
    licence: ClassVar[str] = ""  # of the weights, or of the algorithm's code when it has none
    needs: ClassVar[str] = ""  # weights to get before the first run; "" means nothing
    soft: ClassVar[bool] = False  # `segment` yields probabilities, not binary masks
    gpus: ClassVar[float] = 0.0  # per actor; fractions share a GPU; 0 = runs on the CPU only
    batch_size: ClassVar[int] = 16
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}  # named values for fields that are None, by `preset`
    timeout: ClassVar[float] = 60.0  # seconds that one image may take before its process is given up

    @property
    def name(self) -> str:
        """The method's name: that of the file it lives in."""
        return type(self).__module__.rpartition(".")[2]

    def load(self, device: str) -> None:  # noqa: B027 - most CPU methods have nothing to load
        """Read weights. Runs once per actor, never on the driver. device: "cpu" or "cuda"."""

    def checksums(self) -> dict[str, str]:
        """After `load`: the sha256 of every weight file that was read, by name. For the run's provenance."""
        return {}

    @abstractmethod
    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        """Yield one Segments per image, in order.

        images: RGB uint8 (H, W, 3); sizes may differ. foregrounds: bool (H, W), one per image, given exactly when
        the method has the field `foreground`.
        """
