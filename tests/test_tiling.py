"""Where tiles lie, and what becomes of their results: against pixel-wise loops, and pictures whose truth is known."""

import itertools
import pickle
import random

import cv2
import numpy as np
import pytest

from raypipe.tiling import Placed, Tiling, merge
from raypipe.types import LabelMap, Segments

SIZE = (37, 45)  # of the images
TILING = Tiling(16, 5)
SIZES = [(16, 16), (17, 16), (5, 90), (90, 5), (37, 45), (100, 64), (33, 160)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("text", ["1024:256", "1024:25%"])
def test_the_grammar_has_pixels_or_a_share_of_the_side(text):
    assert Tiling.parse(text) == Tiling(1024, 256) and str(Tiling.parse(text)) == "1024:256"


@pytest.mark.parametrize(
    "text", ["1024", "1024:", ":9", "a:b", "-64:3", "64:-3", "64:3px", "64:1.5", "1e3:9", "64:3:3", ""]
)
def test_another_grammar_is_shown_the_right_one(text):
    with pytest.raises(ValueError, match=f"--tiles '{text}': write SIZE:OVERLAP in pixels, such as 1024:256"):
        Tiling.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"), [("31:4", "at least 32 px"), ("64:64", "below SIZE"), ("64:100%", "below")]
)
def test_sizes_and_overlaps_that_cannot_be_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        Tiling.parse(text)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiling", [Tiling(16, 5), Tiling(16, 0), Tiling(16, 15), Tiling(32, 8)])
def test_tiles_of_one_size_cover_the_image_end_at_its_border_and_overlap_enough(size, tiling):
    places = tiling.places(size)
    covered = np.zeros(size, int)
    for place in places:
        covered[place.slices] += 1
        assert (place.bottom - place.top, place.right - place.left) == tuple(min(tiling.size, side) for side in size)
    assert covered.min() >= 1
    assert (places[-1].bottom, places[-1].right) == size and places[0][2:4] == (0, 0)
    tops, lefts = (sorted({place[i] for place in places}) for i in (2, 3))
    assert len(places) == len(tops) * len(lefts) and places == sorted(places)
    for starts in (tops, lefts):
        steps = np.diff(starts)
        assert not len(steps) or (steps.max() <= tiling.size - tiling.overlap and np.ptp(steps) <= 1)
    fewer = [-(-(side - tiling.overlap) // (tiling.size - tiling.overlap)) for side in size]
    assert len(places) == max(1, fewer[0]) * max(1, fewer[1])  # no more than needed


def test_an_image_that_is_no_larger_than_a_tile_is_one():
    assert [place[2:] for place in Tiling(64, 60).places((64, 3))] == [(0, 0, 64, 3)]


def weights_at(places, y, x):
    """How much each tile counts at a pixel, by its number; tiles that do not cover it are left out."""
    weights = {}
    for number, place in enumerate(places):
        if place.top <= y < place.bottom and place.left <= x < place.right:
            down = min(y - place.top + 1, place.bottom - y)
            weights[number] = down * min(x - place.left + 1, place.right - x)
    return {number: weight / sum(weights.values()) for number, weight in weights.items()}


def test_soft_masks_are_blended_as_a_loop_over_pixels_does_it(rng):
    places = TILING.places(SIZE)
    tiles = [Segments(rng.random((2, 16, 16), np.float32), note="flat_map" if i else "") for i in range(len(places))]
    found = merge(zip(places, tiles, strict=True), SIZE, across="index", exclusive=False)
    expected = np.zeros((2, *SIZE))
    for y, x in np.ndindex(SIZE):
        for number, weight in weights_at(places, y, x).items():
            expected[:, y, x] += weight * tiles[number].masks[:, y - places[number].top, x - places[number].left]
    assert found.masks.dtype == np.float32 and found.note == "in_tiles:flat_map"
    np.testing.assert_allclose(found.masks, expected, atol=1e-6)
    alone = np.array([[len(weights_at(places, y, x)) == 1 for x in range(SIZE[1])] for y in range(SIZE[0])])
    whole = np.zeros_like(found.masks)
    for place, tile in zip(places, tiles, strict=True):
        whole[:, *place.slices] = tile.masks
    np.testing.assert_array_equal(found.masks[:, alone], whole[:, alone])  # the only tile's value, untouched


def test_binary_masks_have_the_pixels_that_more_than_half_of_the_weight_is_for_of_the_tiles_that_are_there(rng):
    places = TILING.places(SIZE)
    tiles = [Segments(rng.random((1, 16, 16)) > 0.5, scores=[i]) for i in range(len(places))]
    gone = {0, 7}
    there = [(place, tile) for i, (place, tile) in enumerate(zip(places, tiles, strict=True)) if i not in gone]
    found = merge(there, SIZE, across="index", exclusive=False)
    for y, x in np.ndindex(SIZE):
        weights = {number: weight for number, weight in weights_at(places, y, x).items() if number not in gone}
        votes = sum(
            weight * tiles[number].masks[0, y - places[number].top, x - places[number].left]
            for number, weight in weights.items()
        )
        if abs(votes - sum(weights.values()) / 2) > 1e-6:  # a tie is rounding's
            assert found.masks[0, y, x] == (votes > sum(weights.values()) / 2)
    areas = [tile.masks.sum() for _, tile in there]
    assert found.masks.dtype == bool and found.scores[0] == pytest.approx(
        np.average([tile.scores[0] for _, tile in there], weights=areas)
    )


def random_map(rng, names) -> LabelMap:
    labels = [name for name in names if rng.random() < 0.7]
    index = rng.integers(0, len(labels) + 1, (16, 16)).astype(np.uint8)
    return LabelMap(index, (rng.random((16, 16), np.float32) + 0.01).clip(max=1) * (index > 0), labels)


def test_classes_have_the_pixels_where_their_average_is_the_largest_and_none_where_most_see_none(rng):
    places, names = TILING.places(SIZE), ["cat", "cow", "dog"]
    tiles = [random_map(rng, names) for _ in places]
    found = merge(zip(places, tiles, strict=True), SIZE, across="label", exclusive=True)
    assert isinstance(found, LabelMap) and sorted(found.labels) == names
    for y, x in np.ndindex(SIZE):
        scores, none = dict.fromkeys(names, 0.0), 0.0
        for number, weight in weights_at(places, y, x).items():
            place, tile = places[number], tiles[number]
            chosen = tile.index[y - place.top, x - place.left]
            none += weight * (chosen == 0)
            if chosen:
                scores[tile.labels[chosen - 1]] += weight * tile.values[y - place.top, x - place.left]
        best = max(scores, key=scores.get)
        if none > 0.5 + 1e-6 or scores[best] == 0:
            assert found.index[y, x] == 0 and found.values[y, x] == 0
        elif none < 0.5 - 1e-6:
            assert found.labels[found.index[y, x] - 1] == best
            assert found.values[y, x] == pytest.approx(scores[best], abs=1e-6)


def test_classes_that_no_tile_has_a_pixel_of_are_not_there():
    places = Tiling(16, 4).places((16, 28))
    empty = LabelMap(np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.float32), ["cat"])
    found = merge([(place, empty) for place in places], (16, 28), across="label", exclusive=True)
    assert found.count == 0 and not len(found.labels) and found.masks.shape == (0, 16, 28)


def drawn() -> tuple[np.ndarray, dict[int, str]]:
    """A picture of objects by number, and their labels; none is in the overlaps alone twice."""
    picture = np.zeros((60, 70), int)
    picture[4:50, 6:60] = 1  # in every tile
    picture[8:12, 20:23] = 2  # inside the overlap of two
    picture[24:27, 24:27] = 3  # inside that of four
    picture[30:34, 2:40], picture[34:38, 2:40] = 4, 5  # long ones that touch
    picture[55:58, 1:3] = 6  # in a corner
    picture[0:2, :] = 7  # all along the border
    return picture, {1: "sand", 2: "ant", 3: "ant", 4: "ant", 5: "leaf", 6: "ant", 7: "leaf"}


def tiles_of(picture, labels, tiling, *, shuffle=None, names=True):
    """What a perfect method finds in each tile: a mask for each object there, in any order."""
    for place in tiling.places(picture.shape):
        part = picture[place.slices]
        numbers = sorted(set(np.unique(part)) - {0})
        if shuffle:
            shuffle.shuffle(numbers)
        masks = np.array([part == number for number in numbers]).reshape(-1, *part.shape)
        vectors = np.array([[number, 1] for number in numbers], np.float32).reshape(-1, 2)
        its = [labels[number] for number in numbers] if names else ()
        yield place, Segments(masks, its, [float(number) for number in numbers], embeddings=vectors)


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("tiling", [Tiling(32, 12), Tiling(32, 20), Tiling(40, 7)])
def test_each_object_is_found_once_and_whole_however_many_tiles_saw_it(tiling, exclusive, names):
    picture, labels = drawn()
    tiles = tiles_of(picture, labels, tiling, shuffle=random.Random(1), names=names)
    found = merge(tiles, picture.shape, across="object", exclusive=exclusive)
    order = sorted(labels, key=lambda number: -(picture == number).sum())
    assert [round(score) for score in found.scores] == order  # each once, the largest first
    assert [*found.labels] == ([labels[number] for number in order] if names else [])
    for number, mask, vector in zip(order, found.masks, found.embeddings, strict=True):
        np.testing.assert_array_equal(mask > 0.5, picture == number)
        np.testing.assert_allclose(vector, [number, 1])
    assert isinstance(found, LabelMap if exclusive else Placed)


def test_no_order_of_a_tiles_masks_changes_the_objects():
    picture, labels = drawn()
    results = [
        merge(
            tiles_of(picture, labels, TILING, shuffle=random.Random(seed)), picture.shape, across="object", exclusive=e
        )
        for seed, e in itertools.product(range(3), (False, True))
    ]
    for one, other in zip(results[2:], results, strict=False):
        np.testing.assert_array_equal(one.masks, other.masks)
        assert [*one.scores] == pytest.approx([*other.scores])


def two_tiles(first, second, labels=("a", "a")):
    """Objects of two tiles of 8 x 10 px that share 4 columns, from their columns there."""
    places = Tiling(10, 4).places((8, 16))
    masks = [np.zeros((8, 10), bool), np.zeros((8, 10), bool)]
    masks[0][2:6, slice(*first)], masks[1][2:6, slice(*second)] = True, True
    tiles = [
        Segments(mask[None], [label], [score]) for mask, label, score in zip(masks, labels, (0.2, 0.8), strict=True)
    ]
    return merge(zip(places, tiles, strict=True), (8, 16), across="object", exclusive=False)


def test_two_masks_are_one_object_if_they_agree_by_more_than_half_where_their_tiles_overlap():
    assert len(two_tiles((0, 10), (0, 10)).masks) == 1
    assert len(two_tiles((0, 9), (0, 4)).masks) == 1  # 3 of 4 columns
    assert len(two_tiles((0, 8), (0, 4)).masks) == 2  # half
    assert len(two_tiles((0, 6), (4, 10)).masks) == 2  # they only touch
    assert len(two_tiles((0, 10), (0, 10), ("a", "b")).masks) == 2
    found = two_tiles((0, 10), (0, 5))
    assert found.scores[0] == pytest.approx((10 * 0.2 + 5 * 0.8) / 15)


def test_what_only_one_of_two_tiles_saw_stays_as_it_was():
    places = Tiling(10, 4).places((8, 16))
    mask = np.zeros((1, 8, 10), bool)
    mask[0, 2:6, 7:10] = True  # at the border of its tile, where the other one counts most
    nothing = Segments(np.zeros((0, 8, 10), bool))
    found = merge(zip(places, [Segments(mask), nothing], strict=True), (8, 16), across="object", exclusive=False)
    np.testing.assert_array_equal(found.masks[0, :, :10], mask[0])


@pytest.mark.parametrize(("rows", "columns", "count"), [((3, 5), (7, 10), 1), ((3, 5), (6, 8), 2), ((0, 2), (6, 8), 2)])
def test_a_piece_belongs_to_what_goes_on_in_the_next_tile_only_where_its_tile_cuts_it(rows, columns, count):
    places = Tiling(10, 4).places((8, 16))
    piece, large = np.zeros((8, 10), bool), np.ones((8, 10), bool)
    piece[slice(*rows), slice(*columns)] = True  # in the shared columns, and few of them
    tiles = [Segments(piece[None]), Segments(large[None])]
    found = merge(zip(places, tiles, strict=True), (8, 16), across="object", exclusive=False)
    assert len(found.masks) == count


def test_a_thing_and_its_part_in_one_tile_never_become_one_object():
    places = Tiling(10, 4).places((8, 16))
    body, legs = np.zeros((8, 10), bool), np.zeros((8, 10), bool)
    body[2:6, 4:], legs[2:7, 4:] = True, True  # one lies in the other
    seen = np.zeros((8, 10), bool)
    seen[2:6, :5] = True
    tiles = [Segments(np.stack([legs, body])), Segments(seen[None])]
    found = merge(zip(places, tiles, strict=True), (8, 16), across="object", exclusive=False)
    assert found.masks.sum((1, 2)).tolist() == [5 * 6, 4 * 7]  # the body goes on, the legs end at the border


def test_parts_of_one_tile_that_meet_in_others_become_one_object():
    picture = np.zeros((60, 60), int)
    picture[2:58, 2:58] = 1
    picture[8:52, 8:52] = 0  # a frame: of each tile in a corner one part, of the middle one none
    picture[0:30, 28:32] = 0  # and a gap in its upper side, in the middle of a tile

    def tiles():
        for place in Tiling(28, 12).places(picture.shape):
            count, parts = cv2.connectedComponents((picture[place.slices] > 0).astype(np.uint8))
            yield place, Segments(np.array([parts == i for i in range(1, count)]).reshape(-1, 28, 28))

    found = merge(tiles(), picture.shape, across="object", exclusive=False)
    np.testing.assert_array_equal(found.masks, (picture > 0)[None])


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_connected_is_one_object_with_all_its_pixels(seed, exclusive):
    rng, picture = np.random.default_rng(seed), np.zeros((90, 130), np.uint8)
    for _ in range(10):  # discs, lines and rings, of which a tile often sees several pieces
        y, x, radius = (int(rng.integers(most)) for most in (*picture.shape, 25))
        cv2.circle(picture, (x, y), radius, 1, int(rng.choice([-1, 2])))
        cv2.line(picture, (x, y), (x + 2 * radius, y - radius), 1, 2)

    def found(part):
        count, parts = cv2.connectedComponents(np.ascontiguousarray(part))
        return Segments(np.array([parts == i for i in range(1, count)], bool).reshape(-1, *part.shape))

    tiles = ((place, found(picture[place.slices])) for place in Tiling(40, 14).places(picture.shape))
    merged = merge(tiles, picture.shape, across="object", exclusive=exclusive).masks > 0.5
    assert sorted(map(bytes, merged)) == sorted(map(bytes, found(picture).masks))


@pytest.mark.parametrize("across", ["index", "object"])
def test_nothing_in_any_tile_is_nothing(across):
    places = TILING.places(SIZE)
    nothing = Segments(np.zeros((0, 16, 16), bool), note="few_masks")
    found = merge([(place, nothing) for place in places], SIZE, across=across, exclusive=False)
    assert found.masks.shape == (0, *SIZE) and found.masks.dtype == bool and found.note == "few_masks"


def test_placed_masks_travel_as_run_lengths():
    picture, labels = drawn()
    found = merge(tiles_of(picture, labels, TILING), picture.shape, across="object", exclusive=False)
    packed = pickle.dumps(found)
    np.testing.assert_array_equal(pickle.loads(packed).masks, found.masks)
    assert len(packed) < found.masks.size / 4
