"""The losses of Sempart: stored values and gradients."""

import pytest
import torch
from support.golden import arrays

from raypipe.segmenters.sempart import losses

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stored(shared) -> dict:
    return {key: torch.from_numpy(value) for key, value in arrays(shared / "golden/sempart/losses_64.npz").items()}


def test_losses_and_gradients_are_the_stored_ones(stored):
    coarse, fine = stored["coarse"].requires_grad_(), stored["fine"].requires_grad_()
    image, tau = stored["image_norm"], float(stored["tau"])
    alike = losses.edges(stored["features"], tau=tau)
    assert alike.sum((1, 2)).tolist() == stored["edges_above_tau"].tolist()
    torch.testing.assert_close(
        losses.ncut_per_image(coarse, alike).double(), stored["ncut_per_image"], atol=1e-5, rtol=0
    )
    top, left = stored["crop_top"], stored["crop_left"]
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
