"""One trial of a sweep: a run over the labelled images, on whose stored masks all later settings are scored.

trials/<hash of the settings>/            a run like any other: every command reads it
trials/<hash of the settings>/trial.json  its settings, how it ended
trials/<hash of the settings>/scores.parquet  one row per image and later setting: the task's measures
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import masks, storage
from raypipe.evaluation import tasks as evaluation
from raypipe.inputs import manifest as inputs
from raypipe.inputs import maskfiles
from raypipe.inputs.containers import map_ahead
from raypipe.pipeline import foregrounds, stages
from raypipe.pipeline import label as pipeline
from raypipe.pipeline.foregrounds import Foreground
from raypipe.pipeline.label import Label
from raypipe.run import provenance, rows
from raypipe.run.run import Run, parquet_bytes
from raypipe.storage.folder import Folder
from raypipe.storage.lock import hold
from raypipe.sweep.search import canonical
from raypipe.types import BadImage, Segmenter, Segments

SIXTEENTH = 16  # a trial's parts hold about a quarter of the images: four batches of a sixteenth
SCORES = "scores.parquet"
LABEL = "label_sha256"  # column of the images and of their scores: the label file, "" for one that cannot be read
LEAVES = ("size", "counts", "score", "label", "soft")  # fields of a stored segment that scoring may need


@dataclass(frozen=True)
class Trial:
    """One setting of what acts inside the model, and the later settings to score on its masks. Cheap to pickle."""

    input: str
    column: str | None
    output: str  # the trial's folder
    device: Literal["auto", "cpu", "cuda"]
    segmenter: Segmenter  # with the trial's setting and no threshold
    refiner: Callable | None  # the later settings replace its fields
    later: tuple[dict, ...]  # each with `threshold` and all fields of the refiner
    task: str
    labels: str
    images: pa.Table  # the manifest of the labelled images in a fixed random order, with `label_location`
    foreground: Foreground | None  # where the foreground comes from; None for a method that takes none

    @property
    def run(self) -> Run:
        """The trial's run."""
        return Run(self.output, self.segmenter.name)

    @property
    def settings(self) -> dict:
        """What names the trial: all parameters of the method, paths absolute."""
        return settings(self.segmenter)

    @cached_property
    def job(self) -> Label:
        """The options of the trial's run."""
        size = min(self.segmenter.batch_size, max(1, len(self.images) // SIXTEENTH))
        return Label(
            self.input,
            self.output,
            column=self.column,
            keep_soft=self.segmenter.soft,
            device=self.device,
            batch_size=size,
            max_bad_fraction=1.0,
        )


def settings(segmenter: Segmenter) -> dict:
    """All parameters of a method but the threshold, which acts on its masks, as they are recorded."""
    found = provenance.settings(segmenter, None, refine=None, keep_soft=segmenter.soft)
    return {name: value for name, value in found.items() if name not in ("threshold", "refine", "keep_soft")}


def trial_name(segmenter: Segmenter) -> str:
    """The name of a trial's folder: equal for equal parameters inside the model."""
    return hashlib.sha256(canonical(settings(segmenter)).encode()).hexdigest()[:12]


def advance(trial: Trial, count: int, *, execute: Callable = pipeline.label_here, threads: int = 1) -> pa.Table:
    """Label and score the first `count` images, as far as that is not done yet. Returns all scores of the trial.

    execute: `pipeline.label_here` or `pipeline.label_on_ray`. Writes the trial's folder; what was committed stays when
    it is interrupted. Raises what labelling raises.
    """
    start, before = time.monotonic(), read_state(trial.output)
    _label(trial, count, execute)
    scores = score(trial, threads=threads)
    seconds = before.get("seconds", 0.0) + time.monotonic() - start
    is_done = len(trial.run.plan(trial.images)) == 0
    write_state(trial, status="done" if is_done else "running", seconds=seconds)
    return scores


def has_labelled(folder: Folder) -> bool:
    """Whether any trial of a sweep's folder has a committed row."""
    return any(folder.files("trials", name, "_commits") for name in folder.folders("trials"))


def read_state(output: str) -> dict:
    """The content of trial.json: `settings`, `later`, `status` (running, done, stopped, failed), `seconds`, `error`."""
    content = Run(output).folder.read("trial.json")
    return json.loads(content) if content else {}


def write_state(trial: Trial, *, status: str, seconds: float | None = None, error: str = "") -> None:
    """Write trial.json; the later settings of earlier sweeps and, with None, the seconds are kept."""
    before = read_state(trial.output)
    seconds = before.get("seconds", 0.0) if seconds is None else round(seconds, 3)
    state = {"settings": trial.settings, "later": list(_all_later(trial, before).values())}
    state |= {"status": status, "seconds": seconds, "error": error}
    trial.run.folder.write((json.dumps(state, indent=2) + "\n").encode(), "trial.json")


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


def _all_later(trial: Trial, state: dict) -> dict[str, dict]:
    """The later settings of earlier sweeps, from trial.json, and of this one, by their text."""
    return {canonical(setting): setting for setting in (*state.get("later", []), *trial.later)}


def _label(trial: Trial, count: int, execute: Callable) -> None:
    """Label what is pending of the first `count` images, as `pipeline.label` does for a whole input."""
    run, work = trial.run, replace(pipeline.plan_work(trial.job, trial.segmenter, None), foreground=trial.foreground)
    pending = run.plan(trial.images.slice(0, count))
    if not len(pending):
        return
    start = time.monotonic()
    frozen = provenance.settings(trial.segmenter, None, refine=None, keep_soft=trial.job.keep_soft)
    options = asdict(trial.job) | {"input": storage.redact(trial.input), "output": storage.redact(trial.output)}
    options["local"] = execute is pipeline.label_here
    record = {"options": options, "settings": frozen, "environment": provenance.environment(), "exit_code": None}
    record |= {"images": len(trial.images), "planned": len(pending)}
    with hold(run.folder, work.attempt):
        run.clean()
        run.record_attempt(work.attempt, record)
        run.mark_complete(None)
        execute(trial.job, work, run, pending, record)
        run.finish(work.attempt)
        left = len(run.plan(trial.images))
        record |= {"labelled": len(pending), "pending": left, "seconds": round(time.monotonic() - start, 3)}
        record |= {"exit_code": 0, "finished": provenance.now()}
        run.record_attempt(work.attempt, record)
        if not left:
            run.mark_complete(record)


# Scores


def score(trial: Trial, *, threads: int = 1) -> pa.Table:
    """Score the later settings, those of earlier sweeps too, on the stored masks. Returns all scores.

    What was scored before is kept, unless its label was unusable or has changed.
    """
    task, run = evaluation.find(trial.task), trial.run
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
        self._trial, self.task = trial, evaluation.find(trial.task)
        self._places = {row["image_id"]: row for row in trial.images.to_pylist()}
        self._settings = {canonical(setting): setting for setting in trial.later}
        work = pipeline.plan_work(trial.job, trial.segmenter, None)
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

        (content,) = inputs.fetch([self._places[row["image_id"]]], max_bytes=self._work.max_bytes)
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


def with_labels(manifest: pa.Table, labels: str) -> pa.Table:
    """The images that have a label file, in the order of their ids, with the columns `label_location` and LABEL.

    Ids are hashes: their order is random and always the same. Raises ValueError when no label belongs to an image.
    """
    keys = manifest["key"].to_pylist()
    matches = maskfiles.match(labels, keys)
    if not matches.location:
        example = f"; images are named as {keys[0]!r}, labels as {matches.unused[0]!r}" if matches.unused else ""
        raise ValueError(f"no label in {storage.redact(labels)} has the path or the stem of an image{example}")
    location = pa.array([matches.location.get(key) for key in keys], pa.string())
    found = manifest.append_column("label_location", location).filter(location.is_valid()).sort_by("image_id")
    checksums = list(map_ahead(_checksum, found["label_location"].to_pylist()))
    return found.append_column(LABEL, pa.array(checksums, pa.string()))


def _checksum(label: str) -> str:
    try:
        return hashlib.sha256(storage.read_bytes(label, max_bytes=Label.max_bytes)).hexdigest()
    except BadImage:
        return ""


def with_images(trial: Trial, images: pa.Table, foreground: Foreground | None = None) -> Trial:
    """The trial with its images (`with_labels`), and maybe another place to take the foreground from."""
    foreground = foreground or trial.foreground
    if foreground and foreground.is_read:
        images = foregrounds.attach(images, foreground)
    return replace(trial, images=images, foreground=foreground)


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
