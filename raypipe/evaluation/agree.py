"""`raypipe agree`: runs over the same images against each other. Where methods agree, their masks can be trusted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from raypipe.evaluation.task import WRITTEN_ROWS, written
from raypipe.run import Run, rows
from raypipe.schema import VERSION
from raypipe.storage import Folder, Location, open_table

TERMINAL_IMAGES = 10  # the least agreed on, by name
BUCKET_ROWS = 20_000  # masks in memory at a time
BUCKET_BYTES = 64 << 20  # of them, as they are stored
MAX_BUCKETS = 256  # files open at a time
FIRST_MASKS = pa.schema(  # what is compared: one row per image and run
    [
        ("key", pa.string()),
        ("run", pa.int32()),  # index
        ("image_id", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("mask", pa.string()),  # counts of a COCO RLE of the image's size; null when nothing was found
        ("foreground", pa.string()),  # the same; null = the whole image
        ("failed", pa.bool_()),
    ]
)
# `raypipe agree`: one row per image of any of the runs, in no order. The file's metadata lists them as `raypipe.runs`.
AGREEMENT = pa.schema(
    [
        ("image_id", pa.string()),  # in the first run that has the image
        ("key", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("agreement", pa.float64()),  # mean IoU over all pairs of runs; null unless status is "ok"
        ("nearest", pa.string()),  # the run with the highest mean IoU, the first among equals; null for two runs
        ("ious", pa.list_(pa.float64())),  # of each run, its mean IoU with the others
        ("signs", pa.list_(pa.int8())),  # of each run: 1 = its first mask, -1 = the rest of the foregrounds
        ("status", pa.string()),  # ok, or what keeps the image from being compared: `missing: RUN`, `failed: RUN`, ...
    ],
    metadata={"raypipe.schema": str(VERSION)},
)


@dataclass(frozen=True)
class Agree:
    """Compare the first masks of several runs over the same images."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # two or more run folders, of images with the same keys
    output: str | None = None  # folder for agreement.parquet; None = metrics/agreement in the first run
    polarity: Literal["fixed", "best"] = "fixed"  # best: a mask may stand for the rest of the foreground instead


@dataclass(frozen=True)
class Agreement:
    """How far the runs agree."""

    table: str  # where the rows per image are
    runs: list[str]
    images: int
    compared: int  # images that have a mask in every run
    mean: float  # agreement over the compared images, 0..1
    nearest: dict[str, int]  # run -> images for which it is nearest to the consensus; {} for two runs, which are even
    least: list[tuple[str, float]]  # the images that the runs agree least on: key, agreement
    left_out: dict[str, int]  # images that were not compared, by reason and run

    def text(self) -> str:
        """The mean, who is nearest, and which images to look at first."""
        lines = [f"{self.compared:,} of {self.images:,} images compared, mean agreement {self.mean:.3f}"]
        lines += [f"{count:>9,}  {reason}" for reason, count in self.left_out.items()]
        if self.nearest:
            lines.append("nearest to the consensus")
            lines += [f"{count:>9,}  {count / self.compared:4.0%}  {name}" for name, count in self.nearest.items()]
        lines.append("least agreed on")
        lines += [f"{agreement:>9.3f}  {key}" for key, agreement in self.least]
        return "\n".join([*lines, f"per image: {self.table}"])


def agree(options: Agree) -> Agreement:
    """Compare the runs image by image and write AGREEMENT; an earlier table is replaced at once.

    Streams: the first masks go through temporary files, which take about their size. The table is held compressed,
    about 100 MB for a million images, and four of its columns for the summary. Raises ValueError for fewer than two
    runs, the same one twice, or runs without a common image, and FileNotFoundError for a folder that is no run.
    """
    names = [Location(folder).rstrip("/") for folder in options.runs]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"agree needs two or more different runs, got {', '.join(names) or 'none'}")
    runs = [Run(folder) for folder in options.runs]
    for run in runs:
        if not run.parts():
            raise ValueError(f"{run} has no rows")
    columns = AGREEMENT.with_metadata(AGREEMENT.metadata | {b"raypipe.runs": json.dumps(names).encode()})
    content = written((compare(images, names, polarity=options.polarity) for images in by_key(runs)), columns)
    folder = Folder(options.output or Folder(options.runs[0]).location("metrics", "agreement"))
    result = summary(names, content, str(folder.location("agreement.parquet")))
    if not result.compared:
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in result.left_out.items()) or "no images"
        raise ValueError(f"no image has a mask in all of {', '.join(names)}: {reasons}; are the keys the same?")
    folder.write(content, "agreement.parquet")
    return result


def summary(names: list[str], content: bytes, table: str) -> Agreement:
    """What the terminal shows of a table of AGREEMENT. content: the Parquet file. table: where it is."""
    every = open_table(content).read(columns=["key", "agreement", "nearest", "status"])
    statuses, nearest = (Counter(every[name].to_pylist()) for name in ("status", "nearest"))
    compared = statuses.pop("ok", 0)
    least = (
        every.select(["key", "agreement"]).sort_by("agreement").slice(0, min(compared, TERMINAL_IMAGES))
    )  # null last
    return Agreement(
        table=table,
        runs=names,
        images=len(every),
        compared=compared,
        mean=pc.mean(every["agreement"]).as_py() or 0.0,
        nearest={name: nearest[name] for name in names} if len(names) > 2 else {},
        least=[(row["key"], row["agreement"]) for row in least.to_pylist()],
        left_out=dict(statuses.most_common()),
    )


def by_key(
    runs: Sequence[Run],
    taken: Callable[[pa.Table, int], pa.Table] | None = None,
    columns: pa.Schema = FIRST_MASKS,
    *,
    leaves: tuple[str, ...] = ("counts",),
    bucket_rows: int = BUCKET_ROWS,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[list[dict]]:
    """For each key the rows of FIRST_MASKS that the runs have for it, in the order of the runs.

    taken: makes rows of these columns, `key` and `run` among them, in the place of `first_masks`. leaves: of the
    segments that it gets (`rows.batches`).

    The rows are parted by a hash of their key into temporary files, so that all of a key are in one, of at most about
    bucket_rows rows and bucket_bytes stored bytes. One of these is in memory at a time, sorted by key. No database: on
    400,000 rows this takes 63 s and 599 MB, DuckDB 49 s and 1,265 MB; it fails when it may take 300 MB.
    """
    stored = sum(info.size for run in runs for info in run.folder.files(run.data).values())
    count = min(MAX_BUCKETS, 1 + max(stored // bucket_bytes, sum(len(run.commits()) for run in runs) // bucket_rows))
    with tempfile.TemporaryDirectory(prefix="raypipe-") as folder:
        paths = [os.path.join(folder, f"{i}.arrow") for i in range(count)]
        write_buckets(runs, paths, taken or first_masks, columns, leaves=leaves, at_once=bucket_bytes)
        for path in paths:
            with pa.OSFile(path) as file:
                table = pa.ipc.open_stream(file).read_all()
            table = table.sort_by([("key", "ascending"), ("run", "ascending")])
            sorted_rows = (row for batch in table.to_batches(WRITTEN_ROWS) for row in batch.to_pylist())
            for _, images in itertools.groupby(sorted_rows, key=itemgetter("key")):
                yield list(images)


def write_buckets(
    runs: Sequence[Run],
    paths: Sequence[str],
    taken: Callable,
    columns: pa.Schema,
    *,
    leaves: tuple[str, ...],
    at_once: int,
) -> None:
    """Write what is taken of all runs to Arrow streams by a hash of their key. at_once: bytes to hold before."""
    held, size = [], 0
    with contextlib.ExitStack() as stack:
        compressed = pa.ipc.IpcWriteOptions(compression="zstd")
        writers = [stack.enter_context(pa.ipc.new_stream(path, columns, options=compressed)) for path in paths]

        def flush() -> None:
            table = pa.concat_tables([columns.empty_table(), *held])
            buckets = np.array([zlib.crc32(key.encode()) % len(paths) for key in table["key"].to_pylist()], np.int64)
            for i, writer in enumerate(writers):
                writer.write_table(table.take(np.flatnonzero(buckets == i)))

        for index, run in enumerate(runs):
            for table in rows.batches(run, leaves=leaves):
                held.append(taken(table, index))
                size += held[-1].nbytes
                if size >= at_once:
                    flush()
                    held, size = [], 0
        flush()


def first_masks(table: pa.Table, run: int) -> pa.Table:
    """Rows of FIRST_MASKS for rows of the masks table. run: the index to write."""
    segments = table["segments"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(segments), 0).to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths) - lengths
    first = pc.struct_field(pc.list_flatten(segments), "counts").take(pa.array(starts, mask=lengths == 0))
    kept = {name: table[name] for name in ("key", "image_id", "height", "width")}
    kept |= {
        "run": pa.array(np.full(len(table), run)),
        "mask": first,
        "foreground": pc.struct_field(table["foreground"], "counts"),
        "failed": pc.not_equal(table["error"], ""),
    }
    return pa.table(kept).select(FIRST_MASKS.names).cast(FIRST_MASKS)


def compare(images: list[dict], names: Sequence[str], *, polarity: str = "fixed") -> dict:
    """A row of AGREEMENT for one image. images: its rows of FIRST_MASKS, in the order of the runs."""
    known = next((row for row in images if not row["failed"]), images[0])
    row = {name: known[name] for name in ("image_id", "key", "height", "width")}
    if status := _incomparable(images, names, (known["height"], known["width"])):
        return row | {"status": status}
    overlaps, union = overlap(images)
    signs = best_signs(overlaps, union) if polarity == "best" else [1] * len(images)
    ious = pairwise_iou(overlaps, union, signs)
    means = (ious.sum(1) - 1) / (len(images) - 1)  # without the diagonal, which is 1
    first = int(np.argmax(np.round(means, 12)))  # rounded, so that ties do not hang on the order of a sum
    return row | {
        "agreement": float(means.mean()),
        "nearest": names[first] if len(images) > 2 else None,
        "ious": means.tolist(),
        "signs": list(signs),
        "status": "ok",
    }


def overlap(images: Sequence[dict]) -> tuple[np.ndarray, int]:
    """Pixels that each pair of masks shares, (N, N) int64 with the areas on the diagonal, and those of all foregrounds.

    images: rows of FIRST_MASKS of one size. Works on the run lengths: no mask is decoded.
    """
    from pycocotools import mask as coco

    size = [images[0]["height"], images[0]["width"]]
    pixels = size[0] * size[1]
    masks = [None if row["mask"] is None else {"size": size, "counts": row["mask"].encode()} for row in images]
    shared = np.zeros((len(images), len(images)), np.int64)
    for (i, one), (j, other) in itertools.combinations_with_replacement(enumerate(masks), 2):
        if one and other:
            both = one if i == j else coco.merge([one, other], intersect=True)
            shared[i, j] = shared[j, i] = coco.area(both)
    foregrounds = [row["foreground"] for row in images]
    if None in foregrounds:
        return shared, pixels
    distinct = [{"size": size, "counts": counts.encode()} for counts in dict.fromkeys(foregrounds)]
    return shared, int(coco.area(coco.merge(distinct)))


def pairwise_iou(overlaps: np.ndarray, union: int, signs: Sequence[int]) -> np.ndarray:
    """IoU of each pair of masks, (N, N) float64; 1 where both are empty. Arguments as `overlap` returns them.

    A mask of sign -1 stands for what it leaves of the union of all foregrounds, in which all masks lie. So its overlaps
    follow from the counts.
    """
    inverted = np.asarray(signs) < 0  # (N,)
    areas = np.diagonal(overlaps)
    shared = np.where(inverted[:, None], areas[None, :] - overlaps, overlaps)  # of (not) i with j
    areas_signed = np.where(inverted, union - areas, areas)
    shared = np.where(inverted[None, :], areas_signed[:, None] - shared, shared)  # of (not) i with (not) j
    together = areas_signed[:, None] + areas_signed[None, :] - shared
    return np.where(together > 0, shared / np.maximum(together, 1), 1.0)


def best_signs(overlaps: np.ndarray, union: int) -> tuple[int, ...]:
    """The polarities with the highest mean IoU; the first run keeps its own, among equals the fewest are inverted."""
    choices = ((1, *signs) for signs in itertools.product((1, -1), repeat=len(overlaps) - 1))
    by_inverted = sorted(choices, key=lambda signs: signs.count(-1))
    return max(by_inverted, key=lambda signs: round(pairwise_iou(overlaps, union, signs).sum(), 12))


def _incomparable(images: Sequence[dict], names: Sequence[str], size: tuple[int, int]) -> str:
    """What keeps an image from being compared in all runs; "" if nothing does. size: of the first that is good."""
    reasons = []
    for i, name in enumerate(names):
        own = [row for row in images if row["run"] == i]
        if len(own) != 1:
            reasons.append(f"{'several of this key' if own else 'missing'}: {name}")
        elif own[0]["failed"] or (own[0]["height"], own[0]["width"]) != size:
            reasons.append(f"{'failed' if own[0]['failed'] else 'another size'}: {name}")
    return ", ".join(reasons)
