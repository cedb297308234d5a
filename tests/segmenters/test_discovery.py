"""What methods on dense features share, in a method that takes the first channel for the object."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from support.tiny.dino import write_model

from raypipe.segmenters._discovery import Discovery
from raypipe.segmenters.spectral_voting import SpectralVoting
from raypipe.types import BadImage, Segments

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class First(Discovery):
    """One mask: patches whose first number is above average."""

    def find(self, images, features) -> Iterator[Segments]:
        for image, each in zip(images, features, strict=True):
            first = each.patches[:, 0].reshape(each.grid)
            yield Segments(each.enlarged((first > first.mean()).cpu().numpy(), image.shape[:2])[None])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("dino"))


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    sizes = [(40, 56), (6, 7), (1, 1), (33, 20), (1, 30)]
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


@pytest.mark.parametrize("weights", ["network", "color"])
def test_every_image_is_answered_and_what_is_too_small_has_an_empty_mask(weights, folder, images):
    method = First(weights=str(folder) if weights == "network" else weights)
    method.load("cpu")
    found = list(method.segment(images))
    assert [each.masks.shape for each in found] == [(1, *image.shape[:2]) for image in images]
    too_small = [False, True, True, False, False]
    assert [each.note for each in found] == ["too_small" if small else "" for small in too_small]
    assert [each.masks.any() for each in found] == [not small for small in too_small]


def test_color_is_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "color").mkdir()
    method = First(weights="color")
    assert method.networks == () and method.weights == "color" and method.gpus == 0 and First().gpus == 1
    method.load("cpu")
    assert method.checksums() == {}
    assert replace(method, max_side=64).networks == () and pickle.loads(pickle.dumps(First(weights="color"))) == method
    with pytest.raises(
        ValueError, match="test_discovery: dtype 'float32' has no effect: weights 'color' is no network"
    ):
        First(weights="color", dtype="float32")


def test_the_network_is_fetched_checked_and_recorded(folder):
    method = First(weights=str(folder))
    assert method.networks == ("weights",)
    method.load("cpu")
    assert list(method.checksums()) == ["model.safetensors"]


@pytest.mark.parametrize("kind", [First, SpectralVoting])
def test_similarities_on_a_gpu_are_no_tf32_where_the_environment_asks_for_it(kind):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as torch starts in NVIDIA's containers
        kind(weights="color").load("cpu")
        assert torch.get_float32_matmul_precision() == "high"
        kind(weights="color").load("cuda")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_images_are_reduced_first(folder):
    method = First(weights=str(folder), max_side=32)
    method.load("cpu")
    (found,) = method.features([np.zeros((10, 400, 3), np.uint8)])
    assert found.seen == (1, 32) and found.grid == (1, 4)
    with pytest.raises(ValueError, match="max_side must be at least 1, got 0"):
        First(max_side=0)


def test_features_that_are_not_finite_concern_their_image_alone(folder, images):
    method = First(weights=str(folder))
    method.load("cpu")
    forward = method._dino.forward
    method._dino.forward = lambda pixels, **options: (forward(pixels, **options)[0] * torch.nan, None)
    with pytest.raises(BadImage, match="segment: non_finite: .*"):
        list(method.segment(images[:1]))
    method._dino.forward = forward
    assert next(iter(method.segment(images[:1]))).masks.any()
