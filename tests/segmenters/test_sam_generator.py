"""The parts of SAM's mask generator against slow loops and the definitions of the official code."""

import math

import numpy as np
import pytest
import torch
from support.tiny.sam import record
from torchvision.ops import box_iou

from raypipe.benchmark.plain import sam as plain_sam
from raypipe.segmenters.sam import generator
from raypipe.segmenters.sam.generator import Crop


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("size", [(480, 640), (101, 77), (1, 1), (20, 300), (9, 9)])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_crops_follow_the_integer_rules(size, layers):
    height, width = size
    expected = [(0, 0, width, height, 0)]
    for layer in range(1, layers + 1):
        overlap = int(512 / 1500 * min(height, width) * 2 / 2**layer)
        w = int(math.ceil((overlap * (2**layer - 1) + width) / 2**layer))
        h = int(math.ceil((overlap * (2**layer - 1) + height) / 2**layer))
        for i in range(2**layer):
            for j in range(2**layer):
                x, y = (w - overlap) * i, (h - overlap) * j
                box = (x, y, min(x + w, width), min(y + h, height))
                if box[2] - box[0] > 1 and box[3] - box[1] > 1:
                    expected.append((*box, layer))
    crops = generator.crop_boxes(size, layers=layers, overlap_ratio=512 / 1500)
    assert crops == expected
    if min(size) > 20:
        assert len(crops) == sum(4**layer for layer in range(layers + 1))
        for layer in range(1, layers + 1):
            covered = np.zeros(size, bool)
            for x0, y0, x1, y1, own in crops:
                covered[y0:y1, x0:x1] |= own == layer
            assert covered.all()


def test_points_lie_at_the_centres_of_cells_row_by_row():
    np.testing.assert_allclose(generator.point_grid(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    np.testing.assert_array_equal(generator.point_grid(1), [[0.5, 0.5]])


@pytest.mark.parametrize(
    ("inner", "size"), [((64, 48), (180, 135)), ((64, 64), (64, 64)), ((1, 64), (1, 90)), ((63, 5), (20, 2))]
)
def test_upsampling_is_two_bilinear_steps_however_many_masks_go_at_once(inner, size, monkeypatch):
    logits = torch.randn(7, 16, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.nn.functional.interpolate
    large = scale(logits[None], (64, 64), mode="bilinear")[..., : inner[0], : inner[1]]
    expected = scale(large, size, mode="bilinear")[0]
    most = max(64 * 64, size[0] * size[1])  # px of a mask
    for masks, counts in ((0, [1] * 7), (3, [3, 3, 1]), (100, [7])):
        monkeypatch.setitem(generator.CHUNK, "cpu", max(1, masks * most))
        parts = list(generator.upsample(logits, side=64, input_size=inner, size=size))
        assert [len(part) for part in parts] == counts
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)
    (nothing,) = generator.upsample(logits[:0], side=64, input_size=inner, size=size)
    assert nothing.shape == (0, *size)


def test_stability_counts_pixels_and_is_not_a_number_without_any():
    logits = torch.tensor([[[2.0, 0.5], [-0.5, -2.0]], [[-2.0, -2.0], [-2.0, -2.0]], [[3.0, 3.0], [3.0, 3.0]]])
    np.testing.assert_allclose(generator.stability(logits, 1.0), [1 / 3, np.nan, 1])


def test_boxes_name_the_first_and_last_pixels(rng):
    masks = rng.random((20, 9, 13)) > 0.97
    masks[0], masks[1] = False, True
    for mask, box in zip(masks, generator.mask_boxes(torch.from_numpy(masks)).tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert box == ([x.min(), y.min(), x.max(), y.max()] if len(x) else [0, 0, 0, 0])


def test_a_mask_is_cut_off_where_it_ends_near_the_crops_edge_and_not_the_images(rng):
    crop, size = Crop(60, 0, 200, 100, 1), (100, 300)
    boxes = np.sort(rng.integers(0, 100, (400, 2, 2)), 1).reshape(-1, 4)
    boxes[0], boxes[1] = (20, 0, 119, 99), (21, 0, 118, 99)  # 20 px from the crop's left edge counts, 21 does not
    found = generator.is_cut_off(torch.from_numpy(boxes), crop, size)
    expected = [plain_sam.is_cut_off(list(np.add(box, [60, 0, 60, 0])), list(crop[:4]), size) for box in boxes]
    assert found.tolist() == expected
    assert found[0] and not found[1] and 0 < found.sum() < 400


def test_suppression_keeps_the_best_of_overlapping_boxes_and_ties_keep_their_order(rng):
    corners = rng.integers(0, 40, (600, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + rng.integers(0, 30, (600, 2))], 1))
    scores = torch.from_numpy(rng.integers(0, 5, 600) / 5)
    overlaps, kept = (box_iou(boxes.float(), boxes.float()) > 0.7).numpy(), []
    for i in sorted(range(600), key=lambda i: -scores[i]):
        if not overlaps[i, kept].any():
            kept.append(i)
    assert generator.suppress(boxes, scores, 0.7).tolist() == kept
    assert len(kept) < 600


def test_between_crops_the_mask_of_the_smallest_crop_wins_and_comes_first():
    mask, other = np.zeros((2, 50, 50), bool)
    mask[10:20, 10:20], other[30:40, 30:40] = True, True
    small, whole = Crop(0, 0, 30, 30, 1), Crop(0, 0, 50, 50, 0)
    found = [record(mask, 0.99, whole), record(other, 0.5, whole), record(mask, 0.9, small)]
    assert generator.prefer_small_crops(found, 0.7) == [found[2], found[1]]


def test_a_record_keeps_its_mask(rng):
    for mask in (*(rng.random((6, 17, 11)) > 0.9), np.zeros((3, 3), bool), np.ones((1, 1), bool)):
        np.testing.assert_array_equal(record(mask).paste(np.zeros(mask.shape, bool)), mask)


@pytest.mark.parametrize("kind", ["holes", "islands"])
def test_small_regions_are_those_a_slow_flood_finds(rng, kind):
    changes = []
    for density in (0.3, 0.5, 0.7, 0.0, 1.0):
        mask = rng.random((14, 15)) < density
        areas = region_areas(~mask if kind == "holes" else mask)
        expected = mask | (areas < 5) & ~mask if kind == "holes" else mask & (areas >= 5)
        found, changed = generator.remove_small_regions(mask, 5, kind)
        np.testing.assert_array_equal(found, expected)
        assert changed == (found != mask).any()
        changes.append(changed)
    assert any(changes) and not all(changes)


def region_areas(mask: np.ndarray) -> np.ndarray:
    """For each pixel of the mask the area of its 8-connected region; 0 elsewhere."""
    areas, left = np.zeros(mask.shape, int), {tuple(place) for place in np.argwhere(mask).tolist()}
    while left:
        region = {left.pop()}
        edge = list(region)
        while edge:
            y, x = edge.pop()
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            region |= near
            edge += near
        areas[tuple(np.transpose(list(region)))] = len(region)
    return areas


def test_of_small_islands_alone_the_largest_stays():
    mask = np.zeros((9, 9), bool)
    mask[0, 0], mask[4, 4:6], mask[8, 8] = True, True, True
    found, changed = generator.remove_small_regions(mask, 5, "islands")
    assert changed and found.sum() == 2 and found[4, 4:6].all()


def test_cleaning_prefers_unchanged_masks_and_keeps_scores():
    whole = np.zeros((40, 40), bool)
    whole[5:35, 5:35] = True
    holed, spotted = whole.copy(), np.zeros_like(whole)
    holed[10, 10] = False
    spotted[0:4, 0:4], spotted[39, 39] = True, True
    found = generator.clean(
        [record(holed, 0.99), record(spotted, 0.8), record(whole, 0.5)], (40, 40), min_area=3, threshold=0.7
    )
    assert [(one.score, one.area) for one in found] == [(0.5, 900), (0.8, 16)]
    assert found[1].box == (0, 0, 3, 3)
    assert generator.clean([], (40, 40), min_area=3, threshold=0.7) == []
