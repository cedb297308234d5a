"""One contract for all refiners; a new refiner is found by itself."""

import doctest
import pickle
from dataclasses import fields

import numpy as np
import pytest

from raypipe import refiners
from raypipe.refiners import find, names


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (20, 31)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_masks_become_soft_masks_of_their_size(name, size, count):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    soft = rng.random((count, *size)).astype(np.float32)
    for masks in (soft, soft > 0.5, np.zeros_like(soft)):
        before = masks.copy()
        refined, note = find(name)()(masks, image)
        assert refined.shape == masks.shape and refined.dtype == np.float32
        assert not refined.size or (refined.min() >= 0 and refined.max() <= 1)
        assert " " not in note
        np.testing.assert_array_equal(masks, before)


@pytest.mark.parametrize("name", names())
def test_options_are_named_after_refining_and_pickle(name):
    refiner = find(name)()
    assert all(field.name.startswith("refine_") for field in fields(refiner))
    assert pickle.loads(pickle.dumps(refiner)) == refiner
    assert find(name).__module__ == f"{refiners.__name__}.{name}"


def test_the_example_runs():
    result = doctest.testmod(refiners)
    assert result.attempted and not result.failed
