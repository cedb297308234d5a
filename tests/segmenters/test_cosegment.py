"""Co-segmentation: outputs of ReCo's authors' code, the plain formulation, what is degenerate."""

import math

import pytest
import torch
from support import golden

from raypipe.benchmark.plain import cosegment as plain
from raypipe.benchmark.processes import peak
from raypipe.segmenters.reco import cosegment

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["coseg_small", "coseg_k8"])
def stored(request, shared):
    arrays = golden.arrays(shared / "golden/reco" / f"{request.param}.npz")
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array.ndim}


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_attention_weights_and_seeds_are_those_of_the_authors_code(stored):
    features, contexts = stored["features"], stored["context_features"]
    attention = cosegment.language_attention(stored["dense_clip"], stored["text_feature"], features.shape[2:])
    close(attention, stored["text_attention"])
    close(cosegment.likeness(features, contexts), stored["context_weights"])
    weight = cosegment.weights(features, attention, contexts)
    close(weight, stored["weights"])
    close(cosegment.supports(features, weight), stored["grid"])
    found = cosegment.cosegment(features, weight)
    close(found.support, stored["avg_support"])
    assert found.seeds.equal(stored["seed_index"])
    seeds = features.flatten(2)[torch.arange(len(features)), :, found.seeds]
    close(seeds, stored["seed_features"])
    close(found.vector, stored["reference_feature"])


def test_without_weights_and_with_the_slices_as_released(stored):
    features, ones = stored["features"], torch.ones_like(stored["weights"])
    found = cosegment.cosegment(features, ones)
    close(found.vector, stored["reference_feature_unweighted"])
    assert found.seeds.equal(stored["seed_index_unweighted"])
    released = cosegment.cosegment(features, stored["weights"], slices="released")
    close(released.vector, stored["literal_reference_feature"])
    close(cosegment.cosegment(features, ones, slices="released").vector, stored["literal_reference_feature_unweighted"])


@pytest.mark.parametrize("slices", cosegment.SLICES)
@pytest.mark.parametrize(("images", "side"), [(1, 3), (2, 1), (11, 5), (17, 4)])
def test_blocks_give_what_the_whole_matrix_gives(slices, images, side):
    features, weight = plain.made_up(images, 12, side)
    close(cosegment.supports(features, weight, slices=slices), plain.supports(features, weight, slices=slices))


def test_fifty_images_take_a_tenth_of_the_memory_of_the_matrix_of_all_pairs():
    features, weight = plain.made_up(50, 384, 14)
    cosegment.supports(features[:2], weight[:2])  # what torch itself needs
    memory, found = peak(cosegment.supports, features, weight)
    if math.isnan(memory):
        pytest.skip("the memory of a process is not told here")
    pairs = (50 * 14 * 14) ** 2 * 4 / 2**20  # MB, of the matrix alone
    assert memory < pairs / 10
    whole = plain.supports(features[:, :, ::2, ::2], weight[:, ::2, ::2])
    close(cosegment.supports(features[:, :, ::2, ::2], weight[:, ::2, ::2]), whole)
    assert found.shape == (50 * 14 * 14, 50)


def test_a_single_image_is_its_own_support_and_equal_pixels_elect_the_first():
    features, weight = plain.made_up(1, 8, 3)
    found = cosegment.cosegment(features, weight)
    close(found.vector, cosegment.unit(features[0].flatten(1)[:, found.seeds[0]]))
    same = torch.ones(3, 8, 2, 2)
    found = cosegment.cosegment(same, torch.ones(3, 2, 2))
    assert found.seeds.tolist() == [0, 0, 0] and found.vector.norm() == pytest.approx(1)


def test_features_of_nothing_are_no_nan():
    features, weight = torch.zeros(2, 8, 2, 2), torch.ones(2, 2, 2)
    found = cosegment.cosegment(features, cosegment.weights(features, None, torch.zeros(1, 8)) * weight)
    assert found.vector.equal(torch.zeros(8)) and found.support.isfinite().all()
