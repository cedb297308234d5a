"""Forms of features against loops over cells."""

import numpy as np
import pytest
import torch

from raypipe.features import descriptors


@pytest.mark.parametrize("hierarchy", [1, 2, 3])
@pytest.mark.parametrize("grid", [(4, 5), (1, 7), (12, 10)])
def test_bins_are_means_of_ever_larger_windows_around(grid, hierarchy):
    height, width = grid
    picture = np.random.default_rng(0).normal(size=(height, width, 3))
    found = descriptors.log_binned(torch.tensor(picture).flatten(0, 1), grid, hierarchy=hierarchy)
    assert found.shape == (height * width, (1 + 8 * hierarchy) * 3)
    for y in range(height):
        for x in range(width):
            expected = []
            for step in [1, 3, 9][:hierarchy]:
                for down in (-step, 0, step):
                    for right in (-step, 0, step):
                        if step > 1 and down == right == 0:
                            continue
                        i, j = np.clip(y + down, 0, height - 1), np.clip(x + right, 0, width - 1)
                        half = step // 2
                        window = picture[max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
                        expected.append(window.mean((0, 1)))
            np.testing.assert_allclose(found[y * width + x], np.concatenate(expected), atol=1e-12)


def test_heads_lie_side_by_side_within_a_dimension():
    features = torch.arange(12).reshape(1, 12)  # two heads of six dimensions
    assert descriptors.by_dimension(features, 2).tolist() == [[0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]]
