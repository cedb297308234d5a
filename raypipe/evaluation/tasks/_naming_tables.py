"""The tables that `naming` writes besides: all thresholds, frequent names, and the histogram of similarities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from raypipe.evaluation.task import Chart
from raypipe.evaluation.tasks._naming_scores import CURVE

EDGES = np.arange(-10, 51) / 100  # of the histogram (figure 13); beyond them it has two bins more
MOST_NAMES = 100
KINDS = {"tt": "text to text", "st": "segment to text"}
THRESHOLDS = pa.schema(
    [
        ("metric", pa.string()),
        ("variant", pa.string()),  # union: all segments of a class together; best: the most similar one
        ("threshold", pa.float64()),
        ("is_headline", pa.bool_()),
        ("value", pa.float64()),
        ("published", pa.float64()),
        ("accepted", pa.int64()),  # segments
        ("recall", pa.float64()),
        ("precision", pa.float64()),
        ("without_accepted", pa.int64()),  # images, which leave the mean of the precision
        ("regions_below", pa.float64()),  # share of given regions whose similarity is below
    ]
)


def frequent(images: pa.Table, kinds: Iterable[str]) -> pa.Table:
    """The most frequent names of segments, by kind. images: with a column names_KIND of JSON lists for each."""
    schema = pa.schema([("of", pa.string()), ("name", pa.string()), ("segments", pa.int64())])
    rows = []
    for what in kinds:
        counts = Counter(name for each in images[f"names_{what}"].to_pylist() if each for name in json.loads(each))
        most = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_NAMES]
        rows += [{"of": what, "name": name, "segments": count} for name, count in most]
    return pa.Table.from_pylist(rows, schema=schema)


def histogram(counts: Sequence[int]) -> pa.Table:
    """The similarities of given regions and their classes. counts: (62,), those below and above EDGES too."""
    edges, total = EDGES.tolist(), sum(counts)
    columns = {"low": [None, *edges], "high": [*edges, None], "regions": counts}
    return pa.table(columns | {"share": [count / total for count in counts]})


def charts(rows: Iterable[Mapping], details: Mapping) -> list[Chart]:
    """What a page draws. rows: of THRESHOLDS, those of the union also with `best`. details: of the task."""
    found = []
    for kind, title in KINDS.items():
        its = [row for row in rows if row["metric"] == f"iou_{kind}" and row["variant"] == "union"]
        lines = {"ours": "value", "published": "published", "most similar segment": "best"}
        lines = {name: [row[column] for row in its] for name, column in lines.items()}
        lines = {name: line for name, line in lines.items() if any(value is not None for value in line)}
        marked = next((row["threshold"] for row in its if row["is_headline"]), None)
        if lines:
            remark = f"{title}, over the threshold of the cosine"
            found.append(Chart(f"IoU_{kind}", remark, [row["threshold"] for row in its], lines, marked))
    columns = {"recall": "curve", "precision": "precision_curve"}
    curves = {f"{name}, {KINDS[kind]}": details[f"{columns[name]}_{kind}"] for name in columns for kind in KINDS}
    if curves := {name: curve for name, curve in curves.items() if curve}:
        remark = "shares of classes and of accepted segments, over the IoU that they reach"
        found.append(Chart("Recall and precision", remark, CURVE.tolist(), curves))
    if counts := details["similarities"]:
        below = next((row["regions_below"] for row in rows if row["metric"] == "iou_st" and row["is_headline"]), None)
        remark = f"cosines of {sum(counts):,} regions of the ground truth and the names of their classes"
        remark += "" if below is None else f"; {below:.1%} are below the threshold"
        remark += f"; {counts[0] + counts[-1]:,} lie outside" if counts[0] + counts[-1] else ""
        inner = {"regions": counts[1:-1]}
        found.append(Chart("Regions and their classes", remark, EDGES.tolist(), inner, marked, are_bars=True))
    return found
