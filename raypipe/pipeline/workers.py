"""What runs on Ray's workers: stages guarded against inputs that kill or hang their process, and the committing sink.

Ray restarts a dead worker and sends its input again, without end. The ledger remembers what was begun and not ended, so
an image that kills its process each time becomes an error row: first try the whole batch, second time image by image,
and an image begun twice in that way is not tried again (design by experiment: 199 good rows and one error row of 200).
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import logging
import os
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import ray
from ray.data import Datasink
from ray.exceptions import GetTimeoutError, RayError

from raypipe import masks
from raypipe.pipeline import stages
from raypipe.pipeline.stages import Work
from raypipe.run import Run
from raypipe.runtime.progress import Counts
from raypipe.types import BadImage

log = logging.getLogger("raypipe")
MAX_TRIES = 2  # single-image tries of an image whose batch killed its process
BACKSTOP_SECONDS = 5.0  # after the alarm
CROSSING = pa.schema([("row", pa.large_binary()), ("arrays", pa.list_(pa.large_binary()))])  # see `to_columns`


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Ledger:
    """Remembers which batches and images were begun and not ended. Forgetting (its own restart) costs extra tries."""

    def __init__(self) -> None:
        self._begun, self._stage, self._overran = Counter(), {}, set()
        self._rows, self._errors, self._has_begun = 0, Counter(), False
        self._remarks: list[str] = []

    def begin(self, key: str) -> tuple[int, str, bool]:
        """Note a start. Returns how many starts have no end yet, the stage of the last, and whether that took too long.

        key: names a batch or an image.
        """
        self._begun[key] += 1
        self._has_begun = True
        return self._begun[key], self._stage.get(key, "segment"), key in self._overran

    def enter(self, key: str, stage: str) -> None:
        """Note the stage that an image tried alone is in."""
        self._stage[key] = stage

    def overran(self, key: str) -> None:
        """Note that the process ends itself because the time limit is over."""
        self._overran.add(key)

    def end(self, key: str) -> None:
        """Note that a batch or an image is done; forgets all about it."""
        self._begun.pop(key, None)
        self._stage.pop(key, None)
        self._overran.discard(key)

    def committed(self, rows: int, errors: dict[str, int]) -> None:
        """Count rows that are durable, for the progress line."""
        self._rows += rows
        self._errors.update(errors)

    def remark(self, text: str) -> None:
        """Keep a line for the terminal."""
        self._remarks.append(text)

    def progress(self, told: int) -> tuple[Counts, list[str]]:
        """Rows and error rows committed so far, whether any batch was begun, and the lines after the first `told`."""
        return Counts(self._rows, self._errors.total(), self._has_begun), self._remarks[told:]


class Guard:
    """Runs stages over a batch so that no input can stop the job: see the module's text."""

    def __init__(self, steps: dict[str, Callable], ledger, *, timeout: float, granted: Callable[[], float] = float):
        """granted: tells the seconds that images got so far beside `timeout`, which shows when they are decoded."""
        self._steps, self._ledger, self._timeout, self._granted = steps, ledger, timeout, granted

    def __call__(self, rows: list[dict]) -> list[dict]:
        key = hashlib.sha256("".join([*self._steps, *(row["image_id"] for row in rows)]).encode()).hexdigest()
        tries, _, overran = ray.get(self._ledger.begin.remote(key))
        if tries == 1:
            with self._limits(key, self._timeout * len(rows)):
                result = rows
                for step in self._steps.values():
                    result = step(result)
                result = list(result)
        else:
            if tries == 2:
                self._say(rows, overran, self._timeout * len(rows))
            result = [done for row in rows for done in self._alone(row)]
        self._ledger.end.remote(key)
        return result

    def _alone(self, row: dict) -> list[dict]:
        """One image by itself, its stage noted; an error row once it has killed its process often enough."""
        key = f"{row['image_id']} {'+'.join(self._steps)}"
        tries, died_in, overran = ray.get(self._ledger.begin.remote(key))
        if tries > MAX_TRIES and not row.get("error"):
            crash = "crash", f"its process died, {MAX_TRIES} times with this image alone"
            timeout = "timeout", f"took longer than {self._timeout:g} s, {MAX_TRIES} times; see --timeout"
            row = row | {"error": str(BadImage(died_in, *(timeout if overran else crash)))}
        elif tries > 1:
            self._say([row], overran, self._timeout)
        rows = [row]
        with self._limits(key, self._timeout):
            for stage, step in self._steps.items():
                ray.get(self._ledger.enter.remote(key, stage))
                rows = list(step(rows))
        ray.get(self._ledger.end.remote(key))
        return rows

    def _say(self, rows: list[dict], overran: bool, seconds: float) -> None:
        """Tell the terminal why a batch or an image is tried again."""
        names = rows[0]["key"] + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
        died = "its process died, as when memory runs out or a library crashes, and it is tried again"
        text = f"took longer than {seconds:g} s and is tried again; see --timeout" if overran else died
        self._ledger.remark.remote(f"{names}: {text}")

    @contextlib.contextmanager
    def _limits(self, key: str, seconds: float) -> Iterator[None]:
        """End the process, for Ray to start another, when the block takes too long or has lost its GPU."""

        def watch() -> None:
            if is_over(done, seconds, waited=waited, arm=arm):
                ray.get(self._ledger.overran.remote(key))
                print(f"raypipe: no result after {seconds:g} s, this worker starts anew", flush=True)
                os._exit(1)

        def arm(seconds: float) -> None:
            # Code that hangs and keeps the interpreter's lock also keeps `watch` from waking; this needs no lock.
            faulthandler.dump_traceback_later(seconds + BACKSTOP_SECONDS, exit=True, file=sys.__stderr__)

        done, thread = threading.Event(), threading.get_native_id()

        def waited() -> float:
            return waited_for_core(thread) + self._granted()

        arm(seconds)
        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        except Exception as error:
            if not stages.is_device_lost(error):
                raise
            print(f"raypipe: the GPU's context is lost, this worker starts anew: {error}", flush=True)
            os._exit(1)
        finally:
            done.set()
            faulthandler.cancel_dump_traceback_later()


def is_over(done: threading.Event, seconds: float, *, waited: Callable[[], float], arm: Callable) -> bool:
    """Wait until work is done or has taken `seconds`, without those that it waited for a core of a busy machine.

    waited: tells these so far. arm: called with each further stretch of seconds that the work gets.
    """
    left, before = seconds, waited()
    while not done.wait(left):
        now = waited()
        left, before = now - before, now
        if left < 0.01 * seconds:
            return True
        arm(left)
    return False


def waited_for_core(thread: int) -> float:
    """Seconds that a thread of this process was ready to run and no core was free; 0 where the system does not tell."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


class LabelOnCpu:
    """All stages in one actor: images never leave the process. For methods without GPU."""

    def __init__(self, work: Work, ledger):
        use_threads(1)
        decode, encode = partial(stages.decode, work=work), partial(stages.encode, work=work)
        segment = stages.Segment(work)
        steps = {"decode": decode, "segment": segment, "encode": encode}
        self._work, self._run = work, Guard(steps, ledger, timeout=work.timeout, granted=segment.granted)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return stages.table(self._run(batch.to_pylist()), self._work)


class SegmentOnGpu:
    """The middle stage alone, so that the GPU waits neither for decoding nor for encoding."""

    def __init__(self, work: Work, ledger):
        self._keep_image = work.refiner is not None
        segment = stages.Segment(work)
        self._run = Guard({"segment": segment}, ledger, timeout=work.timeout, granted=segment.granted)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in self._run(from_columns(batch)):
            if not self._keep_image:
                row.pop("image", None)
            yield to_columns(row)


def decode_on_cpu(batch: pa.Table, work: Work, ledger) -> Iterator[pa.Table]:
    """The first stage as a task, for a GPU pipeline. Yields an image at a time: blocks may be cut between any two."""
    use_threads(1)
    guarded = Guard({"decode": partial(stages.decode, work=work)}, ledger, timeout=work.timeout)
    yield from map(to_columns, guarded(batch.to_pylist()))


def encode_on_cpu(batch: pa.Table, work: Work, ledger) -> pa.Table:
    """The last stage as a task, for a GPU pipeline."""
    use_threads(1)
    guarded = Guard({"encode": partial(stages.encode, work=work)}, ledger, timeout=work.timeout)
    return stages.table(guarded(from_columns(batch)), work)


class CommitSink(Datasink):
    """Writes each block of finished rows as one part with its commit record, under the attempt's fence."""

    def __init__(self, run: Run, attempt: str, ledger):
        self._run, self._attempt, self._ledger = run, attempt, ledger
        self.errors: Counter[str] = Counter()  # after the write: error rows by `stage: kind`
        self.rows = 0  # after the write: all rows

    def write(self, blocks: Iterable, ctx) -> tuple[int, Counter]:
        rows = pa.concat_tables([pa.table(block).cast(self._run.columns) for block in blocks])
        if not len(rows):
            return 0, Counter()
        self._run.commit(self._attempt, ctx.task_idx, rows)
        errors = stages.count_errors(rows)
        self._ledger.committed.remote(len(rows), errors)
        return len(rows), errors

    def on_write_complete(self, result) -> None:
        for rows, errors in result.write_returns:
            self.rows += rows
            self.errors.update(errors)


def use_threads(count: int) -> None:
    """Let OpenCV in this process use `count` threads; as many processes as cores share the machine."""
    import cv2

    cv2.setNumThreads(count)


def to_columns(row: dict) -> pa.Table:
    """A row between two stages as a table: its arrays as bytes, since tensors of two dtypes cannot be joined."""
    arrays, rest = [], io.BytesIO()
    _Pickler(rest, protocol=5, buffer_callback=arrays.append).dump(row)
    return pa.Table.from_pylist([{"row": rest.getvalue(), "arrays": [each.raw() for each in arrays]}], CROSSING)


def from_columns(batch: pa.Table) -> list[dict]:
    """The rows of joined tables of `to_columns`; their arrays are read-only views of the table."""
    pairs = zip(batch["row"], batch["arrays"], strict=True)
    return [pickle.loads(row.as_buffer(), buffers=[each.as_buffer() for each in arrays]) for row, arrays in pairs]


class _Pickler(pickle.Pickler):
    """Puts bool arrays at one bit a pixel beside the rest, other arrays as they are."""

    def reducer_override(self, value: object) -> object:
        if isinstance(value, np.ndarray) and value.dtype == bool:
            return partial(masks.unpack, soft=False), (pickle.PickleBuffer(masks.pack(value)), value.shape)
        return NotImplemented


def asker(ledger, *, before: int) -> Callable[[], Counts]:
    """Asks how far the job is, and logs the ledger's remarks. before: added to the rows.

    A ledger that is busy or restarting counts as unchanged.
    """
    last, told = Counts(before, 0, False), 0

    def ask() -> Counts:
        nonlocal last, told
        with contextlib.suppress(GetTimeoutError, RayError):
            (rows, *more), remarks = ray.get(ledger.progress.remote(told), timeout=5)
            last, told = max(last, Counts(before + rows, *more)), told + len(remarks)
            for remark in remarks:
                log.info(remark)
        return last

    return ask
