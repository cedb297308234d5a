"""Hand-made descriptions of patches."""

import numpy as np
import pytest
import torch
from PIL import Image

from raypipe import segmenters
from raypipe.features import color

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [(1, 1), (3, 40), (16, 16), (17, 60), (1, 2000)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["pad", "crop", "resize", "reflect"])
def test_images_of_any_size_are_described_on_their_grid(size, fit):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    found = color.describe(image, 16, fit=fit)
    assert found.patches.dtype == torch.float32 and found.patches.isfinite().all()
    assert len(found.patches) == found.grid[0] * found.grid[1] and found.patches.ndim == 2
    assert found.enlarged(np.zeros(found.grid, bool), size).shape == size


@pytest.mark.parametrize("level", [0, 77, 255])
def test_patches_of_one_colour_are_alike(level):
    patches = color.describe(np.full((40, 50, 3), level, np.uint8), 8).patches
    assert (patches == patches[0]).all() and patches.any()


def test_patches_of_one_kind_are_similar_and_those_of_another_are_not():
    image = np.zeros((64, 96, 3), np.uint8)
    image[16:48, 32:64] = (220, 60, 30)
    patches = color.describe(image, 8).patches
    unit = patches / patches.norm(dim=1, keepdim=True)
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[2:6, 4:8] = True
    similarity = unit @ unit.T
    within, across = (
        similarity[inside.flatten()][:, inside.flatten()],
        similarity[inside.flatten()][:, ~inside.flatten()],
    )
    assert within.mean() > 0.5 and across.mean() < 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lost", "tokencut", "deep_spectral", "spectral_voting"])
def test_methods_find_far_more_with_it_than_the_middle_of_the_image(name, shared):
    folder = shared / "data/saliency_examples"
    paths = sorted((folder / "reference_maps/u2net").glob("*.png"))
    method = segmenters.find(name)(weights="color")
    method.load("cpu")
    agreement, chance = [], []
    for path in paths:
        target = np.asarray(Image.open(path)) > 127
        image = np.asarray(Image.open(folder / f"images/{path.stem}.jpg").convert("RGB"))
        (found,) = method.segment([image])
        middle, (height, width) = np.zeros_like(target), target.shape
        middle[height // 5 : -(height // 5), width // 5 : -(width // 5)] = True
        for mask, values in ((found.masks.any(0), agreement), (middle, chance)):
            values.append((mask & target).sum() / (mask | target).sum())
    assert len(agreement) == 13
    assert np.mean(chance) < 0.37 and np.mean(agreement) > 0.45
