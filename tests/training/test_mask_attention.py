"""Masks that CLIP looks at: what fits their category stays, in the samples of NamedMask's training."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.namedmask import small, work_of, write_pool
from support.tiny._clip import write_model
from torch.nn.functional import interpolate

from raypipe import classes, images
from raypipe.training.namedmask import attention
from raypipe.training.namedmask.experts import planned

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, str]:
    return write_pool(tmp_path_factory.mktemp("pool"), 4)


def fit_of(image: np.ndarray, query: str, method) -> np.ndarray:
    """How well each place fits a query, in 0..1 over the image, by torch alone: (H, W)."""
    height, width = size = image.shape[:2]
    scale = 512 / min(size)
    seen = [int(side * scale + 0.5) for side in size]
    features = method._clip.dense(method.pixels(image, tuple(seen)))[0]
    cosine = torch.einsum("dhw,d->hw", features / features.norm(dim=0), torch.tensor(method.vectors([query])[0]))
    padded = [-(-side // 16) * 16 for side in seen]
    whole = interpolate((10 * cosine).sigmoid()[None, None], size=padded, mode="bilinear")[..., : seen[0], : seen[1]]
    fit = interpolate(whole, size=(height, width), mode="bilinear")[0, 0].numpy()
    return (fit - fit.min()) / (fit.max() - fit.min())


def masks_of(recipe) -> dict[str, np.ndarray]:
    """The mask of each sample by its key."""
    found = work_of(recipe, "unused").samples
    return {
        key: np.unpackbits(each["mask"], count=each["image"][..., 0].size).reshape(each["image"].shape[:2]) > 0
        for key, each in zip(found.keys, map(found.__getitem__, range(len(found))), strict=True)
    }


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_samples_keep_of_their_masks_what_fits_their_category(options, clip, threshold):
    whole = masks_of(small(options, experts=False))
    recipe = small(options, experts=False, mask_attention=threshold, clip=clip)
    found, method = masks_of(recipe), attention.reader(clip, "auto")
    rows = {row["key"]: row for row in recipe.rows(None).to_pylist()}
    assert recipe.networks == ("backbone", "clip") and len(found) == len(whole) == 4
    changed = 0
    for key, mask in found.items():
        with open(rows[key]["location"], "rb") as file:
            image = images.decode(file.read(), max_pixels=10**6)
        expected = whole[key] & (fit_of(image, rows[key]["category"], method) > threshold)
        assert (mask != (expected if expected.any() else whole[key])).mean() < 1e-3
        changed += (mask != whole[key]).any()
    assert changed >= 2


def test_a_mask_that_would_lose_everything_and_a_flat_image_stay_as_they_are(clip):
    method = attention.reader(clip, "auto")
    text, image = method.vectors(["cat"])[0], np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    fit = fit_of(image, "cat", method)
    mask = fit < 0.4
    np.testing.assert_array_equal(attention.attend(mask, image, method, text, 0.5), mask)
    mask[fit > 0.9] = True
    np.testing.assert_array_equal(attention.attend(mask, image, method, text, 0.5), mask & (fit > 0.5))
    empty = np.zeros_like(mask)
    assert not attention.attend(empty, image, method, text, 0.5).any()
    one = np.ones((1, 1), bool)
    np.testing.assert_array_equal(attention.attend(one, image[:1, :1], method, text, 0.5), one)


def test_only_what_was_found_is_looked_at_and_experts_masks_are_not_again(options, clip):
    recipe = small(options, experts=True, mask_attention=0.5, clip=clip)
    plain, attended = masks_of(small(options)), masks_of(replace(recipe, experts=False))
    rows = recipe.rows(None)
    for expert in planned(recipe, rows).values():
        for key, mask in masks_of(expert).items():
            np.testing.assert_array_equal(mask, attended[key])
    assert any((attended[key] != plain[key]).any() for key in plain)
    for key, mask in masks_of(recipe).items():  # what experts make of them has replaced the masks by then
        np.testing.assert_array_equal(mask, plain[key])


def test_categories_are_asked_by_the_queries_of_their_list():
    known = classes.read("voc2012")
    for alias, name in classes.facts("voc2012")["aliases"].items():
        assert known.queries[known.numbers[classes.normalised(alias)] - 1] == name
    named = classes.read("[{name: crane, query: crane bird}, {name: crane, query: crane machine}]")
    assert named.numbers == {"crane bird": 1, "crane machine": 2} and named.queries == named.names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_attention": 1.0}, "namedmask: mask_attention must be above 0 and below 1, got 1.0"),
        ({"mask_attention": 0.0}, "namedmask: mask_attention must be above 0 and below 1, got 0.0"),
        ({"clip": "some/clip"}, "namedmask: clip 'some/clip' has no effect without mask_attention"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(options, **given)
