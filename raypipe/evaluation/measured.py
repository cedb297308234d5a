"""The signals of all masks of some runs, image by image, on the disk; a sample of them to learn from."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import segmenters
from raypipe.evaluation import signals
from raypipe.evaluation.agree import by_key
from raypipe.evaluation.labels import Labels
from raypipe.evaluation.task import WRITTEN_ROWS
from raypipe.inputs.originals import Originals, decode
from raypipe.masks import decode_rle, decode_soft
from raypipe.run import Run
from raypipe.storage import map_ahead
from raypipe.types import BadImage

SAMPLE_MASKS = 50_000  # that ranks and weights are learned from; all of a smaller corpus
SIGNALS = {  # by column, what is said of it; the first one is what the others are held against
    "agreement": "Dice with the other runs' masks, by how far all agree with each on the image",
    "stability": "IoU with itself in other views of the image (label --jitter)",
    "edges": "how far edges of the image lie on the contour",
    "contrast": "share of the colours' variance between mask and rest",
    "threshold": "IoU of the masks at a threshold 0.1 higher and lower (label --keep-soft)",
    "score": "the method's own score, such as a spectral gap",
}
WITHIN_RUN = ("threshold", "score")  # whose numbers mean something else in each run
EVERY_MASK = pa.schema(  # one row per image and run
    [
        ("key", pa.string()),
        ("run", pa.int32()),  # index
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("sha256", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("foreground", pa.string()),  # counts of a COCO RLE of the image's size; null = the whole image
        ("failed", pa.bool_()),
        ("masks", pa.list_(pa.string())),  # the same of each segment
        ("stability", pa.list_(pa.float64())),
        ("threshold", pa.list_(pa.float64())),
        ("score", pa.list_(pa.float64())),
    ]
)
MEASURED = pa.schema(  # one row per image and run: values of each mask, NaN or null where not measured
    [
        ("run", pa.int32()),
        ("image_id", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("masks", pa.int32()),  # 0 when nothing was found, which is measured as one empty mask
        *((name, pa.list_(pa.float64())) for name in SIGNALS),
        ("dice", pa.list_(pa.float64())),  # with a label; null without one
    ]
)


class Sample:
    """Rows of MEASURED that stand for all: of the images whose keys' hashes are lowest, at most SAMPLE_MASKS masks."""

    def __init__(self):
        self._rows: list[tuple[int, dict]] = []
        self._bound, self._masks = 1 << 32, 0

    def add(self, row: dict) -> None:
        """Take a row, or leave it out."""
        value = zlib.crc32(row["key"].encode())
        if value < self._bound:
            self._rows.append((value, row))
            self._masks += len(row["agreement"])
        while self._masks > SAMPLE_MASKS and self._bound > 1:
            self._bound //= 2
            self._rows = [(value, row) for value, row in self._rows if value < self._bound]
            self._masks = sum(len(row["agreement"]) for _, row in self._rows)

    def rows(self) -> list[dict]:
        """In the order of keys and runs, whatever the order they came in."""
        return sorted((row for _, row in self._rows), key=lambda row: (row["key"], row["run"], row["image_id"]))


@dataclass
class Measured:
    """What was measured of some runs."""

    path: str  # an Arrow file of MEASURED
    sample: Sample
    labelled: Sample  # of the images with a label
    labels: Counter  # images by the status of their label; empty without labels
    examples: dict[str, list[str]]  # the key of one image of each
    statuses: Counter  # rows by their status
    without_original: int = 0  # images whose original could not be read, so that edges and contrast are null

    def batches(self, run: int) -> Iterator[list[dict]]:
        """The rows of a run, some at a time."""
        with pa.OSFile(self.path) as file, pa.ipc.open_file(file) as batches:
            for i in range(batches.num_record_batches):
                batch = batches.get_batch(i)
                yield batch.filter(pc.equal(batch["run"], run)).to_pylist()


def measure(
    runs: Sequence[Run], path: str, *, polarity: str, originals: Originals | None, labels: Labels | None
) -> Measured:
    """Measure all masks of some runs; see SIGNALS. path: of the file to write. labels: of some of the images."""
    found = Measured(path, Sample(), Sample(), Counter(), {}, Counter())
    thresholds = [_threshold(run) for run in runs]
    leaves = ("counts", "score", "stability", *["soft"] * any(each is not None for each in thresholds))
    every = by_key(runs, lambda table, run: every_mask(table, run, thresholds[run]), EVERY_MASK, leaves=leaves)
    image = Image([run.method for run in runs], polarity, labels)
    held = []
    with pa.ipc.new_file(path, MEASURED, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        for rows, status, lacks_original in map_ahead(
            lambda pair: image.measure(*pair), _fetched(every, originals), depth=min(16, 2 * (os.cpu_count() or 1))
        ):
            if status:
                found.labels[status] += 1
                found.examples.setdefault(status, [rows[0]["key"]])
            found.without_original += lacks_original
            for row in rows:
                found.statuses[row["status"]] += 1
                if row["status"] != "failed":
                    found.sample.add(row)
                    if row["dice"]:
                        found.labelled.add(row)
            held += rows
            if len(held) >= WRITTEN_ROWS:
                file.write_batch(pa.RecordBatch.from_pylist(held, schema=MEASURED))
                held = []
        file.write_batch(pa.RecordBatch.from_pylist(held, schema=MEASURED))
    return found


def every_mask(table: pa.Table, run: int, threshold: float | None = None) -> pa.Table:
    """Rows of EVERY_MASK for rows of the masks table. run: the index to write. threshold: of its soft masks, if any."""
    segments = pc.fill_null(table["segments"].combine_chunks(), [])
    values = segments.flatten()
    ends = np.cumsum(pc.list_value_length(segments).to_numpy(zero_copy_only=False))
    of_masks = {name: pc.struct_field(values, leaf) for name, leaf in (("masks", "counts"), ("score", "score"))}
    of_masks["stability"] = pc.struct_field(values, "stability")
    of_masks["threshold"] = pa.nulls(len(values), pa.float64())
    if threshold is not None:
        soft = pc.struct_field(values, "soft").to_pylist()
        steady = [np.nan if each is None else signals.steadiness(decode_soft(each), threshold) for each in soft]
        of_masks["threshold"] = pa.array(steady, pa.float64())
    offsets = pa.array(np.append(0, ends), pa.int32())
    kept = {name: table[name] for name in ("key", "image_id", "uri", "sha256", "height", "width")}
    kept |= {name: pa.ListArray.from_arrays(offsets, its) for name, its in of_masks.items()}
    kept |= {"run": pa.array(np.full(len(table), run)), "failed": pc.not_equal(table["error"], "")}
    kept["foreground"] = pc.struct_field(table["foreground"], "counts")
    return pa.table(kept).select(EVERY_MASK.names).cast(EVERY_MASK)


@dataclass(frozen=True)
class Image:
    """Measures one image of some runs at a time."""

    methods: Sequence[str]  # of each run
    polarity: str = "fixed"
    labels: Labels | None = None

    def measure(self, images: list[dict], content: bytes | BadImage | None) -> tuple[list[dict], str, bool]:
        """Rows of MEASURED of an image; the status of its label, "" without labels; whether its original is missing.

        images: its rows of EVERY_MASK, in the order of the runs. content: of its original; None = none is asked for.
        """
        count = Counter(row["run"] for row in images)
        good = [row for row in images if not row["failed"]]
        groups: dict[tuple[int, int], list[dict]] = {}
        for row in good:
            if count[row["run"]] == 1:
                groups.setdefault((row["height"], row["width"]), []).append(row)
        agreement = {}
        for its in (group for group in groups.values() if len(group) > 1):
            methods = [self.methods[row["run"]] for row in its]
            found = signals.agreements(its, methods, polarity=self.polarity)
            agreement |= {id(row): values for row, values in zip(its, found, strict=True)}
        picture = self._picture(good, content)
        labels, status = self._labels(good) if self.labels else ({}, "")
        rows = []
        for row in images:
            known = {name: row[name] for name in ("run", "image_id", "key")} | {"masks": len(row["masks"] or ())}
            if row["failed"]:
                rows.append(known | {"status": "failed"})
                continue
            nothing = [np.nan] * max(1, known["masks"])
            own = {name: row[name] or nothing for name in ("stability", "threshold", "score")}
            its = agreement.get(id(row))
            alone = "several of this key" if count[row["run"]] > 1 else "no other run to compare with"
            own["agreement"] = nothing if its is None else its.tolist()
            own |= self._of_picture(row, picture) if picture else {"edges": nothing, "contrast": nothing}
            own["status"] = alone if its is None and len(self.methods) > 1 else "ok"
            label = labels.get((row["height"], row["width"]))
            own["dice"] = None if label is None else signals.against(row, label, polarity=self.polarity).tolist()
            rows.append(known | own)
        return rows, status, content is not None and bool(good) and picture is None

    def _labels(self, good: list[dict]) -> tuple[dict[tuple[int, int], np.ndarray], str]:
        """An image's label by the sizes that it has in the runs, bool (H, W) each, where it fits; and its status."""
        found, statuses = {}, []
        for size, row in {(row["height"], row["width"]): row for row in good}.items():
            label, status = self.labels.read(row | {"error": ""})
            statuses.append(status)
            if label is not None:
                found[size] = self.labels.task.outline(row, label)
        return found, "ok" if found else next(iter(statuses), "")

    def _picture(self, good: list[dict], content: bytes | BadImage | None) -> signals.Picture | None:
        if not good or content is None or isinstance(content, BadImage):
            return None
        try:
            return signals.Picture(decode(good[0], content))
        except BadImage:
            return None

    def _of_picture(self, row: dict, picture: signals.Picture) -> dict:
        size = [row["height"], row["width"]]
        counts = row["foreground"]
        foreground = np.ones(size, bool) if counts is None else decode_rle({"size": size, "counts": counts})
        masks = (decode_rle({"size": size, "counts": each}) for each in row["masks"] or ())
        masks = masks if row["masks"] else [np.zeros(size, bool)]
        pairs = [(picture.edges(mask, foreground), picture.contrast(mask, foreground)) for mask in masks]
        edges, contrast = zip(*pairs, strict=True)
        return {"edges": list(edges), "contrast": list(contrast)}


def _fetched(
    every: Iterable[list[dict]], originals: Originals | None
) -> Iterator[tuple[list[dict], bytes | BadImage | None]]:
    """The rows of each image with the bytes of its original; None where none is asked for, or the image failed."""
    if originals is None:
        yield from ((images, None) for images in every)
        return
    without: list[list[dict]] = []

    def labelled() -> Iterator[dict]:
        for images in every:
            known = next((row for row in images if not row["failed"]), None)
            if known is None:
                without.append(images)
            else:
                yield known | {"images": images}

    for row, content in originals.fetch(labelled()):
        yield row["images"], content
        while without:
            yield without.pop(), None
    yield from ((images, None) for images in without)


def _threshold(run: Run) -> float | None:
    """Of a run's soft masks; None where it keeps none, or its masks take pixels from each other instead."""
    settings = run.configuration()["settings"]
    if not settings.get("keep_soft") or segmenters.is_exclusive(run.method):
        return None
    return 0.5 if settings.get("threshold") is None else settings["threshold"]
