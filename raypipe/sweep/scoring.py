"""The later settings of a trial scored on its stored masks."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import masks, storage
from raypipe.evaluation import tasks
from raypipe.inputs import maskfiles
from raypipe.inputs.manifest import fetch
from raypipe.pipeline import stages
from raypipe.pipeline.job import plan_work
from raypipe.run import Run, parquet_bytes, rows
from raypipe.storage import map_ahead
from raypipe.sweep.search import canonical
from raypipe.sweep.trials import LABEL, Trial, _all_later, read_state
from raypipe.types import BadImage, Segments

SCORES = "scores.parquet"
LEAVES = ("size", "counts", "score", "label", "soft")  # fields of a stored segment that scoring may need


def read_scores(output: str, schema: pa.Schema) -> pa.Table:
    """The scores of a trial, with the columns `later` (the setting as JSON) and LABEL; no rows before the first."""
    for name in ("later", LABEL):
        schema = schema.append(pa.field(name, pa.string()))
    content = Run(output).folder.read(SCORES)
    found = schema.remove_metadata().empty_table() if content is None else pq.read_table(io.BytesIO(content))
    return found if found.schema.names == schema.names else schema.remove_metadata().empty_table()  # other columns


def current(scores: pa.Table, images: pa.Table) -> pa.Table:
    """The scores of these images against the labels that they have now. images: `with_labels`."""
    pairs = (pc.binary_join_element_wise(table["image_id"], table[LABEL], "/") for table in (scores, images))
    scored, wanted = pairs
    return scores.filter(pc.is_in(scored, value_set=wanted.combine_chunks()))


def score(trial: Trial, *, threads: int = 1) -> pa.Table:
    """Score the later settings, those of earlier sweeps too, on the stored masks. Returns all scores.

    What was scored before is kept, unless its label was unusable or has changed.
    """
    task, run = tasks.find(trial.task), trial.run
    trial = replace(trial, later=tuple(_all_later(trial, read_state(trial.output)).values()))
    known = current(read_scores(trial.output, task.SCHEMA), trial.images)
    known = known.filter(pc.is_in(known["status"], value_set=pa.array(["ok", "failed"])))
    scored: dict[str, set[str]] = {}
    for image_id, later in zip(known["image_id"].to_pylist(), known["later"].to_pylist(), strict=True):
        scored.setdefault(image_id, set()).add(later)
    wanted = {canonical(setting): setting for setting in trial.later}
    committed = set(run.commits()["image_id"].to_pylist()).intersection(trial.images["image_id"].to_pylist())
    missing = {image_id: wanted.keys() - scored.get(image_id, set()) for image_id in committed}
    if not any(missing.values()):
        return known
    scorer = Scorer(trial)
    todo = (row for table in rows.batches(run, leaves=LEAVES) for row in table.to_pylist())
    todo = (row for row in todo if missing.get(row["image_id"]))
    lists = map_ahead(lambda row: scorer(row, missing[row["image_id"]]), todo, depth=threads)
    found = [measured for rows_of_image in lists for measured in rows_of_image]
    table = pa.concat_tables([known, pa.Table.from_pylist(found, schema=known.schema)])
    run.folder.write(parquet_bytes(table), SCORES)
    return table


class Scorer:
    """Scores many later settings on the stored masks of one image: decoded once, refined once per refiner setting."""

    def __init__(self, trial: Trial):
        self._trial, self.task = trial, tasks.find(trial.task)
        self._places = {row["image_id"]: row for row in trial.images.to_pylist()}
        self._settings = {canonical(setting): setting for setting in trial.later}
        work = plan_work(trial.job, trial.segmenter, None)
        self._work = replace(work, keep_soft="soft" in self.task.LEAVES)

    def __call__(self, row: dict, later: set[str]) -> list[dict]:
        """Rows of the task's table with the column `later`. row: one of the run, with soft masks."""
        known = {name: row[name] for name in ("image_id", "key", "height", "width")}
        known |= {"method": self._trial.segmenter.name, "reference": storage.redact(self._trial.labels)}
        known[LABEL] = self._places[row["image_id"]][LABEL]
        label, status = self.label(row)
        if status != "ok":
            return [known | {"status": status, "later": setting} for setting in later]
        found = []
        for setting, labelled in self.labelled(row, later):
            measured = (
                {"status": "failed"} if labelled["error"] else self.task.score(labelled, label) | {"status": "ok"}
            )
            found.append(known | measured | {"later": setting})
        return found

    def label(self, row: dict) -> tuple[np.ndarray | None, str]:
        """The image's label, and the status that its rows get, as `evaluate` names it."""
        if row["error"]:
            return None, "failed"
        place, work = self._places[row["image_id"]]["label_location"], self._work
        try:
            label = maskfiles.read(place, max_bytes=work.max_bytes, max_pixels=work.max_pixels)
        except BadImage:
            return None, "bad_label"
        return label, "ok" if label.shape == (row["height"], row["width"]) else "other_size"

    def labelled(self, row: dict, later: set[str]) -> Iterator[tuple[str, dict]]:
        """The masks row that `label` gives with each setting.

        Without a refiner and with the standard threshold that is the stored row itself.
        """
        if self._trial.refiner is None:
            stored = {setting for setting in later if self._settings[setting]["threshold"] in (None, 0.5)}
            yield from ((setting, row) for setting in stored)
            later = later - stored
        if not later:
            return
        foreground = None if row["foreground"] is None else masks.decode_rle(row["foreground"])
        row = row | {"found": _stored(row, soft=self._trial.segmenter.soft), "foreground": foreground}

        def refiner_of(setting: str) -> str:
            return canonical({name: v for name, v in self._settings[setting].items() if name != "threshold"})

        for refiner, alike in groupby(sorted(later, key=refiner_of), key=refiner_of):
            refined = self._refined(row, json.loads(refiner))
            for setting in alike:
                threshold = self._settings[setting]["threshold"]
                if self._trial.refiner is None:
                    threshold = as_stored(threshold)
                segmenter = replace(self._trial.segmenter, threshold=threshold)
                yield setting, next(iter(stages.Encode(replace(self._work, segmenter=segmenter))([refined])))

    def _refined(self, row: dict, options: dict) -> dict:
        """The row with its masks refined; with `error` set where that fails."""
        if self._trial.refiner is None or not len(row["found"].masks):
            return row
        try:
            values, _ = replace(self._trial.refiner, **options)(row["found"].masks, self.image(row))
        except Exception as error:  # whatever it is, `label` makes it an error row
            return row | {"error": f"refine: {type(error).__name__}: {error}"}
        return row | {"found": replace(row["found"], masks=values)}

    def image(self, row: dict) -> np.ndarray:
        """The original. Raises BadImage when it cannot be read or is not the one that was labelled."""
        from raypipe import images

        (content,) = fetch([self._places[row["image_id"]]], max_bytes=self._work.max_bytes)
        if isinstance(content, BadImage):
            raise content
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise BadImage("fetch", "changed", f"{row['key']!r} is not the file that was labelled")
        return images.decode(content, max_pixels=self._work.max_pixels)


def as_stored(threshold: float) -> float:
    """A threshold in [0, 1) rounded to 16 bits, as stored probabilities are, so that a value equal to it stays outside.

    What then differs from `label`'s masks are values that are above it and round to it: about one pixel in ten thousand
    where the values crowd within a few hundredths.
    """
    return float(masks.decode_soft(masks.encode_soft(np.full((1, 1), threshold, np.float32)))[0, 0])


def _stored(row: dict, *, soft: bool) -> Segments:
    """What the method found, from a stored row."""
    segments, size = row["segments"], (row["height"], row["width"])
    if soft:
        values = [masks.decode_soft(segment["soft"]) for segment in segments]
        found = np.stack(values) if values else np.zeros((0, *size), np.float32)
    else:
        found = masks.decode_segments(segments, size)
    labels, scores = ([segment[name] for segment in segments] for name in ("label", "score"))
    return Segments(found, () if None in labels else labels, () if None in scores else scores)
