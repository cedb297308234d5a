"""NamedMask's experts: before the training a network for each category learns from its masks alone, and cleans them.

(Shin, Xie, Albanie, CVPR Workshops 2023, section 3.2.) What a detector of salient objects finds in one image only, and
not in the others of the category, an expert has not learned. Each is a training of its own, and says in the end where
the object is in the images that it has seen, at their own size.

    <output>/experts/0003/                    a training like any other, by the label of the expert's first category
    <output>/experts/0003/refined.parquet     its masks, by category and id of the image
    <output>/experts/experts.parquet          all experts, and why some of them failed
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields

import pyarrow as pa
import pyarrow.compute as pc

from raypipe import classes, masks
from raypipe.lookup import one_line
from raypipe.runtime.progress import count_of
from raypipe.segmenters.namedmask import NamedMask as Method
from raypipe.storage import Folder, Locked, open_table
from raypipe.storage.lock import STALE_AFTER
from raypipe.training import checkpoints
from raypipe.training.job import Train, default_settings, frozen_settings
from raypipe.training.namedmask import NamedMask
from raypipe.training.namedmask.student import NamedMaskStudent
from raypipe.training.train import EXPERTS, FINISHED, STALL_SECONDS, check_frozen, prepare_ray, train

log = logging.getLogger("raypipe")
REFINED = "refined.parquet"
COLUMNS = pa.schema(
    [
        ("category", pa.string()),
        ("image_id", pa.string()),
        ("size", pa.list_(pa.int32(), 2)),
        ("mask", pa.string()),  # COCO's counts
        ("area", pa.int64()),  # px
    ]
)
ALL = pa.schema([("expert", pa.string()), ("categories", pa.string()), ("images", pa.int64()), ("error", pa.string())])
NAMED = 5  # failed experts that an error names
PUBLISHED = {"experts": False, "n_max": 1, "copy_paste_bbox": "inclusive"}  # of an expert: nothing is pasted


@dataclass(kw_only=True)
class Expert(NamedMask):
    """How one expert is trained, on images that are at hand."""

    pool: str = ""  # digest of its images' ids and masks: other ones are another training

    name = "namedmask"

    @classmethod
    def of(cls, recipe: NamedMask, names: tuple[str, ...], rows: pa.Table) -> Expert:
        """The expert of some categories. rows: of `pool.read`, theirs alone."""
        options = {each.name: getattr(recipe, each.name) for each in fields(NamedMask)} | PUBLISHED
        options |= {"iterations": recipe.expert_iterations, "batch_size": recipe.expert_batch_size, "only": names}
        for each in ("expert_iterations", "expert_batch_size", "expert_groups"):
            options[each] = getattr(NamedMask, each)
        cells = json.dumps(rows.select(["category", "image_id", "size", "mask"]).to_pylist())
        expert = cls(**options, pool=hashlib.sha256(cells.encode()).hexdigest()[:16])
        label = rows.schema.get_field_index("label")
        expert.images = rows.set_column(label, rows.schema.field(label), pa.array([1] * len(rows), pa.int32()))
        return expert

    def rows(self, manifest: pa.Table | None) -> pa.Table:
        return self.images

    def student(self, device: str) -> ExpertStudent:
        return ExpertStudent(self, device)


class ExpertStudent(NamedMaskStudent):
    """The network of an expert, which in the end labels what it has learned from."""

    def finish(self, samples) -> None:
        """Look at all images again, at their own size."""
        method, known = Method(dtype=self.recipe.dtype), {row["key"]: row for row in self.recipe.images.to_pylist()}
        method.use(self.network.eval(), self._device, ["object"])
        self.refined = []
        for i, key in enumerate(samples.keys):
            (found,) = method.segment([samples[i]["image"]])
            rle = masks.encode_rle(found.index > 0)
            cells = {"size": rle["size"], "mask": rle["counts"], "area": int((found.index > 0).sum())}
            self.refined.append({name: known[key][name] for name in ("category", "image_id")} | cells)

    def export(self, folder: Folder) -> None:
        folder.write_table(pa.Table.from_pylist(self.refined, COLUMNS), REFINED)
        super().export(folder)


def refined(recipe: NamedMask, rows: pa.Table, job: Train, folder: Folder) -> pa.Table:
    """The rows of `pool.read` with the masks of experts in the place of the given ones, once all are trained.

    Images whose object an expert does not find are left out; those that could not be read stay as they are. Raises
    OtherConfiguration for experts of other settings, ValueError where they find nothing at all, and RuntimeError where
    some have failed, after all others are trained: the same call trains only these then.
    """
    experts = planned(recipe, rows)
    todo = {name: each for name, each in experts.items() if folder.read_json(EXPERTS, name, *FINISHED) is None}
    for name, expert in experts.items():
        options = _job(job, folder, name)
        check_frozen(Folder(options.output), frozen_settings(options, expert), defaults=default_settings(expert))
    if todo:
        log.info("%s: %s to train of %s", recipe.name, count_of(len(todo), "expert"), f"{len(experts):,}")
        failed = dict((_train_here if job.local else _train_on_ray)(todo, job, folder))
        _tell(experts, failed, folder)
    return _joined(recipe, rows, experts, folder)


def planned(recipe: NamedMask, rows: pa.Table) -> dict[str, Expert]:
    """The expert of each group of categories that has any image, by the name of its folder."""
    found, known = {}, recipe.labels
    for names in recipe.groups:
        labels = [known[classes.normalised(name)] for name in names]
        its = rows.filter(pc.is_in(rows["label"], pa.array(labels, rows.schema.field("label").type)))
        if len(its):
            found[f"{labels[0]:04}"] = Expert.of(recipe, names, its)
    return found


def _job(job: Train, folder: Folder, name: str, device: str | None = None) -> Train:
    """The training of one expert in one process. device: None = as the job says."""
    limits = {each: getattr(job, each) for each in ("checkpoint_steps", "log_steps", "max_pixels", "max_bytes")}
    return Train(output=folder.location(EXPERTS, name), local=True, device=device or job.device, **limits)


def _train_here(experts: dict[str, Expert], job: Train, folder: Folder) -> Iterator[tuple[str, str]]:
    """Train one after the other. Gives the name of each that failed, and why."""
    for number, (name, expert) in enumerate(experts.items(), 1):
        log.info("expert %s of %s: %s", f"{number:,}", f"{len(experts):,}", " or ".join(expert.only))
        try:
            _trained(_job(job, folder, name), expert)
        except Exception as error:  # of any kind: the others do not depend on it
            yield name, one_line(error)


def _train_on_ray(experts: dict[str, Expert], job: Train, folder: Folder) -> Iterator[tuple[str, str]]:
    """Train as tasks of Ray, as many at a time as there are GPUs, or else cores. Gives the same."""
    prepare_ray()
    import ray

    from raypipe.runtime import cluster

    with cluster.connected(stall=STALL_SECONDS):
        cluster.warn_of_local_paths(output=job.output)
        found = cluster.resources(gpus=1.0, device=job.device, actors=1, option="--workers")
        options = {"num_cpus": 1, "num_gpus": found.gpus, "max_retries": job.max_failures}
        task = ray.remote(**options, scheduling_strategy="DEFAULT")(_trained)
        given = {name: _job(job, folder, name, found.device) for name in experts}
        waiting = {task.remote(given[name], expert): name for name, expert in experts.items()}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            name, left = waiting.pop(done), len(waiting)
            try:
                ray.get(done)
                log.info("expert of %s is trained, %s left", " or ".join(experts[name].only), f"{left:,}")
            except Exception as error:  # of any kind: the others do not depend on it
                yield name, one_line(cluster.cause(error))


def _trained(job: Train, expert: Expert) -> None:
    """Train one expert in this process. A task of a killed attempt may hold its folder for some seconds more."""
    deadline = time.monotonic() + STALE_AFTER
    while True:
        try:
            train(job, expert)
            break
        except Locked:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    Folder(job.output).delete_folder(checkpoints.ROOM)  # 0.4 GB each


def _tell(experts: dict[str, Expert], failed: dict[str, str], folder: Folder) -> None:
    """Write the table of all experts. Raises RuntimeError that names those that failed."""
    table = [
        {"expert": name, "categories": ", ".join(each.only), "images": len(each.images), "error": failed.get(name, "")}
        for name, each in experts.items()
    ]
    folder.write_table(pa.Table.from_pylist(table, ALL), EXPERTS, "experts.parquet")
    if failed:
        which = "; ".join(f"{' or '.join(experts[name].only)}: {why}" for name, why in [*failed.items()][:NAMED])
        text = f"{len(failed):,} of {count_of(len(experts), 'expert')} failed ({which}), the others are trained"
        where = folder.location(EXPERTS, "experts.parquet")
        raise RuntimeError(f"namedmask: {text}; see {where}. The same command trains only these; or --no-experts")


def _joined(recipe: NamedMask, rows: pa.Table, experts: dict[str, Expert], folder: Folder) -> pa.Table:
    """The rows with the masks of the experts."""
    known = {}
    for name in experts:
        for each in open_table(folder.read(EXPERTS, name, REFINED)).read().to_pylist():
            known[each["category"], each["image_id"]] = each
    found, empty = [], Counter()
    for row in rows.to_pylist():
        mask = known.get((row["category"], row["image_id"]))
        if mask and mask["area"] <= recipe.min_object_fraction * mask["size"][0] * mask["size"][1]:
            empty[row["category"]] += 1
        else:
            found.append(row | ({name: mask[name] for name in ("size", "mask")} if mask else {}))
    if not found:
        text = "find nothing in any image; train them for longer into another --output, or leave them out"
        raise ValueError(f"{recipe.name}: experts {text} (--expert-iterations, --no-experts)")
    if empty:
        which = ", ".join(f"{count:,} of {name}" for name, count in empty.most_common(NAMED))
        text = f"{count_of(empty.total(), 'image')} left out, in which experts find nothing: {which}"
        if lost := sorted(empty.keys() - {row["category"] for row in found}):
            text += f"; no image is left of {', '.join(lost)}"
        log.warning("%s: %s", recipe.name, text)
    return pa.Table.from_pylist(found, rows.schema)
