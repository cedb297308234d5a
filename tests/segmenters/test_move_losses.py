"""MOVE's composition and mask losses: stored values and gradients, and what they say of simple masks."""

from pathlib import Path

import pytest
import torch
from support.golden import arrays

from raypipe.segmenters.move import losses

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {"bin": "binary", "minarea": "area", "shifted": "", "avg16": "_mean", "max16": "_max"}


def case(folder, name):
    return {key: torch.from_numpy(value) for key, value in arrays(folder / f"{name}.npz").items()}


def check(stored):
    mask = stored["mask"].requires_grad_()
    parts = losses.take_apart(stored.get("x", mask.detach()), mask, stored["shifts"])
    for ours, theirs in (
        (parts.image, "x_shifted" if "x" in stored else "fg_mask"),
        (parts.foreground, "fg_mask"),
        (parts.hole, "inpaint_mask"),
        (parts.keep, "mae_keep_mask"),
    ):
        torch.testing.assert_close(ours, stored[theirs], atol=1e-6, rtol=0)
    found = losses.mask_losses(parts.foreground)
    for kind in ("bin", "minarea"):
        for scale in ("shifted", "avg16", "max16"):
            ours, theirs = found[NAMES[kind] + NAMES[scale]], stored[f"loss_{kind}_mask_{scale}"]
            torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-6, rtol=0)
    total = losses.weighted(found)
    torch.testing.assert_close(total.double(), stored["weighted_mask_loss"].double(), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(total, mask)
    torch.testing.assert_close(gradient, stored["grad_mask"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["compose_losses", "compose_losses_small"])
def test_parts_losses_and_gradients_are_the_stored_ones(shared, name):
    check(case(shared / "golden/move", name))


def test_parts_losses_and_gradients_of_a_small_object_are_the_stored_ones():
    check(case(GOLDEN, "move_compose_small"))


def test_a_shift_moves_right_and_down_and_zeros_enter():
    x = torch.arange(1.0, 13).reshape(1, 1, 3, 4).repeat(3, 1, 1, 1)
    moved = losses.shift(x, torch.tensor([[1, 2], [-2, 0], [0, 0]]))
    assert moved[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert moved[1, 0].tolist() == [[3, 4, 0, 0], [7, 8, 0, 0], [11, 12, 0, 0]]
    torch.testing.assert_close(moved[2], x[2])


def test_drawn_shifts_reach_an_eighth_of_the_shorter_side_and_no_further():
    shifts = losses.draw_shifts(2000, (64, 160), generator=torch.Generator().manual_seed(0))
    assert shifts.shape == (2000, 2) and shifts.dtype == torch.int64
    assert shifts.min() == -8 and shifts.max() == 8


def test_only_tiles_without_the_object_before_and_after_its_move_are_kept():
    mask = torch.zeros(1, 1, 48, 48)
    mask[..., 16:32, 16:32] = 1
    parts = losses.take_apart(torch.zeros(1, 3, 48, 48), mask, torch.tensor([[4, 0]]))
    assert parts.keep.reshape(3, 3).tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert parts.hole.sum() == 16 * 4 and not (parts.hole * parts.foreground).any()


def test_an_image_pasted_over_a_background_is_seen_where_the_mask_is():
    mask = torch.tensor([[[[0.0, 0.25, 1.0]]]])
    assert losses.paste(torch.full((1, 3, 1, 3), 8.0), torch.zeros(1, 3, 1, 3), mask)[0, 2, 0].tolist() == [0, 2, 8]


def test_binary_masks_of_enough_area_cost_nothing_and_the_rest_costs_by_its_weight():
    half, small, grey = torch.zeros(3, 1, 1, 32, 32)
    half[..., :16] = 1
    small[..., :1, :1] = 1
    grey[:] = 0.5
    assert losses.weighted(losses.mask_losses(half)) == 0
    found = losses.mask_losses(small)
    assert found["binary"] == 0 and found["area_max"] == 0  # a quarter of the tiles
    torch.testing.assert_close(found["area"], torch.tensor(0.05 - 1 / 1024))
    torch.testing.assert_close(losses.weighted({"area": found["area"]}), 100 * found["area"])
    found = losses.mask_losses(grey)
    assert losses.weighted(found) == 3 * 12.5 * 0.5
    assert losses.weighted(found, 625) == 3 * 12.5 * 0.5 / 4 and losses.weighted(found, 0) == 0
    assert losses.weighted(found, 9999) == losses.weighted(found)
