"""How ReCo's bank is made of an archive, without any training (Shin, Xie, Albanie, NeurIPS 2022).

Of each category the retrieved images are co-segmented: what they have in common is its reference vector. First come
those of common backgrounds, the contexts, which the others leave out. Here is the recipe; `plan` says which images
serve what, `student` makes the vectors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from raypipe import classes, networks, storage
from raypipe.features.clip import settle_templates
from raypipe.segmenters.reco import BACKBONE, CLIP
from raypipe.segmenters.reco.cosegment import SLICES, TEXT_TEMPERATURE
from raypipe.storage import Location
from raypipe.training.recipe import Recipe, Sample

if TYPE_CHECKING:
    import pyarrow as pa

    from raypipe.training.reco.plan import Plan
    from raypipe.training.reco.student import ReCoMaker

SIDE = 224  # px a side of what the networks see of an image (paper)
CONTEXTS = ("tree", "sky", "building", "road", "person")  # the order matters (paper)


@dataclass(kw_only=True)
class ReCo(Recipe):
    """Makes the bank that `label reco` needs: one reference vector per category of an archive.

    The defaults are the paper's, but for the networks: its encoder is a DeiT-S/16 of Stylized ImageNet, a file that
    --backbone takes, and its CLIP a RN50x16, which --clip takes as a folder of open_clip.
    """

    archive: str  # what `raypipe archive` left, or a JSON file {category: [paths]} as the authors publish them
    context_archive: str | None = None  # an archive of the contexts; those that it lacks are looked for in the first
    image_root: str | None = None  # where the paths of JSON files start; None = beside them
    # which of the archive's categories, and in which order: a data set's list, a file, or names; None = all, in its
    # own order
    classes: str | None = None
    k: int = 50  # images per category at most, the best ones; sweep 5..50
    backbone: str = BACKBONE  # frozen: the id, address, folder or file of a DeiT, DINO, iBOT or DINOv2
    clip: str = CLIP  # frozen: the id or folder of a CLIP
    templates: str = "default"  # in what words CLIP is asked: default, none, or a file with a line each, with {}
    text_attention: bool = True  # places that fit the category's name count more
    text_temperature: float = TEXT_TEMPERATURE  # of the cosine with a text; sweep 1..100
    context_elimination: bool = True  # places that look like a context count less
    contexts: tuple[str, ...] = CONTEXTS  # each leaves out those before it; a category of the same name is that context
    slices: Literal["corrected", "released"] = "corrected"  # released: by a slip images j to 2j stand for image j
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the networks; auto is bfloat16 on a GPU

    seed: ClassVar[int] = 0  # nothing here is left to chance
    has_steps = False
    networks = ("backbone", "clip")
    model_types = {"clip": "clip"}

    def __post_init__(self):
        self.archive = Location(storage.absolute(self.archive))
        if self.context_archive is not None:
            self.context_archive = Location(storage.absolute(self.context_archive))
        if self.image_root is not None:
            self.image_root = Location(storage.absolute(self.image_root))
        if self.classes is not None:
            self.classes = classes.settle(self.classes)
        self.contexts = tuple(self.contexts)
        self._check_effects()
        self.templates = settle_templates(self.templates)
        networks.settle_options(self)
        self.refuse_unknown({"slices": SLICES}, self._ranges())

    def _check_effects(self) -> None:
        """Raise ValueError for options without effect."""
        defaults = {each.name: each.default for each in fields(self)}
        if not self.context_elimination:
            for name in ("contexts", "context_archive"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"{self.name}: {name} has no effect without context_elimination")

    def _ranges(self) -> Iterator[tuple[str, str, bool]]:
        """Options with a range: name, what it must be, whether it is."""
        yield "k", "at least 1", self.k >= 1
        yield "text_temperature", "a finite number above 0", 0 < self.text_temperature < np.inf
        known = [classes.normalised(name) for name in self.contexts]
        is_right = bool(known) and all(known) and len({*known}) == len(known)
        yield "contexts", "names, each once; without any, pass --no-context-elimination", is_right

    def rows(self, manifest: pa.Table | None) -> pa.Table:
        """The images of all categories and contexts, each once, with what they serve. Sees whether the networks fit."""
        if manifest is not None:
            raise ValueError(f"{self.name}: --input has no effect: the images are those of --archive")
        rows = self._plan().rows()
        with contextlib.suppress(FileNotFoundError):  # here; workers elsewhere may have the networks
            self.student("cpu")
        return rows

    def _plan(self) -> Plan:
        from raypipe.training.reco.plan import plan

        return plan(self)

    def prepare(self, row: dict, image: np.ndarray) -> Sample:
        """The middle square of the image, and what it serves: (category, rank) each, int32 (m, 2)."""
        from raypipe.training.crops import middle, shortened

        serves = [(each["number"], each["rank"]) for each in row["serves"]]
        return {"image": middle(shortened(image, SIDE), SIDE), "serves": np.array(serves, np.int32)}

    def student(self, device: str) -> ReCoMaker:
        """What makes the bank. Raises ValueError where an archive lacks something, and for networks of another kind."""
        from raypipe.training.reco.student import ReCoMaker

        return ReCoMaker(self, self._plan(), device)


RECIPE = ReCo
