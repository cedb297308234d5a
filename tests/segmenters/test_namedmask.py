"""NamedMask: label maps of its network, where the names of its classes come from, large and broken photographs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny.namedmask import CLASSES, made, write_model

from raypipe.benchmark.plain import namedmask as plain
from raypipe.segmenters.namedmask import NamedMask
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("namedmask"))


@pytest.fixture(scope="module")
def tiny(folder) -> NamedMask:
    return loaded(weights=str(folder))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 93, 3)).astype(np.uint8)


def loaded(**options) -> NamedMask:
    method = NamedMask(**options)
    method.load("cpu")
    return method


def published(folder, name: str = "namedmask.pt", **options):
    """A file as the authors', which names no classes."""
    torch.save({"model": made(**options).state_dict()}, folder / name)
    return str(folder / name)


def test_each_pixel_has_its_likeliest_class_and_how_likely_that_is(tiny, noise):
    (found,) = tiny.segment([noise])
    expected = plain.probabilities(made().state_dict(), noise).numpy()
    value, index = expected.max(0), expected.argmax(0)
    present = [i for i in range(1, 4) if (index == i).any()]
    assert list(found.labels) == [CLASSES[i - 1] for i in present] and len(present) > 1 and (index == 0).any()
    for mask, i in zip(found.masks, present, strict=True):
        np.testing.assert_allclose(mask, np.where(index == i, value, 0), atol=1e-5)


def test_a_photograph_of_nothing_known_has_no_segments(tmp_path, noise):
    file = write_model(tmp_path) / "model.safetensors"
    state = load_file(file)
    state["classifier.classifier.3.bias"][0] += 1000
    save_file(state, file)
    (found,) = loaded(weights=str(tmp_path)).segment([noise])
    assert found.masks.shape == (0, *noise.shape[:2]) and list(found.labels) == []


def test_a_large_photograph_is_seen_smaller_and_its_map_has_its_size(tiny, noise):
    (whole,) = tiny.segment([noise])
    same, small = (replace(tiny, max_side=side) for side in (93, 50))
    for each in (same, small):
        each.load("cpu")
    np.testing.assert_array_equal(next(same.segment([noise])).masks, whole.masks)
    (found,) = small.segment([noise])
    assert found.index.shape == noise.shape[:2] and (found.values != whole.values).any()
    seen = np.asarray(Image.fromarray(noise).resize((50, 38), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(small._logits([noise], (38, 50)), tiny._logits([seen], (38, 50)))
    with pytest.raises(ValueError, match="^namedmask: max_side must be at least 1, got 0"):
        NamedMask(max_side=0)


def test_a_published_file_is_told_its_classes(tmp_path, noise):
    weights = published(tmp_path)
    with pytest.raises(
        ValueError, match="^namedmask: .*namedmask.pt does not name its 3 classes; pass them as --class"
    ):
        loaded(weights=weights)
    with pytest.raises(ValueError, match="^namedmask: classes must be 3, as many as .* beside the background, got 2"):
        loaded(weights=weights, classes="otter, crane")
    (found,) = loaded(weights=weights, classes="wolf, otter, crane").segment([noise])
    assert set(found.labels) <= {"wolf", "otter", "crane"} and len(found.labels) > 1


def test_a_published_file_of_a_known_name_names_its_classes(tmp_path):
    method = loaded(weights=published(tmp_path, "namedmask_voc2012.pt", classes=21))
    assert method._names[:2] == ("aeroplane", "bicycle") and len(method._names) == 20
    assert list(method.checksums()) == ["namedmask_voc2012.pt"]
    with pytest.raises(ValueError, match="class 1 of .*namedmask_voc2012.pt is 'aeroplane', classes say 'bicycle'"):
        loaded(weights=method.weights, classes="bicycle,aeroplane," + ",".join(method._names[2:]))


def test_names_of_a_training_count_and_another_order_is_refused(folder):
    assert loaded(weights=str(folder), classes="Dining_Table,CRANE,otter")._names == CLASSES
    with pytest.raises(ValueError, match="^namedmask: class 2 of .* is 'crane', classes say 'otter'; leave --classes"):
        loaded(weights=str(folder), classes="dining table,otter,crane")


def test_classes_are_frozen_as_what_a_file_says(tmp_path):
    (tmp_path / "names.txt").write_text("otter\ncrane\nwolf\n")
    assert json.loads(NamedMask(classes=str(tmp_path / "names.txt")).classes) == ["otter", "crane", "wolf"]
    assert NamedMask(classes="voc2012").classes == "voc2012"


def test_names_are_part_of_the_checksums(folder, tmp_path):
    write_model(tmp_path, classes=["a", "b", "c"])
    one, other = loaded(weights=str(folder)).checksums(), loaded(weights=str(tmp_path)).checksums()
    assert one.keys() == {"model.safetensors", "config.json"}
    assert [name for name in one if one[name] != other[name]] == ["config.json"]


def test_a_training_that_is_under_way_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="^namedmask: the training in .* has not ended"):
        NamedMask(weights=str(tmp_path)).fetch()


def test_values_that_are_no_numbers_are_an_error_of_the_image(tmp_path, noise):
    file = write_model(tmp_path) / "model.safetensors"
    state = load_file(file)
    state["classifier.classifier.3.bias"][1] = torch.nan
    save_file(state, file)
    with pytest.raises(BadImage, match="segment: non_finite: the network gives values that are no finite numbers"):
        next(iter(loaded(weights=str(tmp_path)).segment([noise])))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_finds_for_images_of_several_sizes(tiny, noise):
    images = [noise, noise[:40], noise[::-1], noise[:, ::-1]]
    there = replace(tiny, dtype="float32")
    there.load("cuda")
    for one, other in zip(tiny.segment(images), there.segment(images), strict=True):
        sure = one.values > 0.51
        names, others = (np.array(["", *each.labels])[each.index] for each in (one, other))
        np.testing.assert_array_equal(names[sure], others[sure])
        np.testing.assert_allclose(one.values[sure], other.values[sure], atol=1e-3)
