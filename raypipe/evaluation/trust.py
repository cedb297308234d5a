"""`raypipe trust`: how far each mask of a run can be trusted, learned without labels from what agrees."""

from __future__ import annotations

import itertools
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from raypipe import schema
from raypipe.evaluation import signals
from raypipe.evaluation.agree import by_key
from raypipe.evaluation.combined import Ranks, loadings, run_weights, weighted
from raypipe.evaluation.task import WRITTEN_ROWS, written
from raypipe.run import Run, rows
from raypipe.storage import open_table

PLACE = ("metrics", "trust", "trust.parquet")  # in each run's folder
TERMINAL_IMAGES = 10  # the least trusted, by name
SAMPLE_MASKS = 200_000  # that ranks and weights are learned from; all of a smaller corpus
SIGNALS = {  # by column: what is said of it
    "agreement": "IoU with the other runs' masks, by how far each run agrees with the rest",
    "stability": "IoU with itself in other views of the image (label --jitter)",
    "score": "the method's own score, as a rank within the run",
}
WITHIN_RUN = ("score",)  # signals that say nothing between runs
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
        ("stability", pa.list_(pa.float32())),
        ("score", pa.list_(pa.float32())),
    ]
)
MEASURED = pa.schema(  # one row per image and run: its signals before they are combined, of each mask
    [
        ("run", pa.int32()),
        ("image_id", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("masks", pa.int32()),  # 0 when nothing was found, which is measured as one empty mask
        ("ious", pa.list_(pa.list_(pa.float64()))),  # with the best mask of each run, NaN where there is none
        *((name, pa.list_(pa.float64())) for name in SIGNALS if name != "agreement"),  # NaN where not measured
    ]
)
# `raypipe trust`: one row per image of the run, in no order.
TRUST = pa.schema(
    [
        ("image_id", pa.string()),
        ("key", pa.string()),
        ("trust", pa.float64()),  # of the first mask: the share of all masks that are trusted less; null if failed
        ("dice", pa.float64()),  # expected of it; null without labels
        ("low", pa.float64()),  # interval of the Dice; null without labels
        ("high", pa.float64()),
        ("masks", pa.list_(pa.float64())),  # trust of each segment, in their order
        *((name, pa.float64()) for name in SIGNALS),  # of the first mask; null where not measured
        ("status", pa.string()),  # ok, failed, or what keeps the image from being compared
    ],
    metadata={"raypipe.schema": str(schema.VERSION)},
)


@dataclass(frozen=True)
class Trust:
    """Say which masks can be trusted: by agreement of runs, stability and other signals, combined without labels."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs over images with the same keys; one works too
    polarity: Literal["fixed", "best"] = "fixed"  # best: a mask may stand for the rest of the foreground instead


@dataclass(frozen=True)
class Trusted:
    """What the masks of some runs are trusted by, and which are trusted least."""

    tables: list[str]  # per run, where its rows are
    images: dict[str, int]  # by run, those that have a trust
    mean: dict[str, float | None]  # by run, of its images' trust
    run_weights: dict[str, float]  # how much each run counts in the agreement; {} for one run
    weights: dict[str, float]  # by signal, what it counts; 0 where it was not measured or contradicts the others
    least: dict[str, list[tuple[str, float]]]  # by run, its least trusted images: key, trust
    left_out: dict[str, int] = field(default_factory=dict)  # images without a trust, or compared with none, by reason

    def text(self) -> str:
        """The runs, what the signals count, and the images to look at first."""
        lines = [f"{'images':>9} {'trust':>7}"]
        lines += [f"{self.images[name]:>9,} {_shown(mean):>7}  {name}" for name, mean in self.mean.items()]
        lines.append("weights of the signals, from how far they agree with each other")
        lines += [f"{share:>9.2f}  {name}: {SIGNALS[name]}" for name, share in self.weights.items() if share]
        lines += [f"{count:>9,}  {reason}" for reason, count in self.left_out.items()]
        for name, least in self.least.items():
            lines.append(f"least trusted of {name}")
            lines += [f"{trust:>9.3f}  {key}" for key, trust in least]
        return "\n".join([*lines, *(f"per image: {table}" for table in self.tables)])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def trust(options: Trust) -> Trusted:
    """Measure the signals of all masks, combine them, and write TRUST into each run; earlier tables are replaced.

    Streams as `agree` does: signals go through a temporary file, ranks and weights come from SAMPLE_MASKS of them.
    Raises ValueError for no run, the same one twice or one without rows, FileNotFoundError for a folder that is none.
    """
    names = rows.run_names(options.runs)
    if not names:
        raise ValueError("trust needs a run, or several over the same images")
    runs = [Run(folder) for folder in options.runs]
    for run in runs:
        if not run.parts():
            raise ValueError(f"{run} has no rows")
    with tempfile.TemporaryDirectory(prefix="raypipe-") as folder:
        path = os.path.join(folder, "measured.arrow")
        every = by_key(runs, every_mask, EVERY_MASK, leaves=LEAVES)
        every = (measure(images, len(runs), polarity=options.polarity) for images in every)
        sample = _spool(itertools.chain.from_iterable(every), path)
        learned = Learned(sample, [run.method for run in runs])
        contents = [written(_rows(path, index, learned), TRUST) for index in range(len(runs))]
    for run, content in zip(runs, contents, strict=True):
        run.folder.write(content, *PLACE)
    return _summary(names, runs, contents, learned)


def least(run: Run, share: float) -> list[str]:
    """The image ids of the least trusted share of a run's images, least first, at least one. share: in 0..1.

    Raises FileNotFoundError where `raypipe trust` has written no table, and ValueError where no image has a trust.
    """
    table = read(run, ["image_id", "trust"])
    table = table.filter(pc.is_valid(table["trust"])).sort_by([("trust", "ascending"), ("image_id", "ascending")])
    if not len(table):
        raise ValueError(f"{run}: no image has a trust; all failed")
    return table["image_id"].slice(0, max(1, round(share * len(table)))).to_pylist()


def read(run: Run, columns: Sequence[str] | Mapping[str, str]) -> pa.Table:
    """Some columns of a run's table TRUST. columns: a mapping gives them other names, {new: stored}.

    Raises FileNotFoundError where there is none.
    """
    if PLACE[-1] not in run.folder.files(*PLACE[:-1]):
        raise FileNotFoundError(f"{run} has no table of trust; make it first: raypipe trust {run} [RUN ...]")
    with run.folder.open(*PLACE) as file, open_table(file) as content:
        stored = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns)
        return content.read([old or new for new, old in stored.items()]).rename_columns(list(stored))


LEAVES = ("counts", "score", *(field.name for field in schema.SEGMENT if field.name == "stability"))


def every_mask(table: pa.Table, run: int) -> pa.Table:
    """Rows of EVERY_MASK for rows of the masks table. run: the index to write."""
    segments = pc.fill_null(table["segments"].combine_chunks(), [])
    values = segments.flatten()

    def of(name: str) -> pa.Array:
        known = name in [field.name for field in segments.type.value_type]
        leaf = pc.struct_field(values, name) if known else pa.nulls(len(values), pa.float32())
        lengths = pc.list_value_length(segments).to_numpy(zero_copy_only=False)
        return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)), pa.int32()), leaf)

    kept = {name: table[name] for name in ("key", "image_id", "uri", "sha256", "height", "width")}
    kept |= {"masks": of("counts"), "stability": of("stability"), "score": of("score")}
    kept |= {"run": pa.array(np.full(len(table), run)), "failed": pc.not_equal(table["error"], "")}
    kept["foreground"] = pc.struct_field(table["foreground"], "counts")
    return pa.table(kept).select(EVERY_MASK.names).cast(EVERY_MASK)


def measure(images: list[dict], count: int, *, polarity: str = "fixed") -> Iterator[dict]:
    """Rows of MEASURED for one image. images: its rows of EVERY_MASK, of `count` runs in their order."""
    twice = {run for run, rows in Counter(row["run"] for row in images).items() if rows > 1}
    good = [row for row in images if not row["failed"] and row["run"] not in twice]
    for row in images:
        known = {name: row[name] for name in ("run", "image_id", "key")}
        if row["failed"]:
            yield known | {"status": "failed", "masks": 0}
            continue
        number = max(1, len(row["masks"]))
        ious = np.full((number, count), np.nan)
        size = (row["height"], row["width"])
        others = [each for each in good if each is not row and (each["height"], each["width"]) == size]
        if row["run"] not in twice:
            for other in others:
                ious[:, other["run"]] = signals.matches(row, other, polarity=polarity)
        own = {name: row[name] or [None] for name in ("stability", "score")}
        status = "several of this key" if row["run"] in twice else "ok" if others or count == 1 else "in no other run"
        yield known | own | {"status": status, "masks": len(row["masks"]), "ious": ious.tolist()}


class Sample:
    """Masks that stand for all: those of the images whose keys' hashes are lowest, at most SAMPLE_MASKS of them."""

    def __init__(self):
        self.rows: list[tuple[int, dict]] = []
        self._bound, self._masks = 1 << 32, 0

    def add(self, row: dict) -> None:
        """Take a row of MEASURED, or leave it out."""
        value = zlib.crc32(row["key"].encode())
        if value >= self._bound or row["status"] == "failed":
            return
        self.rows.append((value, row))
        self._masks += len(row["ious"])
        while self._masks > SAMPLE_MASKS and self._bound > 1:
            self._bound //= 2
            self.rows = [(value, row) for value, row in self.rows if value < self._bound]
            self._masks = sum(len(row["ious"]) for _, row in self.rows)


def _spool(measured: Iterator[dict], path: str) -> Sample:
    """Write rows of MEASURED to a file. Returns the sample of them."""
    sample, held = Sample(), []
    with pa.ipc.new_file(path, MEASURED, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        for row in measured:
            sample.add(row)
            held.append(row)
            if len(held) == WRITTEN_ROWS:
                file.write_batch(pa.RecordBatch.from_pylist(held, schema=MEASURED))
                held = []
        file.write_batch(pa.RecordBatch.from_pylist(held, schema=MEASURED))
    return sample


class Learned:
    """What makes signals one number: ranks of the signals, and their weights."""

    def __init__(self, sample: Sample, methods: Sequence[str]):
        """sample: rows of MEASURED. methods: of each run."""
        measured = [row for _, row in sample.rows]
        masks = Masks.of(measured)
        self.run_weights = run_weights(masks.ious[masks.first], masks.run[masks.first], methods)
        values = masks.signals(self.run_weights)
        self._ranks = [
            Ranks(values[:, i], masks.weight, masks.run * (name in WITHIN_RUN)) for i, name in enumerate(SIGNALS)
        ]
        ranks = self._ranked(values, masks.run)
        self.weights = loadings(ranks, masks.weight)
        self._order = Ranks(self._scores(ranks), masks.weight, 0 * masks.run)

    def __call__(self, measured: list[dict]) -> tuple[list[np.ndarray], np.ndarray]:
        """The trust of each mask of some rows of MEASURED that have not failed, and of the first ones their signals."""
        masks = Masks.of(measured)
        values = masks.signals(self.run_weights)
        trust = self._order(self._scores(self._ranked(values, masks.run)), 0 * masks.run)
        return np.split(trust, np.flatnonzero(masks.first)[1:]), values[masks.first]

    def _ranked(self, values: np.ndarray, run: np.ndarray) -> np.ndarray:
        of = zip(SIGNALS, self._ranks, values.T, strict=True)
        return np.column_stack([ranks(its, run * (name in WITHIN_RUN)) for name, ranks, its in of])

    def _scores(self, ranked: np.ndarray) -> np.ndarray:
        """Ranks by their weights; one that is missing counts as the middle, which says nothing.

        Rounded, so that ties do not hang on how many are summed at once.
        """
        return np.round(np.where(np.isfinite(ranked), ranked - 0.5, 0) @ self.weights, 12)


@dataclass(frozen=True)
class Masks:
    """The masks of some images, one after the other."""

    run: np.ndarray  # int (N,)
    first: np.ndarray  # bool (N,): an image's first mask
    weight: np.ndarray  # float64 (N,): those of one image and run add up to 1
    ious: np.ndarray  # float64 (N, R)
    own: np.ndarray  # float64 (N, K - 1): SIGNALS but the agreement

    @classmethod
    def of(cls, measured: list[dict]) -> Masks:
        """measured: rows of MEASURED that have not failed."""
        counts = np.array([len(row["ious"]) for row in measured], np.int64)
        first = np.zeros(counts.sum(), bool)
        first[np.cumsum(counts) - counts] = True
        own = [[value for row in measured for value in row[name]] for name in list(SIGNALS)[1:]]
        ious = [of_runs for row in measured for of_runs in row["ious"]]
        return cls(
            run=np.repeat([row["run"] for row in measured], counts),
            first=first,
            weight=np.repeat(1 / counts, counts),
            ious=np.array(ious, np.float64),
            own=np.array(own, np.float64).T,
        )

    def signals(self, weights: np.ndarray) -> np.ndarray:
        """The values of SIGNALS, float64 (N, K). weights: of the runs."""
        return np.column_stack([weighted(self.ious, weights), self.own])


def _rows(path: str, run: int, learned: Learned) -> Iterator[dict]:
    """Rows of TRUST of one run. path: of what `_spool` wrote."""
    with pa.OSFile(path) as file, pa.ipc.open_file(file) as batches:
        for i in range(batches.num_record_batches):
            batch = batches.get_batch(i)
            measured = batch.filter(pc.equal(batch["run"], run)).to_pylist()
            good = [row for row in measured if row["status"] != "failed"]
            of_good = zip(*learned(good), strict=True) if good else iter(())
            for row in measured:
                known = {name: row[name] for name in ("image_id", "key", "status")}
                if row["status"] == "failed":
                    yield known
                    continue
                masks, values = next(of_good)
                cells = {
                    name: None if np.isnan(value) else float(value) for name, value in zip(SIGNALS, values, strict=True)
                }
                yield known | cells | {"trust": float(masks[0]), "masks": masks[: row["masks"]].tolist()}


def _summary(names: list[str], runs: list[Run], contents: list[bytes], learned: Learned) -> Trusted:
    """What the terminal shows. contents: of each run its table TRUST."""
    tables = [open_table(content).read(columns=["key", "trust", "status"]) for content in contents]
    statuses = sum((Counter(table["status"].to_pylist()) for table in tables), Counter())
    del statuses["ok"]
    known = [table.filter(pc.is_valid(table["trust"])) for table in tables]
    first = [table.sort_by("trust").slice(0, TERMINAL_IMAGES).to_pylist() for table in known]
    return Trusted(
        tables=[str(run.folder.location(*PLACE)) for run in runs],
        images={name: len(table) for name, table in zip(names, known, strict=True)},
        mean={name: pc.mean(table["trust"]).as_py() for name, table in zip(names, known, strict=True)},
        run_weights=dict(zip(names, learned.run_weights.tolist(), strict=True)) if len(names) > 1 else {},
        weights=dict(zip(SIGNALS, learned.weights.tolist(), strict=True)),
        least={name: [(row["key"], row["trust"]) for row in its] for name, its in zip(names, first, strict=True)},
        left_out=dict(statuses.most_common()),
    )
