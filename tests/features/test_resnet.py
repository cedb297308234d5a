"""Dilated residual networks in the files of MoCo-v2 and SwAV, made up here, against torchvision's own forward pass."""

import numpy as np
import pytest
import torch
from torchvision.models.resnet import Bottleneck, ResNet

from raypipe.features import resnet
from raypipe.segmenters.spectral_voting import SpectralVoting

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network() -> ResNet:
    """A residual network of one narrow block a stage, its last two stages dilated."""
    torch.manual_seed(0)
    made = ResNet(Bottleneck, [1, 1, 2, 1], width_per_group=4, replace_stride_with_dilation=[False, True, True])
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return made.eval()


def as_moco(state: dict) -> dict:
    """The names of a MoCo-v2 checkpoint, with the projection and the queue that it may hold."""
    named = {f"module.encoder_q.{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}
    others = ("module.encoder_q.fc.0.weight", "module.encoder_q.fc.2.bias", "module.queue", "module.queue_ptr")
    return {"epoch": 800, "arch": "resnet50", "state_dict": named | dict.fromkeys(others, torch.ones(3))}


def as_swav(state: dict) -> dict:
    """The names of a SwAV checkpoint, from before batches were counted."""
    named = {name: tensor for name, tensor in state.items() if not name.startswith("fc.") and "num_batches" not in name}
    others = ("projection_head.0.weight", "projection_head.1.running_mean", "prototypes.weight")
    return {f"module.{name}": tensor for name, tensor in (named | dict.fromkeys(others, torch.ones(3))).items()}


@pytest.fixture(params=[as_moco, as_swav, dict])
def file(request, network, tmp_path):
    path = tmp_path / "pretrain.pth.tar"
    torch.save(request.param(network.state_dict()), path)
    return path


def test_features_are_those_of_torchvision_at_every_eighth_pixel(file, network):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((40, 64), (33, 50))]
    found = resnet.Resnet(file, method="test", device="cpu")
    kept = {}
    network.layer4.register_forward_hook(lambda module, given, picture: kept.update(picture=picture))
    for image, features in zip(images, found(images, fit="pad"), strict=True):
        assert features.grid == (5, 8 if image.shape[1] == 64 else 7) and features.patch == 8
        with torch.no_grad():
            network(found.pixels(image, image.shape[:2], "pad"))
        assert kept["picture"].shape[2:] == features.grid
        assert torch.allclose(features.patches, kept["picture"][0].flatten(1).T, atol=1e-5)
        assert features.patches.std(0).max() > 0.01


def test_a_residual_network_is_told_from_a_transformer(file, tmp_path):
    from support.tiny.dino import write_model

    folder = write_model(tmp_path / "dino")
    assert resnet.is_resnet(file, method="test") and not resnet.is_resnet(folder, method="test")


@pytest.mark.parametrize(
    ("name", "text"), [("layer3.1.conv2.weight", "Missing key"), ("layer1.0.conv1.weight", "no 'layer1.0.conv1")]
)
def test_a_file_without_one_of_its_tensors_is_refused(network, tmp_path, name, text):
    state = {each: tensor for each, tensor in network.state_dict().items() if each != name}
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=rf"^test: .*broken.pth is no checkpoint of a residual network: .*{text}"):
        resnet.read(tmp_path / "broken.pth", method="test")


def test_three_backbones_vote_together(file, network, tmp_path):
    other = tmp_path / "other.pth"
    torch.save(as_swav(network.state_dict()), other)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    method = SpectralVoting(weights="color", weights_2=str(file), weights_3=str(other))
    method.load("cpu")
    assert list(method.checksums()) == ["weights_2/pretrain.pth.tar", "weights_3/other.pth"]
    (features,) = method.features([image])
    assert [each.grid for each in (features, *features.others)] == [(3, 4), (6, 8), (6, 8)]
    (found,) = method.segment([image])
    assert found.masks.shape == (1, 48, 64) and found.masks.any()
