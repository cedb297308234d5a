"""From ranked candidates to the images that an archive keeps, and why it keeps not the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raypipe.archive.duplicates import Kept
from raypipe.archive.retrieval import vectors
from raypipe.archive.topk import Ranked
from raypipe.inputs.archives import MEMBERS

LEAST_SIDE = 16  # px of the shorter side
MOST_ASPECT = 20  # of the longer side over the shorter
REJECTS = pa.schema(
    [
        ("image_id", pa.string()),
        ("key", pa.string()),
        ("category", pa.string()),  # the archive that it was a candidate of
        ("reason", pa.string()),  # tiny, aspect, duplicate, near_duplicate, or what the caller says (unsafe, face, ...)
    ]
)


class Chosen(NamedTuple):
    """What an archive keeps."""

    members: pa.Table  # MEMBERS: by category in the given order, then by rank
    rejects: pa.Table  # REJECTS: what stood before a category's last image and was not kept, in the same order
    short: list[str]  # categories with fewer images than asked for: there are no more


def over_fetch(n: int) -> int:
    """How many candidates to rank for n images: some are broken or duplicates."""
    return math.ceil(1.3 * n) + 64


def choose(
    categories: Sequence[str],
    n: int,
    *,
    rank: Callable[[Sequence[int], int], Sequence[Ranked]],
    look_up: Callable[[pa.Array], pa.Table],
    refuse: Callable[[pa.Table], Mapping[str, str]] = lambda rows: {},
) -> Chosen:
    """The first n good images of each category in the order of their rank.

    rank: from indices of categories and k to the best k images of each, named (key, image_id). look_up: from ids to
    rows with image_id, uri, sha256, phash, height, width and embedding, in that order. refuse: from such rows to the
    ids of images that are not to be kept, and why; asked once for each image. Categories that come out short are
    ranked again with twice as many candidates, until they are full or there are no more images.
    """
    walks: dict[int, Walk] = {}
    k, left, refused, seen = over_fetch(n), list(range(len(categories))), {}, set()
    while left:
        ranked = dict(zip(left, rank(left, k), strict=True))
        ids = dict.fromkeys(image_id for each in ranked.values() for _, image_id in each.names)
        if ids:
            rows, place = look_up(pa.array(ids, pa.string())), {image_id: i for i, image_id in enumerate(ids)}
            refused |= refuse(rows.filter(pa.array([image_id not in seen for image_id in ids])))
            seen |= ids.keys()
        for c, each in ranked.items():
            if each.names:
                of_category = rows.take([place[image_id] for _, image_id in each.names])
                walks[c] = walk(each, of_category, refused, n)
        left = [c for c in left if len(ranked[c].names) == k and len(walks[c].kept) < n]
        k *= 2
    return _tables(categories, [walks.get(c, Walk([], [])) for c in range(len(categories))], n)


class Walk(NamedTuple):
    """One category's candidates, in order."""

    kept: list[dict]  # image_id, key, uri, score
    rejected: list[tuple[str, str, str]]  # image_id, key, reason


def walk(ranked: Ranked, rows: pa.Table, refused: Mapping[str, str], n: int) -> Walk:
    """Take candidates in the order of their rank until n are kept. A duplicate is one of a better image of those kept.

    rows: of the candidates, in the same order, as `choose` says. refused: why images are not to be kept, by id.
    """
    embeddings = vectors(rows["embedding"]).astype(np.float32)
    facts = rows.drop_columns("embedding").to_pylist()
    seen, found = Kept(n, embeddings.shape[1]), Walk([], [])
    for (key, image_id), score, row, embedding in zip(ranked.names, ranked.scores, facts, embeddings, strict=True):
        if len(found.kept) == n:
            break
        same = row["sha256"], row["phash"], embedding
        reason = refused.get(image_id) or _shape(row["height"], row["width"]) or seen.duplicate(*same)
        if reason:
            found.rejected.append((image_id, key, reason))
        else:
            seen.add(*same)
            found.kept.append({"image_id": image_id, "key": key, "uri": row["uri"], "score": float(score)})
    return found


def _shape(height: int, width: int) -> str:
    short, long = sorted((height, width))
    return "tiny" if short < LEAST_SIDE else "aspect" if long > MOST_ASPECT * short else ""


def _tables(categories: Sequence[str], walks: Sequence[Walk], n: int) -> Chosen:
    members, rejects = [], []
    for category, each in zip(categories, walks, strict=True):
        members += [{"category": category, "rank": rank} | row for rank, row in enumerate(each.kept)]
        rejects += [(image_id, key, category, reason) for image_id, key, reason in each.rejected]
    rejected = [dict(zip(REJECTS.names, row, strict=True)) for row in rejects]
    short = [category for category, each in zip(categories, walks, strict=True) if len(each.kept) < n]
    return Chosen(pa.Table.from_pylist(members, MEMBERS), pa.Table.from_pylist(rejected, REJECTS), short)
