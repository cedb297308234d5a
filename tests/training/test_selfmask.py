"""SelfMask's training: its losses, the masks of a run as targets, and the way from a run to weights that label."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from support import golden

from raypipe.segmenters.selfmask.losses import dice, losses, ranking

pytestmark = pytest.mark.usefixtures("one_thread")
ORDERS = ["corrected", "reference"]


def plain_losses(masks, objectness, targets, order) -> dict[str, torch.Tensor]:
    """The same as the paper says it: masks at the targets' size, a loop over queries, a loop over their pairs."""
    total = {"dice": torch.zeros(()), "ranking": torch.zeros(())}
    for (b, image), level in itertools.product(enumerate(masks), range(masks.shape[1])):
        target, costs = targets[b].float(), []
        for mask in image[level]:
            p = torch.nn.functional.interpolate(mask[None, None], size=target.shape, mode="bilinear")[0, 0]
            costs.append(1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1))
        total["dice"] = total["dice"] + sum(costs) / len(masks)
        sure = objectness[b, level, :, 0]
        for i, j in itertools.permutations(range(len(costs)), 2):
            if (costs[i] < costs[j]) if order == "corrected" else (costs[i] > costs[j]):
                total["ranking"] = total["ranking"] + (sure[j] - sure[i]).clamp(min=0) / len(masks)
    return total


@pytest.fixture
def predictions():
    """Masks of two images, two blocks, five queries on an oblong grid, what they are sure of, and their targets."""
    random = torch.Generator().manual_seed(3)
    masks = torch.rand(2, 2, 5, 6, 7, generator=random).requires_grad_()
    objectness = torch.rand(2, 2, 5, 1, generator=random).requires_grad_()
    return masks, objectness, torch.rand(2, 25, 28, generator=random) > 0.6


@pytest.mark.parametrize("order", ORDERS)
def test_losses_and_gradients_are_those_of_a_plain_loop(predictions, order):
    masks, objectness, targets = predictions
    found, expected = losses(*predictions, order=order), plain_losses(*predictions, order)
    for name in ("dice", "ranking"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=0)
    one, other = (torch.autograd.grad(sum(each.values()), (masks, objectness)) for each in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_losses_and_gradients_are_those_of_the_authors_code(shared):
    stored = golden.arrays(shared / "golden/selfmask/loss_dice_ranking.npz")
    masks, objectness = (torch.tensor(stored[name], requires_grad=True) for name in ("mask_pred", "objectness"))
    targets = torch.tensor(stored["pseudo_mask"])
    terms = {order: losses(masks, objectness, targets, order=order) for order in ORDERS}
    for order, name in (("reference", "ranking_reference_order"), ("corrected", "ranking_corrected")):
        np.testing.assert_allclose(terms[order]["dice"].item(), stored["dice"], rtol=1e-5)
        np.testing.assert_allclose(terms[order]["ranking"].item(), stored[name], rtol=1e-5)
    gradients = torch.autograd.grad(sum(terms["reference"].values()), (masks, objectness))
    for found, name in zip(gradients, ("grad_mask_pred", "grad_objectness_reference_order"), strict=True):
        np.testing.assert_allclose(found, stored[name], atol=1e-5 * abs(stored[name]).max())


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_those_of_finite_differences(predictions, order):
    masks, objectness = (each[:1, :, :3].detach().double().requires_grad_() for each in predictions[:2])
    terms = partial(losses, targets=predictions[2][:1], order=order)
    assert torch.autograd.gradcheck(lambda *given: tuple(terms(*given).values()), (masks, objectness))


def test_a_perfect_mask_costs_nothing_and_an_empty_one_almost_all():
    target = torch.zeros(1, 8, 8)
    target[0, 2:6, 2:6] = 1
    masks = torch.stack([target[0], torch.zeros(8, 8), 1 - target[0]])[None, None]
    expected = [0, 1 - 1 / 17, 1 - 1 / 65]
    np.testing.assert_allclose(dice(masks, target)[0, 0], expected, atol=1e-6)


def test_the_worse_of_two_queries_is_charged_for_being_surer_and_the_released_code_charges_the_better():
    costs, sure = torch.tensor([[[0.2, 0.7]]]), torch.tensor([[[0.3, 0.8]]])
    assert ranking(costs, sure) == 0.5 and ranking(costs, sure, order="reference") == 0
    assert ranking(costs, sure.flip(2)) == 0 and ranking(costs, sure.flip(2), order="reference") == 0.5


def test_queries_of_equal_masks_are_not_ranked():
    assert ranking(torch.full((1, 1, 4), 0.5), torch.rand(1, 1, 4)) == 0
