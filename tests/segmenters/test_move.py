"""MOVE: stored cases, its folded head, sizes, and weights that are not its own."""

from fnmatch import fnmatch
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from support.golden import arrays
from support.tiny import move as tiny
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from raypipe.benchmark.plain import move as plain
from raypipe.features.grid import Features
from raypipe.pipeline.job import Label, fetch_weights, plan_work
from raypipe.segmenters.move import Move, network, resized, restored
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def method(tmp_path_factory) -> Move:
    loaded = Move(**tiny.options(tmp_path_factory.mktemp("move")))
    loaded.load("cpu")
    return loaded


@pytest.mark.parametrize("name", ["infer_64x96", "infer_75x91_reflectpad"])
def test_features_logits_and_masks_are_the_stored_ones(name, shared):
    stored = arrays(shared / f"golden/move/{name}.npz")
    image = stored["image"]
    weights = shared / "golden/move/segmenter_tiny_original_names.safetensors"
    backbone = shared / "golden/models/dino-vits8-tiny"
    method = Move(weights=str(weights), backbone=str(backbone), short_side=min(image.shape[:2]), dtype="float32")
    method.load("cpu")
    (features,) = method.features([image])
    np.testing.assert_allclose(
        method._dino.pixels(image, image.shape[:2], "reflect"), stored["pixel_values_padded"], atol=1e-5
    )
    tokens = method._head.normed(features.patches).reshape(1, *features.grid, -1)
    np.testing.assert_allclose(tokens.permute(0, 3, 1, 2), stored["features"], atol=1e-4)
    logits = method._head(features.patches.reshape(1, *features.grid, -1))
    np.testing.assert_allclose(logits, stored["logits"], atol=1e-4)
    (segments,) = method.segment([image])
    np.testing.assert_allclose(segments.masks, stored["mask_prob"][0], atol=1e-4)
    unlike = (segments.masks > 0.5) != stored["mask_bin"][0]
    assert (np.abs(segments.masks[unlike] - 0.5) < 1e-4).all()


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_folded_convolutions_give_what_the_trained_layers_give(tmp_path, grid):
    file = tiny.write_checkpoint(tmp_path / "move.pth")
    norm, layers = plain.trained(network.read(file))
    tokens = torch.randn(2, *grid, tiny.WIDTHS[0], generator=torch.Generator().manual_seed(1))
    expected = layers(norm(tokens).permute(0, 3, 1, 2))
    torch.testing.assert_close(network.load(file, "cpu")(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(90, 70), (33, 100), (1, 90)])
def test_masks_are_those_of_the_plain_formulation(method, size):
    image = cv2.resize(skimage.data.coffee(), size[::-1], interpolation=cv2.INTER_AREA)
    (segments,) = method.segment([image])
    mask = plain.PlainMove(method)(image)
    assert ((segments.masks > 0.5) != mask).mean() <= 0.005 and mask.any() and not mask.all()


def test_the_norm_is_float32_where_the_convolutions_are_not(method):
    tokens = torch.randn(1, 2, 2, tiny.WIDTHS[0]) * torch.logspace(-2, 2, tiny.WIDTHS[0])
    with torch.autocast("cpu", torch.bfloat16):
        reduced = method._head.normed(tokens)
    assert torch.equal(reduced, method._head.normed(tokens)) and reduced.dtype == torch.float32


@pytest.mark.parametrize("size", [(300, 400), (401, 300), (448, 500), (90, 90), (60, 400), (500, 20), (1, 700), (2, 3)])
def test_images_are_resized_as_torchvision_resizes_them(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    ours = resized(image, 90, 270)
    if min(size) * 270 < max(size):  # torchvision would make it 0 px high
        assert ours.shape == (1, 270, 3)
        return
    options = {"interpolation": InterpolationMode.BICUBIC, "max_size": 270}
    np.testing.assert_array_equal(ours, resize(Image.fromarray(image), 90, **options))


def test_masks_go_back_to_the_image_in_floats_or_in_256_levels():
    probability = torch.rand(20, 30, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(restored(probability, (20, 30), quantise8=False), probability)
    for size in ((40, 45), (10, 15)):
        levels = Image.fromarray((probability.numpy() * 255).astype(np.uint8)).resize(size[::-1], Image.BILINEAR)
        ours = restored(probability, size, quantise8=True)
        np.testing.assert_array_equal(ours, np.asarray(levels, np.float32) / 255)
        assert ours.shape == size and ours.dtype == np.float32
    smooth = torch.linspace(0, 1, 30).expand(20, 30)
    exact = restored(smooth, (40, 60), quantise8=False)
    np.testing.assert_allclose(restored(smooth, (40, 60), quantise8=True), exact, atol=2 / 255)


def test_a_line_of_pixels_is_answered_at_its_size(method):
    image = np.random.default_rng(0).integers(0, 256, (1, 2000, 3)).astype(np.uint8)
    (segments,) = method.segment([image])
    assert segments.masks.shape == (1, 1, 2000) and np.isfinite(segments.masks).all()


def test_a_probability_that_is_no_number_is_a_bad_image(method, monkeypatch):
    grid, nan = (8, 8), float("nan")
    monkeypatch.setattr(method, "_head", lambda tokens: torch.full((1, 1, 64, 64), nan))
    features = Features(torch.zeros(64, 32), grid, 8, (64, 64), "reflect")
    with pytest.raises(BadImage, match="segment: non_finite: the head gives"):
        next(method.find([np.zeros((50, 50, 3), np.uint8)], [features]))


def test_the_vit_s8_of_300_epochs_is_refused():
    file = "dino_deitsmall8_300ep_pretrain.pth"
    with pytest.raises(ValueError, match=f"move: backbone '{file}' is {file}, but facebook/dino-vits8 is needed"):
        Move(backbone=file)


def test_without_a_checkpoint_the_error_says_where_to_get_one():
    job = Label("photos", "run", local=True)
    for call in (lambda: fetch_weights(job, plan_work(job, Move(), None)), lambda: Move().load("cpu")):
        with pytest.raises(
            FileNotFoundError, match="move: no checkpoint was given; pass --weights FILE.* https://github"
        ):
            call()


def test_a_checkpoint_is_read_from_safetensors_and_from_folders_and_without_prefixes(tmp_path):
    file = tiny.write_checkpoint(tmp_path / "move.pth")
    bare = {key.removeprefix("module.segmenter."): one for key, one in tiny.model(file).items() if "segmenter" in key}
    (tmp_path / "folder").mkdir()
    save_file(bare, tmp_path / "folder/move.safetensors")
    tokens = torch.randn(1, 2, 3, tiny.WIDTHS[0])
    for path in (tmp_path / "folder", tmp_path / "folder/move.safetensors"):
        assert torch.equal(network.load(path, "cpu")(tokens), network.load(file, "cpu")(tokens))
    save_file(bare, tmp_path / "folder/other.safetensors")
    with pytest.raises(ValueError, match="and 2 files \\(move.safetensors, other.safetensors\\); name one"):
        network.load(tmp_path / "folder", "cpu")


NORM, HEAD = "module.segmenter.feature_extractor.norm", "module.segmenter.segmenter_head.model"
ODD = torch.zeros(3, 3, 3, 3)
BROKEN = [  # what is taken out of a checkpoint, what is put into it, and the message
    (f"{NORM}.*", {}, "has no LayerNorm of its own, so it was trained on features of MAE or of a last block"),
    (f"{HEAD}.1.2.running_var", {}, "tensor 'segmenter_head.model.1.2.running_var' is absent"),
    (f"{HEAD}.*", {}, "it has no tensor segmenter_head.model"),
    ("", {f"{HEAD}.0.4.weight": ODD}, "tensor segmenter_head.model.0.4.weight belongs to no layer"),
    ("", {f"{HEAD}.x.weight": ODD}, "is no checkpoint of MOVE: invalid literal"),
    ("", {f"{HEAD}.3.0.weight": torch.zeros(8, 5, 3, 3)}, "is no checkpoint of MOVE: .*channels"),
    ("*", {}, "holds no tensors by name"),
]


@pytest.mark.parametrize(("without", "added", "message"), BROKEN)
def test_a_checkpoint_of_anything_else_is_refused(tmp_path, without, added, message):
    file = tiny.write_checkpoint(tmp_path / "move.pth")
    model = {name: tensor for name, tensor in tiny.model(file).items() if not fnmatch(name, without)}
    torch.save({"model": model | added}, file)
    with pytest.raises(ValueError, match=f"move: .*move.pth .*{message}"):
        network.load(file, "cpu")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": {}, "args": Path("x")}, tmp_path / "move.pth")
    with pytest.raises(ValueError, match="move.pth is not a checkpoint that can be read safely"):
        network.load(tmp_path / "move.pth", "cpu")


def test_a_checkpoint_for_a_wider_backbone_is_refused(tmp_path):
    options = tiny.options(tmp_path) | {
        "weights": str(tiny.write_checkpoint(tmp_path / "wide.pth", widths=(48, 8, 8, 8, 8)))
    }
    with pytest.raises(ValueError, match="is for a backbone of width 48 and patches of 8 px, got 32 and 8 px"):
        Move(**options).load("cpu")


@pytest.mark.parametrize("options", [{"short_side": 4}, {"short_side": 448, "max_side": 300}])
def test_sizes_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=f"move: {list(options)[-1]} must be at least"):
        Move(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_a_gpu_finds_what_the_cpu_finds(method, tmp_path, dtype, tolerance):
    there = Move(**tiny.options(tmp_path), dtype=dtype)  # the same random weights
    there.load("cuda")
    images = [skimage.data.coffee()[:200, :300], skimage.data.astronaut()[:200, :300]]
    for one, other in zip(method.segment(images), there.segment(images), strict=True):
        assert np.abs(one.masks - other.masks).mean() < tolerance
        assert ((one.masks > 0.5) != (other.masks > 0.5)).mean() < tolerance
