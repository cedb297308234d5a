"""Weights by folder or by id, what does not fit, and what a network sees."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from support.hub import COMMIT, Repository, hub
from support.tiny.dino_pca import write_model
from support.two_networks import TwoNetworks, write_backbone, write_models
from torchvision.transforms.v2 import InterpolationMode, Resize

from raypipe import fetching, networks
from raypipe.segmenters.clipseg import Clipseg
from raypipe.segmenters.dino_pca import DinoPca


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("dino"))


def in_child(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


# Where they are


def test_a_folder_or_a_file_is_taken_as_it_is(weights, tmp_path, monkeypatch):
    assert networks.locate(str(weights), method="sam") == weights
    assert networks.locate(str(weights / "model.safetensors"), method="sam") == weights / "model.safetensors"
    monkeypatch.setenv("HOME", str(weights.parent))
    assert networks.locate(f"~/{weights.name}", method="sam") == weights
    with pytest.raises(FileNotFoundError, match=r"sam: .* holds no weights; expected one of \*.safetensors"):
        networks.locate(str(tmp_path), method="sam")


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/c", "org/name@", "http://a/b"])
def test_what_is_neither_a_path_nor_an_id_is_refused(name):
    with pytest.raises(FileNotFoundError, match=f"sam: weights '{name}' is neither a folder nor a file nor a Hugging"):
        networks.locate(name, method="sam")


def test_a_repository_is_fetched_once_and_then_found_offline(weights, tmp_path):
    code = "from raypipe import networks; print(networks.locate('org/tiny', method='dino_pca'))"
    with hub({"org/tiny": Repository(weights)}) as served:
        first = in_child(code, HF_ENDPOINT=served.address, HF_HOME=str(tmp_path))
        assert first.returncode == 0, first.stderr
        again = in_child(code, HF_ENDPOINT=served.address, HF_HOME=str(tmp_path))
        assert sorted(served.served) == ["config.json", "model.safetensors"]
    offline = in_child(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert first.stdout == again.stdout == offline.stdout and COMMIT in first.stdout
    place = Path(first.stdout.strip())
    assert networks.checksums(place) == networks.checksums(weights)


def test_a_repository_without_safetensors_is_read_from_its_older_file(weights, tmp_path):
    from transformers import Dinov2WithRegistersModel

    old = tmp_path / "old"
    (old / "onnx").mkdir(parents=True)
    (old / "onnx" / "model.safetensors").write_bytes(b"another library's")
    (old / "flax_model.msgpack").write_bytes(b"another library's")
    (old / "config.json").write_bytes((weights / "config.json").read_bytes())
    network = Dinov2WithRegistersModel.from_pretrained(weights)
    torch.save(network.state_dict(), old / "pytorch_model.bin")
    code = "from raypipe import networks; print(networks.locate('org/old', method='dino_pca'))"
    with hub({"org/old": Repository(old)}) as served:
        done = in_child(code, HF_ENDPOINT=served.address, HF_HOME=str(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        assert sorted(served.served) == ["config.json", "pytorch_model.bin"]
    segmenters = [DinoPca(weights=place, size=112) for place in (done.stdout.strip(), str(weights))]
    image = data.chelsea()
    for segmenter in segmenters:
        segmenter.load("cpu")
    fetched, original = (next(each.segment([image], [image[..., 0] > 90])).masks for each in segmenters)
    np.testing.assert_array_equal(fetched, original)
    assert list(segmenters[0].checksums()) == ["pytorch_model.bin"]


def test_a_file_on_the_web_is_fetched_once_and_then_found_offline(weights, tmp_path):
    place = "org/tiny/resolve/main/model.safetensors"
    repository = Repository(weights, break_at=10_000)
    with hub({"org/tiny": repository}) as served:
        code = f"from raypipe import networks; print(networks.locate('{served.address}/{place}', method='found'))"
        broken = in_child(code, HF_HOME=str(tmp_path))
        first = in_child(code, HF_HOME=str(tmp_path))
        again = in_child(code, HF_HOME=str(tmp_path))
        assert first.returncode == 0, first.stderr
        assert served.served == ["model.safetensors"] * 2
    alone = in_child(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    line = broken.stderr.splitlines()[-1]
    assert f"found: no weights '{served.address}/{place}' here and they could not be fetched (" in line
    assert "the connection broke" in line and line.endswith("pass --weights DIR")
    assert first.stdout == again.stdout == alone.stdout
    assert networks.checksums(Path(first.stdout.strip())) == networks.checksums(weights)
    (folder,) = (tmp_path / "raypipe").iterdir()
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


def test_a_file_that_cannot_be_fetched_is_one_line_with_the_way_out(weights, tmp_path):
    code = "from raypipe import networks; networks.locate('{}/org/tiny/resolve/main/none.pth', method='found')"
    with hub({"org/tiny": Repository(weights)}) as served:
        code = code.format(served.address)
        missing = in_child(code, HF_HOME=str(tmp_path)).stderr.splitlines()[-1]
    gone = in_child(code, HF_HOME=str(tmp_path)).stderr.splitlines()[-1]
    offline = in_child(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").stderr.splitlines()[-1]
    for line, reason in ((missing, "404"), (gone, "no connection: "), (offline, "HF_HUB_OFFLINE is set")):
        assert f"FileNotFoundError: found: no weights '{served.address}/org" in line
        assert reason in line and "`raypipe weights found --to DIR`" in line
    assert not list(tmp_path.rglob("*.p*t*"))


def test_what_cannot_be_fetched_is_one_line_with_the_way_out(weights, tmp_path):
    code = (
        "from raypipe import networks\n"
        "for name in ('org/none', 'org/gated', 'org/tiny@v9'):\n"
        "    try: networks.locate(name, method='sam')\n"
        "    except FileNotFoundError as error: print(error)\n"
    )
    with hub({"org/gated": Repository(weights, gated=True), "org/tiny": Repository(weights)}) as served:
        done = in_child(code, HF_ENDPOINT=served.address, HF_HOME=str(tmp_path))
    none, gated, revision = done.stdout.splitlines()
    assert "there is no such repository, or it is private: then set HF_TOKEN" in none
    assert "it is gated: accept its terms on its page and set HF_TOKEN" in gated
    assert "there is no such revision" in revision
    for line in (none, gated, revision):
        assert line.startswith("sam: no weights 'org/") and line.endswith("pass --weights DIR")
        assert "`raypipe weights sam --to DIR`" in line
    code = "from raypipe import networks; networks.locate('org/tiny', method='sam')"
    offline = in_child(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert "(HF_HUB_OFFLINE is set)" in offline.stderr.splitlines()[-1]
    alone = in_child(code, HF_ENDPOINT=served.address, HF_HOME=str(tmp_path / "empty"))  # the server has gone
    assert "(no connection: " in alone.stderr.splitlines()[-1]


def test_what_an_interrupted_download_left_is_one_line_with_the_way_out(weights, tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_bytes((weights / "config.json").read_bytes())
    code = "from raypipe import networks; networks.locate('org/tiny', method='sam')"
    with hub({"org/tiny": Repository(tmp_path / "part")}) as served:
        in_child(code, HF_ENDPOINT=served.address, HF_HOME=str(tmp_path / "home"))
    offline = in_child(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    line = offline.stderr.splitlines()[-1]
    assert "FileNotFoundError: sam: weights 'org/tiny' are incomplete: " in line
    assert line.endswith("run `raypipe weights sam --to DIR` where there is internet and pass --weights DIR")


def test_checksums_are_those_of_the_weight_files_only(weights):
    expected = hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
    assert networks.checksums(weights) == {"model.safetensors": expected}
    assert networks.checksums(weights / "model.safetensors") == {"model.safetensors": expected}


# Several networks of one method


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("both"))


def test_a_folder_of_folders_names_every_network(both, monkeypatch):
    monkeypatch.chdir(both.parent)
    method = TwoNetworks(weights=both.name)
    assert (method.weights, method.backbone) == (str(both / "weights"), str(both / "backbone"))
    again = TwoNetworks(weights=method.weights, backbone=method.backbone)  # as a sweep or an option file makes it
    assert again == method
    assert networks.locate_each(method) == {name: (both / name).resolve() for name in ("weights", "backbone")}


def test_a_network_that_is_named_stays(both, weights):
    for other in ("org/other", str(weights)):
        method = TwoNetworks(weights=str(both), backbone=other)
        assert (method.weights, method.backbone) == (str(both / "weights"), other)
    method = TwoNetworks(backbone=str(both / "backbone"))
    assert (method.weights, method.backbone) == ("org/head", str(both / "backbone"))


def test_a_plain_folder_of_weights_sets_only_itself(weights, tmp_path):
    assert TwoNetworks(weights=str(weights)).backbone == "org/backbone"
    for name in ("weights", "backbone", "model.safetensors"):
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).touch()
    assert TwoNetworks(weights=str(tmp_path)).weights == str(tmp_path)  # a folder of weights that has folders too


def test_a_folder_that_lacks_a_network_is_refused(both, tmp_path):
    (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match="two_networks: .* has no folder 'backbone'; run `raypipe weights two_"):
        TwoNetworks(weights=str(tmp_path))
    assert TwoNetworks(weights=str(tmp_path), backbone=str(both)).weights == str(tmp_path / "weights")


@pytest.mark.parametrize("field", ["weights", "backbone"])
def test_each_network_needs_a_name(field):
    with pytest.raises(ValueError, match=f"two_networks: {field} must be a folder or a Hugging Face id, got ''"):
        TwoNetworks(**{field: ""})


def test_files_of_one_name_keep_their_own_checksums(both):
    method = TwoNetworks(weights=str(both))
    method.load("cpu")
    expected = {
        f"{field}/model.safetensors": hashlib.sha256((both / field / "model.safetensors").read_bytes()).hexdigest()
        for field in ("weights", "backbone")
    }
    assert method.checksums() == expected and len(set(expected.values())) == 2
    (found,) = method.segment([data.chelsea()])
    assert 0 < found.masks.mean() < 1


# Whether they fit


def test_weights_of_another_network_are_refused_instead_of_filled_at_random(weights, tmp_path):
    with pytest.raises(ValueError, match=r"clipseg: .* asks for [\d,]+ numbers, the weight files have [\d,]+ bytes"):
        Clipseg(weights=str(weights), size=64).load("cpu")
    config = json.loads((weights / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 28}))
    (tmp_path / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="dino_pca: .* holds no Dinov2WithRegistersModel: .* of another shape"):
        DinoPca(weights=str(tmp_path), size=112).load("cpu")


def test_a_network_without_a_pooling_layer_loads_as_such(tmp_path):
    from transformers import ViTModel

    place, options = write_backbone(tmp_path), {"method": "lost", "device": "cpu"}
    with pytest.raises(ValueError, match=r"lost: .* holds no ViTModel: 2 of its tensors are absent .* pooler"):
        networks.pretrained(ViTModel, place, **options)
    network = networks.pretrained(ViTModel, place, **options, add_pooling_layer=False)
    assert network(torch.zeros(1, 3, 28, 28)).last_hidden_state.shape == (1, 5, 16) and network.pooler is None


def test_damaged_weights_are_one_clear_error(weights, tmp_path):
    (tmp_path / "config.json").write_bytes((weights / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="dino_pca: .* cannot be read as a Dinov2WithRegistersModel: "):
        DinoPca(weights=str(tmp_path), size=112).load("cpu")
    (tmp_path / "config.json").unlink()  # then it is read as an original file
    with pytest.raises(ValueError, match="dino_pca: .*model.safetensors is not a checkpoint that can be read safely "):
        DinoPca(weights=str(tmp_path), size=112).load("cpu")


def test_a_relative_folder_means_the_same_from_anywhere(weights, monkeypatch):
    monkeypatch.chdir(weights.parent)
    assert DinoPca(weights=weights.name).weights == str(weights)
    assert DinoPca(weights="org/name").weights == "org/name"


@pytest.mark.parametrize(
    ("licence", "restricted"),
    [
        ("Apache-2.0", False),
        ("mit", False),
        ("unknown", False),
        ("openrail++", False),
        ("cc-by-sa-4.0", False),
        ("CC-BY-NC-4.0", True),
        ("cc-by-nc-sa-4.0", True),
        ("fair-noncommercial-research-license", True),
        ("some-non-commercial", True),
    ],
)
def test_non_commercial_licences_are_known_by_their_names(licence, restricted):
    assert networks.is_non_commercial(licence) == restricted


# How they run


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "float32"), ("auto", "float32"), ("bfloat16", "bfloat16")])
def test_the_cpu_computes_in_float32_unless_told_otherwise(dtype, expected):
    with networks.autocast("cpu", dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, expected)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_float32_is_float32_in_convolutions_and_matrices_too_and_only_there(dtype):
    convolutions = torch.backends.cudnn.conv
    torch.set_float32_matmul_precision("high")  # as torch starts in NVIDIA's containers
    try:
        assert convolutions.fp32_precision == "tf32"  # torch's default, which decides on a GPU alone
        with pytest.raises(KeyError), networks.autocast("cpu", dtype):
            assert convolutions.fp32_precision == "ieee" and torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert convolutions.fp32_precision == "tf32" and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_convolutions_are_as_exact_as_the_cpus():
    x, weights = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 3, 3)
    with networks.autocast("cuda", "float32"):
        found = torch.nn.functional.conv2d(x.cuda(), weights.cuda()).cpu()
    torch.testing.assert_close(found, torch.nn.functional.conv2d(x, weights), rtol=0, atol=1e-3)  # TF32: 0.05


def test_a_gpu_takes_all_images_at_once_and_the_cpu_each_alone():
    images = [np.zeros((2, 2, 3), np.uint8)] * 3
    assert [len(batch) for batch in networks.batches(images, "cuda")] == [3]
    assert [len(batch) for batch in networks.batches(images, "cpu")] == [1, 1, 1]
    assert not list(networks.batches([], "cuda")) and not list(networks.batches([], "cpu"))


@pytest.mark.parametrize("size", [16, 100, 700])
def test_pixels_are_pillows_and_on_request_torchvisions(size):
    images = [data.chelsea(), data.astronaut()[:7], np.zeros((1, 1, 3), np.uint8)]
    for image in images:
        image.setflags(write=False)  # as they come from Ray
    found = networks.pixels(images, size, device="cpu", normalize=False)
    other = networks.pixels(images, size, device="cpu", normalize=False, resize=networks.squeeze_as_torchvision)
    assert found.shape == other.shape == (3, 3, size, size) and found.dtype == other.dtype == torch.float32
    resize = Resize((size, size), InterpolationMode.BILINEAR, antialias=True)
    for image, planes, others in zip(images, found, other, strict=True):
        pillows = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
        np.testing.assert_array_equal(planes.permute(1, 2, 0), pillows)
        torch.testing.assert_close(others, resize(torch.tensor(image).permute(2, 0, 1)).float() / 255, rtol=0, atol=0)


def test_normalised_pixels_have_imagenets_mean_at_zero():
    grey = np.full((5, 5, 3), (124, 116, 104), np.uint8)
    (found,) = networks.pixels([grey], 4, device="cpu", normalize=True)
    expected = (np.array([124, 116, 104]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(found[:, 0, 0], expected, atol=1e-6)
    assert np.abs(expected).max() < 0.02


# Before anything starts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS"),
        ("model.safetensors", b"<!doctype html><html></html>", "is not a checkpoint: it begins with b'<!doctype ht'"),
        ("pytorch_model.bin", b"hello", "is not a checkpoint: it begins with b'hello'"),
        ("sam_vit_h.pth", b"", "is not a checkpoint: it begins with b''"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_seen_from_afar(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"dino_pca: .*{name} {re.escape(message)}"):
        networks.look_for_each(DinoPca(weights=str(tmp_path)))
    with pytest.raises(ValueError, match=f"dino_pca: .*{name} {re.escape(message)}"):
        networks.look_for_each(DinoPca(weights=str(tmp_path / name)))


def test_a_network_of_another_type_is_seen_from_afar(weights):
    networks.look_for_each(DinoPca(weights=str(weights)))
    with pytest.raises(ValueError, match="holds a network of type 'dinov2_with_registers', expected 'clipseg'; `rayp"):
        networks.look_for_each(Clipseg(weights=str(weights)))


def test_every_network_of_a_method_is_looked_for(both, tmp_path):
    networks.look_for_each(TwoNetworks(weights=str(both)))
    with pytest.raises(FileNotFoundError, match="two_networks: .* holds no weights"):
        networks.look_for_each(TwoNetworks(weights=str(both), backbone=str(tmp_path)))


@pytest.mark.parametrize("url", ["https://no-such-host.invalid", "http://127.0.0.1:1"])
def test_a_host_that_cannot_be_reached_is_final_at_once(url, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    host = "127.0.0.1" if "127" in url else "no-such-host.invalid"
    with pytest.raises(ConnectionError, match=f"^{host} cannot be reached: "):
        fetching.check_reachable(url)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_behind_a_proxy_it_is_the_proxy_that_is_reached(proxy, monkeypatch):
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ConnectionError, match=r"^127\.0\.0\.1 cannot be reached: Connection refused"):
        fetching.check_reachable("https://no-such-host.invalid/weights")


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors", "moco_v2_800ep_pretrain.pth.tar"])
def test_the_address_of_a_checkpoint_is_known_by_its_file(name):
    assert networks.is_address(f"https://example.org/weights/{name}?download=true")
    assert not networks.is_address(f"https://example.org/{name}/index.html")
    assert not networks.is_address(f"weights/{name}")
