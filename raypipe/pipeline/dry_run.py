"""`raypipe label --dry-run`: what a run would do and, from up to three images timed in a child, how long it takes."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa

from raypipe.pipeline import stages
from raypipe.pipeline.job import Label, list_images, open_run, plan_work
from raypipe.pipeline.moved import refuse_moved
from raypipe.pipeline.stages import Work
from raypipe.runtime import cores
from raypipe.runtime.child import Child
from raypipe.runtime.progress import count_of_images, duration
from raypipe.storage import Location, Spool, parquet_bytes
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")
STARTUP = 10.0  # seconds: Ray and its first worker processes, measured on two cores
LOADING = 120.0  # seconds that the child may take besides its images
TIMED_IMAGES = 3
# USD for an hour of machines like this one, on demand, Linux, AWS us-east-1, as of 17 June 2026
# (www.factualminds.com/blog/amazon-ec2-on-demand-pricing-instance-families-2026): 0.0816 for an m7g.large of two cores,
# beside which an earlier c5.2xlarge of eight x86 cores was 0.34 in AWS' own guide to Auto Scaling; and for a g5.xlarge
CORE_HOUR, CORE = 0.0408, "an AWS m7g"
GPU_HOUR, GPU = 1.006, "an AWS g5.xlarge (NVIDIA A10G, 24 GB)"
PRICED = "on demand, us-east-1, June 2026; --price PRICE for yours"
PATIENCE = 30.0  # seconds after which no further image is timed: some methods take minutes for one


class Estimate(dict):
    """What a run would do, by name, in the order in which it is shown."""

    def text(self) -> str:
        """A line per entry."""
        width = max(map(len, self))
        return "\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in self.items())


def estimate(job: Label, segmenter: Segmenter, refiner: Callable | None = None) -> Estimate:
    """Inputs, pending images, workers and, with job.timing, expected time, memory and size.

    Writes and downloads nothing. Raises RuntimeError with the child's message when the method cannot be loaded or run,
    and what `label` raises for what it is given.
    """
    start, (run, _) = time.monotonic(), open_run(job, segmenter, refiner)
    work = plan_work(job, segmenter, refiner)
    images = list_images(job, work, run)
    pending = run.plan(images, retry_errors=job.retry_errors, limit=job.limit)
    if len(pending) or job.moved_from:
        refuse_moved(run, images, job.input, job.moved_from, max_bytes=job.max_bytes)
    planned = duration(time.monotonic() - start)
    device = cores.device_here(job.device, gpus=work.gpus)
    actors = _actors(job, work, device)
    counts, given = {"images": len(images), "pending": len(pending), "planned_in": planned}, work.foreground
    result = Estimate({"method": work.segmenter.name} | ({given.option: str(given)} if given else {}))
    result |= {"needs": _needs(work), "licence": _of_both(work, "licence", "of"), "input": str(Location(job.input))}
    result |= counts | {"device": device, "actors": actors}
    if job.timing and len(pending):
        result |= _expected(job, work, pending, device=device, actors=actors)
    return result


def _expected(job: Label, work: Work, pending: Spool | pa.Table, *, device: str, actors: int) -> dict:
    """Time, size and memory, from up to three images; or why they were not timed."""
    step = max(1, len(pending) // TIMED_IMAGES)
    rows = pending.take(list(range(0, len(pending), step))[:TIMED_IMAGES]).to_pylist()
    log.info("timing up to %s; --no-timing leaves this out", count_of_images(len(rows)))
    timed = _timed(work, device, rows, alone=job.local)
    if "missing" in timed:
        reason = "left out, since weights are not on this machine yet and a dry run downloads nothing"
        return {"timing": f"{reason}: {_needs(work)}"}
    price, source = _price(job, device)
    rate = actors / timed["seconds_per_image"]
    hours, machines = 1e6 / rate / 3600, max(1, actors / _most_actors(work, device))
    seconds = timed["load_seconds"] + STARTUP * (not job.local) + timed["seconds_per_image"] * len(pending) / actors
    return {
        "seconds_per_image": round(timed["seconds_per_image"], 4),
        "images_per_second": _rounded(rate),
        "hours_per_million": _rounded(hours),
        "cost_per_million": _rounded(hours * price * machines),
        "price_per_hour": _rounded(price),
        "price_source": source,
        "expected_time": duration(seconds),
        "expected_size": f"{timed['bytes_per_image'] * len(pending) / 1e6:.1f} MB",
        "expected_memory": f"{timed['memory'] * actors / 1e9:.1f} GB in {actors} actor{'s' * (actors != 1)}",
        "timed": f"{count_of_images(timed['images'])}, {timed['failed']} of them failed",
    }


def _price(job: Label, device: str) -> tuple[float, str]:
    """What an hour of this machine costs, and who says so. Of several such machines a million images costs the same."""
    if job.price is not None:
        return job.price, "--price"
    if device == "cpu":
        return cores.count() * CORE_HOUR, f"USD, {cores.count()} cores at {CORE_HOUR} as of {CORE}, {PRICED}"
    import torch

    count = torch.cuda.device_count()
    return count * GPU_HOUR, f"USD, {count} GPU{'s' * (count != 1)} at {GPU_HOUR} as of {GPU}, {PRICED}"


def _rounded(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")


def _needs(work: Work) -> str:
    return _of_both(work, "needs", "for") or "nothing"


def _of_both(work: Work, fact: str, word: str) -> str:
    """What the method has for a fact, and what computes its foreground."""
    its = work.finder and getattr(work.finder, fact)
    return "; ".join(filter(None, (getattr(work.segmenter, fact), its and f"{word} the foreground: {its}")))


def _actors(job: Label, work: Work, device: str) -> int:
    """Actors of a run on this machine; on a cluster its size decides when the job starts."""
    return 1 if job.local else job.actors or _most_actors(work, device)


def _most_actors(work: Work, device: str) -> int:
    """Actors that this machine has room for; --actors for a cluster may be many times that."""
    if device == "cpu":
        return cores.actors(cores.for_local_ray())
    import torch

    return cores.actors(cores.for_local_ray(), gpus=torch.cuda.device_count(), per_actor=work.gpus)


def _timed(work: Work, device: str, rows: list[dict], *, alone: bool) -> dict:
    """Label a few rows in a child process: nothing is loaded here, and a crash stays there.

    alone: the process may use all cores, as in a run without Ray.
    """
    limit, timing = LOADING + work.patience * len(rows), f"timing {count_of_images(len(rows))}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({} if alone else {"OMP_NUM_THREADS": "1"})
    with Child(environment, _measured, work, device, rows, alone) as child:
        try:
            return child.result(limit)
        except TimeoutError:
            raise RuntimeError(f"{timing} took longer than {duration(limit)}; --no-timing leaves it out") from None
        except RuntimeError as error:
            raise RuntimeError(f"{timing} failed: {error}; --no-timing leaves it out") from None


def _measured(work: Work, device: str, rows: list[dict], alone: bool) -> dict:
    """What labelling the rows in this process took, or the weights that are `missing`."""
    import resource

    import cv2

    if not alone:
        cv2.setNumThreads(1)  # as in workers: as many processes as cores share the machine
    start, work, done = time.perf_counter(), replace(work, device=device), []
    try:
        segment = stages.Segment(work)
    except FileNotFoundError as error:
        return {"missing": str(error)}
    begun = loaded = time.perf_counter()
    done += stages.encode(segment(stages.decode(rows[:1], work)), work)
    if time.perf_counter() - loaded < PATIENCE:  # imports may be most of it: it is timed again, with the others
        done, begun = [], time.perf_counter()
    rest = [] if done else rows
    groups = [rest] if alone else [[row] for row in rest]  # some methods see several at once, one on each core
    for row in (row for group in groups for row in stages.encode(segment(stages.decode(group, work)), work)):
        done.append(row)
        if time.perf_counter() - begun > PATIENCE:
            break
    table = stages.table(done, work)
    return {
        "images": len(done),
        "failed": stages.count_errors(table).total(),
        "load_seconds": loaded - start,
        "seconds_per_image": (time.perf_counter() - begun) / len(done),
        "bytes_per_image": len(parquet_bytes(table)) / len(done),
        # bytes on macOS, KiB elsewhere
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
