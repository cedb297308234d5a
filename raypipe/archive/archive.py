"""`raypipe archive`: for each category the images of a corpus that CLIP finds closest to its name.

The corpus is embedded once, as a run that any number of archives are made from: new categories repeat only the ranking,
new images are embedded and ranked with the others.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc

from raypipe import classes
from raypipe.archive import embedding, safety
from raypipe.archive.embedding import Embedder, Embedding
from raypipe.archive.making import PUBLISHED, Plan, made
from raypipe.archive.page import number, page
from raypipe.archive.tools import Here, Look, OnRay
from raypipe.conditions import Condition
from raypipe.features import clip
from raypipe.inputs import archives
from raypipe.inputs.manifest import list_inputs, records
from raypipe.pictures import faces
from raypipe.pictures.faces import SCORE
from raypipe.pipeline import moved
from raypipe.pipeline.job import check_folders
from raypipe.pipeline.label import attempt
from raypipe.run import Run, new_attempt
from raypipe.runtime.interruption import held
from raypipe.runtime.progress import count_of_images
from raypipe.storage import Folder, open_table

log = logging.getLogger("raypipe")
NAMED = 20  # categories in one line
POSITIVE = ("n", "examples", "actors", "batch_size", "timeout", "max_pixels", "max_bytes", "limit")


@dataclass(frozen=True)
class Archive:
    """Which images are searched for which categories, what is left out, and how the job runs."""

    input: str  # the corpus: folder, glob, list (.txt .csv .jsonl), Parquet or tar: a path or a URI (s3://...)
    output: str  # the archive's folder, made or added to: a path or a URI
    classes: str  # a data set (voc2012), a file (a name per line, or YAML of name and query), or names with commas
    n: int = 500  # images per category (NamedMask, supplement); ReCo takes 50
    templates: str = "default"  # contexts in which CLIP is asked: default (85), none, or a file with one per line
    where: str | None = None  # SQL condition on the input table's own columns: "punsafe < 0.5 and not violence"
    concepts: str | None = None  # leave out what CLIP takes for unsafe: default, or YAML lists `unsafe` and `safe`
    safety: bool = True  # --no-safety: neither --where nor --concepts keeps unsafe images out
    faces: str | None = None  # ONNX file of YuNet or CenterFace: leave out images of faces; none = keep them
    face_score: float = SCORE  # that a face has at least
    known: str | None = None  # labels to tell the purity by: folder, a column of the input, or a CSV of key,label
    examples: int = 8  # images of each category on the page
    clip: str = Embedder.clip  # a Hugging Face id or a folder
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto = bfloat16 on a GPU
    exact: bool = False  # store embeddings with 32 bits a value instead of 16
    column: str | None = None  # column of a list or table with URIs or images, or ending in tars (jpg); None finds it
    allow_private: bool = False  # what a list or table names may lie in a private network
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where CLIP runs
    actors: int | None = None  # processes that run CLIP; None = one per core, or as many as there are GPUs
    batch_size: int | None = None  # images per call; None = 64
    timeout: float | None = None  # seconds for one image before it becomes an error row; None = 120
    max_pixels: int = 100_000_000  # images with more pixels become error rows, before they are decoded
    max_bytes: int = 500_000_000  # files with more bytes become error rows, before they are read
    max_bad_fraction: float = 0.05  # end with exit code 3 if more than this share of the images embedded now fail
    limit: int | None = None  # embed at most this many of the pending images now; the next run goes on
    retry_errors: bool = False  # embed the images again that ended in an error row
    moved_from: str | None = None  # where the input was when it was embedded; its images keep their rows
    local: bool = False  # a plain loop in this process, without Ray

    sheet: ClassVar[bool] = False  # has no masks to draw


@dataclass(frozen=True)
class Made:
    """How a call of `archive` ended."""

    output: str
    images: int  # of the corpus
    embedded: int  # now
    pending: int  # left for another call
    summary: dict[str, float]  # of the archive, by name; {} while images are pending
    empty: list[str] = field(default_factory=list)  # categories without any image
    short: list[str] = field(default_factory=list)  # categories with some, but fewer than asked for
    failed: int = 0  # images of the corpus that could not be embedded
    retryable: int = 0  # of these: how many may succeed another time as they are
    is_new: bool = True  # the archive was written now
    reasons: list[str] = field(default_factory=list)  # why the exit code is 3
    exit_code: int = 0  # 0, or 3 when too many images failed or a category has none
    seconds: float = 0.0

    def text(self) -> str:
        """What was done, the figures beside the published ones, and where the archive is."""
        lines = [self._done()]
        if self.failed:
            lines.append(f"{count_of_images(self.failed)} could not be embedded, see {self.output}/errors.parquet")
        if self.pending:
            return "\n".join([*lines, f"{count_of_images(self.pending)} left; the same command goes on"])
        lines += summary_lines(self.summary)
        for names, what in ((self.short, "fewer images than asked for"), (self.empty, "no image")):
            shown = ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)
            lines += [f"{what}: {len(names):,} of the categories: {shown}"] * bool(names)
        lines += [f"exit code 3: {reason}" for reason in self.reasons]
        return "\n".join([*lines, f"archive: {self.output}/archive.parquet, page: {self.output}/archive.html"])

    def _done(self) -> str:
        embedded = f"{self.embedded:,} of {count_of_images(self.images)} embedded now"
        if not self.embedded and not self.pending:
            embedded = f"all of {count_of_images(self.images)} were embedded before"
        archive = "archive written" if self.is_new else "nothing to do: the archive is up to date"
        return f"{embedded}; {archive if not self.pending else 'no archive before all are'} ({self.seconds:.1f} s)"


def summary_lines(summary: dict[str, float]) -> list[str]:
    """The figures of an archive, with the published ones where there are any."""
    lines = []
    for name, value in summary.items():
        beside = f"   (LAION-5B, 919 categories: {number(PUBLISHED[name])})" if name in PUBLISHED else ""
        lines.append(f"  {name.replace('_', ' '):<26}{number(value):>10}{beside}")
    return lines


def archive(job: Archive) -> Made:
    """Embed what is pending of the corpus, then make the archive where it is not up to date.

    Raises ValueError or FileNotFoundError for wrong options and missing input, run.OtherConfiguration and
    storage.Locked when the output belongs to another run, interruption.Interrupted after a signal and RuntimeError when
    the job failed; after the last two the same call resumes.
    """
    start, asked = time.monotonic(), Asked(job)
    images, among, labels = corpus(job)
    table = "exact_embeddings" if job.exact else "embeddings"
    run, settings = Run(job.output, embedding.METHOD, table), embedding.settings(asked.embedder)
    run.check_configuration(settings, defaults=embedding.settings(Embedder()))
    work = Embedding(
        segmenter=asked.embedder,
        refiner=None,
        foreground=None,
        batch_size=job.batch_size or Embedder.batch_size,
        timeout=job.timeout or Embedder.timeout,
        keep_soft=False,
        max_pixels=job.max_pixels,
        max_bytes=job.max_bytes,
        table=table,
    )
    with contextlib.ExitStack() as stack:
        if not job.local and needs_work(job, run, images, asked.state(run, images, among, labels)):
            from raypipe.runtime import cluster

            stack.enter_context(cluster.connected(stall=max(1800.0, 3 * work.timeout * work.batch_size)))
        summary = attempt(job, work, run, images, settings=settings, start=start)
        told = {"images": len(images), "embedded": summary.labelled, "pending": summary.pending}
        told |= {"output": summary.output, "failed": summary.failed, "retryable": summary.retryable}
        reasons = [summary.reason] * bool(summary.reason)
        if summary.pending:
            return _ended(told, {}, reasons, start, is_new=False)  # ranked when all are there
        with held(run.folder, new_attempt()):
            state = asked.state(run, images, among, labels)
            if is_new := not is_current(run.folder, state):
                of_images = {"images": images, "among": among, "labels": labels}
                of_options = {"templates": asked.templates, "concepts": asked.concepts, "look": asked.look}
                make(job, asked, Plan(asked.classes, job.n, **of_images, **of_options), run, state)
            return _ended(told, _summary(run.folder), reasons, start, is_new=is_new)


class Asked:
    """What an archive is to be made of, checked before anything starts."""

    def __init__(self, job: Archive):
        """Raises ValueError or FileNotFoundError that names the option."""
        for option in POSITIVE:
            if (value := getattr(job, option)) is not None and value <= 0:
                raise ValueError(f"--{option.replace('_', '-')} must be positive, got {value}")
        if not 0 <= job.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction must be in 0..1, got {job.max_bad_fraction}")
        for option in ("actors", "timeout"):
            if getattr(job, option) and job.local:
                raise ValueError(f"--{option} has no effect with --local")
        check_folders(job.input, job.output)
        _check_filters(job)
        self.classes, self.templates = classes.read(job.classes), clip.settle_templates(job.templates)
        self.concepts = None if job.concepts is None else safety.read(job.concepts)
        filter = None if job.faces == "none" else faces.load(job.faces, score=job.face_score)
        self.look = filter and Look(filter, max_pixels=job.max_pixels, max_bytes=job.max_bytes)
        self.embedder = Embedder(clip=job.clip, dtype=job.dtype)
        self.settings = {
            "n": job.n,
            "templates": clip.digest(clip.read_templates(self.templates)),
            "where": job.where,
            "concepts": self.concepts and asdict(self.concepts),
            "faces": filter and {"kind": filter.kind, "sha256": filter.digest(), "score": filter.score},
            "known": job.known,
            "examples": job.examples,
        }

    def state(self, run: Run, images: pa.Table, among: pa.Array, labels: dict | None) -> str:
        """A digest of all that decides the archive; rows that were embedded later or again change it."""
        commits = run.commits().read()
        commits = commits.filter(pc.is_in(commits["image_id"], value_set=images["image_id"].combine_chunks()))
        digest = hashlib.sha256(json.dumps([self.settings, self.classes, labels], default=str, sort_keys=True).encode())
        rows = commits.select(["image_id", "error"]).sort_by("image_id")
        for column in (rows["image_id"], rows["error"], among, images["key"], images["location"]):
            for value in column.to_pylist():
                digest.update(value.encode() + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()


def _check_filters(job: Archive) -> None:
    """Raise ValueError unless it is said what keeps unsafe images and faces out, or that nothing does."""
    filters = [name for name in ("where", "concepts") if getattr(job, name) is not None]
    if not job.safety and filters:
        raise ValueError(f"--no-safety has no effect beside --{filters[0]}: leave one of them out")
    if job.safety and not filters:
        ways = "--where (a condition on the input table's columns), --concepts default (what CLIP takes for unsafe)"
        raise ValueError(f"nothing keeps unsafe images out: give {ways}, or --no-safety")
    if job.faces is None:
        raise ValueError(f"nothing keeps faces of people out: {faces.WAY_OUT} (--faces FILE), or say --faces none")
    if job.faces == "none" and job.face_score != SCORE:
        raise ValueError(f"--face-score {job.face_score} has no effect with --faces none")


def corpus(job: Archive) -> tuple[pa.Table, pa.Array, dict[str, str] | None]:
    """The images, the ids of those that --where leaves, and the known labels by id, None without --known."""
    source = {"column": job.column, "allow_private": job.allow_private}
    images = before = list_inputs(job.input, **source)
    if job.moved_from:
        images = moved.as_before(images, job.input, job.moved_from).read()
    ids = dict(zip(before["image_id"].to_pylist(), images["image_id"].to_pylist(), strict=True))
    among, labels = images["image_id"].combine_chunks(), None
    if job.where is not None:
        found = list(records(job.input, lambda rows: Condition(job.where, rows.column_names).matches(rows), **source))
        unfit = {ids[image_id] for image_id, fits in found if not fits}  # in one row of several is enough
        among = among.filter(pa.array([image_id not in unfit for image_id in among.to_pylist()], pa.bool_()))
    if job.known is not None:
        of_keys = dict(zip(images["key"].to_pylist(), images["image_id"].to_pylist(), strict=True))
        labels = known(job, of_keys, ids, source)
    return images, among, labels


def known(job: Archive, of_keys: dict[str, str], ids: dict[str, str], source: dict) -> dict[str, str]:
    """The labels that `job.known` names, by image id. of_keys: ids by key. ids: by the ids of the listing."""
    if job.known == "folder":
        found = {image_id: key.split("/")[-2] for key, image_id in of_keys.items() if "/" in key}
    elif job.known.lower().endswith(".csv"):
        try:
            with open(job.known, newline="", encoding="utf-8-sig") as file:
                pairs = [row[:2] for row in csv.reader(file) if len(row) >= 2]
        except OSError as error:
            raise type(error)(f"--known {job.known}: {error.strerror}") from error
        found = {of_keys[key]: label for key, label in pairs if key in of_keys}
    else:

        def values(rows: pa.Table) -> list:
            if job.known not in rows.column_names:
                columns = ", ".join(rows.column_names)
                raise ValueError(f"--known {job.known!r} is no column of the input; the columns are {columns}")
            return rows[job.known].to_pylist()

        pairs = records(job.input, values, **source)
        found = {ids[image_id]: str(label) for image_id, label in pairs if label is not None}
    if not found:
        raise ValueError(f"--known {job.known} labels no image; give folder, a column, or a CSV of key,label")
    return found


def needs_work(job: Archive, run: Run, images: pa.Table, state: str) -> bool:
    """Whether there are images to embed, or an archive to be made."""
    return len(run.plan(images, retry_errors=job.retry_errors)) > 0 or not is_current(run.folder, state)


def is_current(folder: Folder, state: str) -> bool:
    """Whether the folder holds the archive of this state, with all its files."""
    try:
        settings = folder.read_json(archives.ARCHIVE) or {}
        return settings.get("state") == state and archives.is_whole(folder, settings)
    except ValueError:
        return False


def make(job: Archive, asked: Asked, plan: Plan, run: Run, state: str) -> None:
    """Make the archive and write all its files."""
    if job.local:
        tools = Here(run, asked.embedder, job.device)
    else:
        tools = OnRay(run, asked.embedder, job.device, job.actors)
    tables = made(plan, run, tools)
    frozen = run.configuration()
    settings = {"source": asked.classes.source, "classes": [each._asdict() for each in asked.classes.categories]}
    settings |= asked.settings | {"embeddings": frozen["settings"], "weights": frozen["provenance"]["weights"]}
    settings |= {"short": tables.short, "empty": tables.empty, "state": state}
    shown = {name: value for name, value in settings.items() if name not in ("classes", "short", "empty", "state")}
    limits = {"max_pixels": job.max_pixels, "max_bytes": job.max_bytes}
    html = page(tables, asked.classes, shown, examples=job.examples, **limits)
    others = {"rejects.parquet": tables.rejects, "archive_summary.parquet": tables.summary}
    others["archive.html"] = html.encode("utf-8", "replace")
    archives.write(run.folder, settings, tables.members, tables.images, others)


def has_begun(job: Archive) -> bool:
    """Whether there is a run in the job's output that the same command would go on with."""
    with contextlib.suppress(Exception):  # an output that cannot be read: the error at hand says why
        return Run(job.output).configuration() is not None
    return False


def _summary(folder: Folder) -> dict:
    """What is told of the archive in a folder."""
    with folder.open("archive_summary.parquet") as file:
        figures = open_table(file).read()
    settings = folder.read_json(archives.ARCHIVE)
    return {
        "summary": dict(zip(figures["name"].to_pylist(), figures["value"].to_pylist(), strict=True)),
        "short": settings["short"],
        "empty": settings["empty"],
    }


def _ended(told: dict, of_archive: dict, reasons: list[str], start: float, *, is_new: bool) -> Made:
    if count := len(of_archive.get("empty", [])):
        reasons = [*reasons, f"no image for {count} categor{'y' if count == 1 else 'ies'}"]
    facts = {"summary": {}} | told | of_archive
    seconds = round(time.monotonic() - start, 3)
    return Made(**facts, is_new=is_new, reasons=reasons, exit_code=3 if reasons else 0, seconds=seconds)
