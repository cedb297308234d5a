"""Validation of a network under training, on labelled photographs and by the published protocol (`crops`)."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import images, storage
from raypipe.evaluation import datasets
from raypipe.evaluation.datasets import DataSet
from raypipe.evaluation.evaluate import Comparison, Tally, recorded
from raypipe.evaluation.labels import empty, match, nothing, place_of
from raypipe.evaluation.summary import published
from raypipe.evaluation.task import KNOWN, STATUS
from raypipe.evaluation.tasks.saliency import scaled
from raypipe.inputs import folders
from raypipe.inputs.manifest import fetch, list_inputs
from raypipe.inputs.maskkinds import HALF, chosen
from raypipe.networks import IMAGENET_MEAN, IMAGENET_STD
from raypipe.storage import Folder, Location, map_ahead, open_table
from raypipe.training.crops import FILTERS, POLARITIES, STATISTICS, Cropped, filtered, middle, oriented, shortened
from raypipe.training.recipe import Recipe
from raypipe.types import BadImage

if TYPE_CHECKING:
    import torch

BATCH = 8  # images that share batch statistics and polarity (Two Tricks, published code)
WIDER = 15  # px that shorter sides have beyond a square's: 335 for 320 (published code), however a training resizes
APART = 0.003  # IoU by which running and batch statistics may differ (methods/sempart, section 7)
MASKS = [name for name, each in datasets.LAYOUTS.items() if each.holds == "masks"]
MOST_BYTES = 1 << 26  # of a list of images
MOST_KEPT = 320  # batches in memory, 1 GB; what comes after them is read again
EPOCHS = (  # of metrics/epochs.parquet; then come the values, such as iou
    ("epoch", pa.int32()),  # the first one is 1
    ("variant", pa.string()),
    ("filter", pa.string()),
    ("statistics", pa.string()),
    ("reference", pa.string()),  # where the labels are
    ("images", pa.int64()),  # that were measured
    ("selected_iou", pa.float64()),  # mean over the images of --select; null without
)
ROWS = pa.schema(  # of `measure`
    [
        *KNOWN,
        *Cropped.COLUMNS,
        STATUS,
        ("is_empty", pa.bool_()),  # no pixel of the label is set
        ("variant", pa.string()),
        ("is_inverted", pa.bool_()),  # with polarity global each square has two rows, of which one counts
        ("mean", pa.float64()),  # of the mask as the network gave it; NaN where it is not finite, null without one
    ]
)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Options of a training: on what its network is measured, how and when."""

    # duts-tr, duts-te, dut-omron or ecssd with --root, or photographs of one's own, as for --input, with --labels
    validate: str | None = None
    root: str | None = None  # folder in which data sets lie, as their authors pack them; a path or a URI
    labels: str | None = None  # folder of the photographs' masks, matched by relative path or by a name that is unique
    label_kind: Literal["light", "ink", "alpha", "nonzero"] | None = None  # what is set in --labels; None finds it
    label_value: int | str | None = None  # 1 or 1,2: the values, as stored, that are set in --labels of classes
    validate_every: int = 0  # epochs between validations; 0 = only after the last one
    # file with names of images to validate on, one per line: the epoch with the best IoU on these is exported, by the
    # first of --filters and --statistics. None = the last one, for choosing by the images one reports is cheating
    select: str | None = None
    filters: tuple[Literal["none", "guided", "bilateral"], ...] = ("none", "guided")  # each is a row of the table
    # batch: those of the eight images at hand, as the published evaluation has them; each is a row of the table
    statistics: tuple[Literal["running", "batch"], ...] = ("running",)
    # masks with a mean above 0.5 are inverted: of a batch together (published), each image by itself, all images at
    # once, or none
    polarity: Literal["batch", "image", "global", "none"] = "batch"

    def __post_init__(self):
        """Raise ValueError for options that make no sense, or have no effect."""
        if self.validate is None:
            self._refuse(*(each.name for each in fields(Validation)), without="--validate")
            return
        if self.labels is None:
            self._refuse("label_kind", "label_value", without="--labels")
            if self.root is None:
                text = "add --root, the folder in which data sets lie, or --labels, a folder of masks of photographs"
                raise ValueError(f"--validate {self.validate}: {text}")
        elif self.root is not None:
            raise ValueError("--root has no effect with --labels: --validate names the photographs themselves")
        for name, known in (("filters", FILTERS), ("statistics", STATISTICS)):
            for i, each in enumerate(found := getattr(self, name)):
                if each not in known:
                    raise ValueError(f"--{name} {each!r}: expected some of {', '.join(known)}")
                if each in found[:i]:
                    raise ValueError(f"--{name} names {each!r} twice")
            if not found:
                raise ValueError(f"--{name} is empty: expected some of {', '.join(known)}")
        if self.polarity not in POLARITIES:
            raise ValueError(f"--polarity {self.polarity!r}: expected one of {', '.join(POLARITIES)}")
        if self.validate_every < 0:
            raise ValueError(f"--validate-every must be at least 0, got {self.validate_every}")
        if not self.validate_every:
            self._refuse("select", without="--validate-every: of one epoch none is the best")

    def _refuse(self, *names: str, without: str) -> None:
        for each in fields(Validation):
            if each.name in names and getattr(self, each.name) != each.default:
                raise ValueError(f"--{each.name.replace('_', '-')} has no effect without {without}")


@dataclass(frozen=True)
class Validated(Comparison):
    """The variants side by side, by their names."""

    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """As of several runs, and what to do about it."""
        return "\n".join([super().text(), *self.notes])


class Square(NamedTuple):
    """The middle of one photograph."""

    facts: dict  # columns of its row that are the same in all variants
    image: np.ndarray | None  # RGB uint8 (S, S, 3); None where the photograph or its label cannot be used
    target: np.ndarray | None  # bool (S, S)


class Validator:
    """What a network is validated on. Made on the driver, where what is missing is an error; cheap to pickle.

    The batches are shared out over the workers, batch i to worker i mod their number, so that no value depends on it.
    """

    def __init__(self, options: Validation, recipe: Recipe, *, max_bytes: int, max_pixels: int):
        """options: with `validate`. recipe: of the network; its `image_size` is that of the squares.

        Raises ValueError or FileNotFoundError for photographs, labels or a list that are not there or do not fit, and
        when none of the labelled photographs can be read.
        """
        if not recipe.has_crops:
            text = f"{recipe.name} is not given crops of photographs; label with it, then `raypipe evaluate`"
            raise ValueError(f"--validate has no effect: {text}")
        self._options, self._method = options, recipe.name
        self._size, self._resize = recipe.image_size, recipe.image_size + WIDER
        self._limits = {"max_bytes": max_bytes, "max_pixels": max_pixels}
        pairs = ((each, which) for which in options.statistics for each in options.filters)
        self.variants = {  # by name, the first one first
            _variant(each, which): Cropped(filter=each, statistics=which, polarity=options.polarity)
            for each, which in pairs
        }
        self._source = _source(options)
        photos = list_inputs(options.validate if options.labels else self._source.images).sort_by("key").to_pylist()
        kind = chosen(options.label_kind, options.label_value)
        keys, of = [row["key"] for row in photos], f"an image of {Location(options.validate)}"
        self._labels = match(next(iter(self.variants.values())), self._source, keys, of=of, kind=kind, **self._limits)
        photos = [row for row in photos if row["key"] not in self._labels.outside]
        self._rows = [row for row in photos if row["key"] in self._labels.location]  # in the order of their names
        self._others = [row for row in photos if row["key"] not in self._labels.location]
        self._selected = _selected(options.select, [row["key"] for row in self._rows])
        self._kept: dict[int, list[Square]] = {}  # batches of this worker by number, where they are wanted again
        self._check()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": {}}

    def measure(
        self,
        probabilities: Callable[..., torch.Tensor],
        *,
        device: str | torch.device = "cpu",
        rank: int = 0,
        workers: int = 1,
    ) -> pa.Table:
        """The measures of this worker's squares in all variants: rows for `write` and `keep`, of all workers together.

        probabilities: of the student, `(pixels, *, batch_statistics: bool)`; pixels: normalised float32 (B, 3, S, S)
        on the device; to float (B, S, S) in [0, 1]. Photographs are read, and masks measured, in threads beside it.
        """
        batches = map_ahead(self._batch, range(rank, -(-len(self._rows) // BATCH), workers))
        measured = map_ahead(self._measured, self._predicted(batches, probabilities, device))
        return pa.Table.from_batches([pa.RecordBatch.from_pylist(rows, ROWS) for rows in measured], ROWS)

    def write(self, folder: Folder, rows: pa.Table) -> Validated:
        """Write the tables that `evaluate` writes, one of each per variant, and say what they come to.

        rows: of `measure` of all workers, in any order. Raises ValueError when nothing could be measured.
        """
        found, notes = {}, []
        if strange := set(rows.filter(pc.is_nan(pc.field("mean")))["key"].to_pylist()):
            text = f"the network gives values that are no finite numbers for {len(strange):,} images, such as"
            notes.append(f"{text} {min(strange)!r}; try --dtype float32, or other weights")
            if "ok" not in rows["status"].to_pylist():
                raise ValueError(f"{self._method}: {notes[0]}")
        for name, task in self.variants.items():
            printed = published(self._labels.dataset, task.SHOWN, method=self._method)
            its = self._of_variant(rows, name)
            labels = replace(self._labels, task=task)
            found[name] = recorded(folder, its, labels, self._source, method=self._method, printed=printed)
        notes += self._apart({name: each.means["iou"] for name, each in found.items()})
        return Validated(found, notes=tuple(notes))

    def keep(self, folder: Folder, rows: pa.Table, *, epoch: int) -> float | None:
        """Add an epoch to `metrics/epochs.parquet`, a row per variant, and return by what the best one is chosen.

        rows: as of `write`. epoch: the first one is 1; what the table has of it and later ones is replaced. The choice
        is by the mean IoU of the images that were selected, in the first variant; None without any.
        """
        stored, new, score = folder.read("metrics", "epochs.parquet"), [], None
        for name, task in self.variants.items():
            its = [row for row in self._of_variant(rows, name) if row["status"] == "ok"]
            ious = [row["iou"] for row in its if row["key"] in self._selected and row["iou"] is not None]
            selected = math.fsum(ious) / len(ious) if ious else None
            score = selected if not new else score
            known = {"epoch": epoch, "variant": name, "filter": task.filter, "statistics": task.statistics}
            known |= {"reference": str(place_of(self._source)), "images": len(its), "selected_iou": selected}
            new.append(known | task.values(task.sums(its)))
        schema = pa.schema([*EPOCHS, *((name, pa.float64()) for name in Cropped.SHOWN)])
        table = pa.Table.from_pylist(new, schema)
        if stored:
            is_earlier = (pc.field("epoch") < epoch) & (pc.field("reference") == str(place_of(self._source)))
            table = pa.concat_tables([open_table(stored).read().filter(is_earlier), table])
        folder.write_table(table, "metrics", "epochs.parquet")
        return score

    def _check(self) -> None:
        """Raise ValueError unless some photograph can be measured: who trains for a day is told before."""
        tally = Tally(self._labels.task)
        for square in map_ahead(self._square, self._rows):
            if square.image is not None and not (self._labels.dataset and square.facts["is_empty"]):
                return
            tally.counted(dict(square.facts))
        found = tally.summary(self._labels, [])
        if found["counts"]["ok"]:
            raise empty(self._source)
        raise nothing(f"--validate {self._options.validate}", self._source, found["counts"], found["examples"])

    def _batch(self, number: int) -> list[Square]:
        if number in self._kept:
            return self._kept[number]
        squares = [self._square(row) for row in self._rows[number * BATCH : (number + 1) * BATCH]]
        if self._options.validate_every and len(self._kept) < MOST_KEPT:
            self._kept[number] = squares
        return squares

    def _square(self, row: dict) -> Square:
        facts = self._facts(row)
        image, error = self._image(row)
        if image is not None:
            facts["height"], facts["width"] = image.shape[:2]
        label, status = self._labels.read(facts | {"error": error})
        if status != "ok":
            return Square(facts | {"status": status}, None, None)
        is_scaled, label = label.shape != image.shape[:2], scaled(label, image.shape[:2])
        image, label = (middle(shortened(each, self._resize), self._size) for each in (image, label))
        target = label >= HALF
        return Square(facts | {"status": "ok", "is_scaled": is_scaled, "is_empty": not target.any()}, image, target)

    def _facts(self, row: dict) -> dict:
        known = {"image_id": row["image_id"], "key": row["key"], "group": "all", "method": self._method}
        return known | {"reference": str(place_of(self._source)), "height": None, "width": None}

    def _image(self, row: dict) -> tuple[np.ndarray | None, str]:
        """An upright photograph and "", or None and what is wrong with it."""
        (content,) = fetch([row], max_bytes=self._limits["max_bytes"])
        try:
            if isinstance(content, BadImage):
                raise content
            return images.decode(content, max_pixels=self._limits["max_pixels"]), ""
        except BadImage as bad:
            return None, str(bad)
        except MemoryError:
            return None, str(BadImage("decode", "memory", "not enough memory to decode it"))

    def _predicted(
        self, batches: Iterable[list[Square]], probabilities: Callable[..., torch.Tensor], device
    ) -> Iterator[tuple[list[Square], dict[str, np.ndarray]]]:
        """Each batch with the masks of its good squares, float32 (B, S, S), by statistics."""
        import torch

        mean, std = (torch.tensor(each, device=device).reshape(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
        for squares in batches:
            good, masks = [square.image for square in squares if square.image is not None], {}
            if good:
                pixels = torch.from_numpy(np.stack(good)).to(device).permute(0, 3, 1, 2).float() / 255
                pixels = ((pixels - mean) / std).contiguous()
                for each in self._options.statistics:
                    with torch.no_grad():
                        found = probabilities(pixels, batch_statistics=each == "batch")
                    masks[each] = found.float().cpu().numpy()
            yield squares, masks

    def _measured(self, batch: tuple[list[Square], dict[str, np.ndarray]]) -> list[dict]:
        """The rows of a batch: of each square one per variant, and where all images decide on polarity one for each."""
        squares, masks = batch
        rows, good = [], [square for square in squares if square.image is not None]
        for name, task in self.variants.items():
            for is_inverted in (False, True) if task.polarity == "global" else (False,):
                of_variant = {"variant": name, "is_inverted": is_inverted}
                rows += [of_variant | square.facts for square in squares if square.image is None]
                if not good:
                    continue
                found = masks[task.statistics]
                upright = 1 - found if is_inverted else oriented(found, task.polarity)
                for square, mask, raw in zip(good, upright, found, strict=True):
                    rows.append(
                        of_variant
                        | {"mean": raw.mean(dtype=float) if np.isfinite(raw).all() else math.nan}
                        | _cells(square, mask, task)
                    )
        return rows

    def _of_variant(self, rows: pa.Table, name: str) -> Iterator[dict]:
        """The rows of a variant as `evaluate` has them, in the order of the images' names."""
        its = rows.filter(pc.field("variant") == name)
        if self.variants[name].polarity == "global":
            means = its.filter((pc.field("status") == "ok") & ~pc.field("is_inverted"))["mean"].to_pylist()
            is_inverted = bool(means) and math.fsum(means) / len(means) > 0.5
            its = its.filter(pc.field("is_inverted") == is_inverted)
        others = [self._facts(row) | {"status": "no_label"} for row in self._others]
        its = pa.concat_tables([its, pa.Table.from_pylist(others, its.schema)]).sort_by("key")
        its = its.select([*(column for column, _ in (*KNOWN, *Cropped.COLUMNS, STATUS)), "is_empty"])
        for batch in its.to_batches(max_chunksize=BATCH):
            for row in batch.to_pylist():
                yield row | {"is_empty": bool(row["is_empty"])}

    def _apart(self, ious: dict[str, float | None]) -> Iterator[str]:
        """What to do where running and batch statistics differ. ious: by variant."""
        pairs = [[ious.get(_variant(each, which)) for which in STATISTICS] for each in self._options.filters]
        apart = max((abs(one - other) for one, other in pairs if None not in (one, other)), default=0.0)
        if apart > APART:
            text = "`label` has the running ones, which --epochs 0 --start-from HEAD --precise-bn --input IMAGES, into"
            text += " another --output, takes anew from training crops"
            yield f"running statistics and those of batches differ by {apart:.3f} of IoU: {text}"


def exported_epoch(rows: Sequence[dict]) -> int:
    """The epoch whose network a finished training has exported: the best by `selected_iou`, else the last one.

    rows: of metrics/epochs.parquet.
    """
    selected = [row for row in rows if row["variant"] == rows[0]["variant"] and row["selected_iou"] is not None]
    return max(selected, key=lambda row: row["selected_iou"], default=rows[-1])["epoch"]


def _variant(filter: str, statistics: str) -> str:
    return f"{filter}, {statistics} statistics"


def _source(options: Validation) -> str | DataSet:
    """Where the labels are. Raises ValueError or FileNotFoundError when that holds no masks, or does not exist."""
    if options.labels is not None:
        return options.labels
    found = datasets.find(options.validate, options.root)
    if found.holds != "masks":
        text = f"{found.name} has boxes, which are measured on a labelled run (label, then evaluate)"
        raise ValueError(f"--validate {text}; here are {', '.join(MASKS)}")
    return found


def _selected(file: str | None, keys: Sequence[str]) -> frozenset[str]:
    """The images that a file names, one per line, as the data set does: with folders, without, or by the stem alone.

    keys: of the images that can be validated on. Raises ValueError for a name that is none's or several images', and a
    file without any, FileNotFoundError when there is none.
    """
    if file is None:
        return frozenset()
    if folders.kind(file) != "file":
        raise FileNotFoundError(storage.missing(Location(file)))
    lines = storage.read_bytes(Location(file), max_bytes=MOST_BYTES).decode("utf-8-sig", "replace").splitlines()
    by_name: dict[str, set[str]] = {}
    for key in keys:
        for name in (key, posixpath.basename(key), datasets.stem_of(key)):
            by_name.setdefault(name, set()).add(key)
    names = [line.strip() for line in lines if line.strip()]
    unknown = [name for name in names if len(by_name.get(name, ())) != 1]
    if unknown or not names:
        text = f"{len(unknown):,} of {len(names):,} lines, such as {unknown[0]!r}," if unknown else "it is empty, and"
        advice = f"a line is a name such as {keys[0]!r}, of one image that has a label"
        raise ValueError(f"--select {file}: {text} name no image to validate on; {advice}")
    return frozenset(key for name in names for key in by_name[name])


def _cells(square: Square, mask: np.ndarray, task: Cropped) -> dict:
    """The columns of a square for its mask, float32 (S, S), as it is before the filter."""
    if not np.isfinite(mask).all():
        return square.facts | {"status": "failed"}
    soft = filtered(mask, square.image, task.filter)
    return square.facts | task.cells({"soft": soft}, square.target) | {"is_scaled": square.facts["is_scaled"]}
