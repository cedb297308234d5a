"""The tables that `naming` writes besides: all thresholds, frequent names, and the histogram of similarities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

EDGES = np.arange(-10, 51) / 100  # of the histogram (figure 13); beyond them it has two bins more
MOST_NAMES = 100
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
