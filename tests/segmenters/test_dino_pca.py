"""DINOv2-PCA with a tiny network that is made here: against the plain form, and where there is nothing to find."""

import numpy as np
import pytest
import torch
from skimage import data
from support.tiny import dino
from support.tiny.dino import as_published
from support.tiny.dino_pca import write_model

from raypipe.benchmark import methods
from raypipe.benchmark.figures import Sizes
from raypipe.benchmark.plain.dino_pca import PlainDinoPca
from raypipe.segmenters.dino_pca import DinoPca, components, masked, project, read_as_grey

SIZE = 112  # of the tiny network's input; its positions are for 70 and get interpolated


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("dino")))


@pytest.fixture(scope="module")
def cat() -> np.ndarray:
    return data.chelsea()


def loaded(weights: str, device: str = "cpu", **options) -> DinoPca:
    segmenter = DinoPca(weights=weights, foreground="whole", **{"size": SIZE} | options)
    segmenter.load(device)
    return segmenter


def whole(image: np.ndarray) -> np.ndarray:
    return np.ones(image.shape[:2], bool)


@pytest.mark.parametrize("options", [{}, {"layers": 1}, {"layers": 5, "normalize": True}])
def test_masks_are_those_of_the_plain_form(weights, cat, options):
    segmenter = loaded(weights, **options)
    (found,) = segmenter.segment([cat], [whole(cat)])
    expected = PlainDinoPca(weights, "cpu")(cat, size=SIZE, layers=segmenter.layers, normalize=segmenter.normalize)
    assert 0.02 < expected[0].mean() < 0.98
    ours = found.masks > 0.5
    assert (ours & expected).sum() >= 0.995 * (ours | expected).sum()


def test_features_are_the_normed_mean_of_the_last_blocks(weights):
    segmenter = loaded(weights, layers=3)
    pixels = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    network = segmenter._network
    with torch.inference_mode():
        states = network(pixels, output_hidden_states=True).hidden_states
        expected = sum(network.layernorm(state) for state in states[3:])[:, 5:] / 3  # states: the input, then 5 blocks
    assert len(states) == 6 and expected.shape == (2, 64, 24)
    torch.testing.assert_close(segmenter.features(pixels), expected, rtol=0, atol=1e-5)


def test_projection_is_numpys_with_the_largest_loadings_positive():
    features = np.random.default_rng(0).normal(size=(90, 7)) @ np.diag([9, 5, 3, 1, 1, 1, 1]) + 4
    scores, axes = (found.numpy() for found in project(torch.tensor(features)))
    _, _, expected = np.linalg.svd(features - features.mean(0), full_matrices=False)
    assert (axes[np.arange(3), np.abs(axes).argmax(1)] > 0).all()
    np.testing.assert_allclose(np.abs(axes), np.abs(expected[:3]), atol=1e-9)
    np.testing.assert_allclose(scores, (features - features.mean(0)) @ axes.T, atol=1e-9)


def test_one_range_is_stretched_over_all_components():
    features = torch.tensor(np.random.default_rng(0).normal(size=(100, 7)) @ np.diag([9, 5, 3, 1, 1, 1, 1]))
    picture = components(features)
    assert picture.shape == (10, 10, 3) and picture.dtype == np.float32
    assert picture.min() == 0 and picture.max() == 1
    assert np.ptp(picture[..., 0]) > np.ptp(picture[..., 2])  # not each component for itself


def test_the_two_masks_complement_each_other_at_one_half(weights, cat):
    left = np.broadcast_to(np.arange(cat.shape[1]) < 300, cat.shape[:2])
    (found,) = loaded(weights).segment([cat], [left])
    bright, dark = found.masks > 0.5
    np.testing.assert_array_equal(bright ^ dark, left)
    np.testing.assert_array_equal(np.rint(found.masks * 255).astype(np.float32) / 255, found.masks)


def test_bright_spots_do_not_wrap_around_to_black():
    picture = np.zeros((9, 9, 3), np.float32)
    picture[3:6, 3:6] = 1
    grey = read_as_grey(picture, (90, 90))
    assert grey[40:50, 40:50].min() > 250 and grey.max() == 255 and grey[:10].max() == 0


def test_the_same_features_everywhere_are_no_variance(tmp_path):
    segmenter = loaded(str(write_model(tmp_path)))
    torch.nn.init.zeros_(segmenter._network.embeddings.position_embeddings)
    grey = np.full((50, 60, 3), 90, np.uint8)
    (found,) = segmenter.segment([grey], [whole(grey)])
    assert found.masks.shape == (2, 50, 60) and not found.masks.any() and found.note == "no_variance"
    (found,) = segmenter.segment([grey], [~whole(grey)])
    assert not found.masks.any() and found.note == "empty_foreground"
    assert components(torch.full((16, 5), 3.0)) is None
    assert masked(None, whole(grey)).note == "no_variance"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1000}, "size must be a multiple of 14, got 1000"),
        ({"size": 14}, "size must be at least 28, got 14"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dtype": "half"}, "unknown dtype 'half'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"dino_pca: {message}"):
        DinoPca(**options)


def test_weights_that_do_not_fit_the_options_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="layers must be at most 5 with these weights, got 6"):
        loaded(weights, layers=6)
    with pytest.raises(ValueError, match="patches of the weights must be 14 px, got 16"):
        loaded(str(write_model(tmp_path, patch_size=16, image_size=64)))


def test_bfloat16_stays_near_float32(weights, cat):
    segmenters = [loaded(weights, dtype=dtype) for dtype in ("float32", "bfloat16")]
    exact, reduced = (next(segmenter.segment([cat], [whole(cat)])).masks for segmenter in segmenters)
    assert 0 < np.abs(exact - reduced).max() and np.abs(exact - reduced).mean() < 0.05


def test_the_benchmark_takes_other_weights_and_finds_the_same_masks(weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # where ours would be bfloat16
    figures = methods.measure("dino_pca", Sizes(side=100, photographs=1, repeats=1), True, weights)
    of = {figure.figure: figure for figure in figures}
    assert len(of["times faster than plain"].values) == 1
    assert max(of["share of pixels unlike plain"].values) < 0.005


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_masks_of_the_cpu(weights, cat):
    images = [cat, data.astronaut(), cat[:40, :30]]
    wholes = [whole(image) for image in images]
    of_cpu = list(loaded(weights, dtype="float32").segment(images, wholes))
    of_gpu = list(loaded(weights, "cuda", dtype="float32").segment(images, wholes))
    for one, other in zip(of_cpu, of_gpu, strict=True):
        assert np.abs(one.masks - other.masks).mean() < 0.01


def test_the_original_file_of_a_dinov2_with_registers_is_the_folder_of_transformers(cat, tmp_path):
    folder = write_model(tmp_path / "folder", hidden_size=64, num_attention_heads=1, use_swiglu_ffn=True)
    file = tmp_path / "dinov2_vitg14_reg4_pretrain.pth"
    torch.save(as_published(folder), file)
    ((one,), (other,)) = (loaded(str(path)).segment([cat], [whole(cat)]) for path in (folder, file))
    np.testing.assert_allclose(one.masks, other.masks, atol=1e-6)
    assert list(loaded(str(file)).checksums()) == [file.name]


def test_a_plain_vit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds a network of type 'vit', not a DINOv2 with registers"):
        loaded(str(dino.write_model(tmp_path)))
