"""`raypipe export`: a run's masks in one format, streamed into a new folder."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import repeat
from types import ModuleType

import pyarrow.compute as pc
import tyro

from raypipe import classes, lookup, segmenters
from raypipe.classes import Classes
from raypipe.evaluation import trust
from raypipe.export import corrected, doubtful, formats
from raypipe.export.about import About, csv_line
from raypipe.export.target import RECORD, Target
from raypipe.inputs.originals import Originals
from raypipe.run import Run, provenance, rows
from raypipe.storage import Location, normalise
from raypipe.types import BadImage, PatternSegmenter

LEFT_OUT = "_left_out.csv"
# A condition names what `raypipe trust` has measured; within quotes it is text.
NAMES_TRUST = re.compile(r"\b(mask_)?trust\b(?=([^']*'[^']*')*[^']*$)", re.IGNORECASE)
ADVICE = dict.fromkeys(
    ("original missing", "original permission"), ": give the --input (and --column) that was labelled"
)


@dataclass(frozen=True)
class Export:
    """Hand a run's masks to another tool, in a new folder."""

    run: tyro.conf.Positional[str]  # the run's folder: a path or a URI
    # what reads it: camtrapdp, coco, csv, cutout, cvat, fiftyone, geojson, hf, imagenets, labelstudio, megadetector,
    # png, rating, webdataset or yolo
    format: str
    output: str | None = None  # a new folder: a path or a URI; None = RUN/export/FORMAT
    # only segments for which this SQL condition holds, e.g. "share > 0.01 and score > 0.5", or "mask_trust > 0.3" and
    # "trust > 0.3" of the whole image, once `raypipe trust` has measured them
    where: str | None = None
    join: str | None = None  # Parquet table of one row per image (key or image_id) with more columns for --where
    # only the images whose masks are trusted least, the worst first: a share of those that match such as 2%, or their
    # number; needs `raypipe trust`. labelstudio and cvat get files of at most 5,000 tasks
    doubtful: str | None = None
    # what came back of Label Studio (JSON) or CVAT (COCO 1.0, the zip or a folder of several): takes the place of the
    # masks of its images; conditions still speak of those
    corrections: str | None = None
    category: str | None = None  # name of segments without a label; None = cluster 0, ..., pattern or the method's name
    # a data set's list such as voc2012, a file of names, or names separated by commas: categories have its numbers and
    # its order; None = those that occur, by name
    classes: str | None = None
    input: str | None = None  # as for `label`: finds the originals again in tars and tables, or when they have moved
    column: str | None = None  # as for `label`: the column of --input that holds URIs or images
    allow_private: bool = False  # as for `label`: originals may lie in a private network
    raters: int | None = None  # of rating: people who answer each question, a batch for each; None = 3
    questions: int | None = None  # of rating: on a page; None = 30
    sample: int | None = None  # of rating: ask about so many segments, drawn at random; None = about all
    seed: int | None = None  # of rating: another one draws another sample and other orders; None = 0
    deployments: str | None = None  # of camtrapdp: its table of deployments, CSV; their IDs are folders of the images
    overwrite: bool = False  # replace an earlier export in the output


@dataclass(frozen=True)
class Result:
    """How an export ended."""

    output: str
    format: str
    images: int  # exported
    segments: int
    seconds: float
    left_out: dict[str, int] = field(default_factory=dict)  # images that match but are not in the export, by reason
    remarks: dict[str, int] = field(default_factory=dict)  # what the user should know -> how often
    exit_code: int = 0  # 3 when originals are gone or changed

    def text(self) -> str:
        """What was written, and what was not."""
        lines = [f"{self.images:,} images with {self.segments:,} segments in {self.seconds:.1f} s: {self.output}"]
        lines += [f"{count:>9,}  {remark}" for remark, count in self.remarks.items()]
        if self.left_out:
            lines.append(f"{sum(self.left_out.values()):,} images left out, see {self.output}/{LEFT_OUT}")
            lines += [f"{count:>9,}  {reason}{ADVICE.get(reason, '')}" for reason, count in self.left_out.items()]
        return "\n".join(lines)


def export(options: Export) -> Result:
    """Write a run's masks in a format. Memory does not grow with the run but for some bytes per image.

    Raises ValueError or FileNotFoundError for wrong options, before anything is written. `_export.json` in the output
    says what it holds; its `finished` is null until all is written.
    """
    start, run, form = time.monotonic(), Run(options.run), formats.find(options.format)
    check(options, form)
    about = describe(run, options)
    leaves = (*rows.SMALL, *["embedding"] * (about.embeddings and getattr(form, "EMBEDDINGS", False)))
    images = _selected(run, options, leaves)
    if options.corrections:
        images, about = corrected.applied(run, options.corrections, images, about)
    if segmenters.is_exclusive(run.method):
        images = (row | {"segments": [each for each in row["segments"] if each["area"]]} for row in images)
    where_from = {"column": options.column, "allow_private": options.allow_private}
    originals = Originals(options.input, **where_from) if form.ORIGINALS else None
    own = {name: value for name in getattr(form, "OPTIONS", ()) if (value := getattr(options, name)) is not None}
    if hasattr(form, "choose"):
        images = form.choose(images, about, **own)
    output = Location(options.output or run.folder.location("export", options.format))
    target = Target(output)
    target.clear(overwrite=options.overwrite)
    record = {"run": str(run), "format": options.format, "where": options.where, "most_segments": about.most}
    record |= {"doubtful": options.doubtful, "corrections": options.corrections and str(Location(options.corrections))}
    record["started"] = provenance.now()
    target.folder.write_json(record | {"finished": None}, RECORD)
    counts, left_out = Counter(), Counter()
    with target, target.stream(LEFT_OUT) as file:
        file.write(csv_line(("key", "uri", "reason")))

        def leave_out(row: dict, reason: str, text: str) -> None:
            """List an image that matches but cannot be exported. reason: what is counted. text: the whole story."""
            left_out[reason] += 1
            file.write(csv_line((row["key"], row["uri"], text)))

        remarks = form.write(_exportable(images, form, originals, leave_out, counts), target, about, **own)
    if target.renamed:
        remarks["files have their image's id in the name: another image has that name"] = target.renamed
    result = Result(
        output=str(output),
        format=options.format,
        images=counts["images"],
        segments=counts["segments"],
        seconds=round(time.monotonic() - start, 3),
        left_out=dict(left_out.most_common()),
        remarks={remark: count for remark, count in remarks.items() if count},
        exit_code=3 if any(not reason.startswith("labelling failed") for reason in left_out) else 0,
    )
    target.folder.write_json(record | asdict(result) | {"finished": provenance.now()}, RECORD)
    return result


def check(options: Export, form: ModuleType) -> None:
    """Raise ValueError for options that have no effect or cannot work."""
    if not form.ORIGINALS and (options.input or options.column):
        raise ValueError(f"--input and --column have no effect: {options.format} needs no originals")
    if options.column and not options.input:
        raise ValueError("--column has no effect without --input")
    if not form.CATEGORIES and options.category:
        raise ValueError(f"--category has no effect: {options.format} does not name what segments show")
    if not form.CATEGORIES and options.classes:
        raise ValueError(f"--classes has no effect: {options.format} does not number what segments show")
    if options.category and options.classes:
        raise ValueError("--category has no effect with --classes, which names what segments show")
    for name in ("raters", "questions", "sample", "seed"):
        value = getattr(options, name)
        if value is not None and name not in getattr(form, "OPTIONS", ()):
            raise ValueError(f"--{name} has no effect: {options.format} asks nobody; add --format rating")
        if value is not None and value < 1 and name != "seed":
            raise ValueError(f"--{name} must be positive, got {value}")
    if options.deployments and "deployments" not in getattr(form, "OPTIONS", ()):
        raise ValueError(f"--deployments has no effect: {options.format} has no camera traps; add --format camtrapdp")
    lists = getattr(form, "LISTS", ())
    if lists and options.classes not in lists:
        raise ValueError(f"--format {options.format} needs the numbers of its data set: --classes {'|'.join(lists)}")
    if options.join and not options.where:
        raise ValueError("--join has no effect without --where, which may use its columns")
    source, output = (normalise(uri or "").rstrip("/") + "/" for uri in (options.input, options.output))
    if options.input and options.output and output.startswith(source):
        place = str(Location(options.output))
        raise ValueError(f"the output {place!r} lies inside the input: the next run would label its files")


def describe(run: Run, options: Export) -> About:
    """What formats tell of a run; reads its labels. Raises FileNotFoundError when the folder is no run."""
    method, configuration = run.method, run.configuration()
    labels, most, unlabelled = set(), 0, False
    least = int(segmenters.is_exclusive(method))  # pixels
    for batch in rows.batches(run, leaves=("label", "area")):
        lengths = pc.max(pc.list_value_length(batch["segments"])).as_py()
        found = pc.list_flatten(batch["segments"])
        found = pc.struct_field(found.filter(pc.greater_equal(pc.struct_field(found, "area"), least)), "label")
        most, unlabelled = max(most, lengths or 0), unlabelled or found.null_count > 0
        labels.update(label for label in pc.unique(found).to_pylist() if label is not None)
    known = None if options.classes is None else _numbered(run, options.classes, labels, unlabelled)
    kind = segmenters.find(method) if method in segmenters.names() else None  # it need not be installed here
    parts = () if kind is None or options.category or most > len(kind.parts) else tuple(kind.parts[:most])
    return About(
        method=method,
        settings=configuration["settings"],
        provenance={name: configuration["provenance"].get(name) for name in ("time", "packages", "weights")},
        licence=kind.licence if kind else "",
        caution=kind.caution if kind else "",
        where=options.where,
        doubtful=options.doubtful,
        labels=tuple(sorted(labels)),
        most=most,
        parts=parts,
        category=options.category or ("pattern" if kind and issubclass(kind, PatternSegmenter) else method),
        unlabelled=unlabelled or not labels,
        instances=most > 1 and not (labels or parts or options.category),
        embeddings=configuration["settings"].get("keep_embeddings", False),  # older runs do not say
        classes=known,
    )


def _selected(run: Run, options: Export, leaves: tuple[str, ...]) -> Iterator[dict]:
    """The rows that options ask for. leaves: as in `rows.select`. Raises ValueError and FileNotFoundError at once."""
    joined = [rows.read_joined(options.join)] if options.join else []
    amount = None if options.doubtful is None else doubtful.parse(options.doubtful)
    named = NAMES_TRUST.search(options.where or "") and not any("trust" in table.column_names for table in joined)
    if named or amount:
        doubtful.refuse_older(run)
    if named:
        joined.append(trust.read(run, {"image_id": "image_id", "trust": "trust", "mask_trust": "masks"}))
    select = partial(rows.select, run, where=options.where, joined=joined)
    if amount is None:
        return select(leaves=leaves)
    matching = (row["image_id"] for row in select(leaves=rows.CELLS)) if options.where else None
    order = doubtful.least_trusted(run, amount, matching)
    return doubtful.ordered(select(leaves=leaves), order, doubtful.trusts(run, order))


def _numbered(run: Run, text: str, labels: Iterable[str], unlabelled: bool) -> Classes:
    """The classes that a text means. Raises ValueError where segments of the run have no number in them."""
    known = classes.read(text)
    if unlabelled:
        raise ValueError(f"--classes: {run} has segments without a name, which have no number; leave it out")
    for label in sorted(labels):
        if classes.normalised(label) not in known.numbers:
            raise ValueError(f"--classes: {run} names segments {label!r}; {lookup.suggest(label, known.names)}")
    return known


def _exportable(
    images: Iterator[dict], form: ModuleType, originals: Originals | None, leave_out: Callable, counts: Counter
) -> Iterator[dict]:
    """The rows that the format can write, counted; with originals their `picture`. All others are listed."""

    def labelled() -> Iterator[dict]:
        for row in images:
            if row["error"] and not getattr(form, "FAILED", False):
                reason = ": ".join(row["error"].split(": ", 2)[:2])
                reason = reason if reason.startswith(corrected.STAGE) else f"labelling failed: {reason}"
                leave_out(row, reason, row["error"])
            else:
                yield row

    for row, content in originals.fetch(labelled()) if originals else zip(labelled(), repeat(None)):
        try:
            if isinstance(content, BadImage):
                raise content
            picture = {"picture": form.ORIGINALS(row, content)} if originals else {}
        except BadImage as error:
            leave_out(row, f"original {error.kind}", str(error))
            continue
        counts.update(images=1, segments=len(row["segments"]))
        yield row | picture
