"""`raypipe report`: one self-contained HTML page about one or several runs: pictures, figures, errors, provenance."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from raypipe import segmenters
from raypipe.evaluation.labels import Labels, place_of
from raypipe.inputs.originals import Originals
from raypipe.maintenance import redo
from raypipe.pages import html
from raypipe.pictures import faces, legend
from raypipe.pictures.layers import draw
from raypipe.pictures.overlay import COLOURS
from raypipe.report import measures, truth, words
from raypipe.run import Run, attempts, provenance, rows
from raypipe.runtime.progress import count_of_images, speed
from raypipe.storage import put_at
from raypipe.types import RETRYABLE

PICTURE_BYTES = 15_000_000  # of all data URIs; text and script take the rest of the 20 MB that a page may have
MAX_IMAGES = 1000  # on a page: at a quarter of the default side they still fit
EXAMPLES = 3  # failed images shown per kind of error
REASONS = 40  # kinds of errors listed
MOST_NAMES = 20  # of segments in the head


@dataclass(frozen=True)
class Report:
    """One HTML page about one or several runs: pictures to look at, figures, errors, provenance, speed."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs; several are shown side by side
    output: str | None = None  # the page; None = report.html in the (first) run's folder
    # images on the page: up to half the oddest, up to a quarter the worst and best by what was measured, the rest at
    # random
    sample: int = 160
    side: int = 480  # pixels of a picture's longer side; less where the page would grow above 20 MB
    input: str | None = None  # where the originals are: for tars, tables, credentials, or when they moved
    column: str | None = None  # column of that input that holds URIs or images; None finds it
    allow_private: bool = False  # as for `label`: originals may lie in a private network
    # ground truth, as for `evaluate`: a folder of label images, or of boxes with --task boxes (VOC's XML, COCO's JSON)
    labels: str | None = None
    dataset: str | None = None  # instead of labels: duts-te, voc12, voc2012, ... (raypipe evaluate --help)
    root: str | None = None  # folder in which data sets lie
    split: str | None = None  # of a data set that has several; None = the papers'
    classes: str | None = None  # of labels of one's own for task semantic, as for `evaluate`
    task: str | None = None  # that reads the labels; None = what a data set holds, else semantic with classes, or masks
    label_kind: Literal["light", "ink", "alpha", "nonzero"] | None = None  # what is set in labels; None finds it
    label_value: int | str | None = None  # 1 or 1,2: the values, as stored, that are set in labels of classes
    # of a mask of several parts, which one is boxed: that with the largest box (also None), or with the most pixels
    box_rule: Literal["largest_bbox", "largest_area"] | None = None
    blur_faces: str | None = None  # ONNX file of a face detector, YuNet's or CenterFace's: blur what it finds


@dataclass(frozen=True)
class Result:
    """The page that was written."""

    report: str
    runs: int
    images: int  # rows of all runs
    shown: int  # images with pictures
    bytes: int
    seconds: float
    unavailable: int  # images shown without their photograph
    why: str  # what is wrong with the first of those; "" without one
    unlabelled: dict[str, int]  # images shown without ground truth where that was asked for, by why

    def text(self) -> str:
        """Where the page is."""
        size = f"{self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        lines = [f"{self.images:,} rows, {self.shown:,} images shown ({size})"]
        if self.unavailable:
            lines.append(f"{count_of_images(self.unavailable)} without photograph, the first: {self.why}")
        for why, count in self.unlabelled.items():
            lines.append(f"{count_of_images(count)} without ground truth: {why}")
        return "\n".join([*lines, f"report: {self.report}"])


class RunShown(NamedTuple):
    """One run as the page shows it."""

    run: Run
    name: str  # unique among the runs
    configuration: dict  # run.json
    attempts: list[attempts.Attempt]
    figures: pa.Table  # every image
    good: pa.Table  # without the failed ones


def report(options: Report) -> Result:
    """Write the page. Raises ValueError for options that cannot work and FileNotFoundError for what is no run."""
    check(options)
    start, blur = time.monotonic(), options.blur_faces and faces.load(options.blur_faces).blurred
    names, runs = rows.run_names(options.runs), [Run(folder) for folder in options.runs]
    source = truth.source(options)
    reference = source and str(place_of(source))
    shown = [read(run, name, runs, reference) for run, name in zip(runs, names, strict=True)]
    labels = source and truth.find(options, source, [key for run in shown for key in run.figures["key"].to_pylist()])
    cards = draw_cards(options, shown, labels, blur)
    about = labels and truth.about(labels, source, [card["truth"] for card in cards])
    panes = [pane for card in cards for pane in card["panes"] if pane]
    views = [name for name in titles() if any(name in pane["figures"] for pane in panes)]
    notes, odd = (sorted({each for pane in panes for each in pane[name]}) for name in ("notes", "odd"))
    differing = differences([run.configuration for run in shown])
    page = render(
        title=" and ".join(names),
        runs=[
            overview(run, [card["panes"][i] for card in cards]) | {"differing": differing[i]}
            for i, run in enumerate(shown)
        ],
        cards=cards,
        views=views,
        short=shortened(views),
        notes=notes,
        words=words.glossary({n: headings()[n] for n in views}, odd, notes, labels and labels.task.HOLDS),
        charts=charts(shown),
        truth=about,
        has_blur=blur is not None,
        has_names=any(card["picture"].names for card in cards),
        bins=measures.by_size(runs, reference=reference),
        errors=[errors(run) for run in shown],
        provenance=[_provenance(run) for run in shown],
        made=provenance.now(),
        version=version("raypipe"),
    ).encode("utf-8", "replace")
    written = _write(page, options, shown[0].run)
    images = sum(len(run.figures) for run in shown)
    seconds = round(time.monotonic() - start, 3)
    gone = [card["picture"].remark for card in cards if card["picture"].original is None]
    unlabelled = about["lacking"] if about else {}
    return Result(
        written, len(shown), images, len(cards), len(page), seconds, len(gone), next(iter(gone), ""), unlabelled
    )


def check(options: Report) -> None:
    """Raise ValueError for options that cannot work or have no effect."""
    if not options.runs:
        raise ValueError("report: name at least one run's folder")
    for name in ("sample", "side"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name} must be positive, got {getattr(options, name)}")
    if options.sample > MAX_IMAGES:
        raise ValueError(f"--sample can be {MAX_IMAGES} at most, or the page grows too large, got {options.sample}")
    if options.column and not options.input:
        raise ValueError("--column has no effect without --input")


def read(run: Run, name: str, runs: list[Run], reference: str | None = None) -> RunShown:
    """All that the page needs of a run but its masks. Raises FileNotFoundError when it is no run.

    runs: all of the page. reference: as `measures.read` takes it.
    """
    table = measures.read(run, [each for each in runs if each is not run], reference=reference)
    return RunShown(run, name, run.configuration(), attempts.read(run, table), table, measures.good(table))


def titles() -> dict[str, tuple[str, str]]:
    """Title and unit of each figure, in the order on the page."""
    return {
        "share": ("First mask", "% of the image"),
        "count": ("Masks per image", ""),
        "score": ("Score", ""),
        **{name: (figure.title, figure.unit) for name, figure in measures.measured().items()},
        "seconds": ("Time in the method", "s per image"),
        "megapixels": ("Image size", "megapixels"),
    }


def headings() -> dict[str, str]:
    """What each figure is called where its unit does not stand beside it; of a task's the unit says which one it is."""
    return {
        name: f"{title}, {unit}"
        if unit and name in measures.measured() and name not in ("trust", "agreement")
        else title
        for name, (title, unit) in titles().items()
    }


def shortened(views: list[str]) -> dict[str, str]:
    """What each of some figures is called where there is little room: without its unit if no other has the title."""
    count = Counter(titles()[name][0] for name in views)
    return {name: title if count[title] == 1 else headings()[name] for name, (title, _) in titles().items()}


# Pictures


def draw_cards(
    options: Report, shown: list[RunShown], labels: Labels | None = None, change: Callable | None = None
) -> list[dict]:
    """One card per chosen image, oddest first: its picture, per run what was found, and what is true.

    change: what is done to photographs first.
    """
    choices = measures.choose([run.good for run in shown], options.sample)
    keys = [choice.key for choice in choices]
    chosen = [_chosen(run, keys) for run in shown]
    panes_of = [[of_run.get(key) for of_run in chosen] for key in keys]
    wanted = [next(pane for pane in panes if pane)["row"] for panes in panes_of]
    contents = Originals(options.input, column=options.column, allow_private=options.allow_private).fetch(wanted)
    how = {"side": options.side, "max_bytes": PICTURE_BYTES // max(len(choices), 1), "change": change}
    classes = labels.task.names if labels and labels.task.HOLDS == "classes" else None
    if classes is None and legend.has_names(pane["row"]["segments"] for panes in panes_of for pane in panes if pane):
        classes = ()
    cards = []
    truths = truth.read(labels, wanted)
    for choice, panes, (row, content), true in zip(choices, panes_of, contents, truths, strict=True):
        found = [pane and truth.named(labels, pane["row"]) for pane in panes]
        picture = draw(content, found, truth=true.mask, classes=classes, **how)
        for pane, its, layers in zip(panes, found, picture.layers, strict=True):
            judged = labels.task.cells(its, true.label) if pane and true.boxes else {}
            pane and pane.update(row=its, layers=layers, judged=judged)
        values = [pane and pane["figures"] for pane in panes]
        card = {"choice": choice, "row": row, "picture": picture, "panes": panes, "figures": values}
        cards.append(card | {"truth": true._replace(mask=None, label=None)})  # whole images of all cards would add up
    return cards


def _chosen(run: RunShown, keys: list[str]) -> dict[str, dict]:
    """By key: a masks row, its figures and what is odd about it."""
    index = pc.index_in(pa.array(keys, pa.string()), value_set=run.good["key"].combine_chunks()).drop_null()
    if not len(index):
        return {}
    signs, chosen, panes = measures.signs(run.good), run.good.take(index), {}
    stored, is_exclusive = rows.take(run.run, chosen["image_id"].to_pylist()), segmenters.is_exclusive(run.run.method)
    figures = chosen.select([name for name in titles() if name in chosen.column_names]).to_pylist()
    for i, row, values in zip(index.to_pylist(), stored, figures, strict=True):
        numbered = [segment | {"number": number} for number, segment in enumerate(row["segments"])]
        row["segments"] = [segment for segment in numbered if segment["area"] or not is_exclusive]
        panes[row["key"]] = {
            "row": row,
            "run_name": run.name,
            "figures": {name: value for name, value in values.items() if value is not None and np.isfinite(value)},
            "odd": [name for name, strength in signs.items() if strength[i] >= measures.ODD and name != "note"],
            "notes": [note for note in (row["note"] or "").split(",") if note],
            "shares": [segment["area"] / max(row["height"] * row["width"], 1) for segment in row["segments"]],
        }
    return panes


# Figures


def overview(run: RunShown, panes: list[dict | None]) -> dict:
    """What the page's head says of a run. panes: what its cards show."""
    settings, name = run.configuration["settings"], run.configuration["method"]
    method = segmenters.find(name) if name in segmenters.names() else None  # None: of another version
    known = {
        name: values[np.isfinite(values)]
        for name in ("share", "count", *measures.measured())
        if name in run.good.column_names and np.isfinite(values := measures.numbers(run.good, name)).any()
    }
    rates = [attempt.rate for attempt in run.attempts if attempt.rate]
    found = [pane["row"]["segments"] for pane in panes if pane]
    smallest, count = (measures.numbers(run.good, name) for name in ("smallest", "count"))
    return {
        "name": run.name,
        "folder": str(run.run),
        "method": name,
        "finds": method.finds() if method else "",
        "caution": method.caution if method else "",
        "colours": legend.names(method, found),
        "names": [label for label in legend.by_label(found) if label],
        "most": max(map(len, found), default=0),
        "foreground": settings.get("foreground"),
        "refine": settings.get("refine"),
        "images": len(run.figures),
        "failed": len(run.figures) - len(run.good),
        "means": {name: float(values.mean()) for name, values in known.items()},
        "medians": {name: float(np.median(values)) for name, values in known.items()},
        "empty": int(((smallest == 0) | (count == 0)).sum()),
        "rate": speed(rates[-1]).partition(" ") if rates else None,
        "notes": measures.notes(run.good).most_common(12),
    }


def differences(configurations: list[dict]) -> list[dict]:
    """Of each run the settings that other runs of the page have other values of; nothing unless all have one method.

    What a run does not say, as one of an older version, is no difference.
    """
    settings = [configuration["settings"] for configuration in configurations]
    if len({configuration["method"] for configuration in configurations}) > 1:
        return [{} for _ in settings]
    names = [name for name, value in settings[0].items() if any(its.get(name, value) != value for its in settings)]
    return [{name: its[name] for name in names if name in its} for its in settings]


def charts(shown: list[RunShown]) -> list[dict]:
    """A histogram per figure that some run has, over all its good images."""
    histograms = []
    for name, (title, unit) in titles().items():
        values = [measures.numbers(run.good, name) if name in run.good.column_names else np.zeros(0) for run in shown]
        known = np.concatenate([array[np.isfinite(array)] for array in values])
        if not len(known):
            continue
        are_shares = name in ("share", *measures.measured()) and ((known >= 0) & (known <= 1)).all()
        histogram = measures.histogram(values, limits=(0, 1) if are_shares else None)
        edges, medians = histogram.edges, histogram.medians
        half = 0.5 * (edges[0] % 1 == 0.5)  # bins of whole numbers begin and end between two
        ends = {"low": edges[0] + half, "high": edges[-1] - half}
        ticks = [np.interp(m, edges, np.linspace(0, 1, len(edges))) if np.isfinite(m) else None for m in medians]
        shown_runs = [i for i, counts in enumerate(histogram.counts) if counts.sum()]
        facts = {"title": title, "unit": unit, "scale": 100 if name == "share" else 1}
        histograms.append(facts | ends | {"runs": shown_runs, "histogram": histogram, "ticks": ticks})
    return histograms


def errors(run: RunShown) -> dict:
    """The failed images of a run by `stage: kind`, with examples and the command that tries them again."""
    reasons = measures.reasons(run.figures)
    first = {}
    for reason, _ in reasons[:REASONS]:
        failed = run.figures.filter(pc.equal(run.figures["reason"], reason))
        first[reason] = failed.sort_by("image_id").slice(0, EXAMPLES)["image_id"].to_pylist()
    read = {row["image_id"]: row for row in rows.take(run.run, [*itertools.chain(*first.values())])}
    groups = []
    for reason, count in reasons[:REASONS]:
        examples = [row | {"message": row["error"].split(": ", 2)[-1]} for row in map(read.get, first[reason])]
        retryable = reason.partition(": ")[2] in RETRYABLE
        groups.append({"reason": reason, "count": count, "examples": examples, "retryable": retryable})
    total = len(run.figures) - len(run.good)
    command = "\n".join(f"{line} --retry-errors" for line in redo.commands(run.run)) if total else ""
    return {"name": run.name, "groups": groups, "total": total, "more": len(reasons) - len(groups), "command": command}


def _provenance(run: RunShown) -> dict:
    made = run.configuration["provenance"]
    machine = (made.get("machine") or {}).items()
    facts = {"run": str(run.run), "made": made.get("time"), "python": made.get("python")}
    facts |= {"git commit": made.get("git_commit"), "schema": run.configuration.get("schema")}
    facts |= {"machine": ", ".join(f"{name} {value}" for name, value in machine if value is not None)}
    return {
        "name": run.name,
        "method": run.configuration["method"],
        "facts": {name: value for name, value in facts.items() if value},
        "settings": run.configuration["settings"],
        "weights": made.get("weights") or {},
        "packages": made.get("packages") or {},
        "attempts": run.attempts[::-1],
    }


# The page


def render(**content) -> str:
    """The page's HTML."""
    content |= {"titles": headings(), "metrics": [*measures.measured(), "score"], "meaning": words.NOTES | words.SIGNS}
    content |= {"colours": [f"#{bytes(colour).hex()}" for colour in COLOURS]}
    content |= {
        "number": _number,
        "commas": "{:,}".format,
        "of_images": count_of_images,
        "kind": words.kind,
        "most_names": MOST_NAMES,
    }
    content["two"] = lambda value: "–" if value is None else f"{value:.2f}"
    content |= {"lowered": measures.lowered, "better": {n: each.better for n, each in measures.measured().items()}}
    return html.render("report.html.j2", "report.js", **content)


def _number(value: float | None, scale: float = 1) -> str:
    """Three significant digits, whole thousands in full."""
    if value is None or not np.isfinite(value):
        return "–"
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def _write(page: bytes, options: Report, first: Run) -> str:
    if options.output is None:
        first.folder.write(page, "report.html")
        return str(first.folder.location("report.html"))
    return put_at(options.output, page, option="--output")
