"""Merging of siblings: the stored cases, a plain formulation, and how often parents are asked for."""

import numpy as np
import pytest
from support.golden import arrays

from raypipe.segmenters.zero_guidance.merging import Node, merged


def tree_of(rng: np.random.Generator, splits: int) -> list[int]:
    """The ids of the leaves of a tree that was split at random."""
    leaves = [0]
    for _ in range(splits):
        node = leaves.pop(rng.integers(len(leaves)))
        leaves += [2 * node + 1, 2 * node + 2]
    return leaves


def ancestors(node: int) -> list[int]:
    """A node and all above it, the root last."""
    return [node, *ancestors((node - 1) // 2)] if node else [0]


def recursive(leaves, image, text, *, tau: float, alpha: float) -> set[int]:
    """What is left, written from the root down: a node is formed where both children are and mean the same."""

    def cosine(a, b):
        return a @ b / np.sqrt(a @ a * (b @ b))

    def below(node):
        """(is the node formed, what is left of the tree from it down)"""
        if node in leaves:
            return True, {node}
        if not any(node in ancestors(leaf) for leaf in leaves):
            return False, set()
        a, b = 2 * node + 1, 2 * node + 2
        (a_there, a_left), (b_there, b_left) = below(a), below(b)
        if a_there and b_there:
            if alpha * cosine(image[a], image[b]) + (1 - alpha) * cosine(text[a], text[b]) >= tau:
                return True, {node}
        return False, a_left | b_left

    return below(0)[1]


def run(trees, image, text, *, tau, alpha=0.5):
    """The result for several images whose nodes have given vectors, and the unions that were asked for, by call."""
    calls = []

    def parents(unions):
        calls.append(unions)
        nodes = []
        for i, leaves in unions:
            ids = [trees[i][leaf] for leaf in leaves]
            shared = set(ancestors(ids[0])).intersection(*map(ancestors, ids))
            nodes.append(Node(leaves, image[i][max(shared)], text[i][max(shared)]))
        return nodes

    start = [
        {node: Node((k,), image[i][node], text[i][node]) for k, node in enumerate(tree)} for i, tree in enumerate(trees)
    ]
    return merged(start, parents, tau=tau, alpha=alpha), calls


def test_the_stored_cases_are_met_for_every_tau(shared):
    stored = arrays(shared / "golden/zero_guidance/merge_8.npz")
    leaves = stored["leaf_tree_ids"].tolist()
    image, text = (
        dict(zip(stored["node_ids"].tolist(), stored[f"node_{kind}_features"], strict=True))
        for kind in ("image", "text")
    )
    for tau, nodes, labels in zip(stored["taus"], stored["final_nodes"], stored["final_label_of_leaf"], strict=True):
        ((found,), _) = run([leaves], [image], [text], tau=tau, alpha=float(stored["alpha"]))
        assert set(found) == set(nodes[nodes >= 0].tolist())
        expected = {frozenset(np.flatnonzero(labels == label).tolist()) for label in labels}
        assert {frozenset(node.leaves) for node in found.values()} == expected


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_several_images_come_out_as_a_recursive_formulation_leaves_each(alpha):
    rng = np.random.default_rng(3)
    trees = [tree_of(rng, splits) for splits in (0, 1, 2, 7, 15, 19)] + [[]]
    every = [{node for leaf in tree for node in ancestors(leaf)} for tree in trees]
    image, text = ([{node: rng.normal(1, 1, 4) for node in nodes} for nodes in every] for _ in range(2))
    sizes = []
    for tau in (-1.0, 0.2, 0.6, 0.9, 1.01):
        found, calls = run(trees, image, text, tau=tau, alpha=alpha)
        for nodes, leaves, *vectors in zip(found, trees, image, text, strict=True):
            assert set(nodes) == recursive(leaves, *vectors, tau=tau, alpha=alpha) if leaves else nodes == {}
            assert sorted(leaf for node in nodes.values() for leaf in node.leaves) == list(range(len(leaves)))
        # a parent is asked for where it is formed only, once, and all that can be formed by then together
        joins = sum(len(leaves) - len(nodes) for nodes, leaves in zip(found, trees, strict=True))
        assert sum(map(len, calls)) == joins and len(calls) <= max(map(len, map(ancestors, sum(trees, []))))
        sizes.append(sum(map(len, found)))
    assert sizes == sorted(sizes) and sizes[0] == 6 and sizes[-1] == sum(map(len, trees)) > sizes[2] > 6


def test_a_vector_without_length_is_like_nothing():
    vectors = {1: np.zeros(3, np.float32), 2: np.ones(3, np.float32)}
    (found,), calls = run([[1, 2]], [vectors], [vectors], tau=0.1)
    assert set(found) == {1, 2} and calls == []
