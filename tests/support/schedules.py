"""Schedules on a simulated world: who labels, compacts, verifies and repairs a run at once, and what must hold.

To see one again, with all of its requests: `PYTHONPATH=tests python -m support.schedules SEED`.
`Schedule(seed).play()` raises Wrong with what does not hold. The rows say what they are: everything in a good row
follows from its image's id, and its `note` is a token that no other row has, which tells where the row comes from.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import random
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import pyarrow as pa

from raypipe import schema
from raypipe.maintenance.compact import Compact, compact
from raypipe.maintenance.verify import Verify, verify
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import begun
from raypipe.pipeline.stages import Work
from raypipe.run import DamagedRun, Run
from raypipe.run.rows import batches, columns, load
from raypipe.runtime.interruption import Interrupted
from raypipe.segmenters import find
from raypipe.storage import Locked, open_table
from support.simulated import STEP, Fiber, Killed, Process, Rates, World

PLACE = "simulated://bucket/run"
COMMITS, LOCK = "bucket/run/_commits/", "bucket/run/_runs/LOCK"
SETTINGS = {"k": 2}
WORK = Work(find("kmeans")(), None, None, batch_size=1, timeout=60.0, keep_soft=False, max_pixels=1, max_bytes=1)
TRANSIENT, PERMANENT = "fetch: network: gone", "decode: truncated: ends early"
SEGMENT = {"size": [4, 4], "counts": "484", "bbox": [1.0, 0.0, 2.0, 4.0], "area": 8, "score": 0.5}
FLAKY, NEVER = -1, 99
PARTLY = 32  # beginnings that schedules go on from
ENDS = (OSError, Locked, DamagedRun, Interrupted, Killed)  # how a disturbed command may end


class Wrong(AssertionError):
    """What a schedule shows that must never be."""


class Schedule:
    """One world with one run, its users, and what is known of each row."""

    def __init__(self, seed: int):
        self.seed, self.rng = seed, random.Random(f"schedule {seed}")
        self.world, self.kind = World(seed), ""
        self.table = self.rng.choice(["masks", *["exact_embeddings"] * 5])  # the latter are read in a third of the time
        self.images = manifest(self.rng.randint(2, 5))
        ids = self.images["image_id"].to_pylist()
        self.fails = {image: self.rng.choice([0] * 5 + [1, 2, FLAKY, NEVER]) for image in ids}  # until it is good
        self.tries: Counter = Counter()
        self.parts: dict[str, list[str]] = {}  # tokens by part name
        self.rows: dict[str, tuple[str, str]] = {}  # token -> id, error
        self.committed: set[str] = set()  # tokens of rows of which a record was there
        self.late_records: set[str] = set()  # paths of those that landed after their writers were told of failure
        self.durable: dict[str, bool] = {}  # id -> whether a good row of it was promised
        self.world.on_change, self.world.on_request = self._changed, self._requested
        self.did: Counter = Counter()

    def play(self) -> Schedule:
        """Let the users at it, then check what one undisturbed start leaves. Raises Wrong."""
        try:
            with self.world.inside():
                if self.rng.random() < 0.7:
                    self._go_on_from(partly_labelled(self.rng.randrange(PARTLY)))
                self.world.rates, lots = self._rates(), self.rng.choice([1, 2, 2])
                users = [self.world.start(self._user, host="nobody") for _ in range(lots)]
                if self.rng.random() < 0.5:
                    self.world.sleep(self.rng.expovariate(1 / 40))
                    self.observe()
                for user in users:
                    self._joined(user)
                self.world.rates = Rates()
                self.world.sleep(STEP + 3600)  # a clock may be behind by so much: then locks seem alive for longer
                self.observe()
                self._end()
        except Wrong as wrong:
            raise Wrong(f"schedule {self.seed}: {wrong}") from wrong
        return self

    def _go_on_from(self, other: Schedule) -> None:
        self.table, self.images, self.fails = other.table, other.images, other.fails
        self.tries, self.parts, self.rows = other.tries.copy(), dict(other.parts), dict(other.rows)
        self.committed, self.durable = {*other.committed}, dict(other.durable)
        self.world.objects, self.world.now = dict(other.world.objects), other.world.now

    def _rates(self) -> Rates:
        draw = self.rng.random
        self.kind = self.rng.choice(["atomic", "atomic", "lagging", "torn"])
        most = {"kill": 0.02, "fail": 0.015, "lost": 0.015, "late": 0.03, "torn": 0.02, "interrupt": 0.008}
        most |= {"pause": 0.02, "step": 0.015}
        rates = Rates(**{name: draw() ** 2 * rate for name, rate in most.items()})
        return replace(rates, torn=rates.torn * (self.kind == "torn"), stale=0.5 * draw() * (self.kind == "lagging"))

    # Users

    def _user(self) -> None:
        """Some commands, one after the other, each in a process of its own."""
        for _ in range(self.rng.choice([1, 1, 2])):
            self.world.sleep(self.rng.choice([0.0, 0.0, 1.0, 90.0]) * self.rng.random())
            names, weights = zip(*COMMANDS.items(), strict=True)
            name = self.rng.choices(names, weights)[0] if self.durable else "label"
            self.did[name] += 1
            fiber = self.world.start(lambda name=name: COMMANDED[name](self), host=self._host())
            self.world.join(fiber)
            self._ended(name, fiber)

    def _host(self) -> str:
        return self.rng.choice(["one", "one", "two", "three"])

    def _ended(self, name: str, fiber: Fiber) -> None:
        if fiber.error is None:
            self.did[f"{name}: done"] += 1
        elif isinstance(fiber.error, ENDS) or "the old parts are kept" in str(fiber.error):
            self.did[f"{name}: {type(fiber.error).__name__}"] += 1
        else:
            raise Wrong(f"{name} ended with {fiber.error!r}") from fiber.error

    def _joined(self, fiber: Fiber) -> object:
        self.world.join(fiber)
        if fiber.error:
            raise fiber.error
        return fiber.result

    def label(self, **options):
        """As `raypipe label`: what `label_here` and `label_on_ray` do with the store."""
        job, run = Label("/photos", PLACE, local=True, **options), Run(PLACE, "kmeans", self.table)
        run.check_configuration(SETTINGS, defaults=SETTINGS)
        with begun(job, WORK, run, self.images, settings=SETTINGS) as it:
            if len(it.pending):
                run.freeze(SETTINGS, {"time": f"{self.world.clock()}", "weights": {}})
                size, attempt = self.rng.randint(1, 4), it.work.attempt
                blocks = [it.pending.slice(start, size) for start in range(0, len(it.pending), size)]
                if self.rng.random() < 0.4:
                    self._on_workers(run, attempt, it.pending, blocks)
                else:
                    for task, block in enumerate(blocks):
                        self._commit(run, attempt, task, block)
        return it.summary

    def _on_workers(self, run: Run, attempt: str, pending: pa.Table, blocks: list[pa.Table]) -> None:
        """Each block in a process of its own, and again where that seems to be lost; it may go on all the same."""
        run.write_pending(pending, attempt)
        tasks = [
            lambda task=task, block=block: self._commit(run, attempt, task, block) for task, block in enumerate(blocks)
        ]
        first = [self.world.start(task, host=self._host()) for task in tasks]
        for fiber, task in zip(first, tasks, strict=True):
            for _ in range(3):
                if self.world.rates != Rates() and self.rng.random() < 0.2:
                    self.did["given up worker"] += 1
                else:
                    self.world.join(fiber)
                    if fiber.error is None:
                        break
                    if isinstance(fiber.error, Locked):
                        raise fiber.error
                fiber = self.world.start(task, host=self._host())
            else:
                raise OSError("a task failed three times")

    def _commit(self, run: Run, attempt: str, task: int, block: pa.Table) -> None:
        rows = []
        for image in block.to_pylist():
            self.tries[image["image_id"]] += 1
            fails = self.fails[image["image_id"]]
            failed = self.rng.random() < 0.5 if fails == FLAKY else self.tries[image["image_id"]] <= fails
            error = (PERMANENT if fails == NEVER else TRANSIENT) if failed else ""
            token = f"token {len(self.rows)}"
            self.rows[token] = image["image_id"], error
            rows.append(row(self.table, image, attempt, token, error))
        begin = f"part-{attempt}-{task:06d}"
        self.parts[begin] = [*self.parts.get(begin, ()), *(each["note"] for each in rows)]
        run.commit(attempt, task, pa.Table.from_pylist(rows, schema=schema.TABLES[self.table]))
        for each in rows:
            self.durable[each["image_id"]] = self.durable.get(each["image_id"], False) or each["error"] == ""

    def read(self) -> None:
        """As a reader at any time: each image at most once, nothing that was never committed."""
        tables = batches(Run(PLACE)) if self.table == "masks" else columns(Run(PLACE), ["image_id", "note"])
        self._check_rows([row for table in tables for row in table.select(["image_id", "note"]).to_pylist()])

    # What must hold

    def _changed(self, path: str, before: bytes | None, after: bytes | None) -> None:
        if path == LOCK and before and after and before.partition(b", ")[0] != after.partition(b", ")[0]:
            self.did["lock taken over"] += 1
        if after is not None and path.startswith(COMMITS):
            self.late_records |= {path} if self.world.is_late else {*()}
            name = path.removeprefix(COMMITS).removesuffix(".parquet")
            for begin, tokens in self.parts.items():
                if name.startswith(begin):
                    self.committed |= {*tokens}

    def _requested(self, process: Process, kind: str, path: str) -> None:
        if path == LOCK and kind == "read":
            process.looked = True
        elif kind == "write" and path.startswith(f"bucket/run/{self.table}/"):
            process.looked = False
        elif kind == "write" and path.startswith(COMMITS) and not process.looked:
            raise Wrong("a record is written without a look at the lock")

    def _lacks_part(self, record: str) -> bool:
        """Whether a record is there whose part is not: one that landed after its writer's death and a cleaning."""
        part = f"bucket/run/{self.table}/method=kmeans/{record.removeprefix(COMMITS)}"
        return record in self.world.objects and part not in self.world.objects

    def _check_rows(self, rows: list[dict]) -> None:
        ids = [row["image_id"] for row in rows]
        if len(set(ids)) < len(ids):
            raise Wrong(f"a reader sees an image twice: {Counter(ids).most_common(2)}")
        if missing := {row["note"] for row in rows} - self.committed:
            raise Wrong(f"a reader sees rows that were not committed: {missing}")

    def observe(self) -> None:
        """What is in the store at this moment: all that was promised, once."""
        try:
            rows = load(Run(PLACE), ["image_id", "note", "error"]).to_pylist()
        except FileNotFoundError:
            if self.durable:
                raise Wrong("the run is gone") from None
            return
        except DamagedRun:
            if not (self.world.happened["torn"] or any(map(self._lacks_part, self.late_records))):
                raise
            return
        self._check_promised(rows)

    def _check_promised(self, rows: list[dict]) -> None:
        self._check_rows(rows)
        errors = {row["image_id"]: row["error"] for row in rows}
        for image, is_good in self.durable.items():
            if image not in errors:
                raise Wrong(f"a row is lost: {image}")
            if is_good and errors[image]:
                raise Wrong(f"a good row gave way to an error: {image}")

    def _end(self) -> None:
        """One undisturbed start of the same command: all is there, once, right, and stays when it is started again."""
        retries = self.rng.random() < 0.5
        if self.world.happened["torn"]:
            with contextlib.suppress(FileNotFoundError):  # no run yet
                self.world.run(lambda: verify(Verify(PLACE, repair=True)), host=self._host())
        summary = self.world.run(lambda: self.label(retry_errors=retries), host=self._host())
        if self.rng.random() < 0.15:
            self.world.run(lambda: compact(Compact(PLACE)), host=self._host())
        if self.rng.random() < 0.06:
            self._check_end(summary)
            summary = self._damaged()
        elif self.rng.random() < 0.1:
            summary = self.world.run(self.label, host=self._host())
            if summary.labelled:
                raise Wrong(f"{summary.labelled} images labelled by a start that had nothing to do")
        self._check_end(summary)

    def _damaged(self):
        """A part is damaged: verify says so, a repair (a first one is killed) and a start put it right. Others stay."""
        before = {row["note"]: row["image_id"] for row in load(Run(PLACE), ["image_id", "note"]).to_pylist()}
        paths = [path for path in sorted(self.world.objects) if path.startswith((COMMITS, f"bucket/run/{self.table}/"))]
        path = self.rng.choice(paths)
        content, name = self.world.objects[path][0], path.rpartition("/")[2]
        with Run(PLACE).part(name) as part:
            hit = {*part.read(columns=["image_id"])["image_id"].to_pylist()}
        place = self.rng.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ (1 << self.rng.randrange(8))]) + content[place + 1 :]
        self.world.change(path, self.rng.choice([flipped, content[:place], *[None] * (len(paths) > 2)]))
        if verify(Verify(PLACE)).exit_code != 1:
            raise Wrong(f"verify does not see that {path} is damaged")
        self.durable = {image: good for image, good in self.durable.items() if image not in hit}
        self.world.rates = Rates(kill=0.05)
        repair = self.world.start(lambda: verify(Verify(PLACE, repair=True)), host="one")
        self.world.join(repair)
        self.world.rates = Rates()
        self.world.sleep(3600)
        self.world.run(lambda: verify(Verify(PLACE, repair=True)))
        after = {row["note"] for row in load(Run(PLACE), ["note"]).to_pylist()}
        if missing := {token for token, image in before.items() if image not in hit} - after:
            raise Wrong(f"repair took good rows: {missing}")
        return self.world.run(lambda: self.label(retry_errors=True))

    def _check_end(self, summary) -> None:
        if summary.pending:
            raise Wrong(f"{summary.pending} images pending after an undisturbed start")
        rows = load(Run(PLACE)).to_pylist()
        self._check_promised(rows)
        images = {image["image_id"]: image for image in self.images.to_pylist()}
        if sorted(each["image_id"] for each in rows) != sorted(images):
            raise Wrong(f"{len(rows)} rows for {len(images)} images")
        for each in rows:
            if (each["image_id"], each["error"]) != self.rows[each["note"]]:
                raise Wrong(f"{each['note']} is not what was written")
            expected = row(self.table, images[each["image_id"]], each["attempt"], each["note"], each["error"])
            if any(each[name] != value for name, value in expected.items() if name != "segments"):
                raise Wrong(f"{each} instead of {expected}")
            if [mask["counts"] for mask in each.get("segments") or []] != [
                mask["counts"] for mask in expected.get("segments") or []
            ]:
                raise Wrong(f"{each['key']}: other masks")
        plain = [*self._plain()]
        if sorted(plain) != sorted(images):
            raise Wrong(f"plain readers see {len(plain)} rows for {len(images)} images")
        failed = {each["image_id"]: each["error"] for each in rows if each["error"]}
        listed = {
            each["image_id"]: f"{each['stage']}: {each['kind']}: {each['message']}"
            for each in Run(PLACE).errors().to_pylist()
        }
        if listed != failed or summary.failed != len(failed):
            raise Wrong(f"errors.parquet lists {listed}, the rows {failed}, the summary {summary.failed}")
        if self.rng.random() < 0.25:
            found = verify(Verify(PLACE, deep=self.rng.random() < 0.3))
            if found.problems or found.rows != len(images):
                raise Wrong(f"verify: {found.text()}")
        if (Run(PLACE).completed() or {}).get("images") != len(images):
            raise Wrong("the run is not marked as complete")

    def _plain(self):
        for path, (content, _) in sorted(self.world.objects.items()):
            if path.startswith(f"bucket/run/{self.table}/"):
                yield from open_table(content).read(columns=["image_id"], use_threads=False)["image_id"].to_pylist()


COMMANDS = {"label": 6, "retry": 2, "limit": 1, "compact": 3, "verify": 1, "repair": 2, "read": 2}
COMMANDED = {
    "label": Schedule.label,
    "retry": lambda it: it.label(retry_errors=True),
    "limit": lambda it: it.label(limit=2),
    "compact": lambda it: compact(Compact(PLACE)),
    "verify": lambda it: verify(Verify(PLACE)),
    "repair": lambda it: verify(Verify(PLACE, repair=True)),
    "read": Schedule.read,
}


def manifest(count: int) -> pa.Table:
    rows = [{"image_id": f"{i:032x}", "uri": f"/photos/{i}.png", "key": f"{i}.png"} for i in range(count)]
    return pa.Table.from_pylist(rows, schema=schema.MANIFEST)


def row(table: str, image: dict, attempt: str, token: str, error: str) -> dict:
    """What is stored of an image: all but token, attempt and error follows from its id."""
    image_id = image["image_id"]
    return {
        "image_id": image_id,
        "uri": image["uri"],
        "key": image["key"],
        "sha256": hashlib.sha256(image_id.encode()).hexdigest(),
        "height": 4,
        "width": 4,
        **({"segments": [] if error else [SEGMENT]} if table == "masks" else {"embedding": None if error else [1.0]}),
        "note": token,
        "attempt": attempt,
        "error": error,
    }


@cache
def partly_labelled(variant: int) -> Schedule:
    """An undisturbed start that labels some of its images."""
    schedule = Schedule(-1 - variant)
    with schedule.world.inside():
        schedule.world.run(lambda: schedule.label(limit=schedule.rng.randint(1, 4)))
    return schedule


def play(seeds: range) -> dict:
    """Schedules one after the other: what happened in them, by kind, and what is wrong, by seed."""
    happened, did, wrong = Counter(), Counter(), {}
    for seed in seeds:
        schedule = Schedule(seed)
        try:
            schedule.play()
        except Exception as error:
            wrong[seed] = f"{type(error).__name__}: {error}"
        happened, did = happened + schedule.world.happened, did + schedule.did
    return {"happened": happened, "did": did, "wrong": wrong}


def show(seed: int) -> None:
    """Print the requests of a schedule as they took effect; raises what is wrong with it."""
    schedule = Schedule(seed)
    try:
        schedule.play()
    finally:
        for when, host, pid, kind, path, disturbance in schedule.world.trace:
            print(f"{when:12.3f}  {host:6} {pid}  {kind:7} {path.removeprefix('bucket/run/')}  {disturbance or ''}")


if __name__ == "__main__":
    first, *last = map(int, sys.argv[1:])
    if last:
        gc.set_threshold(50_000)  # a tenth of the time
        print(json.dumps(play(range(first, *last))))
    else:
        show(first)
