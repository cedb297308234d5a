"""The figures of a run's images, without their masks: area share, count, ...; how odd each is; which images to show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import segmenters
from raypipe.evaluation import tasks
from raypipe.run import Run, rows
from raypipe.storage import normalise, open_table

# The leaves of the masks table that figures need: run lengths are 99 % of a part and stay on the disk.
LEAVES = [
    *("image_id", "key", "height", "width", "note", "seconds", "attempt", "error"),
    *("segments.list.element.area", "segments.list.element.score"),
]
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("key", pa.string()),
        ("megapixels", pa.float64()),
        ("count", pa.float64()),  # masks
        ("share", pa.float64()),  # of the image that the first mask covers, 0..1; 0 without a mask
        ("smallest", pa.float64()),  # share of the smallest and of the largest mask
        ("largest", pa.float64()),
        ("score", pa.float64()),  # mean of the masks' scores; NaN where the method has none
        ("seconds", pa.float64()),
        ("note", pa.string()),
        ("attempt", pa.string()),
        ("reason", pa.string()),  # "" = good; else `stage: kind`
    ]
)
COUNTED = ("images", "iou")  # columns of the tables size_bins
FULL = 0.99  # a mask of more than this share of the image separates nothing
ODD = 3.0  # an image is odd from this sum of signs on: three robust standard deviations, or one plain fault
DOUBTFUL = 0.02  # a mask is doubtful that is trusted less than all but this share: ranks have no far ends
HEAVIEST = 10.0  # one sign counts at most this much, so that an image with several of them stands above


class Figure(NamedTuple):
    """What another command measured about a run's images."""

    title: str
    unit: str
    folder: str  # in the run
    column: str  # of its tables
    better: str = "high"  # or low

    @property
    def sign(self) -> str:
        """What an image is called whose value is far on the bad side."""
        return f"{'low' if self.better == 'high' else 'high'} {lowered(self.title)}"


class Choice(NamedTuple):
    """One image of the page."""

    key: str
    oddness: float  # the largest over the runs
    is_random: bool  # of the random sample; the others are odd, or the worst or best by some figure


class Histogram(NamedTuple):
    """Counts of one figure between shared edges, for each of several runs."""

    edges: np.ndarray  # (bins + 1,)
    counts: list[np.ndarray]  # per run (bins,)
    medians: list[float]  # per run; NaN without values


class Bins(NamedTuple):
    """What a measure comes to by the size of the object, for the runs that were measured against the same labels."""

    reference: str  # where the labels are
    dataset: str  # with its split; "" for labels of one's own
    lows: list[float]  # of each bin, the smallest share of the image
    images: list[tuple[int, ...]]  # per run, of each bin; () where the run was not measured
    ious: list[tuple[float | None, ...]]  # the same; None without images

    @property
    def differences(self) -> list[float | None]:
        """By how much the second of two runs is better; [] for other numbers of runs, or without a bin of both."""
        pairs = list(zip(*self.ious, strict=True)) if len(self.ious) == 2 and all(self.ious) else []
        found = [None if None in pair else pair[1] - pair[0] for pair in pairs]
        return found if any(value is not None for value in found) else []


def read(run: Run, others: Iterable[Run] = (), *, reference: str | None = None) -> pa.Table:
    """One row of SCHEMA per image of a run, and a column per figure of `measured` that it has. Reads part by part.

    others: runs in which an agreement with this one may lie: `agree` writes it into the first it compares. reference:
    of several measurements those against the labels there count.
    """
    least = int(segmenters.is_exclusive(run.method))  # pixels of a mask
    parts = (_figures(part, least) for part in rows.columns(run, LEAVES))
    table = pa.concat_tables([SCHEMA.empty_table(), *parts])
    for name, figure in measured().items():
        values = _measured(run, name, figure, reference=reference)
        if name == "agreement" and not values:
            values = [each for other in others for each in _measured(other, name, figure, among=str(run))]
        if values:  # the first table that has an image's key counts
            known = pa.concat_tables(values).combine_chunks()
            index = pc.index_in(table["key"], value_set=known["key"].combine_chunks())
            table = table.append_column(name, known[name].take(index))
    return table.combine_chunks()


def measured() -> dict[str, Figure]:
    """What other commands may have measured: trust, agreement, what tasks say of single images (`PER_IMAGE`)."""
    figures = {
        "trust": Figure("Trust", "share of masks trusted less", "metrics/trust", "trust"),
        "agreement": Figure("Agreement", "with other methods", "metrics/agreement", "agreement"),
    }
    for task in tasks.names():
        kind = tasks.find(task)
        for name in kind.PER_IMAGE:
            value = kind.SHOWN[name]
            figures[f"{task}_{name}"] = Figure(value.title, value.unit, f"metrics/task={task}", name, value.better)
    return figures


def good(figures: pa.Table) -> pa.Table:
    """The rows without error."""
    return figures.filter(pc.equal(figures["reason"], ""))


def numbers(figures: pa.Table, name: str) -> np.ndarray:
    """One column as float64 (N,), NaN where it is null."""
    return pc.fill_null(figures[name], np.nan).to_numpy()


def signs(figures: pa.Table) -> dict[str, np.ndarray]:
    """What is unusual about each good row: a sign's name -> (N,) float64 in [0, HEAVIEST], 0 = nothing.

    Distances are robust z-scores, |x - median| / (1.4826 MAD) (Iglewicz and Hoaglin 1993); the floors keep a run of
    almost equal images from calling the smallest difference odd.
    """
    strengths = {
        "empty mask": 5.0 * ((numbers(figures, "smallest") == 0) | (numbers(figures, "count") == 0)),
        "mask fills the image": 5.0 * (numbers(figures, "largest") > FULL),
        "note": 3.0 * pc.not_equal(pc.fill_null(figures["note"], ""), "").to_numpy(),
        "unusual area": _distances(numbers(figures, "share"), floor=0.02),
        "unusual count": _distances(numbers(figures, "count"), floor=1.0),
        "low score": _distances(numbers(figures, "score"), floor=0.02, only_below=True),
    }
    for name, figure in measured().items():
        if name == "trust" and name in figures.column_names:
            strengths[figure.sign] = ODD * (numbers(figures, name) < DOUBTFUL)
        elif name in figures.column_names:
            values = numbers(figures, name) * (1 if figure.better == "high" else -1)
            sign = figure.sign if figure.sign not in strengths else f"{figure.sign} ({name})"
            strengths[sign] = _distances(values, floor=0.02, only_below=True)
    return strengths


def choose(runs: list[pa.Table], sample: int) -> list[Choice]:
    """At most `sample` images, oddest first: up to half for being odd in any run, where something was measured up to a
    quarter of the worst and of the best by it, the rest at random.

    runs: the good rows of each run. Image ids are hashes, so those with the smallest ids of the first run are a random
    sample of it, the same one each time; it may hold odd images too, as the run does.
    """
    totals = [sum(signs(figures).values()) if len(figures) else np.zeros(0) for figures in runs]
    oddness: dict[str, float] = {}
    quota = -(-sample // (2 * len(runs)))
    for figures, sums in zip(runs, totals, strict=True):
        ranks = pc.rank(figures["image_id"], tiebreaker="first").to_numpy()
        order = np.lexsort((ranks, -sums))[: quota if len(figures) > sample else None]
        for key, value in zip(figures["key"].take(order).to_pylist(), sums[order], strict=True):
            if value >= ODD:
                oddness[key] = max(value, oddness.get(key, 0.0))
    odd = sorted(oddness, key=lambda key: (-oddness[key], key))[: sample // 2]
    ends = extremes(runs, sample // 4)
    by_id = runs[0].select(["image_id", "key"]).sort_by("image_id")
    drawn = set(by_id["key"].slice(0, sample - len({*odd, *ends})).to_pylist())
    values = dict.fromkeys({*odd, *ends, *drawn}, 0.0)
    for figures, sums in zip(runs, totals, strict=True):
        here = pc.is_in(figures["key"], value_set=pa.array(values, pa.string())).to_numpy()
        for key, value in zip(figures["key"].filter(here).to_pylist(), sums[here], strict=True):
            values[key] = max(values[key], float(value))
    choices = (Choice(key, value, key in drawn) for key, value in values.items())
    return sorted(choices, key=lambda choice: (-choice.oddness, choice.key))


def extremes(runs: list[pa.Table], most: int) -> list[str]:
    """The keys of at most `most` images that are worst or best by a figure of `measured`: in turn for each run and
    figure one of the worst and one of the best.
    """
    orders = []
    for figures in runs:
        ranks = pc.rank(figures["image_id"], tiebreaker="first").to_numpy()
        for name, figure in measured().items():
            if name in figures.column_names:
                values = numbers(figures, name)
                order = np.lexsort((ranks, values if figure.better == "high" else -values))
                keys = figures["key"].take(order[np.isfinite(values[order])]).to_pylist()
                orders += [keys[:most], keys[: -most - 1 : -1]]
    return list(dict.fromkeys(key for keys in zip_longest(*orders) for key in keys if key is not None))[:most]


def by_size(runs: list[Run], *, reference: str | None = None) -> list[Bins]:
    """The tables size_bins of runs, side by side where they were made against the same labels with the same options.

    reference: where labels are whose tables come first.
    """
    tables: dict[tuple, dict[int, pa.Table]] = {}
    for i, run in enumerate(runs):
        for task in run.folder.folders("metrics", "size_bins"):
            for file in run.folder.files("metrics", "size_bins", task):
                with run.folder.open("metrics", "size_bins", task, file) as opened, open_table(opened) as content:
                    if set(COUNTED) <= set(content.schema_arrow.names):
                        tables.setdefault((task, file), {})[i] = content.read()
    found = []
    for _, of_runs in sorted(tables.items()):
        one = next(iter(of_runs.values()))
        dataset, split, place = (one[name][0].as_py() for name in ("dataset", "split", "reference"))
        tables_of = [of_runs.get(i) for i in range(len(runs))]
        columns = ([tuple(each[name].to_pylist()) if each else () for each in tables_of] for name in COUNTED)
        found.append(Bins(place, " ".join(filter(None, (dataset, split))), one["low"].to_pylist(), *columns))
    return sorted(found, key=lambda bins: not _is_same(bins.reference, reference))


def lowered(title: str) -> str:
    """A title within a sentence: "Time in the method" with a small letter, but IoU and MAE as they are."""
    return title if title[1:2].isupper() or title[2:3].isupper() else title[:1].lower() + title[1:]


def notes(figures: pa.Table) -> Counter[str]:
    """How many images have each remark."""
    total: Counter[str] = Counter()
    for value, count in _counted(figures["note"]).items():
        total.update({note: count for note in (value or "").split(",") if note})
    return total


def reasons(figures: pa.Table) -> list[tuple[str, int]]:
    """The failed images by `stage: kind`, most first."""
    counts = _counted(figures["reason"])
    return sorted(((reason, n) for reason, n in counts.items() if reason), key=lambda pair: (-pair[1], pair[0]))


def histogram(values: list[np.ndarray], *, bins: int = 20, limits: tuple[float, float] | None = None) -> Histogram:
    """Counts of one figure between shared edges. values: one array per run; NaN is left out.

    With limits the edges are even between them. Else few whole numbers get a bin each, and positive values over more
    than two decades edges that grow by a constant factor.
    """
    values = [array[np.isfinite(array)] for array in values]
    everything = np.concatenate([*values, np.zeros(0)])
    low, high = limits or ((everything.min(), everything.max()) if len(everything) else (0, 1))
    if limits is None and len(everything) and high - low < bins and (everything % 1 == 0).all():
        edges = np.arange(max(low - 1, 0), high + 3) - 0.5  # with an empty bin beside, so that one value is one bar
    elif limits is None and low > 0 and high / low > 100:
        edges = np.geomspace(low, high, bins + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    medians = [float(np.median(array)) if len(array) else np.nan for array in values]
    return Histogram(edges, [np.histogram(array, edges)[0] for array in values], medians)


def _figures(part: pa.Table, least: int) -> pa.Table:
    lists = pc.fill_null(part["segments"].combine_chunks(), [])
    parents, segments = pc.list_parent_indices(lists), lists.flatten()
    counts = pc.greater_equal(segments.field("area"), least)
    parents, segments = parents.filter(counts).to_numpy(), segments.filter(counts)
    pixels = (part["height"].cast("float64").to_numpy() * part["width"].to_numpy()).clip(1)
    shares = segments.field("area").to_numpy(zero_copy_only=False) / pixels[parents]
    count = np.bincount(parents, minlength=len(part))
    first = np.zeros(len(part))
    first[parents[::-1]] = shares[::-1]  # written last, hence kept: the first mask of each row
    smallest, largest = np.ones(len(part)), np.zeros(len(part))
    np.minimum.at(smallest, parents, shares)
    np.maximum.at(largest, parents, shares)
    scores = pc.fill_null(segments.field("score"), np.nan).to_numpy(zero_copy_only=False).astype(np.float64)
    with np.errstate(invalid="ignore"):
        score = np.bincount(parents, scores, minlength=len(part)) / count
    reason = pc.replace_substring_regex(part["error"], r"(?s)^([^:]*: [^:]*):.*$", r"\1")
    columns = {name: part[name] for name in ("image_id", "key", "seconds", "attempt")}
    columns |= {"note": pc.fill_null(part["note"], ""), "reason": reason, "megapixels": pixels / 1e6, "count": count}
    columns |= {"share": first, "smallest": smallest, "largest": largest, "score": score}
    return pa.table(columns).select(SCHEMA.names).cast(SCHEMA)


def _measured(
    run: Run, name: str, figure: Figure, *, among: str | None = None, reference: str | None = None
) -> list[pa.Table]:
    """Tables of `key` and a figure, the last file by name first. among: only files that compare this run too.

    reference: only files against the labels there, if there are any.
    """
    files = sorted((f for f in run.folder.files(figure.folder) if f.endswith(".parquet")), reverse=True)
    tables, ours = [], []
    for file in files:
        with run.folder.open(figure.folder, file) as opened, open_table(opened) as content:
            compared = json.loads((content.schema_arrow.metadata or {}).get(b"raypipe.runs", b"[]"))
            columns = [each for each in ("key", figure.column, "reference") if each in content.schema_arrow.names]
            if {"key", figure.column} <= set(columns) and (among is None or among in compared):
                table = content.read(columns=columns).drop_null()
                values = table[figure.column].cast("float64")
                tables.append(pa.table({"key": table["key"].cast("string"), name: values}))
                if len(table) and "reference" in columns and _is_same(table["reference"][0].as_py(), reference):
                    ours.append(tables[-1])
    return ours or tables


def _is_same(place: str, reference: str | None) -> bool:
    """Whether two places are one; no reference is none."""
    return reference is not None and normalise(place).rstrip("/") == normalise(reference).rstrip("/")


def _distances(values: np.ndarray, *, floor: float, only_below: bool = False) -> np.ndarray:
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros(len(values))
    differences = np.median(known) - values
    scale = max(1.4826 * np.median(np.abs(np.median(known) - known)), floor)
    distances = np.maximum(differences, 0) if only_below else np.abs(differences)
    z = np.nan_to_num(distances / scale)
    return np.where(z >= ODD, z.clip(max=HEAVIEST), 0.0)


def _counted(column: pa.ChunkedArray) -> dict:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}
