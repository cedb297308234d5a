"""What happens to a batch of images: decode, segment, encode. Generators over rows, the same with and without Ray.

A row is a dict: it enters as a manifest row (`schema.MANIFEST`) and leaves as a masks row (`schema.MASKS`), or that of
another table where a subclass of Work says so. A row whose
`error` is set passes the remaining stages untouched, so every input yields exactly one row.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import ClassVar

import numpy as np
import pyarrow as pa

from raypipe import images, masks, schema
from raypipe.inputs.manifest import fetch
from raypipe.pipeline import foregrounds, tiles
from raypipe.pipeline.foregrounds import Foreground
from raypipe.pipeline.views import View, stability, views
from raypipe.tiling import Tiling
from raypipe.types import BadImage, LabelMap, Segmenter, Segments

GROUP_PIXELS = 48_000_000  # decoded pixels handed to a method at once (144 MB of RGB), however large the batch


@dataclass(frozen=True)
class Work:
    """What the workers need to know of a job; pickled once per worker, networks not yet loaded."""

    segmenter: Segmenter
    refiner: Callable | None  # (masks, image) -> (soft masks, note)
    foreground: Foreground | None  # None for a method that takes none
    batch_size: int  # images per call of the method
    timeout: float  # seconds for one image
    keep_soft: bool
    max_pixels: int
    max_bytes: int
    device: str = "cpu"  # cpu or cuda; set when it is known what there is
    attempt: str = ""  # its name; set when it begins
    keep_embeddings: bool = False
    jitter: int = 0  # further views of each image
    tiling: Tiling | None = None  # None: an image goes through the method as a whole

    columns: ClassVar[pa.Schema] = schema.MASKS  # of the finished rows
    verb: ClassVar[str] = "label"  # what is done to images

    @property
    def finder(self) -> Segmenter | None:
        """The method that computes the foreground, if one does."""
        return self.foreground and self.foreground.segmenter(seed=self.segmenter.seed)

    @property
    def views(self) -> list[View]:
        """The further views of each image."""
        return views(self.segmenter)[: self.jitter]

    @property
    def of_views(self) -> Work:
        """The work on one view, of which nothing is kept but masks."""
        return replace(self, jitter=0, keep_soft=False, keep_embeddings=False)

    @property
    def is_soft(self) -> bool:
        """Whether masks are probabilities before the threshold: those of a soft method, and all that was refined."""
        return self.segmenter.soft or self.refiner is not None

    @property
    def patience(self) -> float:
        """Seconds that the largest image may take: each of its tiles has the time of an image."""
        return self.timeout * (self.tiling.most(self.max_pixels) if self.tiling else 1)

    @property
    def gpus(self) -> float:
        """GPUs per actor where the device is cuda; 0 when nothing of this work can use one."""
        return max(self.segmenter.gpus, self.finder.gpus if self.finder else 0.0)

    def learned(self) -> dict:
        """What only loading the networks tells, as values of fields of this class."""
        return {}

    def prepared(self, row: dict) -> dict:
        """A decoded row as it crosses to the method: another job needs less than the whole image."""
        return row

    def encoded(self, row: dict) -> dict:
        """What the method found, as columns of a finished row."""
        return _encoded(row, self)


def decode(rows: Iterable[dict], work: Work) -> Iterator[dict]:
    """Adds `image` (RGB uint8), `sha256`, `height`, `width`; `foreground` or `regions` where these are in files."""
    rows = [{**row, "error": row.get("error", ""), "sha256": "", "height": 0, "width": 0} for row in rows]
    contents = fetch([row for row in rows if not row["error"]], max_bytes=work.max_bytes)
    for row in rows:
        yield row if row["error"] else _decoded(row, next(contents), work)


def _decoded(row: dict, content: bytes | BadImage, work: Work) -> dict:
    if isinstance(content, BadImage):
        return row | {"error": str(content)}
    row["sha256"] = hashlib.sha256(content).hexdigest()
    try:
        image = images.decode(content, max_pixels=work.max_pixels)
        row["height"], row["width"] = size = image.shape[:2]
        if work.foreground and work.foreground.is_read:
            limits = {"max_bytes": work.max_bytes, "max_pixels": work.max_pixels}
            row[work.foreground.option] = foregrounds.read(row, work.foreground, size=size, **limits)
        note = "narrow_range" if images.has_narrow_range(content, image) else ""
        return work.prepared(row | {"image": image, "note": note})
    except BadImage as error:
        return row | {"error": str(error)}
    except MemoryError:
        return row | {"error": str(BadImage("decode", "memory", "not enough memory to decode it"))}


class Segment:
    """Adds `found` (Segments), `foreground` (bool, where the method takes one), `seconds`; `views` where there are any.

    Loads the networks once.
    """

    def __init__(self, work: Work):
        self._segmenter, self._foreground, self._work = work.segmenter, work.foreground, work
        self._granted = 0.0
        self._segmenter.load(work.device)
        self._finder = work.finder
        if self._finder:
            self._finder.load(work.device if self._finder.gpus else "cpu")  # rembg often cannot use the method's GPU

    def checksums(self) -> dict[str, str]:
        """sha256 of all weight files that were read, by name."""
        return self._segmenter.checksums() | (self._finder.checksums() if self._finder else {})

    def granted(self) -> float:
        """Seconds that images got so far beside the time limit of each: for their second and further tiles."""
        return self._granted

    def __call__(self, rows: Iterable[dict]) -> Iterator[dict]:
        for group in _groups(rows, self._work.batch_size, GROUP_PIXELS // (1 + self._work.jitter)):
            if self._foreground:
                group = [self._with_foreground(row) for row in group]
            if tiling := self._work.tiling:
                further = (len(tiles.places(row, tiling)) - 1 for row in group if not row["error"])
                self._granted += self._work.timeout * sum(max(0, count) for count in further)
            segmented = self._whole([row for row in group if not row["error"]], self._segmenter)
            if self._work.jitter:
                segmented = iter(self._with_views(list(segmented)))
            for row in group:
                yield row if row["error"] else next(segmented)

    def _with_foreground(self, row: dict) -> dict:
        if row["error"] or self._foreground.is_read:
            return row
        if self._finder is None:
            return row | {"foreground": np.ones(row["image"].shape[:2], bool)}
        try:
            segments = next(iter(self._finder.segment([row["image"]])))
        except Exception as error:
            if is_device_lost(error):
                raise
            return row | {"error": _failure("foreground", error)}
        mask = segments.masks[0]
        if mask.dtype != bool:
            mask = np.rint(mask * 255) >= self._segmenter.fg_alpha_min
        return row | {"foreground": mask, "note": _join(row.get("note"), segments.note)}

    def _with_views(self, rows: list[dict]) -> list[dict]:
        """Segmented rows with their `views`, each as `_kept` says. One view at a time, of all images."""
        good = [row for row in rows if not row["error"]]
        for row in good:
            row["views"] = []
        for view in self._work.views:
            method = copy.copy(self._segmenter)
            method.seed = (method.seed + view.seed) % 2**31
            for row, seen in zip(good, self._whole([view.row(row) for row in good], method), strict=True):
                row["views"].append(self._kept(seen))
                row["seconds"] += seen.get("seconds", 0.0)
        return rows

    def _kept(self, seen: dict) -> Segments | list[dict] | None:
        """Of a segmented view its segments, its masks where a refiner follows in another process; None if it failed."""
        if seen["error"] or "tile_failed" in seen["note"]:
            return None
        return seen["found"] if self._work.refiner else _of_view(seen, self._work)

    def _whole(self, rows: list[dict], method: Segmenter) -> Iterator[dict]:
        """As `_segmented`, tile by tile where the job wants that; tiles of several images share batches."""
        if not self._work.tiling:
            yield from self._segmented(rows, method)
            return
        batches = _groups(tiles.cut(rows, self._work.tiling), self._work.batch_size, GROUP_PIXELS)
        parts = (part for batch in batches for part in self._segmented(batch, method))
        for number, its in groupby(parts, key=itemgetter("part_of")):
            try:
                yield tiles.whole(rows[number], its, method)
            except Exception as error:
                if is_device_lost(error):
                    raise
                yield rows[number] | {"error": _failure("segment", error)}

    def _segmented(self, rows: list[dict], method: Segmenter) -> Iterator[dict]:
        """One row per row. If a batch fails, its images are tried by halves (memory) or one by one (anything else)."""
        done, start = 0, time.perf_counter()
        try:
            for segments in self._results(rows, method):
                row = rows[done]
                done += 1
                seconds = time.perf_counter() - start
                yield row | {"found": segments, "note": _join(row.get("note"), segments.note), "seconds": seconds}
                start = time.perf_counter()
            return
        except Exception as error:
            if not rows[done:] or is_device_lost(error):
                raise
            # The error itself is not kept: its frames hold what was computed so far, also on the GPU.
            rest, failure, is_memory = rows[done:], _failure("segment", error), _is_memory(error)
        if len(rows) == 1:
            yield rest[0] | {"error": failure}
            return
        size = max(1, len(rows) // 2) if is_memory else 1
        for first in range(0, len(rest), size):
            yield from self._segmented(rest[first : first + size], method)

    def _results(self, rows: list[dict], method: Segmenter) -> Iterator[Segments]:
        if not rows:
            return
        columns = ("image", self._foreground.option) if self._foreground else ("image",)
        results = method.segment(*([row[name] for row in rows] for name in columns))
        for row, segments in zip(rows, results, strict=True):
            _check(segments, row["image"], embeds=method.embeds)
            yield segments


def encode(rows: Iterable[dict], work: Work) -> Iterator[dict]:
    """Refines, thresholds and encodes: leaves rows of the work's columns, without image and arrays."""
    for row in rows:
        try:
            result = {} if row["error"] else work.encoded(row)
        except Exception as error:
            result = {"error": _failure("refine" if work.refiner else "encode", error)}
        kept = {name: row[name] for name in work.columns.names if name in row}
        blank = {"segments": [], "foreground": None, "note": ""}
        yield {"seconds": None, "attempt": work.attempt} | kept | blank | result


def _encoded(row: dict, work: Work) -> dict:
    found, foreground, note = row["found"], row.get("foreground"), row["note"]
    if work.refiner:
        found, remark = refined(found, work.refiner, row["image"], exclusive=work.segmenter.exclusive)
        note = _join(note, remark)
    threshold = 0.5 if work.segmenter.threshold is None else work.segmenter.threshold
    segments = []
    for i, values in enumerate(found.planes()):  # one at a time: no second stack of masks of the image's size
        soft = values[None] if values.dtype != bool and work.keep_soft else None
        binary = values if values.dtype == bool else values > threshold
        if foreground is not None:
            binary = binary & foreground
        own = slice(i, i + 1)
        kept = {"soft": soft, "embeddings": found.embeddings[own] if work.keep_embeddings else None}
        segments += masks.encode_segments(binary[None], labels=found.labels[own], scores=found.scores[own], **kept)
    segments = present(segments, work)
    if work.jitter:
        note = _join(note, _judge(segments, row, work))
    foreground = None if foreground is None else masks.encode_rle(foreground)
    return {"segments": segments, "foreground": foreground, "note": note}


def _judge(segments: list[dict], row: dict, work: Work) -> str:
    """Give an image's segments their stability; null, with the note that is returned, where a view failed."""
    seen = [
        _of_view(view.row(row) | {"found": kept}, work) if isinstance(kept, Segments) else kept
        for view, kept in zip(work.views, row["views"], strict=True)
    ]
    if None in seen:
        return "jitter_failed"
    is_ordered, size = bool(work.segmenter.parts or work.segmenter.ends[0]), (row["height"], row["width"])
    pairs = list(zip(work.views, seen, strict=True))
    for segment, value in zip(segments, stability(segments, pairs, size, is_ordered=is_ordered), strict=True):
        segment["stability"] = value
    return ""


def _of_view(seen: dict, work: Work) -> list[dict] | None:
    """The segments of a segmented view, in its own pixels; None where that fails: the image's own masks are good."""
    try:
        return _encoded(seen, work.of_views)["segments"]
    except Exception:
        return None


def present(segments: list[dict], work: Work) -> list[dict]:
    """Segments of a row without those of an exclusive method that no pixel is left to: such a class is not there.

    Where soft masks are kept all stay: lower thresholds need their values.
    """
    is_left = work.keep_soft or not work.segmenter.exclusive
    return segments if is_left else [segment for segment in segments if segment["area"]]


def refined(found: Segments, refiner: Callable, image: np.ndarray, *, exclusive: bool) -> tuple[Segments, str]:
    """Masks filtered by a refiner, and its remark. exclusive: those of the method are so, and stay so."""
    values = found.masks
    if not len(values):
        return found, ""
    values, remark = refiner(values, image)
    found = Segments(values, found.labels, found.scores, found.note, found.embeddings)
    return LabelMap.largest(found) if exclusive else found, remark


def table(rows: Iterable[dict], work: Work) -> pa.Table:
    """Finished rows as a table of the work's columns."""
    return pa.Table.from_pylist(list(rows), schema=work.columns)


def count_errors(rows: pa.Table) -> Counter[str]:
    """Error rows of a table by `stage: kind`."""
    return Counter(": ".join(error.split(": ", 2)[:2]) for error in rows["error"].to_pylist() if error)


def _groups(rows: Iterable[dict], size: int, most: int) -> Iterator[list[dict]]:
    """Consecutive rows, at most `size` and at most about `most` pixels at a time."""
    group, pixels = [], 0
    for row in rows:
        area = row["image"].size // 3 if "image" in row else 0
        if group and (len(group) == size or pixels + area > most):
            yield group
            group, pixels = [], 0
        group.append(row)
        pixels += area
    if group:
        yield group


def _check(segments: Segments, image: np.ndarray, *, embeds: bool) -> None:
    """Raise BadImage when a method breaks its contract: a wrong mask or embedding must not reach a table."""
    is_map, size = isinstance(segments, LabelMap), image.shape[:2]
    values = segments.values[None] if is_map else segments.masks
    if values.ndim != 3 or values.shape[1:] != size or values.dtype not in (bool, np.float32)[is_map:]:
        raise BadImage("segment", "invalid", f"masks are {values.dtype} {values.shape} for an image of {size}")
    if values.dtype == np.float32 and values.size and not (values.min() >= 0 and values.max() <= 1):
        raise BadImage("segment", "invalid", "soft masks have values outside [0, 1] or not a number")
    if is_map and not (segments.index.shape == size and segments.index.max() <= segments.count):
        index = segments.index
        text = f"a label map of {segments.count} segments is {index.shape} with labels up to {index.max()}"
        raise BadImage("segment", "invalid", f"{text} for an image of {size}")
    if embeds and (count := segments.count if is_map else len(values)):
        _check_embeddings(segments.embeddings, count)


def _check_embeddings(embeddings: np.ndarray | None, count: int) -> None:
    """Raise BadImage unless each of `count` segments has an embedding that 16 bits hold."""
    if embeddings is None or embeddings.dtype != np.float32 or embeddings.ndim != 2 or len(embeddings) != count:
        of = None if embeddings is None else f"{embeddings.dtype} {embeddings.shape}"
        raise BadImage("segment", "invalid", f"embeddings are {of} for {count} segments")
    if embeddings.size and not np.abs(embeddings).max() <= np.finfo(np.float16).max:
        text = "an embedding has values that are no number or beyond 65,504: overflow or damaged weights"
        raise BadImage("segment", "not_finite", text)


def _failure(stage: str, error: Exception) -> str:
    """The text of an error row for any exception."""
    if isinstance(error, BadImage):
        return str(error)
    kind = "memory" if _is_memory(error) else type(error).__name__
    return str(BadImage(stage, kind, str(error)))


def _is_memory(error: Exception) -> bool:
    """Python's, torch's and CUDA's, and OpenCV's (-4, StsNoMem) ways to say that memory ran out."""
    is_torchs = "OutOfMemory" in type(error).__name__ or "out of memory" in str(error)
    return isinstance(error, MemoryError) or is_torchs or getattr(error, "code", None) == -4


def is_device_lost(error: Exception) -> bool:
    """Whether every later call on the GPU fails too, so that the process must start anew."""
    text = str(error)
    return ("CUDA error" in text or "CUDA failure" in text) and not _is_memory(error)  # torch's and onnxruntime's words


def _join(*notes: str | None) -> str:
    return ",".join(dict.fromkeys(note for note in notes if note))
