"""What is kept of a training while it runs: the terms of the loss at every step, and a few masks of every epoch."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.images import encode_png
from raypipe.pictures.overlay import jpeg, resized, scaled
from raypipe.runtime.progress import count_of, duration
from raypipe.storage import Folder, open_table

PART_STEPS = 1000  # of one file: small enough to be written anew at each flush, and few files for a long training
COLUMNS = pa.schema(
    [
        ("step", pa.int64()),  # the first one is 1
        ("epoch", pa.int32()),  # the first one is 1
        ("seconds", pa.float64()),  # since the last step; NaN where there is none in this start
        ("lr", pa.float64()),
        ("skipped", pa.bool_()),  # its gradient was not finite: no weight was changed
    ]
)  # then one float64 column per term of the loss
SIDE, QUALITY = 224, 80  # pixels of the longer side of a kept picture, and of its JPEG


class Log:
    """Where one worker, the first, writes the terms of every step: Parquet files of PART_STEPS steps in `log/`."""

    def __init__(self, folder: Folder, *, after: int):
        """after: steps that the weights at hand have seen. What an earlier start logged of later ones is forgotten."""
        self._folder, self._rows = folder, []
        for name in folder.files("log"):
            if _first_step(name) > after:
                folder.delete("log", name)
        newest = _part_of(after)
        if stored := folder.read("log", newest):
            table = _table(stored)
            self._rows = table.filter(pc.field("step") <= after).to_pylist()
            if len(self._rows) < len(table):
                self._write(newest)

    def add(
        self, *, step: int, epoch: int, lr: float, seconds: float, terms: Mapping[str, float], skipped: bool = False
    ) -> None:
        """Keep the terms of one step in memory. step, epoch: the first ones are 1. seconds: since the last step."""
        assert not COLUMNS.names & terms.keys(), f"terms must not be named as columns are: {sorted(terms)}"
        if self._rows and _part_of(self._rows[0]["step"]) != _part_of(step):
            self.flush()
            self._rows = []
        values = {"step": step, "epoch": epoch, "seconds": seconds, "lr": lr, "skipped": skipped}
        self._rows.append(values | {name: float(value) for name, value in terms.items()})

    def flush(self) -> None:
        """Write what was added, atomically; at the latest before a checkpoint."""
        if self._rows:
            self._write(_part_of(self._rows[0]["step"]))

    def _write(self, name: str) -> None:
        terms = (name for name in self._rows[0] if name not in COLUMNS.names)
        schema = pa.schema([*COLUMNS, *((name, pa.float64()) for name in terms)])
        self._folder.write_table(pa.Table.from_pylist(self._rows, schema), "log", name)


def read(folder: Folder, *, after: int = 0) -> pa.Table:
    """The logged steps behind step `after`, ascending, each once: COLUMNS, then a float64 column per term."""
    first = _first_step(_part_of(after + 1))
    parts = [folder.read("log", name) for name in sorted(folder.files("log")) if _first_step(name) >= first]
    tables = [_table(part) for part in parts if part]  # a start that goes on may have deleted one just now
    if not tables:
        return COLUMNS.empty_table()
    return pa.concat_tables(tables, promote_options="default").filter(pc.field("step") > after)


def follow(folder: Folder) -> Callable[[], list[dict]]:
    """A function that gives the steps logged since its last call, or since now.

    Where a worker goes on from an earlier checkpoint, the steps that it does again come again. What cannot be read is
    left to the next call.
    """
    last = _last_step(folder)

    def news() -> list[dict]:
        nonlocal last
        try:
            rows = read(folder, after=last).to_pylist()
            last = rows[-1]["step"] if rows else min(last, _last_step(folder))
        except (OSError, pa.ArrowInvalid):  # a network that fails for a while; a part that a bucket is just replacing
            return []
        return rows

    return news


def line(rows: list[dict], *, steps: int, per_epoch: int, epochs: int) -> str:
    """Some steps of the log in words: where the training is, the mean loss, its terms, speed and time left.

    rows: of `follow`, at least one. steps: of the whole training. per_epoch: steps of an epoch. epochs: 0 = without.
    """
    step, good = rows[-1]["step"], [row for row in rows if not row["skipped"]]
    where = f"epoch {-(-step // per_epoch):,} of {epochs:,}, " if epochs else ""
    where += f"step {step:,} of {steps:,}"
    total, *terms = _means(good) or ["no loss"]
    losses = f"{total} ({', '.join(terms)})" if terms else total
    skipped = [f"{count_of(len(rows) - len(good), 'step')} skipped"] if len(good) < len(rows) else []
    known = [row["seconds"] for row in rows if row["seconds"] > 0]  # not where it is NaN
    each = sum(known) / len(known) if known else 0.0
    speed = [f"{1 / each:.3g} steps/s", f"{duration((steps - step) * each)} left"] if each else []
    return f"{where}: {', '.join([losses, *skipped, *speed])}"


def in_order(terms: list[str]) -> list[str]:
    """The names of terms of a loss, the total first."""
    return sorted(terms, key=lambda name: name != "total")


def _means(rows: list[dict]) -> list[str]:
    names = in_order([name for name in rows[0] if name not in COLUMNS.names]) if rows else []
    values = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in names}
    return [f"{name.replace('_', ' ')} {np.mean(its):.4g}" for name, its in values.items() if its]


def keep_pictures(folder: Folder, pictures: Mapping[str, np.ndarray]) -> None:
    """Write the images that `keep_masks` is about, by key, small. pictures: RGB uint8 (H, W, 3)."""
    small = {key: resized(image, scaled(image.shape[:2], SIDE)) for key, image in pictures.items()}
    _keep(folder, "pictures", {key: base64.b64decode(jpeg(each, QUALITY).split(",")[1]) for key, each in small.items()})


def keep_masks(folder: Folder, epoch: int, masks: Mapping[str, np.ndarray]) -> None:
    """Write what the network makes of the fixed images after an epoch (0: before the first), small.

    masks: probabilities, float (H, W) in [0, 1], by the key of the image.
    """
    small = {key: resized(mask, scaled(mask.shape, SIDE)) for key, mask in masks.items()}
    grey = {key: (mask.clip(0, 1) * 255).round().astype(np.uint8) for key, mask in small.items()}
    _keep(folder, f"epoch-{epoch:05}", {key: encode_png(each) for key, each in grey.items()})


def kept_pictures(folder: Folder) -> dict[str, bytes]:
    """The JPEG files of `keep_pictures`, by key; {} where there are none."""
    return _kept(folder, "pictures")


def kept_masks(folder: Folder, epoch: int) -> dict[str, bytes]:
    """The PNG files, grey, of `keep_masks`, by key; {} where there are none of this epoch."""
    return _kept(folder, f"epoch-{epoch:05}")


def kept_epochs(folder: Folder) -> list[int]:
    """The epochs that `keep_masks` was called with, ascending."""
    names = (name.removesuffix(".parquet") for name in folder.files("samples"))
    return sorted(int(name.removeprefix("epoch-")) for name in names if name.startswith("epoch-"))


def _keep(folder: Folder, name: str, files: dict[str, bytes]) -> None:
    columns = {"key": pa.array(files, pa.string()), "file": pa.array(files.values(), pa.binary())}
    folder.write_table(pa.table(columns), "samples", f"{name}.parquet")


def _kept(folder: Folder, name: str) -> dict[str, bytes]:
    stored = folder.read("samples", f"{name}.parquet")
    table = _table(stored).to_pydict() if stored else {"key": [], "file": []}
    return dict(zip(table["key"], table["file"], strict=True))


def _last_step(folder: Folder) -> int:
    names = sorted(folder.files("log"))
    stored = folder.read("log", names[-1]) if names else None
    return _table(stored)["step"][-1].as_py() if stored else 0


def _part_of(step: int) -> str:
    """The name of the file that a step is in: that of its first one."""
    return f"part-{max(0, step - 1) // PART_STEPS * PART_STEPS + 1:08}.parquet"


def _first_step(name: str) -> int:
    return int(name.removeprefix("part-").removesuffix(".parquet"))


def _table(content: bytes) -> pa.Table:
    return open_table(content).read()
