"""The options of a labelling job, whether they can work, and what they come to."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import pyarrow as pa

from raypipe import networks, refiners
from raypipe.inputs.manifest import spool_inputs
from raypipe.pipeline import foregrounds, moved, tiles
from raypipe.pipeline.stages import Work
from raypipe.pipeline.views import views
from raypipe.run import Run
from raypipe.runtime import address, cores
from raypipe.storage import Location, Spool, local_path, normalise
from raypipe.tiling import Tiling
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")


@dataclass(frozen=True)
class Label:
    """What to label and how the job runs."""

    input: str  # folder, glob, image, list (.txt .csv .jsonl), Parquet or tar: a path or a URI (s3://...)
    output: str  # the run's folder, made or resumed: a path or a URI
    column: str | None = None  # column of a list or table with URIs or images, or ending in tars (jpg); None finds it
    allow_private: bool = False  # what a list or table names may lie in a private network
    refine: str | None = None  # a refiner, such as guided: sharpen the masks along the image's edges
    # SIZE:OVERLAP in pixels, such as 1024:256 or 1024:25%: larger images go through the method in tiles, for small
    # objects; what it finds becomes one result
    tiles: str | None = None
    keep_soft: bool = False  # also store the probabilities that were thresholded (16-bit PNG)
    keep_embeddings: bool = False  # also store the embedding of each segment (16 bits a value), of a method that has it
    jitter: int = 0  # also label N views of each image (mirrored, smaller, cropped, reseeded): segments get stability
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks run
    actors: int | None = None  # processes that run the method; None = one per core, or as many as the GPUs hold
    batch_size: int | None = None  # images per call of the method; None = the method's own
    timeout: float | None = None  # seconds for an image, views included, before an error row; None = the method's own
    max_pixels: int = 100_000_000  # images with more pixels become error rows, before they are decoded
    max_bytes: int = 500_000_000  # files with more bytes become error rows, before they are read
    max_bad_fraction: float = 0.05  # end with exit code 3 if more than this share of the images labelled now fail
    limit: int | None = None  # label at most this many of the pending images now; the next run goes on
    retry_errors: bool = False  # label the images again that ended in an error row
    moved_from: str | None = None  # where the input was when the run labelled it; its images keep their rows
    local: bool = False  # a plain loop in this process, without Ray: for a handful of images and for debugging
    sheet: bool = False  # write sheet.png into the output: a sample of originals with their masks
    dry_run: bool = False  # only tell what would be done: images, workers, memory, time, size, money
    timing: bool = True  # dry run: time up to three images in a child process
    price: float | None = None  # dry run: money for an hour of one such machine; more machines cost the same per image


def check_job(job: Label, segmenter: Segmenter, refiner: Callable | None) -> None:
    """Raise ValueError for options that cannot work or have no effect, before anything starts."""
    if (job.refine is None) != (refiner is None):
        raise ValueError("refine and the refiner's options must be given together")
    _check_ranges(job, segmenter)
    _check_effects(job, segmenter, refiner)
    if job.tiles is not None:
        tiles.check(Tiling.parse(job.tiles), segmenter)
    if job.device == "cuda" and (job.local or not address.is_elsewhere()):
        cores.device_here(job.device, gpus=plan_work(job, segmenter, refiner).gpus)
    if job.actors and not address.is_elsewhere():
        cpus = cores.for_local_ray()
        if job.actors + 1 > cpus:
            raise ValueError(f"--actors {job.actors} leaves no CPU for reading and writing: at most {cpus - 1} here")
    check_folders(job.input, job.output)
    if refiner and segmenter.refines:
        _say_twice(segmenter.name, segmenter.refines, job.refine)


@functools.cache
def _say_twice(method: str, own: str, refine: str) -> None:
    """Say in the log, once, that masks are filtered by the method and by a refiner, which gives another result."""
    log.info("%s: masks are filtered twice: at the network's size (%s), then by --refine %s", method, own, refine)


def _check_ranges(job: Label, segmenter: Segmenter) -> None:
    for option in ("actors", "batch_size", "timeout", "max_pixels", "max_bytes", "limit", "price"):
        value = getattr(job, option)
        if value is not None and value <= 0:
            raise ValueError(f"--{option.replace('_', '-')} must be positive, got {value}")
    if segmenter.threshold is not None and not 0 <= segmenter.threshold < 1:
        raise ValueError(f"--threshold must be at least 0 and below 1, got {segmenter.threshold}")
    if not 0 <= segmenter.seed < 2**31:
        raise ValueError(f"--seed must be in 0..{2**31 - 1}, got {segmenter.seed}")
    if job.jitter not in range(1 + len(views(segmenter))):
        raise ValueError(f"--jitter must be in 0..{len(views(segmenter))} for {segmenter.name}, got {job.jitter}")
    if not 0 <= job.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction must be in 0..1, got {job.max_bad_fraction}")


def _check_effects(job: Label, segmenter: Segmenter, refiner: Callable | None) -> None:
    if not segmenter.soft and refiner is None:
        for option, is_set in (("threshold", segmenter.threshold is not None), ("keep-soft", job.keep_soft)):
            if is_set:
                text = f"{segmenter.name} gives binary masks; add --refine {' or '.join(refiners.names())}"
                raise ValueError(f"--{option} has no effect: {text}")
    if job.keep_embeddings and not segmenter.embeds:
        raise ValueError(f"--keep-embeddings has no effect: {segmenter.name} makes no embeddings of its segments")
    if job.device == "cuda" and not plan_work(job, segmenter, refiner).gpus:
        hint = "a rembg foreground would use a GPU if onnxruntime-gpu were installed instead of onnxruntime"
        raise ValueError(f"--device cuda has no effect: {segmenter.name} runs on the CPU only ({hint})")
    for option in ("actors", "timeout"):
        if getattr(job, option) and job.local:
            raise ValueError(f"--{option} has no effect with --local")
    if not job.timing and not job.dry_run:
        raise ValueError("--no-timing has no effect without --dry-run")
    if job.price is not None and not (job.dry_run and job.timing):
        raise ValueError(f"--price has no effect {'with --no-timing' if job.dry_run else 'without --dry-run'}")


def check_folders(source: str, output: str) -> None:
    """Raise ValueError for an output that is a file, or that a later listing of the input would find.

    Also for a Windows path, which elsewhere would be the name of one odd file in the current folder.
    """
    for path in (source, output):
        if os.name != "nt" and WINDOWS_PATH.match(path) and not os.path.exists(path):
            here = re.sub(r"^(\w):", lambda drive: f"/mnt/{drive[1].lower()}", path.replace("\\", "/"))
            text = f"{path!r} is a path of Windows, and this is {sys.platform}; give the path here"
            raise ValueError(f"{text}" + (f", in WSL {here!r}" if path[1] == ":" else ""))
    shown, folder = str(Location(output)), local_path(output) or "/"
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"the output {shown!r} is a file or lies below one; choose a folder")
    fixed = source.partition("**")[0] if "**" in source else source
    inside, outside = (local_path(uri) or normalise(uri) for uri in (output, fixed))
    inside, outside = (os.path.realpath(uri) if os.path.isabs(uri) else uri for uri in (inside, outside))
    if f"{inside.rstrip('/')}/".startswith(f"{outside.rstrip('/')}/"):
        raise ValueError(f"the output {shown!r} lies inside the input: the next run would label its files")


def open_run(job: Label, segmenter: Segmenter, refiner: Callable | None) -> tuple[Run, dict]:
    """The run in the job's output and the settings that it freezes. Raises OtherConfiguration if it has others."""
    run = Run(job.output, segmenter.name)
    kept = {name: getattr(job, name) for name in ("keep_soft", "keep_embeddings", "jitter")}
    kept |= {"refine": job.refine, "tiles": _tiling(job)}
    settings = frozen_settings(segmenter, refiner, **kept)
    standard = frozen_settings(type(segmenter)(), refiner and type(refiner)(), refine=None, keep_soft=False)
    run.check_configuration(settings, defaults=standard)
    return run, settings


def frozen_settings(
    segmenter,
    refiner,
    *,
    refine: str | None,
    keep_soft: bool,
    keep_embeddings: bool = False,
    jitter: int = 0,
    tiles: Tiling | None = None,
) -> dict:
    """The settings that decide the rows, flat, by the names of their options: what run.json freezes.

    Paths in them are absolute and without credentials, so that they mean the same from any folder.
    """
    chosen = asdict(segmenter) | {"refine": refine, "keep_soft": keep_soft, "keep_embeddings": keep_embeddings}
    chosen |= {"jitter": jitter, "tiles": tiles and str(tiles)}
    if given := foregrounds.of(segmenter):
        chosen[given.option] = str(given)
    return chosen | (asdict(refiner) if refiner else {})


def plan_work(job: Label, segmenter: Segmenter, refiner: Callable | None) -> Work:
    """What the workers need to know, but for the attempt and the device. Raises ValueError for a wrong foreground."""
    return Work(
        segmenter=segmenter,
        refiner=refiner,
        foreground=foregrounds.of(segmenter),
        batch_size=job.batch_size or segmenter.batch_size,
        timeout=job.timeout or segmenter.timeout * (1 + job.jitter),
        keep_soft=job.keep_soft,
        max_pixels=job.max_pixels,
        max_bytes=job.max_bytes,
        keep_embeddings=job.keep_embeddings,
        jitter=job.jitter,
        tiling=_tiling(job),
    )


def _tiling(job: Label) -> Tiling | None:
    return None if job.tiles is None else Tiling.parse(job.tiles)


def fetch_weights(job: Label, work: Work) -> None:
    """Have the weights of the method and of its foreground here before anything starts, where this machine labels.

    Elsewhere the workers look for theirs. Raises FileNotFoundError or ValueError that names the ways out.
    """
    if job.local or not address.is_elsewhere():
        for method in filter(None, (work.segmenter, work.finder)):
            method.fetch()  # first: it may know better why there is nothing to look for
            networks.look_for_each(method)


def list_images(job: Label, work: Work, run: Run | None = None) -> Spool | pa.Table:
    """The manifest of the whole input, with where the masks of given foregrounds are and how they are read: in memory.

    run: as whose masks were read before they are read again; None = as they look.
    """
    manifest = spool_inputs(job.input, column=job.column, allow_private=job.allow_private)
    if job.moved_from:
        manifest = moved.as_before(manifest, job.input, job.moved_from)
    if work.foreground and work.foreground.is_read:
        frozen = run and run.configuration()
        known = frozen and frozen["provenance"].get(foregrounds.MASK_KIND)
        limits = {"max_bytes": job.max_bytes, "max_pixels": job.max_pixels}
        return foregrounds.attach(manifest.read(), work.foreground, known=known, **limits)
    return manifest
