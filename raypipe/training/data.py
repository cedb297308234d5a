"""The images of a training, read by number in any order by any number of workers.

They are decoded once and kept as a recipe wants them, or as files. Which image comes when, and how it is changed,
follows from (seed, epoch, image) alone, or from the number of a sample where images are drawn with replacement: not
from the number of workers, nor from where a training was resumed. The numbers are numpy's, which promises them for one
version of numpy.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
import pyarrow as pa

from raypipe import images, schema
from raypipe.inputs.manifest import fetch
from raypipe.runtime.progress import Counts, Progress
from raypipe.training.recipe import Recipe, Sample
from raypipe.types import BadImage

BLOCK = 16  # images per task and object: some MB, as Ray likes them, and little to read of which one sample is wanted
AHEAD = 4  # tasks per core that wait for it or run
OF_IMAGE, OF_ORDER = 0, 1  # last words of Philox's counter: streams of one key that never meet


class Samples:
    """The samples of a recipe by index, the position among the sorted keys. Their arrays cannot be written to."""

    keys: list[str]
    digest: str  # sha256 over the keys, the sha256 of each image's file and the columns that the recipe added to it
    skipped: list[dict[str, str]]  # key, uri, error of the images that are left out, sorted by key

    def __init__(self, rows: Sequence[dict], samples: Sequence[Sample]):
        """rows: what `_prepared` says of all images, in the order of their keys. samples: of the good ones."""
        good = [row for row in rows if not row["error"]]
        self.keys = [row["key"] for row in good]
        self.digest = hashlib.sha256(json.dumps([[row["key"], row["digest"]] for row in good]).encode()).hexdigest()
        self.skipped = [{name: row[name] for name in ("key", "uri", "error")} for row in rows if row["error"]]
        self._samples = samples

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = self._samples[index]
        if (file := sample.get("file")) is None:
            return sample
        return {**sample, "image": images.decode(file.tobytes(), max_pixels=sys.maxsize)}


def gather(recipe: Recipe, rows: pa.Table, *, max_bytes: int, max_pixels: int) -> Samples:
    """The samples of all images in the memory of this process.

    rows: of `recipe.rows`. max_bytes, max_pixels: limits per image, checked before it is read and decoded.
    """
    facts, samples = [], []
    with Progress(len(rows), lambda: Counts(len(facts), len(facts) - len(samples))):
        ordered = rows.sort_by("key").to_pylist()
        for row in _prepared(ordered, recipe, max_bytes=max_bytes, max_pixels=max_pixels):
            sample = row.pop("sample")
            facts.append(row)
            if sample is not None:
                samples.append(sample)
    return Samples(facts, samples)


def gather_on_ray(recipe: Recipe, rows: pa.Table, *, max_bytes: int, max_pixels: int, timeout: float = 60.0) -> Samples:
    """The same samples, decoded by tasks on all of the cluster's cores and kept in Ray's object store.

    They pickle as references: in `train_loop_config` they reach every worker, also one that is started anew, and each
    reads them without a copy, once its machine has them. They live as long as the process that called this. What a lost
    machine held is decoded again, for which a core must be free beside the workers' ones. An image that kills its
    process, or takes longer than `timeout` seconds, is left out.
    """
    import ray

    from raypipe.pipeline import workers

    ledger, ordered = workers.Ledger.remote(), rows.sort_by("key")
    prepare = partial(_prepared, recipe=recipe, max_bytes=max_bytes, max_pixels=max_pixels)
    options = {"num_cpus": 1, "num_returns": 2, "max_retries": -1}  # retried when its process or node dies
    task = ray.remote(**options, scheduling_strategy="DEFAULT")(_block)  # beside the resources of a trial of Ray Tune
    ahead, blocks = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 0))), []
    with Progress(len(rows), workers.asker(ledger, before=0)):
        for start in range(0, len(rows), BLOCK):
            if len(blocks) >= ahead:
                ray.get(blocks[-ahead][1])  # an exception of a task ends it here
            blocks.append(task.remote(ordered.slice(start, BLOCK).to_pylist(), prepare, ledger, timeout))
        facts = list(chain.from_iterable(ray.get(said) for _, said in blocks))
    return Samples(facts, _Blocks([samples for samples, _ in blocks], facts, ledger))


def _block(rows: list[dict], prepare: Callable, ledger, timeout: float) -> tuple[list[Sample | None], list[dict]]:
    """The samples of some images, and what there is to say of each; guarded against what kills or hangs a process."""
    from raypipe.pipeline import workers

    done = workers.Guard({"decode": prepare}, ledger, timeout=timeout)(rows)
    ledger.committed.remote(len(done), Counter(row["error"] for row in done if row["error"]))
    return [row.pop("sample") for row in done], done


class _Blocks:
    """Samples that lie in Ray's object store as lists, by index. Any process of the cluster reads them."""

    def __init__(self, references: list, facts: Sequence[dict], ledger):
        """facts: of all images, BLOCK for each list. ledger: is needed where a lost list is made again."""
        self._references, self._ledger = references, ledger
        self._places = [place for place, row in enumerate(facts) if not row["error"]]

    def __getitem__(self, index: int) -> Sample:
        import ray

        block, place = divmod(self._places[index], BLOCK)
        sample = ray.get(self._references[block])[place]
        if sample is None:
            text = "its machine was lost, and since then it cannot be read any more"
            raise RuntimeError(f"training: sample {index}: {text}; see that its file is there and start again")
        return sample


def _prepared(rows: Sequence[dict], recipe: Recipe, *, max_bytes: int, max_pixels: int) -> Iterator[dict]:
    """Of each row its `key`, `uri`, `digest`, `error` and `sample`, which is None where there is an error.

    A row may come with one: that its process died.
    """
    contents = fetch([row for row in rows if not row.get("error")], max_bytes=max_bytes)
    for row in rows:
        sample, digest, error = None, "", row.get("error", "")
        if not error:
            try:
                content = next(contents)
                if isinstance(content, BadImage):
                    raise content
                digest = _digest(row, content)
                prepared = recipe.prepare(row, images.decode(content, max_pixels=max_pixels))
                if recipe.keep_files:
                    del prepared["image"]
                    prepared["file"] = np.frombuffer(content, np.uint8)
                sample = {name: _fixed(array) for name, array in prepared.items()}
            except BadImage as bad:
                error = str(bad)
            except MemoryError:
                error = str(BadImage("decode", "memory", "not enough memory to decode it"))
        yield {"key": row["key"], "uri": row["uri"], "digest": digest, "error": error, "sample": sample}


def _digest(row: dict, content: bytes) -> str:
    """sha256 of an image's file and of the columns that a recipe added to its row, such as a mask.

    Raises BadImage where these say, as `sha256`, that the file was another one.
    """
    file, added = hashlib.sha256(content), {name: row[name] for name in row if name not in schema.MANIFEST.names}
    if (added.get("sha256") or file.hexdigest()) != file.hexdigest():
        raise BadImage("fetch", "changed", f"{row['uri']} is not the file that it was: its sha256 differs")
    return hashlib.sha256(file.digest() + json.dumps(added, sort_keys=True, default=str).encode()).hexdigest()


def _fixed(array: np.ndarray) -> np.ndarray:
    """An array of its own, for views would keep the whole picture, that cannot be written to."""
    array = np.array(array, order="C")
    array.flags.writeable = False
    return array


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers for one sample in one epoch, independent of those of all others: Philox, keyed and counted."""
    return _philox(seed, epoch, index, OF_IMAGE)


def order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` samples in an epoch: a permutation, int64."""
    return _philox(seed, epoch, 0, OF_ORDER).permutation(count)


def _philox(seed: int, epoch: int, *high: int) -> np.random.Generator:
    """A generator that counts in the low two words, 2^128 blocks, above which the `high` words stay what they are."""
    key = np.array([seed % 2**64, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, *high], np.uint64)))


def shares(order: np.ndarray, *, workers: int, batch: int, tail: Literal["pad", "drop"]) -> np.ndarray:
    """Cut an epoch's order into what each worker takes at each step: (steps, workers, batch) of its entries.

    batch: per worker. A step's global batch is the next `workers` * `batch` entries, of which worker r takes every
    `workers`-th from r on; so it holds the same images for any number of workers that share one global batch. tail: a
    last batch that is not full is filled from the start of the order, or dropped. Raises ValueError for fewer entries
    than a global batch.
    """
    size = workers * batch
    if len(order) < size:
        text = f"{len(order)} images are fewer than the {size} of a batch of all workers"
        raise ValueError(f"training: {text}; give more images, or lower --batch-size or --workers")
    steps = -(-len(order) // size) if tail == "pad" else len(order) // size
    return np.resize(order, steps * size).reshape(steps, batch, workers).swapaxes(1, 2)
