"""The images of a run that are trusted least, first of all the worst: what people look at who correct masks."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, takewhile

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.evaluation import trust
from raypipe.export.about import About
from raypipe.run import Run
from raypipe.run.ids import Ids

MOST_TASKS = 5_000  # in a file: what Label Studio imports and CVAT shows as one task without trouble
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)%|(\d+)")


def parse(text: str) -> float | int:
    """What `--doubtful` asks for: a share in (0, 1] for `2%`, else a number of images. Raises ValueError."""
    match = AMOUNT.fullmatch(str(text).strip())
    amount = match and (float(match[1]) / 100 if match[1] else int(match[2]))
    if not amount or (match[1] and amount > 1):
        raise ValueError(f"--doubtful {text!r}: expected a share of the images such as 2%, or their number such as 500")
    return amount


def refuse_older(run: Run) -> None:
    """Raise ValueError where images were labelled after `raypipe trust`: none of them would be among the doubtful."""
    table = trust.read(run, ["image_id", "status"])
    known, newer = Ids(table.filter(pc.not_equal(table["status"], "failed")).to_batches()), 0
    for batch in run.commits().to_batches():
        good = batch.filter(pc.equal(batch["error"], ""))
        newer += len(good) - known.among(good).true_count
    if newer:
        text = f"{newer:,} images were labelled after its trust was measured"
        raise ValueError(f"{run}: {text}; measure it again: raypipe trust {run} [RUN ...]")


def least_trusted(run: Run, amount: float | int, matching: Iterable[str] | None = None) -> list[str]:
    """The ids of the images that are trusted least, the worst first.

    amount: as of `parse`, of the images that have a trust and are among `matching` (ids; None = all). Raises what
    `trust.least` raises for a run without trust.
    """
    order = trust.least(run, 1.0)
    if matching is not None:
        matching = set(matching)
        order = [image_id for image_id in order if image_id in matching]
    return order[: amount if isinstance(amount, int) else max(1, round(amount * len(order)))]


def trusts(run: Run, order: list[str]) -> dict[str, dict]:
    """By id the `trust` of images and of their `masks`, one per stored segment."""
    table = trust.read(run, ["image_id", "trust", "masks"])
    table = table.filter(pc.is_in(table["image_id"], value_set=pa.array(order, pa.string())))
    return {row["image_id"]: row for row in table.to_pylist()}


def ordered(images: Iterable[dict], order: list[str], trusts: Mapping[str, dict]) -> Iterator[dict]:
    """The rows with these ids in the order of the ids, with their `trust` and that of each segment.

    trusts: as of `trusts`. Rows wait in a temporary file.
    """
    rank, places = {image_id: i for i, image_id in enumerate(order)}, {}
    with tempfile.TemporaryFile() as file:
        for row in images:
            if row["image_id"] in rank:
                places[rank[row["image_id"]]] = file.tell()
                file.write(json.dumps(row).encode() + b"\n")
        for i in sorted(places):
            file.seek(places[i])
            row = json.loads(file.readline())
            known = trusts[row["image_id"]]
            of_masks = dict(enumerate(known["masks"] or ()))
            segments = [each | {"trust": of_masks.get(each["segment"])} for each in row["segments"]]
            yield row | {"trust": known["trust"], "segments": segments}


def files(
    images: Iterator[dict], about: About, *, is_full: Callable[[], bool] = bool
) -> Iterator[tuple[str, Iterator[dict]]]:
    """How a file's name ends and what it holds: all images, or of the doubtful ones MOST_TASKS at most.

    Each file's rows have to be taken before the next file is asked for. is_full: whether the present one has enough.
    """
    if about.doubtful is None:
        yield "", images
        return
    for number, first in enumerate(images, 1):
        room = takewhile(lambda _: not is_full(), range(MOST_TASKS - 1))
        yield f"-{number:05}", chain([first], (row for _, row in zip(room, images, strict=False)))
