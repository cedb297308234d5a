"""What the training of a method consists of: the contract between `loop` and the file of each method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from raypipe.lookup import suggest
from raypipe.types import name_of

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from raypipe.storage import Folder

Sample = Mapping[str, np.ndarray]  # what is kept of an image: arrays by name, `image` (RGB uint8) among them


@dataclass(kw_only=True)
class Recipe(ABC):
    """How a method is trained. The fields are its options: shown by --help, frozen in the output, swept.

    Cheap to construct and to pickle; an own `__post_init__` raises ValueError for what makes no sense. What takes steps
    has the fields `epochs` or `iterations`, `batch_size` and `lr`.
    """

    seed: int = 0  # of the order of images, their augmentation and the first weights

    epochs: ClassVar[int] = 0
    iterations: ClassVar[int] = 0  # steps, where images are drawn with replacement
    round_steps: ClassVar[int] = 1000  # of them, in the place of an epoch
    batch_size: ClassVar[int] = 1
    lr: ClassVar[float] = 1.0
    keep_files: ClassVar[bool] = False  # in the place of `image`, which is decoded from its file at each use
    lr_power: ClassVar[float] = 0.5  # of the number of workers, by which `lr` grows where each has a batch of its own
    least_lr: ClassVar[float] = 0.0  # below which no group of parameters comes, whatever `rate` says

    # what has no effect, and must have its default, where another option has a value: name -> (the other, that value)
    depends: ClassVar[Mapping[str, tuple[str, Any]]] = {}

    networks: ClassVar[tuple[str, ...]] = ()  # as of a Segmenter: fields that name a network to be fetched
    model_types: ClassVar[Mapping[str, str]] = {}
    has_steps: ClassVar[bool] = True  # False: nothing is learned by gradients, all is done in `Made.finish`

    @property
    def name(self) -> str:
        """The method's name: that of the file it lives in."""
        return name_of(type(self))

    @property
    def has_crops(self) -> bool:
        """Whether it is given squares of photographs, so that a validation can measure its network on such."""
        return hasattr(self, "image_size") and hasattr(self, "resize")

    @property
    def rounds(self) -> int:
        """The epochs, or what takes their place: what pictures, checkpoints and measures come after."""
        return -(-self.iterations // self.round_steps) or self.epochs

    def refuse_unknown(self, choices: Mapping[str, Sequence[str]], ranges: Iterable[tuple[str, str, bool]]) -> None:
        """Raise ValueError for an option whose value is none of its choices, or out of its range.

        ranges: name of an option, what it must be, whether it is.
        """
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{self.name}: unknown {name} {value!r}; {suggest(value, known)}")
        for name, expected, is_right in ranges:
            if not is_right:
                raise ValueError(f"{self.name}: {name} must be {expected}, got {getattr(self, name)!r}")

    @abstractmethod
    def rows(self, manifest: pa.Table | None) -> pa.Table:
        """The images to train on: rows of schema.MANIFEST, further columns behind. Runs on the driver.

        manifest: of `--input`; None where there is none. Raises ValueError for one that is missing, or has no effect.
        """

    @abstractmethod
    def prepare(self, row: dict, image: np.ndarray) -> Sample:
        """What is kept of an image, at the size that training needs. row: of `rows`. image: RGB uint8 (H, W, 3).

        Raises BadImage for one that cannot be trained on: it is skipped, counted and named.
        """

    def draw(self, random: np.random.Generator, sample: Sample) -> Any:
        """Every random choice of one view of a sample: plain numbers. `random` belongs to (seed, epoch, image)."""
        return None

    def choose(self, random: np.random.Generator, samples: Sequence[Sample], number: int) -> tuple[Any, Any]:
        """A sample and its `draw`, as `Student.views` takes them. number: an index, or with `iterations` the count of
        all samples before."""
        sample = samples[number]
        return sample, self.draw(random, sample)

    def precede(self, rows: pa.Table, job: Any, folder: Folder) -> pa.Table:
        """What comes before the training, on the driver, which holds the folder by then. Returns the rows to train on.

        rows: of `rows`. job: a `Train`. Done again by each call of `train` that finds the training unfinished.
        """
        return rows

    @abstractmethod
    def student(self, device: str) -> Made:
        """The network to be trained, with its first weights, in train mode on the device. device: cpu or cuda.

        The first weights depend on `seed` alone. Raises what loading weights raises.
        """

    def rate(self, step: int, steps: int) -> float:
        """The factor of `lr` at a step of all `steps`, from 0 on."""
        return 1.0


class Made(ABC):
    """What a recipe makes. Beside this class it derives from torch.nn.Module, first.

    Its parameters and buffers are what it consists of. Of a recipe that has steps it is a `Student`.
    """

    recipe: Recipe

    @abstractmethod
    def finish(self, samples: Sequence[Sample]) -> None:
        """What comes after the last step, on one worker, such as the masks' sign. samples: all, by key."""

    @abstractmethod
    def export(self, folder: Folder) -> None:
        """Write the files of a folder that `label METHOD --weights` takes, each whole or not at all."""


class Student(Made):
    """A network under training.

    All its parameters are trained, and its parameters and buffers are what a checkpoint holds. Frozen networks are kept
    out of its modules (in a tuple), so that no data-parallel wrapper and no checkpoint sees them. One that can be
    validated also has `probabilities`, as `validate.Validator.measure` takes it.
    """

    @abstractmethod
    def views(self, samples: Sequence[Sample], draws: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """A batch as `forward` takes it, augmented on the device. draws: one per sample, of `Recipe.draw`."""

    @abstractmethod
    def forward(self, *views: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over the batch of all terms of the loss, unweighted scalars; `total` is what is minimised."""

    @abstractmethod
    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """A new optimiser of all parameters."""

    @abstractmethod
    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Soft masks, float32 (H, W) in [0, 1], of RGB uint8 images (H, W, 3), as they are in the middle of training.

        Leaves the network in train mode and its buffers as they were.
        """
