"""The types that all of raypipe shares: what a method is, what it finds, and what is wrong with an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raypipe import lookup

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
    embeddings: np.ndarray | None = None  # float32 (N, D), finite, of a method that `embeds`; each at most 65,504

    def planes(self) -> Iterator[np.ndarray]:
        """The masks one by one: (H, W)."""
        return iter(self.masks)


class LabelMap(Segments):
    """What an exclusive method found: at each pixel one segment at most, so that two planes say it all.

    Its `masks` are made where somebody asks for them: float32 (N, H, W), the score of a segment where it is, else 0.
    """

    def __init__(
        self, index: np.ndarray, values: np.ndarray, labels: Sequence[str] = (), scores: Sequence[float] = (),
        note: str = "", *, count: int | None = None, embeddings: np.ndarray | None = None,
    ):  # fmt: skip
        """index: uint8 or uint16 (H, W), 0 = no segment, i = the one of labels[i - 1]. values: its score there, float32
        (H, W) in [0, 1]. count: N, where it is not that of the labels."""
        self.index, self.values, self.count = index, values, len(labels) if count is None else count
        self.labels, self.scores, self.note, self.embeddings = labels, scores, note, embeddings

    @classmethod
    def largest(cls, found: Segments) -> LabelMap:
        """Masks, one or more, with each pixel left to the one of the largest value, of equal ones to the first."""
        for i, plane in enumerate(found.planes(), 1):
            if i == 1:
                index, values = np.ones(plane.shape, np.uint8), plane.astype(np.float32)
            if i == 256:
                index = index.astype(np.uint16)
            index[plane > values] = i
            np.maximum(values, plane, out=values)
        return cls(index, values, found.labels, found.scores, found.note, count=i, embeddings=found.embeddings)

    @property
    def masks(self) -> np.ndarray:
        return np.stack([*self.planes()]) if self.count else np.zeros((0, *self.index.shape), np.float32)

    def planes(self) -> Iterator[np.ndarray]:
        return (np.where(self.index == i, self.values, np.float32(0)) for i in range(1, self.count + 1))


@dataclass
class Segmenter(ABC):
    """One method. The fields are its parameters: shown by --help, checked on the driver, recorded, swept.

    Whatever the pipeline reads of a method is here and in PatternSegmenter. `gpus`, `timeout`, `soft`, `random` and
    `refines` may be properties, for they may follow from the options. A class that needs a foreground derives from
    PatternSegmenter.
    """

    threshold: float | None = None  # a soft mask is foreground where probability > threshold; None means 0.5
    seed: int = 0  # random numbers start from it anew for every image

    source: ClassVar[str] = ""  # the paper or library that defines the method
    licence: ClassVar[str] = ""  # of the weights, or of the algorithm's code when it has none
    needs: ClassVar[str] = ""  # weights to get before the first run; "" means nothing
    caution: ClassVar[str] = ""  # what whoever reads its labels has to know: a sentence, beside every list of them
    ends: ClassVar[tuple[str, str]] = ("", "")  # what an image's first and last masks are, where they have an order
    networks: ClassVar[tuple[str, ...]] = ()  # fields that name a network, by id or folder: `weights` and any others
    model_types: ClassVar[Mapping[str, str]] = {}  # of these, what `model_type` in their config.json must say, if known
    licences: ClassVar[Mapping[str, str]] = {}  # of the default of each of these fields, from its model card
    soft: ClassVar[bool] = False  # `segment` yields probabilities, not binary masks
    embeds: ClassVar[bool] = False  # `segment` yields an embedding of each segment, which --keep-embeddings stores
    # its masks never overlap, also after a refiner: each pixel is its largest value's. It may yield a LabelMap
    exclusive: ClassVar[bool] = False
    random: ClassVar[bool] = False  # its masks depend on `seed`; a loaded copy with another one gives that one's
    refines: ClassVar[str] = ""  # the option by which it filters its masks itself, before any refiner
    gpus: ClassVar[float] = 0.0  # per actor; fractions share a GPU; 0 = runs on the CPU only
    batch_size: ClassVar[int] = 16
    parts: ClassVar[Sequence[str]] = ()  # what segments 0, 1, ... without label are called; () = the index says nothing
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}  # by the value of `preset`: see `fill_preset`
    # what is computed of images in turn, by methods (images -> one result each) of which each calls the one before, and
    # the options that matter only after it: none of them to `load`. Trials of a sweep that differ in nothing else share
    # the results
    stages: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # its option `regions` is None or given:DIR, a folder of class maps: it then gets these, in the place of foregrounds
    takes_regions: ClassVar[bool] = False
    # which segments of an image's tiles are one (`label --tiles`): index, those of the same number; label, those of the
    # same name; object, binary ones that agree where tiles overlap
    across: ClassVar[str] = "index"
    timeout: ClassVar[float] = 60.0  # seconds that one image may take before its process is given up

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if hasattr(cls, "foreground") and cls.__module__ != __name__ and not issubclass(cls, PatternSegmenter):
            raise TypeError(f"{name_of(cls)}: only a PatternSegmenter has a foreground; derive {cls.__name__} from it")

    @property
    def name(self) -> str:
        """The method's name: that of the file it lives in."""
        return name_of(type(self))

    @classmethod
    def finds(cls) -> str:
        """What its masks are: the first paragraph of its documentation; "" without one."""
        text = " ".join((cls.__doc__ or "").strip().partition("\n\n")[0].split())
        return "" if text.startswith(f"{cls.__name__}(") else text  # what a dataclass writes for want of one

    def categories(self) -> str | None:
        """The categories that it names, in the order of their labels, as `classes.read` takes them.

        None where it names none, or where only weights that are not here say which.
        """
        return getattr(self, "classes", None)

    def untiled(self) -> str:
        """Why tiles of an image make no sense with these options, and what to do; "" where they do."""
        return ""

    def fetch(self) -> None:  # noqa: B027 - only who keeps weights in its own way has something to do
        """Have the weights on this machine that `networks` does not name, downloaded if need be, and look at them.

        Called before anything starts, on the driver where that is the machine that labels. Quick where the weights are
        there. Raises FileNotFoundError or ValueError that names the ways out.
        """

    def missing(self) -> str:
        """Of weights that the method keeps in its own way what is not on this machine; "" where all is. No network."""
        return ""

    def load(self, device: str) -> None:  # noqa: B027 - most CPU methods have nothing to load
        """Read weights. Runs once per actor, never on the driver. device: "cpu" or "cuda"."""

    def checksums(self) -> dict[str, str]:
        """After `load`: the sha256 of every weight file that was read, by name. For the run's provenance.

        By `FIELD/FILE` where the method has several networks.
        """
        return {}

    @abstractmethod
    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        """Yield one Segments per image, in order.

        images: RGB uint8 (H, W, 3); sizes may differ. foregrounds: one per image, given exactly to a PatternSegmenter,
        bool (H, W), and to one that `takes_regions` if its option says so, int32 (H, W): 0 where no region is.
        """


@dataclass
class PatternSegmenter(Segmenter):
    """A method that looks inside a foreground: where the object is comes from elsewhere, its pattern is looked for.

    An own `__post_init__` calls this one, after `fill_preset` where there are presets.
    """

    # rembg[:model or file.onnx], grabcut, whole, given:DIR (masks, read as they look; KIND in
    # given:KIND:DIR is light, ink, alpha, nonzero or values such as 1,2), boxes:FILE (of MegaDetector) or run:DIR
    foreground: str = "rembg"
    fg_alpha_min: int = 1  # a soft foreground counts from this alpha of 0..255 on

    def __post_init__(self):
        """Raise ValueError for an alpha out of range, or one where the foreground has no alpha."""
        if not 0 <= self.fg_alpha_min <= 255:
            raise ValueError(f"{self.name}: fg_alpha_min must be between 0 and 255, got {self.fg_alpha_min!r}")
        is_soft = self.foreground.partition(":")[0] == "rembg"
        if self.fg_alpha_min != type(self).fg_alpha_min and not is_soft:
            text = f"has no effect: foreground {self.foreground!r} is not soft, only rembg's is"
            raise ValueError(f"{self.name}: fg_alpha_min {self.fg_alpha_min} {text}")


def name_of(kind: type) -> str:
    """The name of a method or refiner: that of the file it lives in."""
    return kind.__module__.rpartition(".")[2]


def fill_preset(options, field: str = "preset") -> None:
    """Set every field of a method or refiner that is None to the value that its preset has for it.

    field: where the preset is named; `refine_preset` of a refiner. Its values are in the class attribute `presets`. To
    be called first in `__post_init__`, so that runs record values and not a name whose meaning may change. Raises
    ValueError for an unknown preset.
    """
    preset = getattr(options, field)
    if preset not in options.presets:
        known = lookup.suggest(preset, options.presets)
        raise ValueError(f"{name_of(type(options))}: unknown {field} {preset!r}; {known}")
    for name, value in options.presets[preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
