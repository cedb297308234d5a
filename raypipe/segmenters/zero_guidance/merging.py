"""Parts of one meaning become one: siblings of the tree are joined from the leaves up (the paper's section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

TINY = 1e-12  # the shortest vector that is divided by its length


class Node(NamedTuple):
    """A part of an image: a leaf of its tree, or several joined."""

    leaves: tuple[int, ...]  # labels of the image's parts
    image: np.ndarray  # float (D,): its CLIP embedding
    text: np.ndarray  # float (D,): the CLIP embedding of its name
    name: object = None  # what else is known of it


Union = tuple[int, tuple[int, ...]]  # which image, and the leaves of a part of it


def merged(
    images: Sequence[Mapping[int, Node]], parents: Callable[[list[Union]], Sequence[Node]], *, tau: float, alpha: float
) -> list[dict[int, Node]]:
    """Join siblings that mean the same: alpha cos(images) + (1 - alpha) cos(texts) is at least tau.

    images: the leaves of each image by tree id, where 2 t + 1 and 2 t + 2 are the children of t. parents: gives the
    nodes of unions of leaves, with an embedding and a name of their own; asked once for all images' unions that are
    possible by then, so that nothing is embedded that no pair of siblings was joined for. A parent whose children stay
    apart is never there, nor is any node above it. Returns what is left of each image by tree id. The order in which
    pairs are looked at has no influence.
    """
    left = [dict(nodes) for nodes in images]
    new = [set(nodes) for nodes in images]
    while joined := _alike(left, new, tau=tau, alpha=alpha):
        unions = [(i, left[i][child].leaves + left[i][child + 1].leaves) for i, child in joined]
        new = [set() for _ in images]
        for (i, child), parent in zip(joined, parents(unions), strict=True):
            del left[i][child], left[i][child + 1]
            left[i][(child - 1) // 2] = parent
            new[i].add((child - 1) // 2)
    return left


def _alike(
    images: Sequence[Mapping[int, Node]], new: Sequence[set[int]], *, tau: float, alpha: float
) -> list[tuple[int, int]]:
    """The image and the first id of each pair of siblings, at least one of them new, that mean the same."""
    found = []
    for i, nodes in enumerate(images):
        for child in sorted({(node - 1) // 2 * 2 + 1 for node in new[i] if node}):
            if child in nodes and child + 1 in nodes:
                one, other = nodes[child], nodes[child + 1]
                likeness = alpha * _cosine(one.image, other.image) + (1 - alpha) * _cosine(one.text, other.text)
                if likeness >= tau:
                    found.append((i, child))
    return found


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(float), other.astype(float)
    return one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), TINY)
