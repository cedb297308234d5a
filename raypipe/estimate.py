"""`raypipe label --dry-run`: what a run would do and, from three images timed in a child process, how long it takes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time

import pyarrow as pa

from raypipe import runs, stages, storage
from raypipe.progress import duration
from raypipe.stages import Work

STARTUP = 10.0  # seconds: Ray and its first worker processes, measured on two cores
TIMED = 3  # images


def estimate(job, work: Work, run: runs.Run, manifest: pa.Table) -> dict:
    """Inputs, pending images, workers and, with job.timing, expected time, memory and size. Writes nothing.

    Raises RuntimeError with the child's message when the method cannot be loaded or run.
    """
    from raypipe import pipeline

    pending = run.plan(manifest, retry_errors=job.retry_errors, limit=job.limit)
    actors, device = _actors(job, work), pipeline.device_here(work)
    result = {
        "method": work.segmenter.name,
        "needs": work.segmenter.needs or "no weights",
        "licence": work.segmenter.licence,
        "input": storage.redact(job.input),
        "images": len(manifest),
        "pending": len(pending),
        "device": device,
        "actors": actors,
    }
    if not job.timing or not len(pending):
        return result
    step = max(1, len(pending) // TIMED)
    timed = _timed(work, device, pending.take(list(range(0, len(pending), step))[:TIMED]).to_pylist())
    seconds = timed["load_seconds"] + STARTUP * (not job.local) + timed["seconds_per_image"] * len(pending) / actors
    return result | {
        "seconds_per_image": round(timed["seconds_per_image"], 4),
        "expected_time": duration(seconds),
        "expected_size": f"{timed['bytes_per_image'] * len(pending) / 1e6:.1f} MB",
        "expected_memory": f"{timed['memory'] * actors / 1e9:.1f} GB in {actors} actors",
        "timed": f"{timed['images']} images, {timed['failed']} of them failed",
    }


def _actors(job, work: Work) -> int:
    """Actors of a local run; on a cluster its size decides when the job starts."""
    from raypipe import cluster

    return 1 if job.local else job.actors or cluster.cores()


def _timed(work: Work, device: str, rows: list[dict]) -> dict:
    """Label a few rows in a child process: nothing is loaded here, and a crash stays there."""
    task = pickle.dumps((work, device, rows))
    child = subprocess.run([sys.executable, "-m", "raypipe.estimate"], input=task, capture_output=True)
    if child.returncode:
        reason = child.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"]
        raise RuntimeError(f"timing {len(rows)} images failed: {reason[-1]}; --no-timing leaves it out")
    return pickle.loads(child.stdout)


def _child() -> None:
    import dataclasses
    import resource

    work, device, rows = pickle.load(sys.stdin.buffer)
    start = time.perf_counter()
    work = dataclasses.replace(work, device=device)
    decode, segment, encode = stages.Decode(work), stages.Segment(work), stages.Encode(work)
    loaded = time.perf_counter()
    table = stages.table(encode(segment(decode(rows))))
    timed = {
        "images": len(rows),
        "failed": stages.count_errors(table).total(),
        "load_seconds": loaded - start,
        "seconds_per_image": (time.perf_counter() - loaded) / len(rows),
        "bytes_per_image": len(runs.parquet_bytes(table)) / len(rows),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    sys.stdout.buffer.write(pickle.dumps(timed))


if __name__ == "__main__":
    _child()
