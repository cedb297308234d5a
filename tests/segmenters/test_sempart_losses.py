"""The losses of Sempart: stored values and gradients, and the same from loops, matrices and shifted arrays."""

import numpy as np
import pytest
import torch
from support.golden import arrays

from raypipe.benchmark.plain.guided import cumulative_guided_filter
from raypipe.networks import IMAGENET_MEAN, IMAGENET_STD
from raypipe.segmenters.sempart import losses

pytestmark = pytest.mark.usefixtures("one_thread")
NEIGHBOURS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


@pytest.fixture
def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Two coarse masks of 5 x 7 patches and fine ones of 40 x 56 px, with gradients."""
    random = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 1, *size, generator=random).requires_grad_() for size in ((5, 7), (40, 56)))


@pytest.fixture
def features() -> torch.Tensor:
    """Of three kinds of patches, with noise: about a third of all pairs is alike."""
    random = torch.Generator().manual_seed(1)
    kinds = torch.randn(3, 16, generator=random)[torch.randint(0, 3, (2, 5, 7), generator=random)]
    return (kinds + torch.randn(2, 5, 7, 16, generator=random) * 0.3).permute(0, 3, 1, 2)


@pytest.fixture
def image() -> torch.Tensor:
    """Normalised, smooth with edges."""
    random = torch.Generator().manual_seed(2)
    small = torch.rand(2, 3, 6, 8, generator=random)
    large = torch.nn.functional.interpolate(small, size=(40, 56), mode="bilinear")
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    return ((large * 4).round() / 4 - mean) / std


def same_with_gradients(ours, expected, *masks):
    """Two losses agree, and their gradients of each mask too."""
    torch.testing.assert_close(ours, expected.to(ours.dtype), atol=1e-6, rtol=1e-5)
    for mask in masks:
        pair = (torch.autograd.grad(loss, mask, retain_graph=True)[0] for loss in (ours, expected))
        torch.testing.assert_close(*pair, atol=1e-7, rtol=1e-4)


def test_losses_and_gradients_are_the_stored_ones(shared):
    stored = {key: torch.from_numpy(value) for key, value in arrays(shared / "golden/sempart/losses_64.npz").items()}
    coarse, fine = stored["coarse"].requires_grad_(), stored["fine"].requires_grad_()
    image, top, left = (stored[name] for name in ("image_norm", "crop_top", "crop_left"))
    alike = losses.edges(stored["features"], tau=float(stored["tau"]))
    assert alike.sum((1, 2)).tolist() == stored["edges_above_tau"].tolist()
    per_image = losses.ncut_per_image(coarse, alike).double()
    torch.testing.assert_close(per_image, stored["ncut_per_image"], atol=1e-5, rtol=0)
    torch.testing.assert_close(losses.zoom(image, top, left), stored["crop_image"], atol=1e-6, rtol=0)
    zoomed = losses.zoom(fine, top, left)
    torch.testing.assert_close(zoomed, stored["crop_mask"], atol=1e-6, rtol=0)
    target = losses.teacher_target(stored["teacher_raw"], stored["crop_image"])
    torch.testing.assert_close(target, stored["teacher_filtered"], atol=2e-5, rtol=0)
    found = {
        "ncut": losses.ncut(coarse, alike),
        "gtv_fine": losses.gtv_fine(fine, image),
        "gtv_coarse": losses.gtv_coarse(coarse, alike),
        "consistency": losses.consistency(coarse, fine),
        "crop_zoom": losses.crop_zoom(zoomed, target),
    }
    for name, loss in found.items():
        torch.testing.assert_close(loss.double(), stored[name], atol=1e-5, rtol=0)
        masks = {"coarse": coarse, "fine": fine}
        expected = {kind: stored[key] for kind in masks if (key := f"{name}_grad_{kind}") in stored}
        assert expected
        for kind, gradient in expected.items():
            (ours,) = torch.autograd.grad(loss, masks[kind], retain_graph=True)
            torch.testing.assert_close(ours, gradient, atol=1e-6, rtol=1e-4)


def test_patches_are_alike_above_tau_and_each_is_like_itself(features):
    features[0, :, 0, 0] = 0  # no direction at all
    alike = losses.edges(features, tau=0.4)
    rows = features.double().flatten(2).transpose(1, 2)
    for found, vectors in zip(alike.tolist(), rows, strict=True):
        for i, one in enumerate(vectors):
            for j, other in enumerate(vectors):
                product = one.norm() * other.norm()
                assert found[i][j] == (i == j or bool(product > 0 and one @ other / product > 0.4))
    assert 0.2 < alike.float().mean() < 0.6
    orthogonal = torch.eye(4).reshape(1, 4, 2, 2)
    assert torch.equal(losses.edges(orthogonal, tau=0.0)[0], torch.eye(4, dtype=torch.bool))  # 0 is not above 0


def test_the_cut_is_that_of_a_whole_matrix_of_weights(masks, features):
    coarse, _ = masks
    alike = losses.edges(features)
    weights = torch.where(alike, 1.0, 1e-3).double()
    s = coarse.flatten(1).double()[..., None].clamp(1e-3, 1 - 1e-3)
    cut = (s.mT @ weights @ (1 - s)).flatten()
    expected = cut / (s.mT @ weights.sum(2, keepdim=True)).flatten()
    expected = expected + cut / ((1 - s).mT @ weights.sum(2, keepdim=True)).flatten()
    torch.testing.assert_close(losses.ncut_per_image(coarse, alike, eps=1e-3), expected.float(), atol=1e-6, rtol=1e-6)
    same_with_gradients(losses.ncut(coarse, alike, eps=1e-3), expected.mean(), coarse)


def test_the_cut_is_0_along_the_gap_between_kinds_and_1_without_a_decision():
    kinds = (torch.arange(6) > 2).float().expand(4, 6)  # two halves
    alike = losses.edges(torch.stack([kinds, 1 - kinds])[None])
    assert losses.ncut(kinds[None, None], alike) < 1e-4
    torch.testing.assert_close(losses.ncut(torch.full((1, 1, 4, 6), 0.5), alike), torch.tensor(1.0))
    assert losses.ncut(1 - kinds[None, None].roll(1, 2).roll(3, 3), alike) < 1e-4  # the halves the other way round


def by_shifts(mask, weight):
    """The mean of weighted squared steps to eight neighbours, pixel by pixel with whole shifted arrays."""
    padded, total = torch.nn.functional.pad(mask.double(), (1, 1, 1, 1), mode="reflect"), 0
    height, width = mask.shape[2:]
    for y, x in NEIGHBOURS:
        there = padded[:, :, 1 + y : 1 + y + height, 1 + x : 1 + x + width]
        total = total + (weight(y, x) * (mask.double() - there).square()).sum()
    return total / (8 * mask.numel())


def kernel(values, sigma):
    """The weight exp(-|x_i - x_j|^2 / sigma) of each pixel and its neighbour at (y, x), (B, 1, H, W)."""
    padded = torch.nn.functional.pad(values.double(), (1, 1, 1, 1), mode="reflect")
    height, width = values.shape[2:]

    def weight(y, x):
        there = padded[:, :, 1 + y : 1 + y + height, 1 + x : 1 + x + width]
        return (-(values.double() - there).square().sum(1, keepdim=True) / sigma).exp()

    return weight


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_steps_of_the_fine_mask_are_weighed_by_the_image(masks, image, sigma):
    _, fine = masks
    same_with_gradients(losses.gtv_fine(fine, image, sigma=sigma), by_shifts(fine, kernel(image, sigma)), fine)


def test_steps_of_the_coarse_mask_are_weighed_by_the_graph_or_a_kernel(masks, features):
    coarse, _ = masks
    unit = features / features.norm(dim=1, keepdim=True)
    padded = torch.nn.functional.pad(unit, (1, 1, 1, 1), mode="reflect")

    def weight(y, x):
        there = padded[:, :, 1 + y : 6 + y, 1 + x : 8 + x]
        return torch.where((unit * there).sum(1, keepdim=True) > 0.4, 1.0, 0.01)

    graph = losses.gtv_coarse(coarse, losses.edges(features), eps=0.01)
    same_with_gradients(graph, by_shifts(coarse, weight), coarse)
    same_with_gradients(losses.gtv_kernel(coarse, features, sigma=0.5), by_shifts(coarse, kernel(unit, 0.5)), coarse)


@pytest.mark.parametrize("patch", [2, 8])
def test_the_fine_mask_is_compared_between_the_central_pixels_of_a_patch(masks, patch):
    coarse, fine = masks
    first, second = patch // 2 - 1, patch // 2
    coarse = torch.rand(2, 1, 40 // patch, 56 // patch).requires_grad_()
    corners = [fine[:, :, y::patch, x::patch] for y in (first, second) for x in (first, second)]
    expected = (coarse - sum(corners) / 4).square().mean()
    same_with_gradients(losses.consistency(coarse, fine), expected, coarse, fine)


def test_a_window_is_enlarged_between_its_pixels_and_gradients_reach_nothing_else(masks):
    _, fine = masks
    top, left = [0, 20], [28, 5]
    zoomed = losses.zoom(fine, top, left)
    for i in range(2):
        window = fine[i, 0, top[i] : top[i] + 20, left[i] : left[i] + 28].detach()
        y, x = (((torch.arange(2 * n) + 0.5) / 2 - 0.5).clamp(0, n - 1) for n in (20, 28))
        rows = window[y.floor().long()] + (y % 1)[:, None] * (window[y.ceil().long()] - window[y.floor().long()])
        both = rows[:, x.floor().long()] + (x % 1) * (rows[:, x.ceil().long()] - rows[:, x.floor().long()])
        torch.testing.assert_close(zoomed[i, 0], both, atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(zoomed.sum(), fine)
    inside = torch.zeros_like(gradient, dtype=torch.bool)
    inside[0, :, :20, 28:], inside[1, :, 20:, 5:33] = True, True
    torch.testing.assert_close(gradient, 4.0 * inside)


def test_the_target_is_the_filtered_mask_of_the_teacher_without_a_gradient(masks, image):
    _, fine = masks
    target = losses.teacher_target(fine, image, radius=3, eps=1e-2)
    colours = (image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]) * 255
    for mask, picture, found in zip(fine, colours.permute(0, 2, 3, 1), target, strict=True):
        expected = cumulative_guided_filter(mask.detach().numpy(), picture.numpy(), radius=3, eps=1e-2)
        np.testing.assert_allclose(found, expected.clip(1e-6, 1 - 1e-6), atol=1e-5)
    assert not target.requires_grad
    sure = losses.teacher_target(torch.ones_like(fine), image)
    torch.testing.assert_close(sure, torch.full_like(sure, 1 - 1e-6), atol=1e-8, rtol=0)
    student = torch.rand(2, 1, 40, 56).requires_grad_()
    same_with_gradients(losses.crop_zoom(student, target), (student - target).square().mean(), student)


@pytest.mark.parametrize("size", [(1, 1), (3, 30), (40, 56)])
def test_the_guided_filter_of_a_gpu_is_that_of_the_cpu(size):
    random = torch.Generator().manual_seed(3)
    masks, guides = torch.rand(2, 3, 1, *size, generator=random)
    mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    ours = losses.filtered_together(masks, guides, radius=9, eps=1e-3)
    torch.testing.assert_close(losses.guided(masks, (guides - mean) / std), ours, atol=2e-5, rtol=0)


def test_losses_are_float32_where_the_network_is_not(masks, features, image):
    coarse, fine = masks

    def found():
        alike = losses.edges(features)
        return [
            losses.ncut(coarse, alike),
            losses.gtv_coarse(coarse, alike),
            losses.gtv_fine(fine, image),
            losses.consistency(coarse, fine),
            losses.teacher_target(fine, image),
        ]

    with torch.autocast("cpu", torch.bfloat16):
        reduced = found()
    assert all(torch.equal(one, other) for one, other in zip(reduced, found(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_losses_and_gradients_that_the_cpu_finds(masks, features, image):
    def found(device):
        there = [mask.detach().to(device).requires_grad_() for mask in masks]
        (coarse, fine), seen = there, image.to(device)
        alike = losses.edges(features.to(device))
        zoomed = losses.crop_zoom(losses.zoom(fine, [0, 3], [1, 2]), losses.teacher_target(fine, seen))
        total = losses.ncut(coarse, alike) + losses.gtv_coarse(coarse, alike) + losses.gtv_fine(fine, seen)
        total = total + losses.consistency(coarse, fine) + zoomed
        return [total.detach().cpu(), *(each.cpu() for each in torch.autograd.grad(total, there))]

    for one, other in zip(found("cpu"), found("cuda"), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
