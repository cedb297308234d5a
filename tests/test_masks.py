"""Masks as table cells and as bytes."""

import numpy as np
import pytest
from support import golden

from raypipe import masks


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 48), (1, 300)])
def test_run_lengths_give_the_mask_back(rng, size):
    for share in (0.0, 0.3, 1.0):
        mask = rng.random(size) < share
        rle = masks.encode_rle(mask)
        assert rle["size"] == list(size) and rle["counts"].isascii()
        np.testing.assert_array_equal(masks.decode_rle(rle), mask)


def test_run_lengths_are_coco_s_column_by_column():
    mask = np.zeros((3, 2), bool)
    mask[1, 0] = mask[2, 0] = mask[0, 1] = True
    assert masks.encode_rle(mask)["counts"] == "132"  # one 0, three 1, two 0: each below 32, as chr(48 + n)


def test_run_lengths_of_masks_anywhere_in_their_image_are_coco_s_own(rng):
    from pycocotools import mask as coco

    for _ in range(500):
        height, width = rng.integers(1, 12, 2)
        top, bottom, left, right = (*sorted(rng.integers(0, height + 1, 2)), *sorted(rng.integers(0, width + 1, 2)))
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) > rng.choice([-1, 0.5])
        expected = coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
        (segment,) = masks.encode_segments(mask[None])
        assert masks.encode_rle(mask)["counts"] == segment["counts"] == expected
        assert segment["area"] == mask.sum()


def test_run_lengths_are_the_stored_ones_byte_for_byte(shared):
    case = golden.arrays(shared / "golden" / "namedmask" / "coco_rle.npz")
    for i in range(4):
        mask, counts = case[f"mask_{i}"].astype(bool), case[f"counts_{i}"].tobytes().decode()
        stored = {"size": case[f"size_{i}"].tolist(), "counts": counts}
        assert masks.encode_rle(mask) == stored
        np.testing.assert_array_equal(masks.decode_rle(stored), mask)


def test_segments_have_areas_boxes_scores_and_labels(rng):
    found = rng.random((3, 20, 30)) > 0.7
    found[1] = False
    rows = masks.encode_segments(found, labels=["a", "b", "c"], scores=[0.1, 0.2, 0.3])
    for row, mask, label, score in zip(rows, found, "abc", [0.1, 0.2, 0.3], strict=True):
        ys, xs = np.nonzero(mask)
        box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1] if len(xs) else [0, 0, 0, 0]
        assert row["bbox"] == box and row["area"] == mask.sum() and (row["label"], row["score"]) == (label, score)
    np.testing.assert_array_equal(masks.decode_segments(rows, (20, 30)), found)


def test_hundreds_of_segments_are_encoded(rng):
    found = rng.random((300, 6, 5)) > 0.5
    rows = masks.encode_segments(found)
    assert [row["area"] for row in rows] == found.sum((1, 2)).tolist()
    np.testing.assert_array_equal(masks.decode_segments(rows, (6, 5)), found)


def test_no_segment_is_an_answer():
    assert masks.encode_segments(np.zeros((0, 4, 5), bool)) == []
    assert masks.decode_segments([], (4, 5)).shape == (0, 4, 5)


def test_soft_masks_keep_sixteen_bits(rng):
    soft = rng.random((9, 7), np.float32)
    soft[0, :2] = 0, 1
    back = masks.decode_soft(masks.encode_soft(soft))
    assert back.dtype == np.float32 and np.abs(back - soft).max() <= 1 / 131070 + 1e-7
    assert (back[0, 0], back[0, 1]) == (0, 1)


@pytest.mark.parametrize("soft", [False, True])
def test_packing_gives_the_masks_back(rng, soft):
    found = rng.random((3, 5, 7), np.float32)
    found = found if soft else found > 0.5
    back = masks.unpack(masks.pack(found), found.shape, soft=soft)
    np.testing.assert_array_equal(back, found)
    assert back.dtype == found.dtype


def flooded(mask, start):
    """The 4-connected part around a set pixel, pixel by pixel."""
    part, rest = np.zeros_like(mask), [start]
    while rest:
        y, x = rest.pop()
        if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not part[y, x]:
            part[y, x] = True
            rest += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return part


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_largest_component_is_the_first_in_raster_order_of_those_with_the_most_pixels(rng, share):
    for _ in range(30):
        mask, best = rng.random((7, 9)) < share, np.zeros((7, 9), bool)
        for start in zip(*np.nonzero(mask), strict=True):
            part = flooded(mask, start)
            best = part if part.sum() > best.sum() else best
        np.testing.assert_array_equal(masks.largest_component(mask), best)


def test_the_component_of_a_pixel_is_what_a_flood_from_it_reaches(rng):
    mask = rng.random((7, 9)) < 0.6
    for pixel in range(mask.size):
        alone = (np.arange(mask.size) == pixel).reshape(mask.shape)
        expected = flooded(mask, divmod(pixel, 9)) if mask.flat[pixel] else alone
        np.testing.assert_array_equal(masks.component_of(mask, pixel), expected)


def test_pixels_that_meet_at_a_corner_are_connected_on_request():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    assert masks.largest_component(mask).tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert masks.largest_component(mask, connectivity=8).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_the_largest_component_of_nothing_is_nothing():
    assert not masks.largest_component(np.zeros((3, 4), bool)).any()
