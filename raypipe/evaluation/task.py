"""What a task of `evaluate` is: how it reads labels, what it measures in an image, what that comes to over images."""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import images, masks, storage
from raypipe.evaluation.sums import Sums, is_measure
from raypipe.inputs import corrections, maskfiles
from raypipe.inputs.maskkinds import LIGHT, Kind
from raypipe.schema import VERSION
from raypipe.types import BadImage, LabelMap

# The table per image has these columns, then the task's own, which are null unless the status is "ok", then the status.
KNOWN = (
    ("image_id", pa.string()),
    ("key", pa.string()),
    ("group", pa.string()),
    ("method", pa.string()),
    ("reference", pa.string()),  # the folder of labels
    ("height", pa.int32()),
    ("width", pa.int32()),
)
WRITTEN_ROWS = 1000  # images of a table written at once
STATUS = ("status", pa.string())  # ok, failed (an error row), no_label, other_size, or bad_label


class Value(NamedTuple):
    """One value of a task's summary, for people and for whoever ranks by it."""

    title: str
    unit: str = ""
    better: Literal["high", "low"] = "high"
    tie: str | None = None  # the value that tells apart what is equal in this one
    peeks: bool = False  # takes what meets an image's label best, which nobody can do for an image without one


class Chart(NamedTuple):
    """What a page draws of a task's details: lines over places, or bars between them."""

    title: str
    remark: str
    places: list[float]  # ascending; of bars their edges
    lines: dict[str, list[float | None]]  # by name; of bars one, shorter by one than places
    marked: float | None = None  # the place of the values in the summary
    are_bars: bool = False


@dataclass(frozen=True)
class Task(ABC):
    """One task. The fields are its options: flags behind `--task NAME`, recorded with what it measured.

    Measures are numbers, lists of one length or counts by place (a map of whole numbers), which are summed over images;
    what has no sense as a sum, as an index, may stand beside them.
    """

    COLUMNS: ClassVar[tuple[tuple[str, pa.DataType], ...]]  # of the table per image, its own ones only
    LEAVES: ClassVar[tuple[str, ...]] = ("size", "counts")  # fields of a segment that `measure` reads
    SHOWN: ClassVar[Mapping[str, Value]]  # the values of `summary`, in the order in which they are shown
    DETAILS: ClassVar[
        tuple[tuple[str, pa.DataType], ...]
    ] = ()  # what the summary's table holds besides, such as curves
    METRIC: ClassVar[str]  # the one of them that ranks the settings of a sweep, unless told otherwise
    HOLDS: ClassVar[str] = "masks"  # what labels it reads: of a data set masks, boxes or classes; people's answers
    MATCHED_BY: ClassVar[str] = "key"  # the column of rows that `match` gets: key or image_id
    QUIET: ClassVar[tuple[str, ...]] = ()  # columns of which nobody is told how many images lack them
    PER_IMAGE: ClassVar[tuple[str, ...]] = ()  # those which are columns too and which a report shows image by image

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        ties = {value.tie for value in cls.SHOWN.values() if value.tie}
        if unknown := {cls.METRIC, *cls.PER_IMAGE, *ties} - cls.SHOWN.keys():
            raise TypeError(f"{cls.__name__}: {', '.join(sorted(unknown))} must be among the values of SHOWN")

    @property
    def name(self) -> str:
        """The task's name: that of the file it lives in."""
        return type(self).__module__.rpartition(".")[2]

    def options(self) -> dict:
        """What it measures by, as it is recorded with what it measured."""
        return asdict(self)

    def of_classes(self, text: str | None, dataset: str = "") -> Task:
        """The task for labels of these classes. text: as `classes.read` takes it; None = it is not said.

        dataset: whose labels they are, "" for those of one's own. Raises ValueError where classes have no effect or are
        needed.
        """
        if text is not None:
            raise ValueError(f"--classes has no effect: task {self.name} knows no classes; add --task semantic")
        return self

    def load(self) -> None:  # noqa: B027 - only a task with networks has something to do
        """Have what measuring needs, before it begins. Raises ValueError or FileNotFoundError with the way out."""

    def ahead(self, rows: list[dict]) -> list[dict]:
        """Rows of which each is measured next. For a task that asks a network about many at once; here as they are."""
        return rows

    @abstractmethod
    def measure(self, row: dict, label: Any) -> dict:
        """The task's columns for one image; null, NaN or an absent one is no measure.

        row: of the masks table, of its segments LEAVES only; `is_hard` is true where masks never were probabilities.
        label: as `read` gives it, of a row that it fits.
        """

    def measure_above(
        self, row: dict, found: LabelMap, label: Any, thresholds: Sequence[float]
    ) -> Iterable[dict] | None:
        """What `measure` gives of the masks above each of several thresholds, in one pass; here None: it cannot.

        row: of the masks table, whose segments are those of `found` at another threshold. found: of an exclusive
        method; a pixel is of its segment where its value is above the threshold.
        """
        return None

    @abstractmethod
    def summary(self, sums: Sums) -> dict[str, float | None]:
        """The values of SHOWN from the sums over some images, which may be none; None where nothing was measured."""

    def match(self, folder: str, keys: Iterable[str]) -> maskfiles.Matches:
        """Which label belongs to which image. folder: where the labels are. keys: MATCHED_BY of all images.

        A key may stand twice. Here a folder of mask files, matched by their names, or what people drew in a tool
        (`corrections`). Raises ValueError or FileNotFoundError for a folder that holds no labels.
        """
        return (corrections if corrections.are_at(folder) else maskfiles).match(folder, keys)

    def read(self, location: str, *, max_bytes: int, max_pixels: int, kind: Kind = LIGHT) -> Any:
        """The label at a location of `match`; here bool (H, W). Raises BadImage when it cannot be read.

        kind: how mask files are read; given where `match` gave the `files` of a folder.
        """
        if corrections.MARK in location:
            return corrections.mask(location, max_pixels=max_pixels)
        return maskfiles.read(location, kind, max_bytes=max_bytes, max_pixels=max_pixels)

    def checksum(self, location: str, *, max_bytes: int) -> str:
        """What changes when the label at a location does; "" for one that cannot be read."""
        if corrections.MARK in location:
            return hashlib.sha256(location.encode()).hexdigest()
        try:
            return hashlib.sha256(storage.read_bytes(location, max_bytes=max_bytes)).hexdigest()
        except BadImage:
            return ""

    def fits(self, row: dict, label: Any) -> bool:
        """Whether a label can be that of a row's image; here one of the image's size."""
        return label.shape[:2] == (row["height"], row["width"])

    def turned(self, label: Any, orientation: int) -> Any:
        """The label of a photograph as it is stored, turned as its EXIF says; here an array (H, W).

        orientation: a key of `images.UPRIGHT`.
        """
        return images.UPRIGHT[orientation](label)

    def details(self, sums: Sums) -> dict:
        """What DETAILS names, from the sums over all images."""
        return {}

    def lines(self, details: Mapping, printed: Sequence[Mapping] = ()) -> tuple[list[str], list[tuple[str, list]]]:
        """What a terminal shows of the details: the heads of a table's columns, and its lines by their names.

        The first column is what runs are compared by; a line without it is left out. printed: what papers print for the
        data set (`summary.PUBLISHED`), each with the options that it is `at`.
        """
        return [], []

    def remarks(self, details: Mapping, printed: Sequence[Mapping] = ()) -> list[str]:
        """What to know of the values, a line each."""
        return []

    def charts(self, details: Mapping, printed: Sequence[Mapping] = ()) -> list[Chart]:
        """What a page beside the tables draws; [] = there is no such page."""
        return []

    def tables(self, images: pa.Table, details: Mapping, printed: Sequence[Mapping] = ()) -> dict[str, pa.Table]:
        """Further tables about a run by their names, such as size_bins. images: the table per image, without lists."""
        return {}

    def counted(self, row: dict, measured: dict, value: str) -> np.ndarray:
        """The masks that a value of an image speaks of, for a picture; here all. Returns bool (N, H, W).

        measured: the image's columns; {} where it was not measured.
        """
        return masks.decode_segments(row["segments"], (row["height"], row["width"]))

    def outline(self, row: dict, label: Any) -> np.ndarray:
        """What of a label is outlined in a picture; here the label itself. Returns bool (H, W)."""
        return label

    def cells(self, row: dict, label: Any) -> dict:
        """What `measure` gives, as the table holds it: plain numbers and lists, None where there is no measure."""
        return self._cells(self.measure(row, label))

    def cells_above(self, row: dict, found: LabelMap, label: Any, thresholds: Sequence[float]) -> list[dict] | None:
        """`cells` of a label map's masks above each threshold; None for a task that needs each threshold's masks."""
        measured = self.measure_above(row, found, label, thresholds)
        return None if measured is None else [self._cells(each) for each in measured]

    def _cells(self, found: dict) -> dict:
        known = dict(self.COLUMNS)
        if unknown := found.keys() - known.keys():
            raise ValueError(f"task {self.name}: {', '.join(sorted(unknown))} measured, which is none of its COLUMNS")
        return {name: _plain(value) for name, value in found.items()}

    def sums(self, rows: Iterable[dict] = ()) -> Sums:
        """The sums over some images. rows: of its table, those with the status "ok"."""
        places = [name for name, kind in self.COLUMNS if pa.types.is_map(kind)]
        return Sums((name for name, kind in self.COLUMNS if _is_summed(kind)), rows, places=places)

    def values(self, sums: Sums) -> dict[str, float | None]:
        """What `summary` gives, in the order of SHOWN; None for what is no number."""
        found = self.summary(sums)
        return {name: found[name] if is_measure(found[name]) else None for name in self.SHOWN}

    def schema(self) -> pa.Schema:
        """The columns of the table per image. Options of the task, where it has any, are in the metadata."""
        metadata, options = {"raypipe.schema": str(VERSION)}, self.options()
        if options:
            metadata["raypipe.options"] = json.dumps(options, sort_keys=True)
        return pa.schema([*KNOWN, *self.COLUMNS, STATUS], metadata=metadata)


def written(rows: Iterable[dict], schema: pa.Schema) -> bytes:
    """Rows as a Parquet file, of which only the compressed bytes and WRITTEN_ROWS rows are in memory at once."""
    rows, sink = iter(rows), pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        while batch := list(itertools.islice(rows, WRITTEN_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return sink.getvalue().to_pybytes()


def _is_summed(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) else kind
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _plain(value):
    if isinstance(value, dict):
        return [(int(place), int(count)) for place, count in value.items()]
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(element) for element in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not is_measure(value) else value
