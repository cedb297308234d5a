"""One contract for all methods; a new method is found by itself."""

import copy
import doctest
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from support import tiny
from support.tiny.rembg import write_network

from raypipe import segmenters
from raypipe.pipeline.job import Label, plan_work
from raypipe.pipeline.stages import Segment
from raypipe.segmenters import find, names
from raypipe.types import LabelMap, PatternSegmenter, Segmenter

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERN = [name for name in names() if issubclass(find(name), PatternSegmenter)]
TILED = {"clipseg": {"stretch": False}, "sam": {"result": "masks"}}  # what a method wants before it takes tiles
UNTILED = ("dino_pca", "grabcut", "kmeans")
SIZES = [(1, 1), (2, 2), (1, 40), (30, 3), (24, 26)]


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """A function that gives a method by name, loaded on the CPU; where it needs weights, tiny made-up ones."""
    made = {}

    def make(name: str) -> Segmenter:
        if name not in made:
            made[name] = find(name)(**tiny.options(name, tmp_path_factory.mktemp(name)))
            made[name].load("cpu")
        return made[name]

    return make


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """A bright disc on a dark ramp, in three sizes, with a little noise."""
    rng, made = np.random.default_rng(0), []
    for height, width in ((48, 64), (64, 48), (50, 50)):
        y, x = np.mgrid[:height, :width]
        disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 4) ** 2
        picture = np.where(disc[..., None], (220, 180, 60), np.stack([x, y, x], 2))
        made.append((picture + rng.integers(0, 20, picture.shape)).clip(0, 255).astype(np.uint8))
    return made


def run(segmenter: Segmenter, images, foregrounds=None):
    """All results; the foreground is the whole image where the method wants one and none is given."""
    if not isinstance(segmenter, PatternSegmenter):
        return list(segmenter.segment(images))
    return list(segmenter.segment(images, foregrounds or [np.ones(image.shape[:2], bool) for image in images]))


def check(segmenter: Segmenter, image, segments):
    masks = segments.masks
    assert masks.ndim == 3 and masks.shape[1:] == image.shape[:2]
    assert masks.dtype == (np.float32 if segmenter.soft else bool)
    assert np.isfinite(masks).all()
    assert not masks.size or (masks.min() >= 0 and masks.max() <= 1)
    assert not segmenter.exclusive or (masks > 0).sum(0).max() <= 1
    assert segmenter.exclusive or not isinstance(segments, LabelMap)
    assert len(segments.labels) in (0, len(masks)) and len(segments.scores) in (0, len(masks))
    assert " " not in segments.note


@pytest.mark.parametrize("name", names())
def test_every_image_gets_masks_of_its_size_in_order(name, loaded, images):
    segmenter = loaded(name)
    for image, segments in zip(images, run(segmenter, images), strict=True):
        check(segmenter, image, segments)
        assert segments.masks.any()


@pytest.mark.parametrize("name", names())
def test_the_same_image_gives_the_same_result(name, loaded, images):
    for one, other in zip(run(loaded(name), images), run(loaded(name), images), strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)


@pytest.mark.parametrize("name", names())
def test_batching_does_not_change_the_result(name, loaded, images):
    segmenter = loaded(name)
    alone = [run(segmenter, [image])[0] for image in images]
    for one, other in zip(alone, run(segmenter, images), strict=True):
        np.testing.assert_allclose(one.masks, other.masks, atol=1e-5)
        assert one.note == other.note


@pytest.mark.parametrize("name", names())
def test_another_seed_matters_to_random_methods_alone_and_a_loaded_copy_takes_it(name, loaded, images):
    options = {"deep_spectral": {"result": "segments"}}.get(name, {})
    segmenter = replace(loaded(name), **options) if options else loaded(name)
    assert segmenter.random == (name in ("deep_spectral", "gloper", "grabcut", "kmeans", "spectral_voting"))
    expected = segmenter
    if segmenter.random:
        expected = replace(segmenter, seed=segmenter.seed + 1)
        for each in (segmenter, expected):
            each.load("cpu")
    other = copy.copy(segmenter)
    other.seed += 1
    np.testing.assert_array_equal(run(other, images[:1])[0].masks, run(expected, images[:1])[0].masks)


@pytest.mark.parametrize("name", names())
def test_no_images_give_no_results(name, loaded):
    assert run(loaded(name), []) == []


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("size", SIZES)
def test_tiny_and_one_colour_images_are_answered(name, size, loaded):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    images = [np.zeros_like(noise), np.full_like(noise, 255), np.full_like(noise, 77), noise]
    for image, segments in zip(images, run(loaded(name), images), strict=True):
        check(loaded(name), image, segments)


@pytest.mark.parametrize(("name", "count"), [("clipseg", 1), ("dino_pca", 2), ("kmeans", 2), ("watershed", 1)])
@pytest.mark.parametrize("size", [(1, 1), (4, 40), (40, 4)])
def test_an_image_below_five_pixels_a_side_is_too_small_for_a_pattern(name, count, size, loaded):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    (segments,) = run(loaded(name), [noise])
    assert segments.note == "too_small"
    assert segments.masks.shape == (count, *size) and not segments.masks.any()
    (segments,) = run(loaded(name), [np.resize(noise, (5, 5, 3))])
    assert segments.note != "too_small"


@pytest.mark.parametrize("name", names())
def test_tiles_of_an_image_become_one_result_unless_the_method_says_why_not(name, loaded, images):
    whole = {"foreground": "whole"} if name in PATTERN else {}
    segmenter = replace(loaded(name), **whole, **TILED.get(name, {}))
    if reason := segmenter.untiled():
        assert name in UNTILED and reason.startswith(("which ", "whose "))
        return
    work = replace(plan_work(Label("photos", "run", tiles="32:16"), segmenter, None), device="cpu")
    results = [Segment(replace(work, batch_size=size))([{"image": images[0], "error": ""}]) for size in (1, 9)]
    ((row,), (other,)) = results
    assert row["error"] == ""
    check(segmenter, images[0], row["found"])
    np.testing.assert_allclose(row["found"].masks, other["found"].masks, atol=1e-5)
    assert segmenter.across in ("index", "label", "object")
    assert not (segmenter.across == "object" and segmenter.soft)  # where two tiles agree is asked of binary masks
    assert not (segmenter.across == "index" and segmenter.exclusive)


@pytest.mark.parametrize("name", PATTERN)
def test_masks_stay_inside_the_foreground_even_where_it_is_empty(name, loaded, images):
    segmenter = loaded(name)
    left = [np.broadcast_to(np.arange(image.shape[1]) < 20, image.shape[:2]) for image in images]
    for image, foreground, segments in zip(images, left, run(segmenter, images, left), strict=True):
        check(segmenter, image, segments)
        assert not segments.masks[:, ~foreground].any()
    for segments in run(segmenter, images, [np.zeros_like(foreground) for foreground in left]):
        assert not segments.masks.any() and segments.note == "empty_foreground"


@pytest.mark.parametrize("kind", ["whole", "grabcut", "rembg"])
@pytest.mark.parametrize("name", PATTERN)
def test_every_foreground_that_is_computed_reaches_the_method(name, kind, loaded, images, tmp_path):
    spec = f"rembg:{write_network(tmp_path / 'tiny.onnx')}" if kind == "rembg" else kind
    segmenter = replace(loaded(name), foreground=spec)
    work = replace(plan_work(Label("photos", "run"), segmenter, None), device="cpu")
    rows = [{"image": image, "error": "", "height": len(image), "width": image.shape[1]} for image in images]
    for row, image in zip(Segment(work)(rows), images, strict=True):
        assert row["error"] == ""
        check(segmenter, image, row["found"])
        assert row["foreground"].dtype == bool and not row["found"].masks[:, ~row["foreground"]].any()


@pytest.mark.parametrize("name", names())
def test_the_fields_that_name_networks_are_its_own(name):
    kind = find(name)
    assert set(kind.networks) <= set(kind.__dataclass_fields__) and set(kind.licences) == set(kind.networks)
    assert "weights" in kind.networks or not kind.networks


@pytest.mark.parametrize("name", names())
def test_an_unloaded_segmenter_pickles(name):
    segmenter = find(name)(seed=5)
    assert pickle.loads(pickle.dumps(segmenter)) == segmenter


@pytest.mark.parametrize("name", names())
def test_the_method_says_what_it_is(name):
    method = find(name)()
    assert isinstance(method, Segmenter) and method.name == name
    assert method.source and method.licence
    assert method.gpus >= 0 and method.batch_size >= 1 and method.timeout > 0


@pytest.mark.parametrize("name", names())
def test_checksums_are_sha256_by_file_and_by_field_where_there_are_several(name, loaded):
    method = loaded(name)
    fields = set(method.networks) if len(method.networks) > 1 else {""}
    for file, checksum in method.checksums().items():
        assert file.rpartition("/")[0] in fields and len(bytes.fromhex(checksum)) == 32


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown segmenter 'kmean'; did you mean 'kmeans'\\?"):
        find("kmean")
    with pytest.raises(ValueError, match="unknown segmenter '../x'; choose one of: .*grabcut, kmeans"):
        find("../x")


@pytest.mark.parametrize("name", PATTERN)
def test_an_alpha_needs_a_soft_foreground(name):
    assert find(name)(foreground="rembg:u2netp", fg_alpha_min=128).fg_alpha_min == 128
    with pytest.raises(ValueError, match=f"{name}: fg_alpha_min 128 has no effect: foreground 'grabcut' is not soft"):
        find(name)(foreground="grabcut", fg_alpha_min=128)


def test_importing_the_methods_imports_no_heavy_library():
    code = (
        "import sys; from raypipe.segmenters import find, names; [find(name) for name in names()];"
        "print({'torch', 'ray', 'cv2', 'rembg', 'onnxruntime', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_name_is_a_file():
    assert set(names()) >= {"grabcut", "kmeans", "rembg", "watershed"}
    assert all(find(name).__module__ == f"{segmenters.__name__}.{name}" for name in names())


def test_the_example_runs():
    result = doctest.testmod(segmenters)
    assert result.attempted and not result.failed
