"""Rating by people: how well names of segments fit, from the answers that pages of `export --format rating` save.

The scale and the means over batches are those of the user study of zero-guidance segmentation (ICCV 2023, supplement).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.evaluation.sums import Sums
from raypipe.evaluation.task import Task, Value
from raypipe.inputs import folders
from raypipe.inputs.items import LeftOut
from raypipe.inputs.maskfiles import Matches
from raypipe.storage import Location, join
from raypipe.types import BadImage

SCORES = 4  # 0, 1, 2, 3
OPEN = SCORES  # in place of a score: no answer
FITS = 2  # scores from here on: not wrong, if too general
COLUMNS = ("batch", "task", "question", "image_id", "segment", "label", "score")
MOST_BATCHES = 1_000_000  # and segments of an image; their numbers stay far below
MOST_BYTES = 1 << 28  # of a file of answers; a million have 80 MB
NO_LETTERS = re.compile(r"[\W_]+")  # spreadsheets change quotes, dashes and blanks


class Answers(NamedTuple):
    """What people said of an image's segments."""

    scores: dict[int, dict[int, int]]  # segment -> batch -> score, or OPEN
    labels: list[tuple[int, str, str]]  # segment, the name that it has there, and where that stands


@dataclass(frozen=True)
class Rating(Task):
    """How people rate the names of segments: 0 incorrect to 3 correct, each question in several batches.

    Values are means over the batches; `alpha` is their agreement. Labels are a folder of the CSVs that the pages save,
    or one file; with template.csv among them, what nobody answered is counted as open too.
    """

    COLUMNS = (
        ("questions", pa.int32()),  # segments that people were asked about
        ("answers", pa.map_(pa.int64(), pa.int64())),  # 5 * batch + score, or + 4 without an answer -> questions
        ("pairs", pa.list_(pa.float64(), SCORES * SCORES)),  # `coincidences` of the scores
        ("score", pa.float64()),  # the mean of the image's answers
    )
    LEAVES = ("label",)
    SHOWN = {
        "score": Value("Mean score", "of 0 to 3"),
        "share_2_or_3": Value("Share of scores 2 and 3"),
        "alpha": Value("Agreement of the batches", "Krippendorff's alpha, ordinal"),
        "open": Value("Questions without an answer", "share", better="low"),
        **{f"share_{n}": Value(f"Share of score {n}", better="high" if n >= FITS else "low") for n in range(SCORES)},
    }
    DETAILS = (
        (
            "batches",
            pa.list_(
                pa.struct(
                    [("batch", pa.int64()), ("score", pa.float64()), ("answers", pa.int64()), ("open", pa.int64())]
                    + [(f"share_{n}", pa.float64()) for n in range(SCORES)]
                    + [("share_2_or_3", pa.float64())]
                )
            ),
        ),
    )
    METRIC = "score"
    PER_IMAGE = ("score",)
    HOLDS = "answers"
    MATCHED_BY = "image_id"

    def match(self, folder: str, keys: Iterable[str]) -> Matches:
        """The answers to each image, as JSON in place of a file's location. keys: ids of images.

        Raises ValueError for what is no such CSV, and answers about other images only.
        """
        of_image, known = read_answers(folder), set(keys)
        location = {image_id: json.dumps(its) for image_id, its in of_image.items() if image_id in known}
        if not location:
            other = next(iter(of_image), None)
            got = "none" if other is None else f"only others, such as image_id {other!r}; is it another run's?"
            raise ValueError(f"rating: expected answers about the run's images in {Location(folder)}, got {got}")
        return Matches(location, [image_id for image_id in of_image if image_id not in known])

    def read(self, location: str, *, max_bytes: int, max_pixels: int) -> Answers:
        """The answers at a location of `match`. Raises BadImage for an impossible one, and for two to one question."""
        scores, labels, where = defaultdict(dict), [], {}
        for place, batch, question, segment, label, score in json.loads(location):
            batch, segment = _whole("batch", batch, place), _whole("segment", segment, place)
            score = _whole("score", score, place, SCORES) if score else OPEN
            known = scores[segment].setdefault(batch, OPEN)
            if OPEN not in (known, score):
                text = f"question {question} of batch {batch} is answered in {where[segment, batch]} and in {place}"
                raise BadImage("decode", "corrupt", f"{text}; keep one")
            if score != OPEN:
                scores[segment][batch], where[segment, batch] = score, place
            labels.append((segment, label, place))
        return Answers(dict(scores), labels)

    def fits(self, row: dict, label: Answers) -> bool:
        """Whether the answers are about segments of this row; raises BadImage where they are not."""
        names = [segment["label"] or "" for segment in row["segments"]]
        for segment, name, place in label.labels:
            ours = names[segment] if segment < len(names) else None
            if ours is None or _letters(ours) != _letters(name):
                text = f"{place}: segment {segment} is {name!r}, in the run it is {ours!r}: another run's answer?"
                raise BadImage("decode", "corrupt", text)
        return True

    def measure(self, row: dict, label: Answers) -> dict:
        """COLUMNS of one image."""
        every = [(batch, score) for its in label.scores.values() for batch, score in its.items()]
        given = [[score for score in its.values() if score != OPEN] for its in label.scores.values()]
        flat = [score for its in given for score in its]
        return {
            "questions": len(label.scores),
            "answers": Counter((SCORES + 1) * batch + score for batch, score in every),
            "pairs": coincidences(given, SCORES).ravel(),
            "score": sum(flat) / len(flat) if flat else None,
        }

    def summary(self, sums: Sums) -> dict[str, float | None]:
        """Means over the batches that have an answer, and the agreement of all."""
        batches = self.details(sums)["batches"]
        known = [batch for batch in batches if batch["answers"]]
        means = dict.fromkeys(self.SHOWN)
        for name in ("score", "share_2_or_3", *(f"share_{n}" for n in range(SCORES))):
            means[name] = sum(batch[name] for batch in known) / len(known) if known else None
        if asked := sum(batch["answers"] + batch["open"] for batch in batches):
            means["open"] = sum(batch["open"] for batch in batches) / asked
            means["alpha"] = alpha(np.reshape(sums.total("pairs"), (SCORES, SCORES)))
        return means

    def details(self, sums: Sums) -> dict:
        """A line per batch. A question that any batch has is open in each that has no answer to it."""
        places, asked = sums.places("answers"), sums.total("questions")
        batches = [_batch(batch, places, int(asked)) for batch in sorted({place // (SCORES + 1) for place in places})]
        return {"batches": batches}

    def lines(self, details: Mapping, printed: Sequence[Mapping] = ()) -> tuple[list[str], list[tuple[str, list]]]:
        """A line per batch."""
        heads = ["score", "answers", "open", *(f"share_{n}" for n in range(SCORES)), "share_2_or_3"]
        its = details["batches"]
        return [head.replace("_", " ") for head in heads], [
            (f"batch {batch['batch']}", [batch[head] for head in heads]) for batch in its
        ]


def read_answers(place: str) -> dict[str, list[tuple[str, ...]]]:
    """By image id the lines of a CSV, or of all in a folder: where they stand, batch, question, segment, label, score.

    Raises FileNotFoundError, and ValueError for what is no CSV of answers.
    """
    kind = folders.kind(place)
    if kind == "missing":
        raise FileNotFoundError(storage.missing(Location(place)))
    if kind == "folder":
        names = [name for name in folders.walk(place, LeftOut()) if name.lower().endswith(".csv")]
        files = {name: join(place, name) for name in names if not name.rpartition("/")[2].startswith("_")}
    else:
        files = {Location(place).rpartition("/")[2]: Location(place)}
    if not files:
        raise ValueError(f"rating: expected the CSVs that the pages save in {Location(place)}, got none")
    found = defaultdict(list)
    for name, file in files.items():
        for row in _lines(name, file):
            found[row["image_id"]].append(
                (row["place"], row["batch"], row["question"], row["segment"], row["label"], row["score"])
            )
    return dict(found)


def _lines(name: str, file: Location) -> Iterable[dict[str, str]]:
    """The lines of a CSV by column, and their `place`; those without any cell are left out.

    As pages save it, and as spreadsheets do: with semicolons or tabs, as UTF-16 or in the code page of Western Europe.
    """
    try:
        content = storage.read_bytes(file, max_bytes=MOST_BYTES)
    except BadImage as error:
        raise ValueError(f"rating: {name}: {error.message}") from None
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    first = text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    try:
        head = [cell.strip().lower() for cell in next(lines, [])]
        if missing := set(COLUMNS) - set(head):
            text = f"expected the columns {', '.join(COLUMNS)}, got none called {', '.join(sorted(missing))}"
            raise ValueError(f"rating: {name}: {text}")
        for cells in lines:
            if any(cells):
                cells = dict(zip(head, map(str.strip, cells + [""] * len(head)), strict=False))
                yield cells | {"place": f"{name} line {lines.line_num}"}
    except csv.Error as error:
        raise ValueError(f"rating: {name} line {lines.line_num}: no CSV: {error}") from None


def coincidences(units: Iterable[Collection[int]], levels: int) -> np.ndarray:
    """How often two raters gave a pair of values to one unit, each unit counted as often as it has values.

    units: the values of each, in 0 .. levels - 1; fewer than two say nothing. Returns float64 (levels, levels), which
    adds up over units (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, section C).
    """
    found = np.zeros((levels, levels))
    for values in units:
        if len(values) > 1:
            counts = np.bincount(values, minlength=levels)
            found += (np.outer(counts, counts) - np.diag(counts)) / (len(values) - 1)
    return found


def alpha(pairs: np.ndarray) -> float | None:
    """Krippendorff's alpha for ordered values: 1 = agreement, 0 = as by chance; None where all values are equal.

    pairs: of `coincidences`. The distance of two values is the number of values that lie from one to the other, of the
    two themselves half, squared.
    """
    counts = pairs.sum(1)
    total, below = counts.sum(), np.cumsum(counts) - counts / 2
    distance = (below[:, None] - below) ** 2
    expected = (np.outer(counts, counts) * distance).sum()
    return float(1 - (total - 1) * (pairs * distance).sum() / expected) if expected else None


def _batch(batch: int, places: Mapping[int, int], asked: int) -> dict:
    counts = [places.get((SCORES + 1) * batch + score, 0) for score in range(SCORES)]
    answers = sum(counts)
    known = {"batch": batch, "answers": answers, "open": asked - answers, "score": None, "share_2_or_3": None}
    if answers:
        known["score"] = sum(score * count for score, count in enumerate(counts)) / answers
        known["share_2_or_3"] = sum(counts[FITS:]) / answers
    return known | {f"share_{n}": count / answers if answers else None for n, count in enumerate(counts)}


def _whole(name: str, text: str, place: str, below: int = MOST_BATCHES) -> int:
    """A whole number of a cell, from 0; also as 2.0. Raises BadImage for anything else."""
    number, _, fraction = text.partition(".")
    if number.isdecimal() and not fraction.strip("0") and len(number) < 10 and int(number) < below:
        return int(number)
    text = f"{place}: expected a whole number from 0 to {below - 1:,} as {name}, got {text[:40]!r}"
    raise BadImage("decode", "corrupt", text)


def _letters(text: str) -> str:
    return NO_LETTERS.sub(" ", text).strip()


TASK = Rating
