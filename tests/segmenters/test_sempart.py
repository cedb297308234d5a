"""Sempart: stored logits of its head, heads in files, and masks of whole images."""

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import load_file, save_file
from support.golden import arrays
from support.tiny import dino as tiny_dino
from support.tiny import sempart as tiny

from raypipe import networks
from raypipe.benchmark.plain import sempart as plain
from raypipe.features.dino import Dino
from raypipe.pipeline.job import Label, check_job, fetch_weights, plan_work
from raypipe.refiners.bilateral import Bilateral
from raypipe.refiners.guided import Guided, guided_filter
from raypipe.segmenters.sempart import Sempart, network, reduced, turned
from raypipe.sweep.together import share_stages
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {
    "head_small": "sempart-head-small",
    "head_full_dims": "sempart-head-s8",
    "head_patch16": "sempart-head-small-p16",
    "head_320": "sempart-head-small",
}


@pytest.fixture(scope="module")
def method(tmp_path_factory) -> Sempart:
    loaded = Sempart(**tiny.options(tmp_path_factory.mktemp("sempart")))
    loaded.load("cpu")
    return loaded


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.write_head(tmp_path / "head", polarity=1)


def loaded(method: Sempart, **options) -> Sempart:
    """The same with other options, loaded on the CPU."""
    other = replace(method, **options)
    other.load("cpu")
    return other


def masks(method: Sempart, *images) -> list[np.ndarray]:
    return [found.masks[0] for found in method.segment(images)]


def coffee(*size: int) -> np.ndarray:
    return cv2.resize(skimage.data.coffee(), size[::-1], interpolation=cv2.INTER_AREA)


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) as a head sees them."""
    mean, std = np.float32(networks.IMAGENET_MEAN), np.float32(networks.IMAGENET_STD)
    return torch.from_numpy(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_running_statistics_are_the_stored_ones(name, shared):
    stored = {key: torch.from_numpy(value) for key, value in arrays(shared / f"golden/sempart/{name}.npz").items()}
    head, config = network.read(shared / "golden/models" / CASES[name], method="sempart")
    assert config["model_type"] == "sempart_head" and head.patch == config["patch_size"]
    image, features = pixels(stored["image"].numpy()), stored["features"].float()
    with torch.no_grad():
        if "tokens_in" in stored:
            torch.testing.assert_close(head.project(features), stored["tokens_in"], atol=2e-5, rtol=0)
            torch.testing.assert_close(head.encode(features), stored["tokens_out"], atol=2e-5, rtol=0)
            first = head.up[0](head.encode(features), image)
            torch.testing.assert_close(first.mean((2, 3)), stored["up0_mean"], atol=2e-5, rtol=0)
            small = network.with_image(first, image)[:, -3:]
            torch.testing.assert_close(small, stored["image_ratio"], atol=2e-5, rtol=0)
        for mode, tolerance in (("eval", 2e-5), ("train", 5e-5)):
            coarse, fine = head.train(mode == "train")(features, image)
            torch.testing.assert_close(coarse, stored[f"coarse_logits_{mode}"], atol=tolerance, rtol=0)
            expected = stored[f"fine_logits_{mode}"]
            tolerance = 1e-3 if expected.dtype == torch.float16 else tolerance
            torch.testing.assert_close(fine, expected.float(), atol=tolerance, rtol=0)
    after = head.state_dict()
    for key in stored:
        if key.startswith("running_after/"):
            torch.testing.assert_close(after[key.partition("/")[2]], stored[key], atol=1e-5, rtol=0)


def test_masks_of_whole_images_are_the_stored_ones(shared):
    stored = arrays(shared / "golden/sempart/end_to_end_224.npz")
    models = shared / "golden/models"
    options = {"weights": str(models / "sempart-head-small"), "backbone": str(models / "dino-vits8-tiny")}
    method = Sempart(**options, image_size=224, polarity="none", filter="none")
    method.load("cpu")
    keys = network.keys(method._dino, pixels(stored["image"]))
    np.testing.assert_allclose(keys[:, :8], stored["keys_sample"], atol=5e-5)
    np.testing.assert_allclose(keys.mean((2, 3)), stored["keys_mean"], atol=5e-5)
    found = np.stack(masks(method, *stored["image"]))
    np.testing.assert_allclose(found, stored["prob"][:, 0], atol=1e-3)
    assert abs(found.mean() - stored["prob_mean"]) < 1e-5 and (found.mean() > 0.5) == stored["was_inverted"]
    sign = "invert" if stored["was_inverted"] else "none"
    method = Sempart(**options, image_size=224, polarity=sign)
    method.load("cpu")
    found = np.stack(masks(method, *stored["image"]))
    np.testing.assert_allclose(found, stored["refined"][:, 0].clip(0, 1), atol=1e-3)
    expected = np.unpackbits(stored["mask"]).reshape(found.shape).astype(bool)
    assert ((found > 0.5) & expected).sum() / ((found > 0.5) | expected).sum() >= 0.995


def test_the_published_sizes_have_the_published_number_of_parameters():
    assert sum(each.numel() for each in network.Head().parameters()) == 748_165


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("patch", [8, 16])
def test_logits_are_those_of_the_layers_one_after_the_other(patch, train):
    random = torch.Generator().manual_seed(0)
    features = torch.randn(2, tiny.WIDTH, 3, 4, generator=random)
    image = torch.randn(2, 3, 3 * patch, 4 * patch, generator=random)
    head = tiny.head(patch=patch).train(train)
    with torch.no_grad():
        expected = plain.head(tiny.head(patch=patch).state_dict(), features, image, train=train)
        for one, other in zip(head(features, image), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
            assert one.std() > 0.1


@pytest.mark.parametrize("size", [(90, 70), (33, 100), (1, 90)])
def test_masks_are_those_of_the_plain_formulation(method, size):
    image = coffee(*size)
    (found,) = masks(method, image)
    expected = plain.PlainSempart(method)(image)[0]
    assert ((found > 0.5) != expected).mean() <= 0.005 and expected.any() and not expected.all()


def test_the_sign_of_the_head_turns_masks_over(method, tmp_path):
    images = coffee(80, 60), skimage.data.astronaut()[:90, 100:200]
    plain_masks = masks(loaded(method, polarity="none"), *images)
    for one, other in zip(plain_masks, masks(loaded(method, polarity="invert"), *images), strict=True):
        np.testing.assert_allclose(one, 1 - other, atol=1e-5)
    unlike = tiny.write_head(tmp_path / "head", polarity=-1)
    for sign, weights in ((1, method.weights), (-1, str(unlike))):
        found = masks(loaded(method, weights=weights), *images)
        expected = [mask if sign == 1 else 1 - mask for mask in plain_masks]
        np.testing.assert_allclose(np.concatenate(found, axis=None), np.concatenate(expected, axis=None), atol=1e-5)


def test_each_image_can_have_a_sign_of_its_own():
    soft = torch.tensor([0.2, 0.5, 0.55, 0.9])[:, None, None, None] + torch.tensor([[-0.05, 0.05]])
    expected = torch.stack([soft[0], soft[1], 1 - soft[2], 1 - soft[3]])
    assert torch.equal(turned(soft, "image", -1), expected)


@pytest.mark.parametrize("polarity", ["none", "invert"])
def test_what_the_filter_gives_beyond_0_and_1_is_cut_off(method, polarity):
    sure = loaded(method, polarity=polarity)
    sure._head.fine.weight.mul_(1000), sure._head.fine.bias.mul_(1000)
    (features,) = sure.features([coffee(64, 64)])
    beyond = sure._masks(features.patches[None], features)
    (found,) = masks(sure, coffee(64, 64))
    assert beyond.min() < -0.01 or beyond.max() > 1.01
    np.testing.assert_array_equal(found, beyond[0, 0].clamp(0, 1))


def test_masks_are_filtered_at_the_size_that_the_network_sees(method):
    image = coffee(150, 100)
    (raw,) = method.features([image])
    small = reduced(image, (64, 64))
    unfiltered = loaded(method, filter="none")
    (seen,) = masks(unfiltered, small)  # of that size already: what comes out is what the head gives
    filters = {
        "none": seen,
        "guided": guided_filter(seen[None], small, radius=5, eps=0.01)[0],
        "bilateral": Bilateral(refine_preset="sempart")(seen[None], small)[0][0],
    }
    for name, expected in filters.items():
        options = {"filter_radius": 5, "filter_eps": 0.01} if name == "guided" else {}
        other = loaded(method, filter=name, **options)
        np.testing.assert_allclose(masks(other, small)[0], expected, atol=1e-4)
        large = torch.nn.functional.interpolate(torch.tensor(expected)[None, None], size=(150, 100), mode="bilinear")
        (found,) = other.find([image], [raw])  # which depends on no filter
        np.testing.assert_allclose(found.masks[0], large[0, 0], atol=1e-4)


def test_methods_that_differ_in_filter_and_sign_share_the_network(method):
    image, kinds = coffee(90, 64), [{"filter": "none"}, {"polarity": "invert"}, {}]
    alone = [masks(loaded(method, **options), image)[0] for options in kinds]
    together = [replace(method, **options) for options in kinds]
    share_stages(together)
    for each in together:
        each.load("cpu")
    assert len({id(each._head) for each in together}) == 1
    assert all(np.array_equal(masks(each, image)[0], mask) for each, mask in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((300, 400), (64, 88)), ((401, 300), (88, 64)), ((64, 64), (64, 64)), ((5, 7), (64, 88)), ((1, 700), (64, 256)),
        ((2000, 2), (256, 64)),
    ],
)  # fmt: skip
def test_the_ratio_of_sides_is_kept_to_whole_patches_and_no_panorama_is_longer_than_max_side(method, size, expected):
    kept = loaded(method, resize="keep_ratio", max_side=256)
    assert kept._size(size) == expected and method._size(size) == (64, 64)
    (found,) = masks(kept, coffee(*size))
    assert found.shape == size and np.isfinite(found).all()
    if size == (300, 400):
        assert not np.array_equal(found, masks(method, coffee(*size))[0])


def test_an_image_of_one_colour_or_below_a_patch_has_an_empty_mask_and_a_note(method):
    for image, note in ((np.full((40, 50, 3), 200, np.uint8), "degenerate"), (coffee(7, 3), "too_small")):
        (found,) = method.segment([image])
        assert found.note == note and not found.masks.any()
    assert next(method.segment([coffee(8, 3)])).note == ""


def test_values_that_are_no_numbers_are_a_bad_image(method):
    broken = loaded(method)
    broken._head.fine.bias.fill_(float("nan"))
    with pytest.raises(BadImage, match="segment: non_finite: the network gives"):
        list(broken.segment([coffee(50, 50)]))


def test_a_head_is_read_from_what_it_was_written_to(tmp_path):
    folder = tiny.write_head(tmp_path / "head", polarity=-1, backbone="org/name", training={"epochs": 3})
    for path in (folder, folder / "head.safetensors"):
        head, config = network.read(path, method="sempart")
        assert config["polarity"] == -1 and config["training"] == {"epochs": 3} and config["model_type"] == "sempart"
        assert (config["feature_dim"], config["hidden_dim"], config["patch_size"]) == (tiny.WIDTH, 8, 8)
        state, expected = head.state_dict(), tiny.head().state_dict()
        assert not head.training and state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_published_checkpoints_have_other_names_and_need_a_polarity(method, tmp_path):
    tensors = tiny.published(tiny.head().state_dict())
    assert {"conv_input.weight", "layers.2.4.running_var", "inp_transformer.layers.1.1.fn.net.3.bias"} <= set(tensors)
    beside = {"optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}, "epoch": 29}
    torch.save({"segmenter_state_dict": tensors} | beside, tmp_path / "best.pth")
    options = {"weights": str(tmp_path / "best.pth"), "backbone": method.backbone, "image_size": 64}
    with pytest.raises(
        ValueError,
        match="best.pth does not say whether it marks foreground .* --polarity none.* --start-from .*best.pth --input",
    ):
        Sempart(**options).load("cpu")
    other = Sempart(**options, polarity="none")
    other.load("cpu")
    assert np.array_equal(masks(other, coffee(60, 90))[0], masks(method, coffee(60, 90))[0])


def test_the_golden_head_is_the_same_under_published_names(shared, tmp_path):
    folder = shared / "golden/models/sempart-head-small"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    torch.save({"segmenter_state_dict": tiny.published(load_file(folder / "model.safetensors"))}, tmp_path / "x.pth")
    ours, theirs = (network.read(path, method="sempart")[0].state_dict() for path in (tmp_path / "x.pth", folder))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


ODD = torch.zeros(3)
BROKEN = {  # what becomes of a head's tensors, and the message
    "project.weight": (None, "tensor 'project.weight' is absent"),
    "up.1.bn1.running_var": (None, 'Missing key.* "up.1.bn1.running_var"'),
    "up.3.conv1.weight": (ODD, "Error.* in loading state_dict for Head"),
    "up.99999.conv1.weight": (ODD, "its decoder enlarges 100,000 times"),
    "up.x.conv1.weight": (ODD, 'Unexpected key.* "up.x.conv1.weight"'),
    "fine.bias": (ODD, "size mismatch for fine.bias"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_head_with_a_tensor_absent_unlike_or_too_many_is_refused(folder, name):
    tensor, message = BROKEN[name]
    tensors = load_file(folder / "head.safetensors") | {name: tensor}
    save_file({key: each for key, each in tensors.items() if each is not None}, folder / "head.safetensors")
    with pytest.raises(ValueError, match=f"^sempart: .*head.safetensors is no head of Sempart: .*{message}"):
        network.read(folder, method="sempart")


def test_a_file_without_a_decoder_or_of_something_else_is_refused(tmp_path):
    decoderless = {name: each for name, each in tiny.head().state_dict().items() if not name.startswith("up.")}
    for tensors in (decoderless, {"project.weight": ODD}, {"weight": ODD}):
        torch.save(tensors, tmp_path / "head.pth")
        with pytest.raises(ValueError, match="^sempart: .*head.pth is no head of Sempart: "):
            network.read(tmp_path / "head.pth", method="sempart")


SETTINGS = [
    ({"model_type": "vit"}, "holds a network of type 'vit', expected 'sempart'"),
    ({"feature_dim": 10**9}, "its feature_dim is 32, config.json says 1000000000"),
    ({"patch_size": "8"}, "its patch_size is 8, config.json says '8'"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_a_configuration_that_is_of_another_head_is_refused(folder, settings, message):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=f"^sempart: .*{message}"):
        network.read(folder, method="sempart")


@pytest.mark.parametrize("content", [b"[1, 2]", b"null", b"", b"\xff\xfe{}", b"[" * 100_000], ids=lambda c: repr(c[:8]))
def test_a_configuration_that_is_none_is_one_clear_error(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="^sempart: .*config.json cannot be read as a configuration"):
        Sempart(weights=str(folder))


@pytest.mark.parametrize("size", [0, 4, 100, 3000])
def test_a_head_that_was_cut_short_is_one_clear_error(folder, size):
    file = folder / "head.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="^sempart: .*head.safetensors is not a checkpoint that can be read safely"):
        network.read(folder, method="sempart")


class Canary:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, partial(pickle.dump, protocol=2)])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, save):
    with (tmp_path / "head.pth").open("wb") as file:
        save({"segmenter_state_dict": {"project.weight": Canary(tmp_path / "canary")}}, file)
    with pytest.raises(ValueError, match="^sempart: .*head.pth is not a checkpoint that can be read safely"):
        network.read(tmp_path / "head.pth", method="sempart")
    assert not (tmp_path / "canary").exists()


def test_the_backbone_that_the_head_was_trained_on_is_taken_unless_one_is_named(tmp_path):
    named = tiny.write_head(tmp_path / "head", backbone="facebook/dino-vits16")
    assert Sempart(weights=str(named)).backbone == "facebook/dino-vits16"
    assert Sempart(weights=str(named), backbone="org/own").backbone == "org/own"
    assert Sempart(weights=str(tiny.write_head(tmp_path / "other"))).backbone == "facebook/dino-vits8"


def test_the_size_is_that_of_the_training_unless_one_is_named(tmp_path):
    trained = tiny.write_head(tmp_path / "head", training={"image_size": 224})
    assert Sempart(weights=str(trained)).image_size == 224
    assert Sempart(weights=str(trained), image_size=64).image_size == 64
    assert Sempart(weights=str(tiny.write_head(tmp_path / "other", training=[1]))).image_size == 320
    with pytest.raises(ValueError, match="sempart: max_side must be at least image_size 224, got 200"):
        Sempart(weights=str(trained), resize="keep_ratio", max_side=200)


def test_another_backbone_than_the_heads_is_refused(method, tmp_path):
    other = tiny_dino.write_model(tmp_path / "other", intermediate_size=48)
    with pytest.raises(ValueError, match="other' is another network than the one that .*head was trained on; pass .*b"):
        Sempart(weights=method.weights, backbone=str(other), image_size=64).load("cpu")
    wide = tiny_dino.write_model(tmp_path / "wide", hidden_size=48)
    with pytest.raises(ValueError, match="backbone of width 32 and patches of 8 px, got 48 and 8 px; pass the one"):
        Sempart(weights=method.weights, backbone=str(wide), image_size=64).load("cpu")
    gone = tiny.write_head(tmp_path / "head", polarity=1, backbone=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone, which .*head was trained on, is not here; .* --backbone"):
        Sempart(weights=str(gone)).fetch()


def test_a_digest_is_of_the_network_and_not_of_its_file(tmp_path):
    folder = tiny_dino.write_model(tmp_path / "dino")
    held = tiny_dino.as_published(folder)
    torch.save(held, tmp_path / "dino.pth")
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    first, second = (Dino(path, method="x", device="cpu") for path in (folder, tmp_path / "dino.pth"))
    assert first.digest() == second.digest() and len(bytes.fromhex(first.digest())) == 32
    held["blocks.0.mlp.fc1.bias"][3] += 1e-3
    torch.save(held, tmp_path / "dino.pth")
    assert Dino(tmp_path / "dino.pth", method="x", device="cpu").digest() != first.digest()


def test_without_a_head_or_before_the_end_of_its_training_the_error_says_what_to_do(tmp_path):
    (tmp_path / "training.json").write_text("{}")
    job = Label("photos", "run", local=True)
    for method, text in (
        (Sempart(), "no head was given; pass --weights DIR, the output of `raypipe train sempart`"),
        (Sempart(weights=str(tmp_path)), "the training in .* has not ended; the same command goes on with it"),
    ):
        with pytest.raises(FileNotFoundError, match=f"sempart: {text}"):
            fetch_weights(job, plan_work(job, method, None))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"polarity": "batch"}, "polarity 'batch' would let an image's mask depend on the images beside it"),
        ({"polarity": "globe"}, "unknown polarity 'globe'; did you mean 'global'"),
        ({"filter": "crf"}, "unknown filter 'crf'"),
        ({"image_size": 4}, "image_size must be at least 8"),
        ({"filter_radius": 0}, "filter_radius must be at least 1"),
        ({"filter_eps": 0.0}, "filter_eps must be above 0"),
        ({"filter": "none", "filter_radius": 4}, "filter_radius 4 has no effect: the filter is 'none'"),
        ({"max_side": 900}, "max_side 900 has no effect: resize 'squash'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, text):
    with pytest.raises(ValueError, match=f"sempart: {text}"):
        Sempart(**options)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(method):
    with pytest.raises(ValueError, match="sempart: image_size must be a multiple of the 8 px of a patch, got 100"):
        loaded(method, image_size=100)


def test_a_filter_of_its_own_and_a_refiner_are_both_applied_which_the_log_says(method, caplog):
    caplog.set_level("INFO", "raypipe")
    job = Label("photos", "run", refine="guided")
    check_job(job, replace(method, filter="none"), Guided())
    assert not caplog.messages
    check_job(job, method, Guided())
    assert caplog.messages == [
        "sempart: masks are filtered twice: at the network's size (--filter guided), then by --refine guided"
    ]


def test_checksums_cover_the_sign(method):
    assert set(method.checksums()) == {
        "weights/head.safetensors", "weights/config.json", "backbone/model.safetensors"
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
@pytest.mark.parametrize("resize", ["squash", "keep_ratio"])
def test_a_gpu_finds_what_the_cpu_finds(method, dtype, tolerance, resize):
    here, there = replace(method, resize=resize), replace(method, resize=resize, dtype=dtype)
    here.load("cpu"), there.load("cuda")
    images = [skimage.data.coffee()[:200, :300], skimage.data.astronaut()[:200, :300], coffee(60, 90)]
    for one, other in zip(masks(here, *images), masks(there, *images), strict=True):
        assert np.abs(one - other).mean() < tolerance
