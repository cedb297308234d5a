"""How NamedMask is trained (Shin, Xie, Albanie, CVPR Workshops 2023): from an archive and masks of its images.

An archive names what its images show, a run of any method says where the object is: together they are pairs of image
and label map that a normal segmenter learns from. `pool` joins both, `views` makes samples of them, `student` is the
network under training.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import classes, networks, storage
from raypipe.features.resnet import DINO_50
from raypipe.segmenters.reco import CLIP
from raypipe.storage import Location
from raypipe.training.recipe import Recipe, Sample

if TYPE_CHECKING:
    import pyarrow as pa

    from raypipe.storage import Folder
    from raypipe.training.job import Train
    from raypipe.training.namedmask.student import NamedMaskStudent
    from raypipe.training.namedmask.views import Draw, Placing, Square

RANDOM = "random"  # in the place of a backbone
POWER = 0.9  # of the polynomial by which the rates fall
EXPERTS = ("expert_iterations", "expert_batch_size", "expert_groups")
PROBABILITIES = ("flip", "jitter", "grey", "blur")


@dataclass(kw_only=True)
class NamedMask(Recipe):
    """Trains a DeepLabv3+ that knows the categories of an archive, without any mask that a person drew.

    The defaults are the authors', but for two slips of their released code, which `reference` brings back.
    """

    archive: str  # folder that `raypipe archive` made, or the authors' file {category: [paths]} (.json)
    masks: str  # folder of a run over the archive's images, such as SelfMask's; or of the authors' masks (JSON)
    classes: str | None = None  # categories in the order of labels; None = the archive's own, which a file has not
    image_root: str | None = None  # where relative paths of an archive that is a file start; None = beside it
    only: tuple[str, ...] = ()  # of these categories alone, which the network then does not tell apart: an expert
    # to begin with: the address, folder or file of a ResNet trained without labels, or random
    backbone: str = DINO_50
    output_stride: Literal[8, 16] = 8  # px between values of the last feature map; 16 is faster and coarser
    channels: int = 256  # of the head
    iterations: int = 20_000  # steps
    batch_size: int = 16  # samples per step, of all workers together
    lr: float = 5e-4  # of the head, at the first step
    backbone_factor: float = 0.1  # times that, of the backbone
    weight_decay: float = 2e-4  # of Adam, as a part of the gradient
    crop: int = 384  # px a side of a sample
    min_scale: float = 0.1  # an image's smallest size in it; its mean colour fills the rest
    max_scale: float = 1.0  # its largest size there
    n_max: int = 2  # images per sample at most, of which all but the first give their objects only; 1 = no copy-paste
    # box by which an object is pasted; reference: without its last row and column, a slip of the released code
    copy_paste_bbox: Literal["inclusive", "reference"] = "inclusive"
    padding: Literal["uniform", "reference"] = "uniform"  # corner where an image lies; reference: not equally often
    min_object_fraction: float = 1e-4  # masks with a smaller share of their image are left out
    # of masks, what CLIP takes for the category less than this is taken out, from 0 to 1 over an image, as the authors
    # suggest for objects that come together; None = off, as published; 0.3 to 0.7 are worth a sweep
    mask_attention: float | None = None
    clip: str = CLIP  # that says so: the id or folder of a CLIP
    experts: bool = True  # a network per category first, which cleans its masks: see `experts`
    expert_iterations: int = 5_000  # steps of each
    expert_batch_size: int = 8  # samples per step of each
    expert_groups: tuple[str, ...] = ()  # categories that share one, each a list such as cat,dog; others have their own
    keep_files: bool = False  # images wait as files, JPEGs in a tenth of the memory, and are decoded at each use
    flip: float = 0.5  # probability that an image is mirrored
    jitter: float = 0.8  # probability that its colours are changed
    grey: float = 0.2  # probability that they are taken away
    blur: float = 0.5  # probability that it is blurred
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto is bfloat16 on a GPU

    networks = ("backbone",)
    model_types = {"clip": "clip"}
    lr_power = 1.0  # of a batch that grows with the workers: linear
    least_lr = 1e-6  # reference
    depends = {name: ("experts", False) for name in EXPERTS}
    depends |= {"clip": ("mask_attention", None), "copy_paste_bbox": ("n_max", 1)}

    def __post_init__(self):
        self.archive, self.masks = (Location(storage.absolute(each)) for each in (self.archive, self.masks))
        asks_clip = self.mask_attention is not None
        self.networks = tuple(["backbone"] * (self.backbone != RANDOM) + ["clip"] * asks_clip)
        if self.clip != CLIP and not asks_clip:
            raise ValueError(f"{self.name}: clip {self.clip!r} has no effect without mask_attention")
        networks.settle_options(self)
        self.refuse_unknown({}, self._ranges())
        self.classes = self._settled()
        self.only = tuple(self.only)
        known = {classes.normalised(name) for name in self.all_names}
        if unknown := [name for name in self.only if classes.normalised(name) not in known]:
            raise ValueError(f"{self.name}: only {unknown[0]!r} is none of the categories {', '.join(self.all_names)}")
        self.expert_groups = tuple(self.expert_groups)
        self._check_experts()

    def _settled(self) -> str:
        """The classes as text that needs no file."""
        if self.classes is not None:
            return classes.settle(self.classes)
        if self.archive.lower().endswith(".json"):
            text = "classes is needed with an archive that is a file: its order says nothing about labels"
            raise ValueError(f"{self.name}: {text}")
        from raypipe.inputs import archives

        found = archives.read(self.archive).classes
        entries = [category._asdict() for category in found.categories]
        return found.source or classes.settle(json.dumps(entries, ensure_ascii=False))

    def _check_experts(self) -> None:
        """Raise ValueError for options of experts that there are none of, and for groups that cannot be."""
        defaults = {each.name: each.default for each in fields(NamedMask)}
        for name in EXPERTS if not self.has_experts else ():
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(f"{self.name}: {name} {value!r} has no effect without experts; leave it out")
        named = [classes.normalised(name) for group in self.expert_groups for name in group.split(",")]
        known = {classes.normalised(name) for name in self.all_names}
        if wrong := [name for name in named if name not in known or named.count(name) > 1]:
            text = f"{wrong[0]!r} must be one of the categories {', '.join(self.all_names)}, and in one group"
            raise ValueError(f"{self.name}: expert_groups: {text}")

    def _ranges(self) -> Iterator[tuple[str, str, bool]]:
        """Options whose values are numbers: name, what it must be, whether it is."""
        for name in ("iterations", "n_max", "channels", "expert_iterations"):
            yield name, "at least 1", getattr(self, name) >= 1
        for name in ("batch_size", "expert_batch_size"):
            yield name, "at least 2, for batch norms see one value of each image", getattr(self, name) >= 2
        yield "crop", "at least 16", self.crop >= 16
        yield "lr", "a finite number above 0", 0 < self.lr < np.inf
        yield "backbone_factor", "a finite number above 0", 0 < self.backbone_factor < np.inf
        yield "weight_decay", "a finite number of at least 0", 0 <= self.weight_decay < np.inf
        for name in PROBABILITIES:
            yield name, "a probability in [0, 1]", 0 <= getattr(self, name) <= 1
        yield "min_object_fraction", "at least 0 and below 1", 0 <= self.min_object_fraction < 1
        yield "mask_attention", "above 0 and below 1", self.mask_attention is None or 0 < self.mask_attention < 1
        yield "max_scale", "a finite number above 0", 0 < self.max_scale < np.inf
        yield "min_scale", f"above 0 and at most max_scale, {self.max_scale}", 0 < self.min_scale <= self.max_scale
        is_pasted = self.n_max > 1 or self.copy_paste_bbox == "inclusive"
        yield "copy_paste_bbox", "inclusive where n_max is 1 and nothing is pasted", is_pasted

    @property
    def has_experts(self) -> bool:
        """Whether experts clean the masks first."""
        return self.experts and not self.only

    @functools.cached_property
    def known(self) -> classes.Classes:
        """The categories of the archive, in the order of their labels."""
        return classes.read(self.classes)

    @property
    def all_names(self) -> tuple[str, ...]:
        """What they are called."""
        return self.known.names

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The categories of each expert, by the label of the first of them."""
        names = self.all_names
        order = {classes.normalised(name): place for place, name in enumerate(names)}
        shared = [sorted(order[classes.normalised(name)] for name in each.split(",")) for each in self.expert_groups]
        alone = [[place] for place in set(range(len(names))).difference(*shared)]
        return [tuple(names[place] for place in group) for group in sorted(shared + alone)]

    @property
    def labels(self) -> dict[str, int]:
        """The label of each category that is trained on, by its name as names are compared; 0 is the background."""
        wanted = {classes.normalised(name) for name in self.only}
        every = {classes.normalised(name): label for label, name in enumerate(self.all_names, 1)}
        return {name: 1 for name in every if name in wanted} if wanted else every

    @property
    def names(self) -> tuple[str, ...]:
        """What the network calls its labels, the background aside."""
        return (" or ".join(self.only),) if self.only else self.all_names

    def rows(self, manifest: pa.Table | None) -> pa.Table:
        """The images of the archive that have a mask, once for each category. Also sees whether the network fits."""
        from raypipe.training.namedmask import pool

        if manifest is not None:
            raise ValueError(f"{self.name}: --input has no effect: the archive says where its images are")
        with contextlib.suppress(FileNotFoundError):  # here; workers elsewhere may have it
            self.student("cpu")
        return pool.read(self)

    def prepare(self, row: dict, image: np.ndarray) -> Sample:
        """The image as it is, its mask as bits, row by row, and its label."""
        from raypipe.training.namedmask import pool

        mask = pool.mask_of(row, image.shape[:2])
        if self.mask_attention is not None and not self.has_experts:  # theirs have been through it
            mask = self._attended(mask, row, image)
        return {"image": image, "mask": np.packbits(mask), "label": np.int16(row["label"])}

    def _attended(self, mask: np.ndarray, row: dict, image: np.ndarray) -> np.ndarray:
        """A mask as CLIP sees its category."""
        from raypipe.training.namedmask import attention

        method = attention.reader(self.clip, self.dtype)
        query = self.known.queries[self.known.numbers[classes.normalised(row["category"])] - 1]
        return attention.attend(mask, image, method, method.vectors([query])[0], self.mask_attention)

    def draw(self, random: np.random.Generator, sample: Sample) -> Draw:
        """How one image becomes a square, in a fixed order, so that no option changes what others get."""
        from raypipe.training.namedmask import views

        return views.draw(random, self, sample["image"].shape[:2])

    def choose(
        self, random: np.random.Generator, samples: Sequence[Sample], number: int
    ) -> tuple[list[Square], Placing]:
        """The squares of a sample, the canvas first, and where the object of each of the others is pasted."""
        from raypipe.training.namedmask import views

        count = int(random.integers(1, self.n_max + 1))
        chosen = [samples[int(index)] for index in random.integers(len(samples), size=count)]
        drawn = [self.draw(random, sample) for sample in chosen]
        seed = int(random.integers(2**62))
        squares = [views.square(sample, each, self.crop) for sample, each in zip(chosen, drawn, strict=True)]
        return squares, views.Placing(views.places(random, squares[1:], self.copy_paste_bbox), seed)

    def precede(self, rows: pa.Table, job: Train, folder: Folder) -> pa.Table:
        """The images with the masks that experts have cleaned, once these are trained."""
        if not self.has_experts:
            return rows
        from raypipe.training.namedmask import experts

        return experts.refined(self, rows, job, folder)

    def student(self, device: str) -> NamedMaskStudent:
        """The network. Raises ValueError for a backbone that is none."""
        from raypipe.training.namedmask.student import NamedMaskStudent

        return NamedMaskStudent(self, device)

    def rate(self, step: int, steps: int) -> float:
        """(1 - t / T)^0.9, all steps long."""
        return (1 - step / steps) ** POWER


RECIPE = NamedMask
