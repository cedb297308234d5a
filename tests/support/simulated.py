"""A simulated world of one seed: an object store (`simulated://...`), processes with clocks, and what goes wrong.

`storage.resolve` reaches the store as it does any file system of fsspec, so the code under test is the product's own.
Time is simulated: each request takes some, and who is due next goes on. A process is one or more threads, of which one
at a time runs: whoever makes a request hands the baton on. So a schedule is a function of its seed.

What is replaced in the product for the time of a schedule (`World.inside`): clock, sleep, threads and process numbers
of `storage.lock`, clock and random numbers of attempts' names, and thread pools by loops, which read in one order.

The store keeps what S3, GCS and Azure promise: a whole object replaces another at once, and whoever asks for an object
by its name gets the last one. A world may be worse: `Rates.stale` listings lag behind, and with `Rates.torn` a killed
writer leaves half an object, as file systems without atomic writes do.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import io
import random
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from unittest import mock

import fsspec
from fsspec.spec import AbstractFileSystem

from raypipe.maintenance import verify
from raypipe.run import provenance
from raypipe.run import run as run_module
from raypipe.runtime.interruption import Interrupted
from raypipe.storage import files, folder, lock

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)
LAG = 20.0  # seconds that a listing may be behind, and that a write may take effect after its writer has gone
PAUSE = 300.0  # seconds that a process may stand still, as a suspended machine does
STEP = 7200.0  # seconds that a host's clock may step


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the process does on its way out has an effect."""


@dataclass
class Rates:
    """Of each kind of disturbance, how probable it is at one request."""

    kill: float = 0.0  # the process ends, before the request or after it has taken effect
    fail: float = 0.0  # ENOSPC or a timeout; nothing happened
    lost: float = 0.0  # it has taken effect, and the answer is an error
    late: float = 0.0  # an error or the process's end, and the write takes effect some seconds later
    torn: float = 0.0  # the process ends, and half of what it wrote is there
    interrupt: float = 0.0  # SIGTERM
    pause: float = 0.0  # the whole process stands still for a while
    step: float = 0.0  # the clock of its host steps
    stale: float = 0.0  # a listing lacks what is new and shows what was deleted


@dataclass(eq=False)
class Process:
    """One process on a host. Dead ones have no effect any more."""

    host: str
    pid: int
    dead: bool = False
    until: float = 0.0  # stands still until then
    looked: bool = False  # at the lock, since it last wrote a part
    fibers: list[Fiber] = field(default_factory=list)

    @property
    def lives(self) -> bool:
        return not self.dead and not self.fibers[0].done


class Fiber:
    """A thread of a process, which runs while it has the baton."""

    def __init__(self, process: Process, function: Callable[[], object]):
        self.process, self.function = process, function
        self.baton, self.turn, self.waiting = threading.Lock(), 0, []
        self.result, self.error, self.done = None, None, False
        self.baton.acquire()


class World:
    """All of one schedule: time, hosts, processes and the store."""

    def __init__(self, seed: int):
        self.rng, self.now, self.rates = random.Random(seed), 0.0, Rates()
        self.objects: dict[str, tuple[bytes, float]] = {}  # path -> content, time
        self.changes: list[tuple[float, str, tuple[bytes, float] | None]] = []  # what was there before
        self.offsets: dict[str, float] = {}  # by host, of its clock
        self.processes: dict[tuple[str, int], Process] = {}
        self.happened: Counter = Counter()
        self.is_late = False  # whether what takes effect now is a write that its writer has given up
        self.trace: list[tuple] = []
        self.on_change: Callable[[str, bytes | None, bytes | None], None] = lambda path, before, after: None
        self.on_request: Callable[[Process, str, str], None] = lambda process, kind, path: None
        self._due, self._count, self._pids = [], 0, 100
        self.current = Fiber(Process("nobody", 1), lambda: None)

    @property
    def rates(self) -> Rates:
        """How much goes wrong from now on."""
        return self._rates

    @rates.setter
    def rates(self, rates: Rates) -> None:
        self._rates, self._most = rates, sum(vars(rates).values())

    # Time and processes

    def start(self, function: Callable[[], object], *, host: str) -> Fiber:
        """A new process that runs the function as soon as it is its turn."""
        self._pids += 1
        process = self.processes[host, self._pids] = Process(host, self._pids)
        return self._fiber(process, function)

    def _fiber(self, process: Process, function: Callable[[], object]) -> Fiber:
        fiber = Fiber(process, function)
        process.fibers.append(fiber)
        threading.Thread(target=self._live, args=(fiber,), daemon=True).start()
        self._push(self.now, fiber)
        return fiber

    def _live(self, fiber: Fiber) -> None:
        fiber.baton.acquire()
        try:
            if not fiber.process.dead:
                fiber.result = fiber.function()
        except BaseException as error:
            fiber.error = error
        fiber.done = True
        for other in fiber.waiting:
            self._push(self.now, other)
        self.current = self._next()
        self.current.baton.release()

    def sleep(self, seconds: float) -> None:
        """Let the process that asks wait, and others go on."""
        me = self.current
        if me.process.dead:
            raise Killed
        self._push(self.now + seconds, me)
        self._hand_over(me)

    def join(self, fiber: Fiber) -> None:
        """Wait until a thread has ended."""
        me = self.current
        while not fiber.done and not me.process.dead:
            fiber.waiting.append(me)
            self._hand_over(me)

    def kill(self, process: Process) -> None:
        """End a process where it stands."""
        process.dead = True
        for fiber in process.fibers:
            if not fiber.done and fiber is not self.current:
                self._push(self.now, fiber)

    def run(self, function: Callable[[], object], *, host: str = "one") -> object:
        """What a function returns or raises in a process of its own."""
        fiber = self.start(function, host=host)
        self.join(fiber)
        if fiber.error:
            raise fiber.error
        return fiber.result

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen later, whoever lives then."""
        self._count += 1
        heapq.heappush(self._due, (self.now + seconds, self._count, 0, event))

    def _push(self, when: float, fiber: Fiber) -> None:
        self._count, fiber.turn = self._count + 1, fiber.turn + 1
        heapq.heappush(self._due, (when, self._count, fiber.turn, fiber))

    def _hand_over(self, me: Fiber) -> None:
        other = self._next()
        if other is not me:
            self.current = other
            other.baton.release()
            me.baton.acquire()
        if me.process.dead:
            raise Killed

    def _next(self) -> Fiber:
        while True:
            when, _, turn, who = heapq.heappop(self._due)
            if not isinstance(who, Fiber):
                self.now = max(self.now, when)
                who()
            elif turn == who.turn and not who.done:  # else it was woken before
                if who.process.until > when and not who.process.dead:
                    self._push(who.process.until, who)
                else:
                    self.now = max(self.now, when)
                    return who

    def clock(self, process: Process | None = None) -> datetime:
        """What a process's host takes for the time."""
        host = (process or self.current.process).host
        return BEGIN + timedelta(seconds=self.now + self.offsets.get(host, 0.0))

    # The store

    def request(self, kind: str, path: str, effect: Callable[[], object], torn: Callable[[], object] | None = None):
        """One request: `effect` happens at once at some time, or does not, as the seed has it. torn: half of it."""
        if self.current.process.host == "nobody":
            return effect()
        self.sleep(self._latency())
        process, disturbance = self.current.process, self._disturbance(kind, torn is not None)
        self.on_request(process, kind, path)
        self.trace.append((round(self.now, 6), process.host, process.pid, kind, path, disturbance))
        if disturbance is None:
            answer = effect()
        else:
            self.happened[disturbance] += 1
            answer = getattr(self, f"_{disturbance}")(kind, effect, torn)
        self.sleep(self._latency())
        return answer

    def _latency(self) -> float:
        x = self.rng.random()
        if x < 0.95:
            return 0.2 * x
        return self.rng.random() * (3.0 if x < 0.995 else 45.0)

    def _disturbance(self, kind: str, is_write: bool) -> str | None:
        x, changes = self.rng.random(), kind != "read" and kind != "list"
        if x >= self._most:
            return None
        rates = iter(vars(self.rates).items())
        while x >= 0:
            name, rate = next(rates)
            x -= rate
        is_possible = {"late": changes, "lost": changes, "torn": is_write, "stale": kind == "list"}
        if name == "interrupt" and self.current is not self.current.process.fibers[0]:
            return None
        return name if is_possible.get(name, True) else None

    def _end(self) -> None:
        self.kill(self.current.process)
        raise Killed

    def _kill(self, kind, effect, torn):
        if self.rng.random() < 0.5:
            with contextlib.suppress(OSError):
                effect()
        self._end()

    def _fail(self, kind, effect, torn):
        if kind == "write" and self.rng.random() < 0.5:
            raise OSError(errno.ENOSPC, "no space left")
        raise TimeoutError(errno.ETIMEDOUT, "timed out")

    def _lost(self, kind, effect, torn):
        effect()
        raise TimeoutError(errno.ETIMEDOUT, "timed out; it was done")

    def _late(self, kind, effect, torn):
        def land() -> None:
            self.is_late = True  # for `on_change`
            with contextlib.suppress(FileNotFoundError):  # what was to be deleted is gone
                effect()
            self.is_late = False

        self.after(self.rng.random() * LAG, land)
        if self.rng.random() < 0.5:
            self._end()
        raise TimeoutError(errno.ETIMEDOUT, "timed out; it is under way")

    def _torn(self, kind, effect, torn):
        torn()
        self._end()

    def _interrupt(self, kind, effect, torn):
        raise Interrupted(15)

    def _pause(self, kind, effect, torn):
        self.current.process.until = self.now + self.rng.random() * PAUSE
        if self.rng.random() < 0.5:
            self.sleep(0.0)
            return effect()
        return effect()

    def _step(self, kind, effect, torn):
        self.offsets[self.current.process.host] = (2 * self.rng.random() - 1) * STEP
        return effect()

    def _stale(self, kind, effect, torn):
        return effect(True)

    def change(self, path: str, content: bytes | None) -> None:
        """An object is there from now on, or is gone (None)."""
        before = self.objects.get(path)
        if content is None:
            if before is None:
                raise FileNotFoundError(errno.ENOENT, "no such object", path)
            del self.objects[path]
        else:
            self.objects[path] = content, self.now
        self.changes.append((self.now, path, before))
        self.on_change(path, before and before[0], content)

    def listed(self, prefix: str, stale: bool = False) -> dict[str, dict]:
        """What lies directly in a folder; stale: of what changed lately, some as it was."""
        objects = self.objects
        if stale:
            objects, seen = dict(objects), set()
            for when, path, before in self.changes:
                if when > self.now - LAG and path not in seen and path.startswith(prefix):
                    seen.add(path)
                    if self.rng.random() < 0.6:
                        objects.pop(path, None)
                        objects |= {path: before} if before else {}
        found = {}
        for path in sorted(objects):
            if path.startswith(prefix):
                name, is_folder, _ = path[len(prefix) :].partition("/")
                place = prefix + name
                found[place] = info(place, None) if is_folder else info(place, objects[path])
        return found

    @contextlib.contextmanager
    def inside(self) -> Iterator[World]:
        """The product's clocks, threads, random names and processes are this world's, and its store is there."""
        clock = types.SimpleNamespace(now=lambda zone: self.clock())
        names = types.SimpleNamespace(token_hex=lambda count: f"{self.rng.getrandbits(8 * count):0{2 * count}x}")
        threads = types.SimpleNamespace(Thread=self._thread, Event=lambda: Event(self))
        process = types.SimpleNamespace(getpid=lambda: self.current.process.pid)
        seams = [(module, "datetime", clock) for module in (lock, folder, run_module, provenance)]
        seams += [(run_module, "secrets", names), (lock, "threading", threads), (lock, "os", process)]
        seams += [(lock, "time", types.SimpleNamespace(sleep=self.sleep)), (lock, "_born", self._born)]
        seams += [(lock, "_machine", lambda: self.current.process.host)]
        seams += [(module, "ThreadPoolExecutor", InOrder) for module in (files, verify)]
        with contextlib.ExitStack() as stack:
            for module, name, instead in seams:
                stack.enter_context(mock.patch.object(module, name, instead))
            stack.enter_context(mock.patch.object(Simulated, "world", self))
            yield self

    def _thread(self, *, target: Callable, args: tuple, daemon: bool) -> types.SimpleNamespace:
        process, started = self.current.process, []
        return types.SimpleNamespace(
            start=lambda: started.append(self._fiber(process, lambda: target(*args))),
            join=lambda: self.join(started[0]),
        )

    def _born(self, pid: int) -> str | None:
        process = self.processes.get((self.current.process.host, pid))
        return str(pid) if process and process.lives else None


class Event:
    """As threading.Event, in simulated time."""

    def __init__(self, world: World):
        self._world, self._is_set, self._waiting = world, False, []

    def set(self) -> None:
        self._is_set = True
        for fiber in self._waiting:
            self._world._push(self._world.now, fiber)

    def wait(self, seconds: float) -> bool:
        if not self._is_set:
            self._waiting.append(self._world.current)
            self._world.sleep(seconds)
            self._waiting.remove(self._world.current)
        return self._is_set


class InOrder:
    """As ThreadPoolExecutor, one after the other."""

    def __init__(self, count: int):
        pass

    def submit(self, function: Callable, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def map(self, function: Callable, arguments) -> Iterator:
        return map(function, arguments)

    def shutdown(self, **options) -> None:
        pass

    def __enter__(self) -> InOrder:
        return self

    def __exit__(self, *error) -> None:
        pass


class Simulated(AbstractFileSystem):
    """The store of the current world, as fsspec wants it."""

    protocol, cachable, world = "simulated", False, None

    def info(self, path: str, **options) -> dict:
        return self.world.request("read", path, lambda: self._info(path))

    def _info(self, path: str) -> dict:
        if path not in self.world.objects and any(each.startswith(f"{path}/") for each in self.world.objects):
            return info(path, None)
        return info(path, self._there(path))

    def _there(self, path: str) -> tuple[bytes, float]:
        if path not in self.world.objects:
            raise FileNotFoundError(errno.ENOENT, "no such object", path)
        return self.world.objects[path]

    def isdir(self, path: str) -> bool:
        return True  # an object store has no folders to ask for

    def isfile(self, path: str) -> bool:
        return True  # asked for right before it is opened, which says if it is gone

    exists = isfile

    def find(self, path: str, **options) -> dict[str, dict]:
        prefix = f"{path.rstrip('/')}/"
        return self.world.request("list", path, lambda stale=False: self.world.listed(prefix, stale))

    def rm(self, path: str, recursive: bool = False) -> None:
        paths = [path]
        if recursive:
            paths = self.world.request("list", path, lambda stale=False: [*self._below(path)])
            if not paths:
                raise FileNotFoundError(errno.ENOENT, "no such folder", path)
        for each in paths:
            with contextlib.suppress(FileNotFoundError) if recursive else contextlib.nullcontext():
                self.world.request("delete", each, lambda each=each: self.world.change(each, None))

    def _below(self, path: str) -> list[str]:
        return [each for each in sorted(self.world.objects) if each.startswith(f"{path}/")]

    def open(self, path: str, mode: str = "rb", **options) -> io.BytesIO:
        if mode == "rb":
            return io.BytesIO(self.world.request("read", path, lambda: self._there(path)[0]))
        return Written(self.world, path)


class Written(io.BytesIO):
    """An object that is there, whole, once it is closed."""

    def __init__(self, world: World, path: str):
        super().__init__()
        self._world, self._path = world, path

    def close(self) -> None:
        if self.closed:
            return
        content = self.getvalue()
        super().close()
        half = content[: len(content) // 2]
        change, path = self._world.change, self._path
        self._world.request("write", path, lambda: change(path, content), lambda: change(path, half))


def info(path: str, stored: tuple[bytes, float] | None) -> dict:
    """What fsspec says of an object, or of a folder (None)."""
    if stored is None:
        return {"name": path, "size": 0, "type": "directory"}
    return {"name": path, "size": len(stored[0]), "type": "file", "mtime": (BEGIN.timestamp() + stored[1])}


fsspec.register_implementation("simulated", Simulated, clobber=True)
