"""The post-processing settings of a trial scored on its stored masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import masks
from raypipe.inputs.manifest import fetch
from raypipe.pipeline import stages
from raypipe.run import Run, rows
from raypipe.storage import Location, map_ahead, open_table
from raypipe.sweep.search import canonical
from raypipe.sweep.trials import LABEL_CHECKSUM, STORED_POST, Trial, all_posts, read_state
from raypipe.types import BadImage, LabelMap, Segmenter, Segments

SCORES_FILE = "scores.parquet"
STORED_LEAVES = ("size", "counts", "area", "score", "label", "soft")  # fields of a stored segment that scoring may need
EMBEDDED_LEAVES = (*STORED_LEAVES, "embedding")


def read_scores(output: str, schema: pa.Schema) -> pa.Table:
    """The scores of a trial; no rows before the first.

    schema: of the task. Besides, the columns STORED_POST (the post-processing setting as JSON) and LABEL_CHECKSUM.
    """
    for name in (STORED_POST, LABEL_CHECKSUM):
        schema = schema.append(pa.field(name, pa.string()))
    content, none = Run(output).folder.read(SCORES_FILE), schema.remove_metadata().empty_table()
    scores = none if content is None else open_table(content).read()
    return scores if scores.column_names == none.column_names else none  # of another version


def current(scores: pa.Table, images: pa.Table) -> pa.Table:
    """The scores of these images against the labels that they have now. images: of `labelled`."""
    both = (pc.binary_join_element_wise(table["image_id"], table[LABEL_CHECKSUM], "/") for table in (scores, images))
    scored, wanted = both
    return scores.filter(pc.is_in(scored, value_set=wanted.combine_chunks()))


def score(trial: Trial, *, threads: int = 1) -> None:
    """Score the post-processing settings, those of earlier sweeps too, on the stored masks.

    What was scored before is kept, unless its label was unusable or has changed.
    """
    run = trial.run
    trial = replace(trial, posts=tuple(all_posts(trial, read_state(trial.output)).values()))
    known = current(read_scores(trial.output, trial.task.schema()), trial.images)
    known = known.filter(pc.is_in(known["status"], value_set=pa.array(["ok", "failed"])))
    done = set(zip(known["image_id"].to_pylist(), known[STORED_POST].to_pylist(), strict=True))
    wanted = {canonical(post) for post in trial.posts}
    committed = set(run.commits()["image_id"].to_pylist()).intersection(trial.images["image_id"].to_pylist())
    missing = {each: {post for post in wanted if (each, post) not in done} for each in committed}
    if not any(missing.values()):
        return
    scorer = Scorer(trial)
    stored = (table.to_pylist() for table in rows.batches(run, leaves=leaves_of(trial)))
    lacking = ([row for row in each if missing.get(row["image_id"])] for each in stored)
    todo = (row for each in lacking for row in trial.task.ahead(each))

    def scored(row: dict) -> pa.Table:  # numbers of a confusion matrix are smaller there than in Python
        return pa.Table.from_pylist(scorer(row, missing[row["image_id"]]), schema=known.schema)

    table = pa.concat_tables([known, *map_ahead(scored, todo, depth=threads)]).combine_chunks()
    run.folder.write_table(table, SCORES_FILE)


def leaves_of(trial: Trial) -> tuple[str, ...]:
    """The fields of stored segments that scoring a trial needs."""
    return EMBEDDED_LEAVES if "embedding" in trial.task.LEAVES else STORED_LEAVES


class Scorer:
    """Scores post-processing settings on the stored masks of one image: decoded once, refined once per refiner."""

    def __init__(self, trial: Trial):
        self._trial, self.task = trial, trial.task
        self._images = {row["image_id"]: row for row in trial.images.to_pylist()}
        self._posts = {canonical(post): post for post in trial.posts}
        embeds = "embedding" in self.task.LEAVES and trial.segmenter.embeds
        self._work = replace(trial.work, keep_soft="soft" in self.task.LEAVES, keep_embeddings=embeds)
        self._is_hard = {"is_hard": not self._work.is_soft and trial.refiner is None}
        self.label = trial.labels.read

    def __call__(self, row: dict, posts: set[str]) -> list[dict]:
        """Rows of the task's table with the column STORED_POST. row: one of the run, with soft masks."""
        known = {name: row[name] for name in ("image_id", "key", "height", "width")}
        known |= {"method": self._trial.segmenter.name, "reference": str(Location(self._trial.sweep.labels))}
        known[LABEL_CHECKSUM] = self._images[row["image_id"]][LABEL_CHECKSUM]
        label, status = self.label(row)
        if status != "ok":
            return [known | {"status": status, STORED_POST: post} for post in posts]
        known |= {"status": "ok"}
        return [known | cells | {STORED_POST: post} for post, cells in self._measured(row, posts, label)]

    def labelled(self, row: dict, posts: set[str]) -> Iterator[tuple[str, dict]]:
        """The masks row that `label` gives with each setting: as stored without refiner and with threshold 0.5."""
        row, stored = row | self._is_hard, self._as_stored(posts)
        yield from ((post, self._present(row)) for post in stored)
        for refined, alike in self._refined_each(row, posts - stored):
            yield from ((post, self._encoded(refined, threshold)) for post, threshold in alike.items())

    def _measured(self, row: dict, posts: set[str], label) -> Iterator[tuple[str, dict]]:
        """The task's cells of each setting, or the status `failed`; all thresholds of a label map in one pass."""
        row, stored = row | self._is_hard, self._as_stored(posts)
        yield from ((post, self._cells(self._present(row), label)) for post in stored)
        for refined, alike in self._refined_each(row, posts - stored):
            cells = None
            if isinstance(refined["found"], LabelMap) and not refined["error"]:
                cells = self.task.cells_above(row, refined["found"], label, [*alike.values()])
            if cells is None:
                cells = (self._cells(self._encoded(refined, threshold), label) for threshold in alike.values())
            yield from zip(alike, cells, strict=True)

    def _cells(self, labelled: dict, label) -> dict:
        return {"status": "failed"} if labelled["error"] else self.task.cells(labelled, label)

    def _present(self, row: dict) -> dict:
        """A stored row as `label` leaves it, of a run that keeps no soft masks where the task needs none."""
        return row | {"segments": stages.present(row["segments"], self._work)}

    def _as_stored(self, posts: set[str]) -> set[str]:
        """The settings whose masks are those of the stored row."""
        if self._trial.refiner is not None:
            return set()
        return {post for post in posts if self._posts[post]["threshold"] in (None, 0.5)}

    def _refined_each(self, row: dict, posts: set[str]) -> Iterator[tuple[dict, dict[str, float]]]:
        """The row with its masks as each refiner leaves them, `error` set where that fails, and the thresholds then."""
        if not posts:
            return
        foreground = None if row["foreground"] is None else masks.decode_rle(row["foreground"])
        row = row | {"found": _stored(row, self._trial.segmenter), "foreground": foreground}

        def refiner_of(post: str) -> str:
            return canonical({name: value for name, value in self._posts[post].items() if name != "threshold"})

        for refiner, alike in groupby(sorted(posts, key=refiner_of), key=refiner_of):
            thresholds = {post: self._posts[post]["threshold"] for post in alike}
            thresholds = {post: 0.5 if threshold is None else threshold for post, threshold in thresholds.items()}
            if self._trial.refiner is None:
                thresholds = {post: as_stored(threshold) for post, threshold in thresholds.items()}
            yield self._refined(row, json.loads(refiner)), thresholds

    def _encoded(self, refined: dict, threshold: float) -> dict:
        work = replace(self._work, segmenter=replace(self._trial.segmenter, threshold=threshold))
        return next(stages.encode([refined], work))

    def image(self, row: dict) -> np.ndarray:
        """The original. Raises BadImage when it cannot be read or is not the one that was labelled."""
        from raypipe import images

        (content,) = fetch([self._images[row["image_id"]]], max_bytes=self._work.max_bytes)
        if isinstance(content, BadImage):
            raise content
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise BadImage("fetch", "changed", f"{row['key']!r} is not the file that was labelled")
        return images.decode(content, max_pixels=self._work.max_pixels)

    def _refined(self, row: dict, options: dict) -> dict:
        """The row with its masks refined; with `error` set where that fails."""
        if self._trial.refiner is None or not row["segments"]:
            return row
        try:
            refiner, exclusive = replace(self._trial.refiner, **options), self._trial.segmenter.exclusive
            found, _ = stages.refined(row["found"], refiner, self.image(row), exclusive=exclusive)
        except Exception as error:  # whatever it is, `label` makes it an error row
            return row | {"error": f"refine: {type(error).__name__}: {error}"}
        return row | {"found": found}


def as_stored(threshold: float) -> float:
    """A threshold in [0, 1) rounded to 16 bits, as stored probabilities are, so that a value equal to it stays outside.

    What then differs from `label`'s masks are values that are above it and round to it: about one pixel in ten thousand
    where the values crowd within a few hundredths.
    """
    return float(masks.decode_soft(masks.encode_soft(np.full((1, 1), threshold, np.float32)))[0, 0])


class _Stored(Segments):
    """Soft masks as they are stored, decoded one at a time."""

    def planes(self) -> Iterator[np.ndarray]:
        return map(masks.decode_soft, self.masks)


def _stored(row: dict, segmenter: Segmenter) -> Segments:
    """What the method found, from a stored row; of an exclusive one with soft masks a LabelMap."""
    segments, size = row["segments"], (row["height"], row["width"])
    labels, scores = ([segment[name] for segment in segments] for name in ("label", "score"))
    labels, scores = () if None in labels else labels, () if None in scores else scores
    embeddings = [segment["embedding"] for segment in segments if segment.get("embedding") is not None]
    embeddings = np.array(embeddings, np.float32) if embeddings else None
    if not segmenter.soft:
        return Segments(masks.decode_segments(segments, size), labels, scores, embeddings=embeddings)
    soft = [segment["soft"] for segment in segments]
    found, nothing = _Stored(soft, labels, scores, embeddings=embeddings), np.zeros(size, np.float32)
    if segmenter.exclusive:
        return LabelMap.largest(found) if segments else LabelMap(nothing.astype(np.uint8), nothing)
    return Segments(np.stack([*found.planes()]) if segments else nothing[None][:0], labels, scores, "", embeddings)
