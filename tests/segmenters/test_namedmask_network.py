"""DeepLabv3+ of NamedMask: the authors' names and numbers, first weights, files that are none of its own."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import golden
from support.tiny.namedmask import CLASSES, SIZES, made, write_model

from raypipe.benchmark.plain import namedmask as plain
from raypipe.features import resnet
from raypipe.segmenters.namedmask import network
from raypipe.segmenters.namedmask.network import DeepLab, files, fold, initialise, read

pytestmark = pytest.mark.usefixtures("one_thread")
COUNTS = {2: 26_609_490, 15: 26_612_831, 21: 26_614_373, 51: 26_622_083, 81: 26_629_793, 301: 26_686_333}
COUNTS |= {920: 26_845_416}  # of the published configurations, by classes


def seeded(name: str, like: torch.Tensor) -> torch.Tensor:
    """The weights of the stored case: numbers that follow from a tensor's name (its README)."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    z = torch.from_numpy(random.standard_normal(tuple(like.shape)).astype(np.float32))
    if name.endswith("running_var"):
        return 0.5 + z.abs()
    if z.ndim > 1:
        return z * (1 / z[0].numel()) ** 0.5
    return 1 + 0.2 * z if name.endswith("weight") else 0.1 * z


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 65, 49, generator=torch.Generator().manual_seed(0))


def normalised(image: np.ndarray) -> torch.Tensor:
    mean, std = (torch.tensor(each)[:, None, None] for each in (plain.MEAN, plain.STD))
    return ((torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std)[None]


@pytest.mark.parametrize("classes", COUNTS)
def test_the_published_sizes_have_the_published_numbers_of_parameters(classes):
    with torch.device("meta"):
        made = DeepLab(classes)
    assert sum(each.numel() for each in made.parameters()) == COUNTS[classes] and made.classes == classes
    assert sum(each.numel() for each in made.backbone.parameters()) == 23_508_032


def test_logits_are_those_of_the_authors_code(shared):
    case = golden.arrays(shared / "golden/namedmask/deeplabv3plus_eval.npz")
    deeplab = DeepLab(5).eval()
    deeplab.load_state_dict({name: seeded(name, each) for name, each in deeplab.state_dict().items()})
    seen = normalised(case["image"])
    with torch.inference_mode():
        low, high = deeplab.features(seen)
        assert low.shape[2:] == (17, 13) and high.shape[2:] == (9, 7)
        found = {"low_level_mean": low[0].mean((1, 2)), "out_mean": high[0].mean((1, 2))}
        found |= {"aspp_mean": deeplab.classifier.aspp(high)[0].mean((1, 2))}
        found |= {"head_logits": deeplab.coarse(seen)[0], "logits": deeplab(seen)[0]}
        for name, values in found.items():
            np.testing.assert_allclose(values, case[name], rtol=0, atol=1e-5 * abs(case[name]).max(), err_msg=name)
        np.testing.assert_array_equal(found["logits"].argmax(0), case["label"])
        fold(deeplab)
        folded = deeplab(seen)[0]
    np.testing.assert_allclose(folded, case["logits"], rtol=0, atol=1e-5 * abs(case["logits"]).max())


@pytest.mark.parametrize("rates", [None, (2, 4, 6)])
def test_logits_are_those_of_the_plain_formulation_with_and_without_norms(rates, pixels):
    deeplab = made(rates=rates)
    tensors = {name: each.clone() for name, each in deeplab.state_dict().items()}
    expected = plain.logits(tensors, pixels, rates or (12, 24, 36))
    close = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    with torch.inference_mode():
        np.testing.assert_allclose(deeplab(pixels), expected, **close)
        fold(deeplab)
        np.testing.assert_allclose(deeplab(pixels), expected, **close)
    assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in deeplab.modules())
    assert expected.std((0, 2, 3)).min() > 0.05  # the comparison says something


def test_a_wider_stride_makes_a_smaller_feature_map(pixels):
    deeplab = made(output_stride=16)
    with torch.inference_mode():
        low, high = deeplab.features(pixels)
        assert low.shape[2:] == (17, 13) and high.shape[2:] == (5, 4) and deeplab(pixels).shape == (2, 4, 65, 49)
    assert deeplab.rates == (6, 12, 18)
    with pytest.raises(ValueError, match="output_stride must be 8 or 16, got 32"):
        DeepLab(4, output_stride=32)


def test_everything_can_be_trained(pixels):
    deeplab = made().train()
    deeplab(pixels).mean().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in deeplab.parameters())
    momenta = {name: module.momentum for name, module in deeplab.named_modules() if hasattr(module, "momentum")}
    assert {value for name, value in momenta.items() if name.startswith("backbone.")} == {0.01}
    assert {value for name, value in momenta.items() if name.startswith("classifier.")} == {0.1}


def test_first_weights_follow_from_the_seed_alone():
    networks = [DeepLab(4, **SIZES) for _ in range(3)]
    for each, seed in zip(networks, (0, 0, 1), strict=True):
        torch.rand(7)
        before = torch.get_rng_state()
        initialise(each, None, seed)
        assert torch.equal(torch.get_rng_state(), before)
    one, same, other = (each.state_dict() for each in networks)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.classifier.3.weight"], other["classifier.classifier.3.weight"])
    kernel = one["classifier.aspp.project.0.weight"]
    assert kernel.std().item() == pytest.approx((2 / kernel[0].numel()) ** 0.5, rel=0.2)  # Kaiming's, by what comes in


def as_torchvision(state: dict, folder: Path) -> Path:
    torch.save(state | {"fc.weight": torch.ones(3)}, folder / "net.pth")
    return folder / "net.pth"


def as_dino(state: dict, folder: Path) -> Path:
    """A whole checkpoint of DINO's training."""
    named = {f"module.backbone.{name}": each for name, each in state.items()}
    torch.save({"student": {}, "teacher": named | {"module.head.mlp.0.weight": torch.ones(3)}}, folder / "full.pth")
    return folder / "full.pth"


def as_namedmask(state: dict, folder: Path) -> Path:
    deeplab = made()
    deeplab.backbone.load_state_dict(state)
    for name, content in files(deeplab, {"classes": list(CLASSES)}).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("written", [as_torchvision, as_dino, as_namedmask])
def test_a_backbone_is_read_from_files_of_many_kinds(written, tmp_path):
    state = made(seed=5).backbone.state_dict()
    deeplab = DeepLab(4, **SIZES)
    initialise(deeplab, written(state, tmp_path), 0)
    for name, each in deeplab.backbone.state_dict().items():
        assert torch.equal(each, state[name]), name


def test_a_backbone_is_read_from_a_folder_of_transformers(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    sizes = {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [1, 1, 1, 1]}
    model = ResNetModel(ResNetConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    assert resnet.is_resnet(tmp_path, method="test")
    found, given = resnet.read(tmp_path, method="test"), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(given, output_hidden_states=True).hidden_states[2]  # what no dilation has changed yet
        first = found.layer1(found.maxpool(found.relu(found.bn1(found.conv1(given)))))
        np.testing.assert_allclose(found.layer2(first), expected, atol=1e-5)
    with pytest.raises(ValueError, match="^namedmask: .* is another backbone than is trained: .*size mismatch"):
        initialise(DeepLab(4, **SIZES), tmp_path, 0)


def test_a_transformer_is_no_backbone(tmp_path):
    from support.tiny.dino import write_model as write_dino

    with pytest.raises(ValueError, match="^namedmask: .* holds a network of type 'vit', expected 'resnet'"):
        initialise(DeepLab(4, **SIZES), write_dino(tmp_path), 0)


def test_what_a_training_exports_is_read_as_it_was(tmp_path, pixels):
    deeplab = made(output_stride=16, rates=(1, 2, 3))
    for name, content in files(deeplab, {"classes": list(CLASSES), "queries": ["a", "b", "c"]}).items():
        (tmp_path / name).write_bytes(content)
    found, config = read(tmp_path, method="test")
    assert config["classes"] == list(CLASSES) and config["queries"] == ["a", "b", "c"]
    assert found.output_stride == 16 and found.rates == (1, 2, 3)
    assert not found.training and not any(each.requires_grad for each in found.parameters())
    with torch.inference_mode():
        assert torch.equal(found(pixels), deeplab(pixels))
    with pytest.raises(ValueError, match="config.json names 2 classes, it has 3 beside the background"):
        files(deeplab, {"classes": ["a", "b"]})


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_a_published_checkpoint_is_read_by_its_names(wrapper, tmp_path, pixels):
    deeplab = made()
    state = {name: each for name, each in deeplab.state_dict().items() if not name.endswith("num_batches_tracked")}
    wrapped = {"model": state} if wrapper == "model" else {f"module.{name}": each for name, each in state.items()}
    torch.save(wrapped, tmp_path / "namedmask.pth")
    found, config = read(tmp_path / "namedmask.pth", method="test")
    assert config == {} and found.rates == (12, 24, 36)
    with torch.inference_mode():
        assert torch.equal(found(pixels), deeplab(pixels))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("backbone.layer4.0.conv2.weight", "Missing key"),
        ("backbone.layer1.0.conv1.weight", "no 'backbone.layer1.0.conv1.weight'"),
        ("classifier.classifier.3.weight", "no 'classifier.classifier.3.weight'"),
        ("classifier.aspp.convs.4.2.running_var", "Missing key"),
    ],
)
def test_a_file_without_one_of_its_tensors_is_refused(tmp_path, name, text):
    file = write_model(tmp_path) / "model.safetensors"
    state = load_file(file)
    del state[name]
    save_file(state, file)
    with pytest.raises(ValueError, match=rf"^test: .*model.safetensors is no checkpoint of NamedMask: .*{text}"):
        read(tmp_path, method="test")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model_type": "sempart"}, "holds a network of type 'sempart', expected 'namedmask'"),
        ({"classes": ["otter"]}, "names 1 classes, it has 3 beside the background"),
        ({"classes": "otter"}, "classes of its config.json must be a list of names, got 'otter'"),
        ({"output_stride": 4}, "output_stride must be 8 or 16"),
        ({"rates": [1, 2]}, "is no checkpoint of NamedMask"),
        ({"rates": 5}, "is no checkpoint of NamedMask"),
    ],
    ids=str,
)
def test_a_configuration_of_another_network_is_refused(tmp_path, settings, text):
    config = write_model(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(ValueError, match=rf"^test: .*{text}"):
        read(tmp_path, method="test")


def test_more_blocks_than_any_network_has_are_refused(tmp_path):
    file = write_model(tmp_path) / "model.safetensors"
    save_file(load_file(file) | {f"backbone.layer3.{i}.bn1.bias": torch.zeros(1) for i in range(1, 1200)}, file)
    with pytest.raises(ValueError, match="no checkpoint of NamedMask: it has 1,203 blocks"):
        read(tmp_path, method="test")
    assert network.networks.MAX_LAYERS < 1200


@pytest.mark.parametrize("size", [(3, 3), (1, 2), (3, 4), (9, 2)])
def test_a_convolution_that_reaches_beyond_the_map_is_one_of_each_pixel(size):
    separable = network.Separable(6, 5, rate=3)
    values, found = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(0)), []
    for form in (separable, separable.body):
        given = values.clone().requires_grad_()
        result = form(given)
        gradients = torch.autograd.grad(result.square().sum(), [given, *separable.parameters()])
        found.append((result, *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
