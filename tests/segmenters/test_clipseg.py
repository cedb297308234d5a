"""CLIPSeg with a tiny network and tokenizer that are made here: against the plain form, and where it has nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from support.tiny.clipseg import write_model

import raypipe
from raypipe.benchmark import methods
from raypipe.benchmark.figures import Sizes
from raypipe.benchmark.plain.clipseg import PlainClipseg
from raypipe.cli.verbs import main
from raypipe.segmenters.clipseg import Clipseg, masked, stretched

SIZE = 64  # of the tiny network's input; its positions are for 32 and get interpolated


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("clipseg")))


@pytest.fixture(scope="module")
def cat() -> np.ndarray:
    return data.chelsea()


def loaded(weights: str, device: str = "cpu", **options) -> Clipseg:
    segmenter = Clipseg(weights=weights, foreground="whole", **{"size": SIZE} | options)
    segmenter.load(device)
    return segmenter


def soft(segmenter: Clipseg, *images: np.ndarray) -> list[np.ndarray]:
    wholes = [np.ones(image.shape[:2], bool) for image in images]
    return [found.masks[0] for found in segmenter.segment(images, wholes)]


@pytest.mark.parametrize("prompt", ["pattern of animal", "Att"])
def test_masks_are_those_of_the_plain_form(weights, cat, prompt):
    (found,) = soft(loaded(weights, prompt=prompt), cat)
    (expected,) = PlainClipseg(weights, "cpu")(cat, prompt=prompt, size=SIZE, threshold=0.3)
    assert 0.02 < expected.mean() < 0.98
    assert ((found > 0.3) != expected).mean() < 0.01  # Pillow rounds a few pixels of the input otherwise


def test_the_map_reaches_from_0_to_1_and_follows_the_prompt(weights, cat):
    maps = [soft(loaded(weights, prompt=prompt), cat)[0] for prompt in ("stripes", "STRIPES", "dots")]
    assert maps[0].min() == 0 and maps[0].max() == 1
    np.testing.assert_array_equal(maps[0], maps[1])  # the tokenizer lower-cases
    assert np.abs(maps[0] - maps[2]).max() > 0.05


def test_blocks_that_the_decoder_does_not_read_are_not_needed(weights, cat):
    from transformers import CLIPSegForImageSegmentation

    segmenter = loaded(weights)
    whole = CLIPSegForImageSegmentation.from_pretrained(weights).eval()
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whole(pixel_values=pixels, conditional_embeddings=segmenter._embedding.expand(2, -1)).logits
    assert len(segmenter._network.clip.vision_model.encoder.layers) == 4 < 5
    torch.testing.assert_close(segmenter.logits(pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(144, 144), (120, 161), (7, 300), (5, 5), (64, 64)])
def test_maps_are_enlarged_as_pillow_does_it(size):
    low = np.random.default_rng(0).random((96, 96), np.float32)
    (found,) = masked(low, np.ones(size, bool)).masks
    np.testing.assert_array_equal(found, np.asarray(Image.fromarray(low).resize(size[::-1], Image.Resampling.NEAREST)))


def test_nothing_remains_outside_the_foreground(weights, cat):
    left = np.broadcast_to(np.arange(cat.shape[1]) < 200, cat.shape[:2])
    (found,) = loaded(weights).segment([cat], [left])
    (whole,) = soft(loaded(weights), cat)
    np.testing.assert_array_equal(found.masks[0], np.where(left, whole, 0))


def test_a_flat_map_is_an_empty_mask_with_a_note(weights, cat):
    segmenter = loaded(weights)
    last = segmenter._network.decoder.transposed_convolution[-1]
    torch.nn.init.zeros_(last.weight)
    (found,) = segmenter.segment([cat], [np.ones(cat.shape[:2], bool)])
    assert not found.masks.any() and found.note == "flat_map"
    (found,) = segmenter.segment([cat], [np.zeros(cat.shape[:2], bool)])
    assert not found.masks.any() and found.note == "empty_foreground"


def test_stretching_uses_the_whole_range():
    np.testing.assert_allclose(stretched(np.float32([[0.2, 0.4], [0.3, 0.6]])), [[0, 0.5], [0.25, 1]], atol=1e-6)
    np.testing.assert_allclose(stretched(np.float32([[2e-8, 4e-8], [3e-8, 6e-8]])), [[0, 0.5], [0.25, 1]], atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-7, 0.7, 1.0])
def test_a_map_that_differs_by_rounding_alone_is_flat(value):
    flat = np.full((3, 3), value, np.float32)
    flat[1, 1] = np.nextafter(flat[1, 1], np.float32(0))
    assert stretched(flat) is None


def test_a_job_thresholds_at_the_methods_default(weights, cat, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(cat).save(tmp_path / "photos" / "cat.png")
    places = ["--input", str(tmp_path / "photos"), "--output", str(tmp_path / "run"), "--foreground", "whole"]
    assert main(["label", "clipseg", *places, "--weights", weights, "--size", "64", "--local", "--device", "cpu"]) == 0
    table = raypipe.load(tmp_path / "run")
    (mask,) = raypipe.decode(table.to_pylist()[0])
    np.testing.assert_array_equal(mask, soft(loaded(weights), cat)[0] > 0.3)


@pytest.mark.parametrize("absent", [{"merges.txt"}, {"vocab.json"}, {"merges.txt", "vocab.json"}])
def test_weights_without_a_complete_tokenizer_are_refused(weights, absent, tmp_path):
    for file in Path(weights).iterdir():
        if file.name not in absent:
            shutil.copy(file, tmp_path)
    files = "expected vocab.json and merges.txt, or tokenizer.json"
    with pytest.raises(ValueError, match=f"clipseg: {tmp_path} holds no complete tokenizer .*; {files}"):
        loaded(str(tmp_path))


def test_a_tokenizer_in_one_file_gives_the_same_prompt(weights, tmp_path):
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(weights).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(weights) / name, tmp_path)
    assert not (tmp_path / "merges.txt").exists()
    assert torch.equal(loaded(str(tmp_path))._embedding, loaded(weights)._embedding)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, "size must be a multiple of 16, got 100"),
        ({"size": 8}, "size must be at least 16, got 8"),
        ({"prompt": " "}, "prompt must say what to look for"),
        ({"weights": ""}, "weights must be a folder or a Hugging Face id, got ''"),
        ({"dtype": "float16"}, "unknown dtype 'float16'; did you mean 'bfloat16'"),
        ({"fg_alpha_min": 256}, "fg_alpha_min must be between 0 and 255"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"clipseg: {message}"):
        Clipseg(**options)


def test_a_prompt_longer_than_the_network_reads_is_refused(weights):
    with pytest.raises(ValueError, match="prompt must have at most 40 tokens, got 43; use fewer words"):
        loaded(weights, prompt="z" * 41)


def test_bfloat16_stays_near_float32(weights, cat):
    exact, reduced = (soft(loaded(weights, dtype=dtype), cat)[0] for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - reduced).max() and np.abs(exact - reduced).mean() < 0.02


def test_the_benchmark_takes_other_weights_and_finds_the_same_masks(weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # where ours would be bfloat16
    figures = methods.measure("clipseg", Sizes(side=200, photographs=2, repeats=1), True, weights)
    of = {figure.figure: figure for figure in figures}
    assert len(of["times faster than plain"].values) == 2
    assert max(of["share of pixels unlike plain"].values) < 0.01


def test_the_benchmark_refuses_weights_that_would_have_no_effect(tmp_path, capsys):
    for only in ([], ["--only", "kmeans"]):
        assert main(["benchmark", "--output", str(tmp_path), "--weights", "x", *only]) == 2
        assert "--weights has no effect without --only METHOD" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_masks_of_the_cpu(weights, cat):
    images = [cat, data.astronaut(), cat[:40, :30]]
    of_cpu, of_gpu = (soft(loaded(weights, device, dtype="float32"), *images) for device in ("cpu", "cuda"))
    for one, other in zip(of_cpu, of_gpu, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    for one, other in zip(of_cpu, soft(loaded(weights, "cuda"), *images), strict=True):
        assert ((one > 0.3) != (other > 0.3)).mean() < 0.05
