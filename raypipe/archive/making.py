"""From embeddings to an archive's tables: ranking, what is left out and why, and the figures of the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.archive.choose import REJECTS, choose
from raypipe.archive.retrieval import vectors
from raypipe.archive.safety import Concepts
from raypipe.archive.tools import Here, Look
from raypipe.classes import Classes, normalised
from raypipe.inputs.archives import MEMBERS
from raypipe.run import Run, refuse_other, rows

# NamedMask, supplement: LAION-5B, the 919 categories of ImageNet-S, after faces were left out
PUBLISHED = {"categories": 919.0, "images": 425_618.0, "mean_per_category": 463.0, "mean_height": 326.0}
PUBLISHED |= {"mean_width": 360.5}
SUMMARY = pa.schema([("name", pa.string()), ("value", pa.float64()), ("published", pa.float64())])


@dataclass(frozen=True)
class Plan:
    """What an archive is made of."""

    classes: Classes
    n: int  # images per category
    templates: str
    images: pa.Table  # schema.MANIFEST of the corpus
    among: pa.Array  # ids of its images that may be taken
    concepts: Concepts | None
    look: Look | None  # for faces
    labels: Mapping[str, str] | None  # of images by id, for the purity


@dataclass(frozen=True)
class Tables:
    """An archive, not yet written."""

    members: pa.Table  # MEMBERS
    rejects: pa.Table  # REJECTS
    images: pa.Table  # schema.MANIFEST of the distinct members
    summary: pa.Table  # SUMMARY
    short: list[str]  # categories with some images but fewer than n
    empty: list[str]  # categories without any


def made(plan: Plan, run: Run, tools: Here) -> Tables:
    """The archive of a run's embeddings. Raises OtherConfiguration where other weights than theirs read the texts."""
    names, concepts = plan.classes.names, plan.concepts
    asked = [*plan.classes.queries, *((*concepts.unsafe, *concepts.safe) if concepts else ())]
    texts, weights = tools.texts(asked, plan.templates)
    refuse_other(f"{run} was made with other weights", run.configuration()["provenance"]["weights"], weights)
    queries, of_concepts = texts[: len(names)], texts[len(names) :]

    def refuse(rows: pa.Table) -> dict[str, str]:
        if not concepts or not len(rows):
            return {}
        are_unsafe = concepts.are_unsafe(vectors(rows["embedding"]), of_concepts)
        return dict.fromkeys(rows["image_id"].filter(pa.array(are_unsafe)).to_pylist(), "unsafe")

    chosen = choose(
        names,
        plan.n,
        rank=lambda which, k: tools.rank(queries[list(which)], k, plan.among),
        look_up=tools.look_up,
        refuse=refuse,
    )
    members, rejects = chosen.members, chosen.rejects
    if plan.look:
        members, with_faces = without_faces(members, tools.faces(of_members(members, plan.images), plan.look))
        rejects = pa.concat_tables([rejects, with_faces])
    rejects = pa.concat_tables([rejects, failed(run, plan.images)])
    counts = Counter(members["category"].to_pylist())
    images = of_members(members, plan.images)
    short, empty = [c for c in names if 0 < counts[c] < plan.n], [c for c in names if not counts[c]]
    summary = figures(plan, run, members, images, rejects, len(short), len(empty))
    return Tables(members, rejects, images, summary, short, empty)


def of_members(members: pa.Table, images: pa.Table) -> pa.Table:
    """The manifest's rows of an archive's images, each once, in their order."""
    ids = pc.unique(members["image_id"])
    return images.take(pc.index_in(ids, value_set=images["image_id"].combine_chunks()))


def without_faces(members: pa.Table, looked: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The members without images of faces, ranks closed up but not refilled; and the others as REJECTS.

    looked: what `Look` says of them.
    """
    reasons = dict(zip(looked["image_id"].to_pylist(), looked["why"].to_pylist(), strict=True))
    why = [reasons[image_id] for image_id in members["image_id"].to_pylist()]
    kept = members.filter(pa.array([each == "" for each in why])).to_pylist()
    ranks = Counter()
    for row in kept:
        row["rank"] = ranks[row["category"]]
        ranks[row["category"]] += 1
    dropped = members.append_column("reason", pa.array(why, pa.string())).filter(pc.field("reason") != "")
    return pa.Table.from_pylist(kept, MEMBERS), dropped.select(REJECTS.names).cast(REJECTS)


def failed(run: Run, images: pa.Table) -> pa.Table:
    """REJECTS of the corpus's images that could not be embedded, of no category."""
    errors = run.errors()
    errors = errors.filter(pc.is_in(errors["image_id"], value_set=images["image_id"].combine_chunks()))
    listed = [
        {name: row[name] for name in ("image_id", "key")}
        | {"reason": "not_finite" if row["kind"] == "not_finite" else "broken"}
        for row in errors.sort_by("key").to_pylist()
    ]
    return pa.Table.from_pylist(listed, REJECTS)


def figures(
    plan: Plan, run: Run, members: pa.Table, images: pa.Table, rejects: pa.Table, short: int, empty: int
) -> pa.Table:
    """SUMMARY of an archive. images: its distinct ones. short, empty: how many categories are so."""
    count = len(plan.classes.names)
    sizes = pa.concat_tables(rows.columns(run, ["image_id", "height", "width"]))
    sizes = sizes.take(pc.index_in(members["image_id"], value_set=sizes["image_id"].combine_chunks()))
    values = {"categories": count, "short_categories": short, "empty_categories": empty, "images": len(members)}
    values |= {"distinct_images": len(images), "mean_per_category": len(members) / count}
    for side in ("height", "width"):
        values[f"mean_{side}"] = pc.mean(sizes[side]).as_py() if len(members) else float("nan")
    if len(plan.among) < len(plan.images):
        values["left_out_by_where"] = len(plan.images) - len(plan.among)
    reasons = Counter(rejects["reason"].to_pylist())
    values |= {f"rejected_{reason}": reasons[reason] for reason in sorted(reasons)}
    values |= {} if plan.labels is None else purity(members, plan.labels)
    listed = [{"name": name, "value": float(value), "published": PUBLISHED.get(name)} for name, value in values.items()]
    return pa.Table.from_pylist(listed, SUMMARY)


def purity(members: pa.Table, labels: Mapping[str, str]) -> dict[str, float]:
    """The share of an archive's images whose known label is their category, and how many have a known label.

    labels: by image id; names are compared as in class lists.
    """
    pairs = zip(members["category"].to_pylist(), map(labels.get, members["image_id"].to_pylist()), strict=True)
    right = [normalised(category) == normalised(label) for category, label in pairs if label is not None]
    return {"purity": float(np.mean(right)) if right else float("nan"), "purity_known": len(right)}
