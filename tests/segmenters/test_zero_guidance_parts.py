"""Parts of zero-guidance segmentation: the stored tree, scipy's Ward, equal rows, splitting, what the CRF leaves."""

import numpy as np
import pytest
import skimage.data
from scipy.cluster import hierarchy
from support import golden

from raypipe.benchmark.plain import ward as plain
from raypipe.segmenters.zero_guidance.parts import Grown, distances, enlarged, parts
from raypipe.segmenters.zero_guidance.tree import BLOCK, _cosine, _leaves, split, ward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stored(shared):
    return golden.arrays(shared / "golden/zero_guidance/tree_16x16.npz")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def described(side, width=48):
    """Vectors of length 1 that are as alike as keys of a photograph."""
    return plain.keys(skimage.data.coffee()[:400, :400], side, width).astype(np.float64)


def merges(tree):
    """All nodes but rows, as sets of rows."""
    sets = [frozenset([i]) for i in range(len(tree) + 1)]
    for a, b in np.asarray(tree)[:, :2].astype(int):
        sets.append(sets[a] | sets[b])
    return set(sets[len(tree) + 1 :])


def same_partition(a, b):
    pairs = {*zip(a.tolist(), b.tolist(), strict=True)}
    return len(pairs) == len({*a.tolist()}) == len({*b.tolist()})


@pytest.mark.parametrize("kept", [None, 0, 60])
def test_the_stored_tree(stored, kept):
    tree = ward(unit(stored["features"].astype(np.float64)), kept=kept)
    np.testing.assert_array_equal(tree.children, stored["children"])
    np.testing.assert_allclose(tree.heights, stored["heights"], atol=1e-6)


def test_stored_splits_at_ten_thresholds(stored):
    rows = unit(stored["features"].astype(np.float64))
    tree = ward(rows)
    for splits in ("full", "first_half"):
        for i, t_dino in enumerate(stored["thresholds"]):
            options = {"splits": "all" if splits == "full" else splits, "force_root_split": True}
            found = split(rows, tree, t_dino=t_dino, **options)
            np.testing.assert_array_equal(found.labels, stored[f"labels_{splits}"][i])
            assert found.tree_ids == [t for t in stored[f"tree_ids_{splits}"][i].tolist() if t >= 0]
    uncapped = split(rows, tree, num_parts=None)
    assert same_partition(uncapped.labels, stored["labels_uncapped_T090"]) and not uncapped.note
    labels = stored["labels_full"][9]
    squares = distances(rows.astype(np.float32), labels, labels.max() + 1)
    np.testing.assert_allclose(squares, stored["sqdist_full_T090"], atol=1e-6)


def test_sides_of_stored_splits_are_as_alike_as_stored(stored):
    rows, children = unit(stored["features"].astype(np.float64)), stored["children"]
    tree, count = ward(rows), len(rows)
    order, start, stop = _leaves(tree)
    members = [order[start[node] : stop[node]] for node in range(2 * count - 1)]
    for (_, *sides), cosine, masks in zip(
        stored["split_nodes"], stored["sibling_cos"], stored["node_masks"].reshape(-1, 2, count), strict=True
    ):
        assert [sorted(members[side]) for side in sides] == [np.flatnonzero(mask).tolist() for mask in masks]
        assert _cosine(*(rows[members[side]].mean(0) for side in sides)) == pytest.approx(cosine, abs=1e-5)
    for label, node in enumerate(stored["uncapped_leaf_nodes_T090"]):
        assert sorted(members[node]) == np.flatnonzero(stored["labels_uncapped_T090"] == label).tolist()
    for (node, *sides), cosine in zip(stored["split_nodes"], stored["sibling_cos"], strict=True):
        assert tree.children[node - count].tolist() == sides == children[node - count].tolist()
        if node == 2 * count - 2:  # the root alone: it is split from its cosine on
            for difference, pieces in ((-1e-5, 1), (1e-5, 2)):
                assert len(split(rows, tree, t_dino=cosine + difference, num_parts=2).tree_ids) == pieces


@pytest.fixture
def small_blocks(monkeypatch):
    """So few values at once that distances are made in many blocks, the last one smaller."""
    monkeypatch.setitem(BLOCK, "cpu", 10_000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("side", "width", "kept"), [(24, 48, 0), (24, 48, 300), (24, 48, 10**9)])
def test_every_merge_is_scipys_in_small_blocks(side, width, kept):
    test_every_merge_is_scipys(side, width, kept)


@pytest.mark.parametrize(
    ("side", "width", "kept"),
    [(24, 48, 300), (55, 384, 10**9), pytest.param(111, 384, None, marks=pytest.mark.slow)],
)
def test_every_merge_is_scipys(side, width, kept):
    rows = described(side, width)
    tree, expected = ward(rows, kept=kept), hierarchy.ward(rows)
    np.testing.assert_array_equal(tree.children, expected[:, :2])
    np.testing.assert_allclose(tree.heights, expected[:, 2], atol=1e-9)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kept", [0, 10**9])
def test_equal_rows_count_as_many_as_they_are(kept):
    rng = np.random.default_rng(1)
    distinct = described(9, width=6)
    rows = distinct[rng.integers(0, len(distinct), 400)]
    rows[:150] = rows[0]
    rows[7, 0], rows[8, 0] = 0.0, -0.0
    rows[7, 1:] = rows[8, 1:]
    tree, expected = ward(rows, kept=kept), hierarchy.ward(rows)
    np.testing.assert_allclose(tree.heights, expected[:, 2], atol=1e-7)  # scipy's are not quite 0 where they should be
    equal = len(rows) - len(np.unique(rows, axis=0))
    assert equal > 150 and (tree.heights[:equal] == 0).all() and tree.heights[equal] > 0
    found, other = merges(tree.children), merges(expected)
    apart = {tuple(row) for row in rows}
    whole = {group for group in other if len({tuple(rows[i]) for i in group}) > 1}
    assert len(whole) == len(apart) - 1 and whole <= found  # how equal rows come together is free


def test_ties_everywhere_and_rings_that_rounding_makes_of_them_still_give_a_tree():
    lattice = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), -1).reshape(-1, 3)
    turns = 2 * np.pi * np.arange(53)[:, None] / 53
    for rows in (lattice, np.hstack([np.cos(turns), np.sin(turns)])):
        for kept in (0, 10**9):
            tree = ward(rows, kept=kept)
            assert sorted(tree.children.ravel().tolist()) == [*range(2 * len(rows) - 2)]
            assert (np.diff(tree.heights) >= 0).all() and (tree.children[:, 0] < tree.children[:, 1]).all()
            total = ((rows - rows.mean(0)) ** 2).sum()  # what merges add to the sum of squares, in any order
            assert (tree.heights**2).sum() / 2 == pytest.approx(total)


def test_one_row_or_equal_rows_are_one_part():
    for rows in (np.ones((1, 4)) / 2, np.ones((30, 4)) / 2, np.zeros((9, 4))):
        tree = ward(rows)
        assert len(tree.heights) == len(rows) - 1 and not tree.heights.any()
        for num_parts in (20, None):
            found = split(rows, tree, t_dino=1.0, num_parts=num_parts)
            assert found.tree_ids == [0] and not found.labels.any() and not found.note
    assert split(np.ones((30, 4)) / 2, ward(np.ones((30, 4)) / 2), force_root_split=True).tree_ids == [1, 2]


def test_a_budget_is_spent_inside_wholes_and_none_stops_at_the_most_segments():
    rows = described(12)
    tree = ward(rows)
    for num_parts in (1, 2, 7, 20):
        found = split(rows, tree, t_dino=1.0, num_parts=num_parts)
        assert len(found.tree_ids) == num_parts and not found.note
        if num_parts > 1:
            cut = hierarchy.fcluster(hierarchy.ward(rows), num_parts, "maxclust")
            assert same_partition(found.labels, cut)
    free = split(rows, tree, t_dino=0.999, num_parts=None, max_segments=10)
    assert len(free.tree_ids) == 10 and free.note == "many_segments"
    assert same_partition(free.labels, hierarchy.fcluster(hierarchy.ward(rows), 10, "maxclust"))
    whole = split(rows, tree, t_dino=0.9, num_parts=None, max_segments=len(rows))
    assert not whole.note and len(whole.tree_ids) >= len(split(rows, tree, t_dino=0.9).tree_ids)
    every = split(rows, tree, t_dino=1.0, num_parts=None, max_segments=len(rows))
    assert sorted(every.labels.tolist()) == [*range(len(rows))]  # an id of a row deep down is no int64
    for above, children in zip(whole.tree_ids, [{2 * t + 1, 2 * t + 2} for t in whole.tree_ids], strict=True):
        assert above > 0 and not children & {*whole.tree_ids}


def test_a_part_without_a_pixel_is_gone_with_its_tree_id():
    rows = unit(np.repeat(np.eye(3), 12, 0) + 0.01)  # three bands of a grid of 6 x 6
    rows[14] = np.array([0.7, -0.7, 0.14])  # and one cell inside the second
    image = np.zeros((60, 60, 3), np.uint8)
    image[:20], image[40:] = (250, 30, 30), (30, 30, 250)
    grown = Grown(image, rows.astype(np.float32), (6, 6), ward(rows))
    cells = split(rows, grown.tree, num_parts=4)
    assert len(cells.tree_ids) == 4
    found = parts(grown, num_parts=4)
    assert found.segment_map.dtype == np.int16 and found.segment_map.shape == (60, 60)
    lone = cells.tree_ids[cells.labels[14]]
    assert lone not in found.tree_ids and sorted([*found.tree_ids, lone]) == sorted(cells.tree_ids)
    for row, cell in ((5, 0), (30, 17), (55, 35)):  # what is left keeps its own
        assert found.tree_ids[found.segment_map[row, 5]] == cells.tree_ids[cells.labels[cell]]


def test_images_of_one_colour_are_one_part_and_others_are_enlarged_with_nearest():
    rows = np.ones((12, 2), np.float32)
    found = parts(Grown(np.zeros((24, 32, 3), np.uint8), rows, (3, 4), ward(rows)))
    assert found.tree_ids == [0] and found.segment_map.shape == (24, 32) and not found.segment_map.any()
    plane = np.arange(6).reshape(1, 2, 3)
    assert enlarged(plane, (3, 5))[0].tolist() == [[0, 0, 1, 1, 2]] * 2 + [[3, 3, 4, 4, 5]]
