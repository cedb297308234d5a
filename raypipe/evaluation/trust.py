"""`raypipe trust`: how far each mask of a run can be trusted, learned without labels from what agrees."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from raypipe import schema
from raypipe.evaluation import datasets, tasks
from raypipe.evaluation.calibration import FEWEST, MISS, Correlation, Curves, calibrated, rank_correlation
from raypipe.evaluation.combined import Ranks, loadings, slopes
from raypipe.evaluation.labels import WHY, Labels, match, nothing
from raypipe.evaluation.measured import SIGNALS, WITHIN_RUN, Measured, measure
from raypipe.evaluation.task import written
from raypipe.inputs.maskkinds import chosen
from raypipe.inputs.originals import Originals
from raypipe.lookup import one_line
from raypipe.run import Run, rows
from raypipe.storage import open_table

PLACE = ("metrics", "trust", "trust.parquet")  # in each run's folder
TERMINAL_IMAGES = 10  # the least trusted, by name
TASKS = ("pattern", "saliency")  # whose labels are one mask an image
# `raypipe trust`: one row per image of the run, in no order.
TRUST = pa.schema(
    [
        ("image_id", pa.string()),
        ("key", pa.string()),
        # of the first mask: the share of all runs' masks that are trusted less; null if failed
        ("trust", pa.float64()),
        ("dice", pa.float64()),  # expected of it; null without labels
        ("low", pa.float64()),  # where it lies for about 90 % of images; null without labels
        ("high", pa.float64()),
        ("masks", pa.list_(pa.float64())),  # trust of each segment, in their order
        *((name, pa.float64()) for name in SIGNALS),  # of the first mask; null where not measured
        ("status", pa.string()),  # ok, failed, or what keeps the image from being compared
    ],
    metadata={"raypipe.schema": str(schema.VERSION)},
)


@dataclass(frozen=True)
class Trust:
    """Say which masks can be trusted, without labels: by agreement of runs, stability, edges and more; several runs of
    different methods tell most."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs over images with the same keys; one works too
    polarity: Literal["fixed", "best"] = "fixed"  # best: a mask may stand for the rest of the foreground instead
    originals: bool = True  # read the photographs, for edges and contrast
    input: str | None = None  # as for `label`: finds the originals again in tars and tables, or when they have moved
    column: str | None = None  # as for `label`: the column of --input that holds URIs or images
    allow_private: bool = False  # as for `label`: originals may lie in a private network
    # what `evaluate` takes: a folder of masks, or corrections of Label Studio or CVAT, of some of the images, best of
    # images drawn at random; trust is then also told as expected Dice with an interval
    labels: str | None = None
    dataset: str | None = None  # instead of labels: a data set of masks, such as ecssd
    root: str | None = None  # folder in which data sets lie
    split: str | None = None  # of a data set that has several
    task: str | None = None  # what the labels show: pattern or saliency; None = what the data set is for, or pattern
    label_kind: Literal["light", "ink", "alpha", "nonzero"] | None = None  # as for `evaluate`
    label_value: int | str | None = None  # as for `evaluate`
    max_pixels: int = 100_000_000  # labels with more pixels are listed as unreadable
    max_bytes: int = 500_000_000  # label files with more bytes are listed as unreadable


@dataclass(frozen=True)
class OfRun:
    """What became of one run."""

    table: str  # where its rows are
    images: int  # that have a trust
    trust: float | None  # mean over them
    least: list[tuple[str, float]]  # the least trusted: key, trust
    dice: float | None = None  # expected, mean over the images; None without enough labels
    error: float | None = None  # mean absolute difference from a labelled image's Dice, that image left out
    correlation: Correlation | None = None  # of trust with Dice, over its labelled images


@dataclass(frozen=True)
class Trusted:
    """What the masks of some runs are trusted by, and which are trusted least."""

    runs: dict[str, OfRun]  # by a short name
    weights: dict[str, float]  # by signal, what it counts: 0 where not measured, or against the agreement
    labels: dict[str, int]  # images by the status of their label; {} without labels
    correlation: Correlation | None = None  # of trust with Dice, over the first masks of all runs
    of_images: Correlation | None = None  # of the images' means over the runs
    left_out: dict[str, int] = field(default_factory=dict)  # by reason: failed, compared with none, without an original
    remarks: list[str] = field(default_factory=list)  # what to know of the labels

    def text(self) -> str:
        """The runs, what the signals count, how far labels confirm it, and the images to look at first."""
        lines = [f"{'images':>9} {'trust':>7} {'Dice':>7}" if self.labels else f"{'images':>9} {'trust':>7}"]
        for name, run in self.runs.items():
            dice = f" {_shown(run.dice):>7}" * bool(self.labels)
            lines.append(f"{run.images:>9,} {_shown(run.trust):>7}{dice}  {name}")
        lines.append("what trust is made of, by how far each goes along with the agreement")
        lines += [f"{share:>9.2f}  {name}: {SIGNALS[name]}" for name, share in self.weights.items() if share]
        lines += [f"{count:>9,}  {reason}" for reason, count in self.left_out.items()]
        lines += self._confirmed() if self.labels else []
        for name, run in ((name, run) for name, run in self.runs.items() if run.least):
            lines.append(f"least trusted of {name}" if len(self.runs) > 1 else "least trusted")
            lines += [f"{trust:>9.3f}  {key}" for key, trust in run.least]
        return "\n".join([*lines, *(f"per image: {run.table}" for run in self.runs.values())])

    def _confirmed(self) -> list[str]:
        """What the labels say."""
        count = self.labels.get("ok", 0)
        lines = [
            f"{count:,} labels; rank correlation of trust, which knows none of them, with Dice (90 % of bootstraps)"
        ]
        named = {**{name: run.correlation for name, run in self.runs.items()}, "masks of all runs": self.correlation}
        named["images, means over the runs"] = self.of_images
        for name, each in named.items() if len(self.runs) > 1 else [("", self.correlation)]:
            lines.append(
                f"{'-':>9}  {name}"
                if each is None
                else f"{each.value:>9.2f}  {each.low:.2f} to {each.high:.2f}  {name}"
            )
        lines += [f"{self.labels[status]:>9,}  {why}" for status, why in WHY.items() if self.labels.get(status)]
        errors = [run.error for run in self.runs.values() if run.error is not None]
        if errors:
            lines.append(f"expected Dice misses that of a labelled image by {np.mean(errors):.2f} when it is left out")
            lines.append(
                "the Dice of about 90 % of images like the labelled ones lies between low and high (jackknife+)"
            )
        else:
            lines.append(f"fewer than {FEWEST} labels: no Dice is expected of other images")
        return [*lines, *self.remarks]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def trust(options: Trust) -> Trusted:
    """Measure the signals of all masks, combine them, and write TRUST into each run; earlier tables are replaced.

    Streams as `agree` does: what was measured goes through a temporary file, ranks and weights are learned from a
    sample of at most 50,000 masks. Raises ValueError for no run, the same one twice, one without rows, labels of which
    none belongs to an image or can be used, and where nothing could be measured that tells masks apart;
    FileNotFoundError for a folder that is no run.
    """
    names = rows.run_names(options.runs)
    if not names:
        raise ValueError("trust needs a run, or several over the same images")
    runs = [Run(folder) for folder in options.runs]
    for run in runs:
        if not run.parts():
            raise ValueError(f"{run} has no rows")
    if not options.originals and (options.input or options.column):
        raise ValueError("--input and --column have no effect with --no-originals, which reads none")
    found_by = {"column": options.column, "allow_private": options.allow_private}
    originals = Originals(options.input, **found_by) if options.originals else None
    with tempfile.TemporaryDirectory(prefix="raypipe-") as folder:
        path = os.path.join(folder, "measured.arrow")
        labels = _labels(options, runs)
        measured = measure(runs, path, polarity=options.polarity, originals=originals, labels=labels)
        learned = Learned(measured.sample.rows(), len(runs))
        _check(measured, learned, ", ".join(names), labels, options)
        confirmed = Confirmed(measured.labelled.rows(), learned)
        curves = [confirmed.curves(index) for index in range(len(runs))]
        contents = [written(_rows(measured, i, learned, curves[i]), TRUST) for i in range(len(runs))]
    for run, content in zip(runs, contents, strict=True):
        run.folder.write(content, *PLACE)
    remarks = _remarks(labels, confirmed.trust) if labels else []
    return _summary(names, runs, contents, measured, learned, confirmed, curves, remarks)


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

    Raises FileNotFoundError where there is none, and ValueError for one that was cut.
    """
    stored = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns)
    if PLACE[-1] not in run.folder.files(*PLACE[:-1]):
        raise FileNotFoundError(f"{run} has no table of trust; make it first: raypipe trust {run} [RUN ...]")
    try:
        with run.folder.open(*PLACE) as file, open_table(file) as content:
            return content.read([old or new for new, old in stored.items()]).rename_columns(list(stored))
    except pa.ArrowInvalid as error:
        place = run.folder.location(*PLACE)
        raise ValueError(f"{place}: {one_line(error)}; make it again: raypipe trust {run} [RUN ...]") from None


def _labels(options: Trust, runs: Sequence[Run]) -> Labels | None:
    """The labels that the options name, of the images of any run; None for none. Raises ValueError."""
    kind = chosen(options.label_kind, options.label_value)
    if options.labels is None and options.dataset is None:
        for name in ("root", "split", "task", "label_kind", "label_value"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} has no effect without --labels or --dataset")
        return None
    source = datasets.chosen(options)
    name = options.task or datasets.task_of(options.dataset)
    if name not in TASKS:
        raise ValueError(
            f"--task {name!r}: trust is held against labels of one mask an image; choose {' or '.join(TASKS)}"
        )
    keys = dict.fromkeys(
        key for run in runs for table in rows.columns(run, ["key"]) for key in table["key"].to_pylist()
    )
    limits = {"max_bytes": options.max_bytes, "max_pixels": options.max_pixels}
    return match(tasks.find(name)(), source, keys, of="an image of the runs", kind=kind, **limits)


def _check(measured: Measured, learned: Learned, names: str, labels: Labels | None, options: Trust) -> None:
    """Raise ValueError where masks cannot be told apart, or no label can be used."""
    if set(measured.statuses) == {"failed"}:
        raise ValueError(f"all images of {names} failed; raypipe report RUN tells why")
    if not learned.weights.any():
        ways = "give runs of other methods too or label with --jitter; edges and contrast need originals (--input)"
        ways += "".join(f"; {count:,} {why}" for why, count in measured.statuses.most_common() if why != "ok")
        raise ValueError(f"nothing was measured that tells the masks of {names} apart: {ways}")
    if labels and not measured.labels["ok"]:
        reason = next(iter(labels.reasons.values()), "")
        raise nothing(names, labels.dataset or options.labels, measured.labels, measured.examples, reason)


def _remarks(labels: Labels, trust: np.ndarray) -> list[str]:
    """What to know of labels. trust: of the masks of labelled images."""
    lines = [f"{key}: {reason}" for key, reason in sorted(labels.reasons.items())[:1]]
    if labels.unused:
        lines.append(f"{len(labels.unused):,} labels belong to no image, such as {labels.unused[0]!r}")
    if (beyond := 1 - np.ptp(trust)) > MISS:  # of the ranks that trust is made of
        span = f"{trust.min():.2f} to {trust.max():.2f}"
        lines.append(
            f"labelled masks have trust {span}: of the {beyond:.0%} beyond, expected Dice and interval are a guess"
        )
    return lines


class Learned:
    """What makes signals one number: ranks of the signals, and what each counts."""

    def __init__(self, sample: list[dict], count: int):
        """sample: rows of MEASURED that have not failed. count: of runs."""
        masks = Masks.of(sample)
        self._ranks = [
            Ranks(masks.values[:, i], masks.weight, masks.run * (name in WITHIN_RUN)) for i, name in enumerate(SIGNALS)
        ]
        ranks = self._ranked(masks)
        self._slopes = np.ones((count, len(SIGNALS)))
        for i, name in enumerate(SIGNALS):
            if name in WITHIN_RUN:
                for run, slope in slopes(ranks[:, i], ranks[:, 0], masks.weight, masks.run).items():
                    self._slopes[run, i] = slope
        ranks = ranks * self._slopes[masks.run]
        self.weights = loadings(ranks, masks.weight)
        self._order = Ranks(self._scores(ranks), masks.weight, 0 * masks.run)

    def __call__(self, measured: list[dict]) -> list[np.ndarray]:
        """The trust of the masks of each of some rows of MEASURED that have not failed."""
        masks = Masks.of(measured)
        trust = self._order(self._scores(self._ranked(masks) * self._slopes[masks.run]), 0 * masks.run)
        return np.split(trust, np.flatnonzero(masks.first)[1:]) if measured else []

    def _ranked(self, masks: Masks) -> np.ndarray:
        """Ranks of the signals about their middle, -0.5..0.5: float64 (N, K), NaN where one is missing."""
        of = zip(SIGNALS, self._ranks, masks.values.T, strict=True)
        return np.column_stack([ranks(its, masks.run * (name in WITHIN_RUN)) - 0.5 for name, ranks, its in of])

    def _scores(self, ranks: np.ndarray) -> np.ndarray:
        """Ranks by what they count; one that is missing counts as the middle, which says nothing.

        Rounded, so that ties do not hang on how many are summed at once.
        """
        return np.round(np.nan_to_num(ranks) @ self.weights, 12)


@dataclass(frozen=True)
class Masks:
    """The masks of some images, one after the other."""

    run: np.ndarray  # int64 (N,)
    first: np.ndarray  # bool (N,): an image's first mask
    weight: np.ndarray  # float64 (N,): those of one image and run add up to 1
    values: np.ndarray  # float64 (N, K): of SIGNALS, NaN where not measured

    @classmethod
    def of(cls, measured: list[dict]) -> Masks:
        """measured: rows of MEASURED that have not failed."""
        counts = np.array([len(row["agreement"]) for row in measured], np.int64)
        first = np.zeros(counts.sum(), bool)
        first[np.cumsum(counts) - counts] = True
        values = [[value for row in measured for value in row[name]] for name in SIGNALS]
        return cls(
            run=np.repeat(np.array([row["run"] for row in measured], np.int64), counts),
            first=first,
            weight=np.repeat(1 / counts, counts),
            values=np.array(values, np.float64).T,
        )


class Confirmed:
    """The first masks of labelled images, with their trust and their Dice."""

    def __init__(self, labelled: list[dict], learned: Learned):
        """labelled: rows of MEASURED with a Dice."""
        keys = {key: i for i, key in enumerate(dict.fromkeys(row["key"] for row in labelled))}
        self.images = np.array([keys[row["key"]] for row in labelled], np.int64)
        self.runs = np.array([row["run"] for row in labelled], np.int64)
        self.trust = np.array([its[0] for its in learned(labelled)])
        self.dice = np.array([row["dice"][0] for row in labelled])

    def curves(self, run: int) -> Curves | None:
        """Expected Dice of a run's masks; None with too few labels."""
        return calibrated(self.images, self.runs, self.trust, self.dice, run)

    def correlation(self, run: int | None = None) -> Correlation | None:
        """Of trust and Dice over the masks of a run, or of all."""
        its = slice(None) if run is None else self.runs == run
        return rank_correlation(self.images[its], self.trust[its], self.dice[its])

    def of_images(self) -> Correlation | None:
        """Of the images' mean trust and mean Dice over the runs."""
        numbers, inverse, counts = np.unique(self.images, return_inverse=True, return_counts=True)
        means = (np.bincount(inverse, its) / counts for its in (self.trust, self.dice))
        return rank_correlation(numbers, *means) if len(numbers) else None


def _rows(measured: Measured, run: int, learned: Learned, curves: Curves | None) -> Iterator[dict]:
    """Rows of TRUST of one run."""
    for batch in measured.batches(run):
        of_good = iter(learned([row for row in batch if row["status"] != "failed"]))
        for row in batch:
            known = {name: row[name] for name in ("image_id", "key", "status")}
            if row["status"] == "failed":
                yield known
                continue
            masks = next(of_good)
            first = {name: None if row[name][0] is None or np.isnan(row[name][0]) else row[name][0] for name in SIGNALS}
            expected = dict(zip(("dice", "low", "high"), curves(masks[0]), strict=True)) if curves else {}
            yield known | first | expected | {"trust": float(masks[0]), "masks": masks[: row["masks"]].tolist()}


def _summary(
    names: list[str],
    runs: list[Run],
    contents: list[bytes],
    measured: Measured,
    learned: Learned,
    confirmed: Confirmed,
    curves: list[Curves | None],
    remarks: list[str],
) -> Trusted:
    """What the terminal shows. contents: of each run its table TRUST."""
    found = {}
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        table = open_table(contents[i]).read(columns=["key", "trust", "dice"])
        table = table.filter(pc.is_valid(table["trust"])).sort_by([("trust", "ascending"), ("key", "ascending")])
        means = {column: pc.mean(table[column]).as_py() for column in ("trust", "dice")}
        first = [(row["key"], row["trust"]) for row in table.slice(0, TERMINAL_IMAGES).to_pylist()]
        error = curves[i].error if curves[i] else None
        place, correlation = str(run.folder.location(*PLACE)), confirmed.correlation(i)
        found[name] = OfRun(place, len(table), **means, least=first, error=error, correlation=correlation)
    reasons = measured.statuses + Counter({"without an original: no edges, no contrast": measured.without_original})
    left_out = {reason: count for reason, count in reasons.most_common() if reason != "ok"}
    weights = dict(zip(SIGNALS, learned.weights.tolist(), strict=True))
    of_all = confirmed.correlation(), confirmed.of_images()
    return Trusted(found, weights, dict(measured.labels), *of_all, left_out, remarks)
