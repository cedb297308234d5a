"""Weights that somebody prepared: no loader runs what they hold, reads other files, or fills the memory."""

import json
import os
import pickle
import struct
from pathlib import Path

import onnx
import pytest
import torch
from support import tiny
from support.tiny.rembg import write_network

from raypipe import segmenters

METHODS = ("clipseg", "dino_pca", "lost", "sam")  # what reads folders of transformers


@pytest.fixture(scope="module", params=METHODS)
def sound(request, tmp_path_factory) -> tuple[str, dict]:
    """A method and the options with which it loads."""
    return request.param, tiny.options(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def weights(sound, tmp_path) -> Path:
    """A copy of its weights that can be spoilt."""
    for file in Path(sound[1]["weights"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(sound, weights: Path) -> None:
    name, options = sound
    segmenters.find(name)(**options | {"weights": str(weights)}).load("cpu")


def change(weights: Path, **settings) -> None:
    """Set settings wherever the configuration has them, in its parts too."""

    def changed(part: dict) -> dict:
        inner = {name: changed(value) for name, value in part.items() if isinstance(value, dict)}
        return part | {name: value for name, value in settings.items() if name in part} | inner

    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps(changed(config) | {"architectures": None}))


class Canary:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_code_beside_the_weights_is_not_run(sound, weights):
    code = f"open({str(weights / 'canary')!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "configuration_evil.py", "modeling_evil.py"):
        (weights / name).write_text(code)
    config = json.loads((weights / "config.json").read_text())
    names = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    hostile = {"auto_map": names, "custom_pipelines": {"evil": {"impl": "evil.Evil"}}, "trust_remote_code": True}
    (weights / "config.json").write_text(json.dumps(config | hostile))
    if (weights / "tokenizer_config.json").exists():
        (weights / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "tokenizer_class": "Evil"}))
    try:
        load(sound, weights)
    except ValueError as error:
        assert str(error).startswith(f"{sound[0]}: ")
    assert not (weights / "canary").exists()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"hidden_size": 10**6}, "numbers, the weight files have"),
        ({"mlp_dim": 3 * 10**6, "intermediate_size": 10**6, "image_size": 30_000}, "numbers, the weight files have"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"hidden_size": -5}, "cannot be read"),
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(sound, weights, settings, text):
    change(weights, **settings)
    with pytest.raises(ValueError, match=rf"^{sound[0]}: .*({text})"):
        load(sound, weights)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[1, 2]", b"3", b"null", b"", b"\xff\xfe{}", b'{"a": NaN'], ids=lambda c: repr(c[:8])
)
def test_a_configuration_that_is_none_is_one_clear_error(sound, weights, content):
    (weights / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{sound[0]}: .* cannot be read as a "):
        load(sound, weights)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def header(content: bytes, **changes) -> bytes:
    """A safetensors file whose header says something else of its first tensor."""
    length = struct.unpack("<Q", content[:8])[0]
    names = json.loads(content[8 : 8 + length])
    names[next(name for name in names if name != "__metadata__")] |= changes
    text = json.dumps(names).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


CHECKPOINTS = {
    "cut in two": cut,
    "cut in its header": lambda content: content[:100],
    "of no bytes": lambda content: b"",
    "whose header is longer than the file": lambda content: struct.pack("<Q", 1 << 62) + content[8:],
    "whose tensor lies outside": lambda content: header(content, data_offsets=[0, 1 << 40]),
    "whose tensor is of another shape": lambda content: header(content, shape=[1 << 40]),
    "whose numbers are of no kind": lambda content: header(content, dtype="X7"),
    "that is text": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_spoilt_safetensors_file_is_one_clear_error(sound, weights, damage):
    file = weights / "model.safetensors"
    file.write_bytes(CHECKPOINTS[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{sound[0]}: "):
        load(sound, weights)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_in_a_folder_of_weights_is_not_run(sound, weights, form):
    canary = weights / "canary"
    (weights / "model.safetensors").unlink()
    with (weights / "pytorch_model.bin").open("wb") as file:
        (pickle.dump if form == "pickle" else torch.save)({"weight": Canary(canary)}, file)
    with pytest.raises(ValueError, match=rf"^{sound[0]}: "):
        load(sound, weights)
    assert not canary.exists()


@pytest.mark.parametrize("form", ["pickle", "torch", "cut", "text", "empty"])
def test_an_official_checkpoint_that_is_none_is_not_run(tmp_path, form):
    file, canary = tmp_path / "sam.pth", tmp_path / "canary"
    with file.open("wb") as opened:
        (pickle.dump if form == "pickle" else torch.save)({"weight": Canary(canary)}, opened)
    if form in ("cut", "text", "empty"):
        file.write_bytes({"cut": cut(file.read_bytes()), "text": b"<html>", "empty": b""}[form])
    with pytest.raises(ValueError, match="^sam: .* is not a checkpoint that can be read safely"):
        segmenters.find("sam")(weights=str(file)).load("cpu")
    assert not canary.exists()


def load_onnx(file: Path) -> None:
    segmenters.find("rembg")(model=str(file)).load("cpu")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "one byte"])
def test_a_spoilt_onnx_file_is_one_clear_error(tmp_path, damage):
    file = write_network(tmp_path / "tiny.onnx")
    content = file.read_bytes()
    file.write_bytes({"cut": cut(content), "empty": b"", "text": b"<html>", "one byte": content[:1]}[damage])
    with pytest.raises(ValueError, match=r"^rembg: .*tiny.onnx cannot be read as a network: "):
        load_onnx(file)


@pytest.mark.parametrize("place", ["../secret.bin", "{folder}/secret.bin", "missing.bin", "link.bin", "/dev/zero"])
def test_an_onnx_file_reads_no_file_outside_its_folder(tmp_path, place):
    folder = tmp_path / "weights"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(struct.pack("<f", 1.0))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(write_network(folder / "tiny.onnx"))
    contrast = model.graph.initializer[0]
    contrast.ClearField("float_data")
    contrast.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", place.format(folder=tmp_path)), ("offset", "0"), ("length", "4")):
        entry = contrast.external_data.add()
        entry.key, entry.value = key, value
    (folder / "tiny.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"^rembg: .*tiny.onnx cannot be read as a network: "):
        load_onnx(folder / "tiny.onnx")


NETWORKED = [name for name in segmenters.names() if segmenters.find(name)().networks]


def refused_everywhere(name: str, weights: Path) -> None:
    """A method to each of whose networks somebody gave these weights does not load, and says so in its name."""
    kind = segmenters.find(name)
    with pytest.raises((ValueError, OSError), match=rf"^{name}: "):
        kind(**dict.fromkeys(kind().networks, str(weights))).load("cpu")


@pytest.mark.parametrize("name", NETWORKED)
@pytest.mark.parametrize("form", ["pickle", "torch", "cut"])
def test_no_method_runs_or_takes_a_checkpoint_that_is_none(name, form, tmp_path):
    file, canary = tmp_path / "weights.pth", tmp_path / "canary"
    with file.open("wb") as opened:
        (pickle.dump if form == "pickle" else torch.save)({"weight": Canary(canary)}, opened)
    if form == "cut":
        torch.save({"weight": torch.ones(1000)}, file)
        file.write_bytes(cut(file.read_bytes()))
    refused_everywhere(name, file)
    assert not canary.exists()


@pytest.mark.parametrize("name", NETWORKED)
def test_no_method_runs_code_of_a_folder_or_takes_a_network_that_it_names(name, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    maps = {each: "evil.Evil" for each in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    config = {"model_type": "evil", "architectures": ["Evil"], "auto_map": maps, "trust_remote_code": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    refused_everywhere(name, tmp_path)
    assert not (tmp_path / "canary").exists()
