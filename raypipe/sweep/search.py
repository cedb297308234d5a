"""What a sweep tries: the grammar of `--over`, and the settings that a grid or a draw makes of it. No Ray inside."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from raypipe.pipeline.options import checked

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"({NUMBER}):({NUMBER})(?::({NUMBER}))?")
INTERVAL = re.compile(rf"(log:)?({NUMBER})\.\.({NUMBER})")
MAX_SETTINGS = 100_000  # of one sweep
DRAWS_EACH = 20  # draws per wanted setting, where few are left that were not drawn yet
WORDS = {"None": None, "true": True, "false": False}


@dataclass(frozen=True)
class Interval:
    """Numbers to draw from, both ends included."""

    low: float
    high: float
    is_log: bool  # uniform in the logarithm
    is_whole: bool  # for a field that takes whole numbers

    def draw(self, rng: np.random.Generator) -> float | int:
        """One number."""
        if self.is_log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            return round(value) if self.is_whole else min(max(value, self.low), self.high)
        return int(rng.integers(self.low, self.high + 1)) if self.is_whole else float(rng.uniform(self.low, self.high))


Space = dict[str, list | Interval]  # swept field -> its values


def parse(over: Collection[str], kinds: list[type]) -> Space:
    """Read `NAME=VALUES` for each swept field of the dataclasses (a method, a refiner).

    VALUES: values and inclusive ranges `start:stop:step`, of whole numbers also `start:stop`, comma-separated, the
    members of a list joined by `+` (`4+8+16`); or an interval to draw from, `low..high` or `log:low..high`. Ranges are
    computed in decimals, so 0.1 three times is 0.3; a value that comes again is left out. Raises TypeError or
    ValueError that names the field.
    """
    space: Space = {}
    for entry in over:
        name, separator, text = entry.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or not text.strip():
            raise ValueError(f"--over {entry!r}: expected NAME=VALUES, such as threshold=0.2:0.8:0.1 or k=2,3,4")
        if name in space:
            raise ValueError(f"--over names {name!r} twice; join its values with commas")
        space[name] = _values(name, text.strip(), kinds)
    if not space:
        raise ValueError("sweep: --over must name at least one field, such as --over threshold=0.2:0.8:0.1")
    return space


def grid(space: Space) -> list[dict]:
    """Every combination, the last field fastest. Raises ValueError for an interval and for too many of them."""
    for name in (name for name, values in space.items() if isinstance(values, Interval)):
        advice = "give values or start:stop:step, or use --search random"
        raise ValueError(f"--over {name}: an interval has no grid; {advice}")
    count = math.prod(map(len, space.values()))
    if count > MAX_SETTINGS:
        raise ValueError(f"sweep: {count:,} settings are too many (at most {MAX_SETTINGS:,}); use --search random")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def lines(space: Space, base: dict) -> list[dict]:
    """Every value of each field, the others as in `base`. Raises ValueError for an interval."""
    settings = [base | setting for name in space for setting in grid({name: space[name]})]
    return list({canonical(setting): setting for setting in settings}.values())


def draw(space: Space, *, free: Collection[str], trials: int, seed: int) -> list[dict]:
    """Settings of `trials` different random draws. The same seed and more trials begin with the same ones.

    free: fields whose every value costs next to nothing; of those, lists are tried in full with each draw and only
    intervals are drawn from. Fewer come back where the lists hold no more. Raises ValueError where nothing is drawn.
    """
    listed = {name: values for name, values in space.items() if name in free and isinstance(values, list)}
    drawn = {name: values for name, values in space.items() if name not in listed}
    if not drawn:
        why = "every swept field acts after the model, where all values are tried"
        raise ValueError(f"sweep: nothing to draw, since {why}; use --search grid")
    rng, settings = np.random.default_rng(seed), {}
    for _ in range(DRAWS_EACH * trials):
        setting = {
            name: values.draw(rng) if isinstance(values, Interval) else values[rng.integers(len(values))]
            for name, values in drawn.items()
        }
        settings.setdefault(canonical(setting), setting)
        if len(settings) == trials:
            break
    return [setting | rest for setting in settings.values() for rest in grid(listed)]


def canonical(setting: dict) -> str:
    """A setting as text: equal for equal settings, however they are ordered, and readable back as JSON."""
    return json.dumps(setting, sort_keys=True)


def _values(name: str, text: str, kinds: list[type]) -> list | Interval:
    if match := INTERVAL.fullmatch(text):
        return _interval(name, text, kinds, match)
    values = []
    for part in text.split(","):
        texts = [part.strip()]
        if match := RANGE.fullmatch(*texts):
            start, stop, step = match.groups()
            if step is None and not all(isinstance(_value(name, end, kinds), int) for end in (start, stop)):
                raise ValueError(f"--over {name}: the range {part.strip()!r} lacks its step; write start:stop:step")
            texts = _range(name, start, stop, step or "1")
        values += [_value(name, each, kinds) for each in texts]
    return list({canonical({"": value}): value for value in values}.values())


def _interval(name: str, text: str, kinds: list[type], match: re.Match) -> Interval:
    low, high = (_value(name, end, kinds) for end in match.groups()[1:])
    if not low < high:
        raise ValueError(f"--over {name}: the interval {text!r} is empty; write low..high")
    if match[1] and low <= 0:
        raise ValueError(f"--over {name}: a logarithmic interval must begin above 0, got {text!r}")
    return Interval(low, high, is_log=bool(match[1]), is_whole=isinstance(low, int) and isinstance(high, int))


def _range(name: str, *numbers: str) -> list[str]:
    start, stop, step = map(Decimal, numbers)
    if step == 0 or (stop - start) / step < 0:
        raise ValueError(f"--over {name}: the range {':'.join(numbers)!r} is empty; write start:stop:step")
    count = int((stop - start) / step) + 1
    if count > MAX_SETTINGS:
        shown = ":".join(numbers)
        raise ValueError(f"--over {name}: the range {shown!r} has {count:,} values, at most {MAX_SETTINGS:,}")
    return [str(start + i * step) for i in range(count)]


def _value(name: str, text: str, kinds: list[type]):
    """One value as the field takes it. Raises what `options.checked` raises for the text itself."""
    # the most special first; `none` is a word of some options
    nothing = [None] * (text == "none")
    for value in (_scalar(text), [_scalar(part) for part in text.split("+")], text, *nothing):
        with contextlib.suppress(TypeError, ValueError):
            return checked({name: value}, kinds)[name]
    return checked({name: text}, kinds)[name]


def _scalar(text: str):
    if text in WORDS:
        return WORDS[text]
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    return float(text) if re.fullmatch(NUMBER, text) else text
