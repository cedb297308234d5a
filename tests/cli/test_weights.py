"""`raypipe weights` against a real server of the Hub's protocol and of rembg's files, both on loopback."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from support.hub import COMMIT, Repository, hub
from support.tiny.clipseg import write_model
from support.tiny.dino import as_published
from support.tiny.dino import write_model as write_dino
from support.tiny.rembg import write_network
from support.two_networks import TwoNetworks, write_models

from raypipe import networks, segmenters
from raypipe.benchmark.methods import loaded
from raypipe.cli.verbs import main
from raypipe.cli.weights import Weights, weights
from raypipe.features.dino import Dino
from raypipe.segmenters import rembg
from raypipe.segmenters.clipseg import Clipseg
from raypipe.segmenters.rembg import Rembg


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("clipseg"))


@pytest.fixture
def without_internet(monkeypatch):
    """Every request goes to a port where nothing listens, so it is refused at once."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")


def fetch(address: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """`raypipe weights ...` in a process of its own: huggingface_hub reads its environment when it is imported.

    With the method of two networks where it is named.
    """
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    program = "support.two_networks" if words[0] == "two_networks" else "raypipe"
    command = [sys.executable, "-m", program, "weights", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# From the Hugging Face Hub


def test_a_fetched_folder_is_complete_and_loads(model, tmp_path):
    folder = tmp_path / "new" / "clip seg"
    with hub({"CIDAS/clipseg-rd64-refined": Repository(model)}) as served:
        done = fetch(served.address, "clipseg", "--to", str(folder), "--json", HF_HOME=str(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        again = fetch(served.address, "clipseg", "--to", str(folder), HF_HOME=str(tmp_path / "home"))
        assert again.returncode == 0, again.stderr
    names = sorted(path.name for path in model.iterdir())
    assert sorted(served.served) == names  # each once: the second call found them
    *lines, result = done.stdout.splitlines()
    result = json.loads(result)
    assert result["files"] == {path.name: path.stat().st_size for path in sorted(model.iterdir())}
    assert (result["licence"], result["revision"], result["folder"]) == ("Apache-2.0", COMMIT, str(folder))
    assert lines[0].startswith("CIDAS/clipseg-rd64-refined at commit 0123456789ab, licence: Apache-2.0")
    assert f"raypipe label clipseg --weights '{folder}'" in lines[-1] and "raypipe weights rembg --to DIR" in lines[-1]
    segmenter = Clipseg(weights=str(folder), size=64, foreground="whole")
    segmenter.load("cpu")
    assert segmenter.checksums() == networks.checksums(model)
    (found,) = segmenter.segment([np.eye(50, dtype=np.uint8)[..., None].repeat(3, 2) * 255], [np.ones((50, 50), bool)])
    assert found.masks.any()


def test_a_broken_connection_loses_nothing(model, tmp_path):
    repository = Repository(model, break_at=50_000)
    with hub({"org/tiny": repository}) as served:
        words = ["clipseg", "--weights", "org/tiny", "--to", str(tmp_path / "to")]
        done = fetch(served.address, *words)
        if done.returncode:  # this huggingface_hub leaves the second try to us
            assert "once that is mended the same command goes on" in done.stderr.splitlines()[-1]
            done = fetch(served.address, *words)
    assert done.returncode == 0 and repository.break_at is None, done.stderr
    assert networks.checksums(tmp_path / "to") == networks.checksums(model)


def test_what_other_libraries_read_is_left_out(model, tmp_path):
    large = shutil.copytree(model, tmp_path / "large")
    for name in ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", "README.md"):
        (large / name).parent.mkdir(exist_ok=True)
        (large / name).write_bytes(b"not wanted")
    with hub({"org/large": Repository(large)}) as served:
        done = fetch(served.address, "clipseg", "--weights", "org/large@main", "--to", str(tmp_path / "to"))
    assert done.returncode == 0, done.stderr
    assert sorted(served.served) == sorted(path.name for path in model.iterdir())
    (large / "model.safetensors").unlink()
    with hub({"org/large": Repository(large)}) as served:
        done = fetch(served.address, "clipseg", "--weights", "org/large", "--to", str(tmp_path / "old"))
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin" in served.served and "tf_model.h5" not in served.served


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "some-noncommercial-license"])
def test_weights_for_no_commercial_use_need_consent(model, tmp_path, licence):
    words = ["clipseg", "--weights", "org/tiny", "--to", str(tmp_path / "to")]
    with hub({"org/tiny": Repository(model, licence=licence)}) as served:
        refused = fetch(served.address, *words)
        assert refused.returncode == 2 and not served.served and not (tmp_path / "to").exists()
        (line,) = refused.stderr.splitlines()
        assert f"org/tiny is not for commercial use (licence {licence})" in line and "--accept-license" in line
        accepted = fetch(served.address, *words, "--accept-license")
    assert accepted.returncode == 0 and f"licence: {licence}" in accepted.stdout


def test_an_unknown_licence_is_said(model, tmp_path):
    with hub({"org/tiny": Repository(model, licence=None)}) as served:
        done = fetch(served.address, "clipseg", "--weights", "org/tiny", "--to", str(tmp_path))
    assert done.returncode == 0 and "licence: unknown (the model card names none" in done.stdout


def test_a_folder_holds_one_repository_only(model, tmp_path):
    with hub({"org/one": Repository(model), "org/two": Repository(model)}) as served:
        fetch(served.address, "clipseg", "--weights", "org/one", "--to", str(tmp_path / "to"))
        count = len(served.served)
        other = fetch(served.address, "clipseg", "--weights", "org/two", "--to", str(tmp_path / "to"))
        assert other.returncode == 2 and "holds org/one already; choose an empty folder" in other.stderr
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("...")
        mine = fetch(served.address, "clipseg", "--weights", "org/two", "--to", str(tmp_path / "mine"))
        assert mine.returncode == 2 and "holds other files already" in mine.stderr
        assert len(served.served) == count


def test_what_goes_wrong_is_one_line_that_says_what_helps(model, tmp_path):
    repositories = {
        "org/gated": Repository(model, gated=True),
        "org/huge": Repository(model, sizes={"model.safetensors": 10**18}),
        "org/empty": Repository(tmp_path),
    }
    expected = {
        "org/none": (2, "there is no such repository, or it is private: then set HF_TOKEN"),
        "org/huge@v9": (2, "there is no such revision"),
        "org/gated": (1, "it is gated: accept its terms on its page and set HF_TOKEN"),
        "org/huge": (1, "weights: 1,000,000,000.0 GB to fetch but "),
        "org/empty": (2, "org/empty has neither model.safetensors nor pytorch_model.bin"),
    }
    with hub(repositories) as served:
        for name, (code, text) in expected.items():
            done = fetch(served.address, "clipseg", "--weights", name, "--to", str(tmp_path / name[4:]))
            assert done.returncode == code and text in done.stderr.splitlines()[-1], done.stderr
            assert "Traceback" not in done.stderr
        offline = fetch(served.address, "clipseg", "--to", str(tmp_path / "to"), HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "could not be fetched: HF_HUB_OFFLINE is set;" in offline.stderr
    gone = fetch(served.address, "clipseg", "--to", str(tmp_path / "to"))
    assert gone.returncode == 1 and "could not be fetched: no connection" in gone.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grabcut", "--to", "x"], "grabcut needs no weights of its own\n"),
        (["kmeans", "--to", "x"], "kmeans needs no weights of its own; its foreground does: raypipe weights rembg"),
        (["clipsek", "--to", "x"], "unknown segmenter 'clipsek'; did you mean 'clipseg'?"),
        (["clipseg", "--to", "s3://bucket/x"], "--to must be a local folder, got 's3://bucket/x'"),
        (["clipseg", "--to", "x", "--weights", "nowhere"], "org/name or the address of a file for clipseg"),
        (["kmeans", "--to", "x", "--networks", "weights=a/b"], "kmeans has no network 'weights'; it has none"),
        (["rembg", "--to", "x", "--weights", "u2nett"], "'u2nett' is an unknown model and no .onnx file; did you mean"),
        (["rembg", "--to", "x", "--weights", "a.onnx"], "expected a model of rembg, got the file 'a.onnx'"),
    ],
)
def test_wrong_usage_ends_with_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["weights", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Of a method with several networks


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("both"))


def test_each_network_lies_in_the_folder_of_its_field(both, tmp_path):
    folder = tmp_path / "to"
    repositories = {"org/head": Repository(both / "weights"), "org/backbone": Repository(both / "backbone")}
    with hub(repositories) as served:
        done = fetch(served.address, "two_networks", "--to", str(folder), "--json")
        assert done.returncode == 0, done.stderr
        again = fetch(served.address, "two_networks", "--to", str(folder))
        assert again.returncode == 0, again.stderr
        assert sorted(served.served) == ["config.json"] * 2 + ["model.safetensors"] * 2
        flat = fetch(served.address, "clipseg", "--weights", "org/head", "--to", str(folder))
        assert flat.returncode == 2 and "holds other files already; choose an empty folder" in flat.stderr
    *lines, result = done.stdout.splitlines()
    result = json.loads(result)
    assert lines[0] == "org/head at commit 0123456789ab, licence: Apache-2.0"
    assert lines[1] == "backbone: org/backbone at commit 0123456789ab, licence: MIT"
    assert lines[-1] == f"use: raypipe label two_networks --weights {folder}"
    backbone = {"weights": "org/backbone", "revision": COMMIT, "licence": "MIT"}
    assert result["others"] == {"backbone": backbone} and result["weights"] == "org/head"
    files = {f"{field}/{name}" for field in ("weights", "backbone") for name in ("config.json", "model.safetensors")}
    assert set(result["files"]) == files and all((folder / file).is_file() for file in files)
    assert json.loads((folder / "backbone/source.json").read_text()) == backbone
    assert json.loads((folder / "weights/source.json").read_text())["licence"] == "Apache-2.0"
    method, device = loaded(TwoNetworks, str(folder))  # as `raypipe benchmark --weights` does
    assert device == "cpu" and (method.weights, method.backbone) == (str(folder / "weights"), str(folder / "backbone"))
    assert method.checksums() == networks.checksums_of_each({name: both / name for name in TwoNetworks.networks})


def test_a_network_may_be_a_file_on_the_web(both, tmp_path):
    original = tmp_path / "original"
    original.mkdir()
    torch.save(as_published(write_dino(tmp_path / "dino", hidden_size=64, num_attention_heads=1)), original / "vit.pth")
    folder = tmp_path / "to"
    with hub({"org/head": Repository(both / "weights"), "org/file": Repository(original)}) as served:
        address = f"{served.address}/org/file/resolve/main/vit.pth"
        words = ["two_networks", "--to", str(folder), "--networks", f"backbone={address}"]
        done = fetch(served.address, *words)
        again = fetch(served.address, *words)
        missing = fetch(served.address, *words[:-1], f"backbone={address.replace('vit', 'none')}")
        other = fetch(served.address, *words[:-1], f"backbone={address}?x=1")
        assert done.returncode == again.returncode == 0, done.stderr + again.stderr
        assert served.served.count("vit.pth") == 1
    assert f"backbone: {address}, licence: unknown (an address names none" in done.stdout
    assert missing.returncode == 1 and "404" in missing.stderr.splitlines()[-1]
    assert other.returncode == 2 and f"backbone holds {address} already" in other.stderr
    assert sorted(file.name for file in (folder / "backbone").iterdir()) == ["source.json", "vit.pth"]
    method = TwoNetworks(weights=str(folder))
    paths = networks.locate_each(method)
    network = Dino(paths["backbone"], method="two_networks", device="cpu")
    assert network.depth == 3 and network.width == 64
    assert "backbone/vit.pth" in networks.checksums_of_each(paths)


def test_the_licence_of_each_network_is_checked_and_other_ones_are_read_from_their_cards(both, tmp_path):
    repositories = {
        "org/head": Repository(both / "weights", licence="cc-by-nc-4.0"),  # of its own default the class knows better
        "org/backbone": Repository(both / "backbone"),
        "org/other": Repository(both / "backbone", licence="cc-by-nc-4.0"),
    }
    words = ["two_networks", "--to", str(tmp_path / "to"), "--networks", "backbone=org/other"]
    with hub(repositories) as served:
        refused = fetch(served.address, *words)
        assert refused.returncode == 2 and not served.served and not (tmp_path / "to").exists()
        assert "org/other is not for commercial use (licence cc-by-nc-4.0)" in refused.stderr
        accepted = fetch(served.address, *words, "--accept-license")
        assert accepted.returncode == 0, accepted.stderr
        assert "backbone: org/other at commit 0123456789ab, licence: cc-by-nc-4.0" in accepted.stdout
        changed = fetch(served.address, "two_networks", "--to", str(tmp_path / "to"))
    assert changed.returncode == 2 and "backbone holds org/other already; choose an empty folder" in changed.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"networks": ("bone=org/x",)}, "two_networks has no network 'bone'; its networks are weights, backbone"),
        ({"networks": ("backbone=a/b", "backbone=c/d")}, "backbone is given twice: 'a/b' and 'c/d'"),
        ({"networks": ("weights=a/b",), "weights": "c/d"}, "weights is given twice: 'c/d' and 'a/b'"),
        (
            {"networks": ("backbone",)},
            "expected a Hugging Face id .* for two_networks's backbone, got ''",
        ),
    ],
)
def test_a_network_is_named_by_its_field_once(given, message, tmp_path, monkeypatch):
    monkeypatch.setattr(segmenters, "find", lambda name: TwoNetworks)
    with pytest.raises(ValueError, match=f"weights: {message}"):
        weights(Weights("two_networks", str(tmp_path / "to"), **given))


def test_weights_at_no_known_address_are_said_to_be_so_with_what_the_method_needs(tmp_path):
    for method, needs in (("move", "a checkpoint from https://github"), ("sempart", "a head as --weights")):
        with pytest.raises(ValueError, match=f"no address of {method}'s weights is known; it needs {needs}"):
            weights(Weights(method, str(tmp_path / "to"), networks=("backbone=org/name",)))
    assert not (tmp_path / "to").exists()


def test_folders_of_networks_lie_beside_nothing_else(both, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with hub({"org/head": Repository(both / "weights"), "org/backbone": Repository(both / "backbone")}) as served:
        done = fetch(served.address, "two_networks", "--to", str(tmp_path))
    assert done.returncode == 2 and f"{tmp_path} holds other files already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# From rembg


@pytest.fixture
def u2netp(tmp_path, monkeypatch):
    """rembg's u2netp as a small network served on loopback; gives the file."""
    served = tmp_path / "served"
    served.mkdir()
    file = write_network(served / "u2netp.onnx")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    class Served(rembg.sessions()["u2netp"]):
        @classmethod
        def download_models(cls, *args, **kwargs):
            existing = cls.resolve_existing("u2netp.onnx")
            url = f"http://127.0.0.1:{server.server_port}/u2netp.onnx"
            return existing or pooch.retrieve(url, None, fname="u2netp.onnx", path=cls.model_dir())

    monkeypatch.setitem(rembg.sessions(), "u2netp", Served)
    monkeypatch.setattr("raypipe.segmenters.rembg.RELEASES", f"http://127.0.0.1:{server.server_port}")
    yield file
    server.shutdown()
    server.server_close()


def test_a_model_of_rembg_is_found_again_in_both_ways(u2netp, tmp_path, monkeypatch):
    monkeypatch.setenv("U2NET_HOME", str(tmp_path / "elsewhere"))
    found = weights(Weights("rembg", str(tmp_path / "to"), weights="u2netp"))
    assert os.environ["U2NET_HOME"] == str(tmp_path / "elsewhere") and not (tmp_path / "elsewhere").exists()
    ((name, size),) = found.files.items()
    file = tmp_path / "to" / name
    assert file.read_bytes() == u2netp.read_bytes() and size == u2netp.stat().st_size
    assert found.licence == "Apache-2.0"
    assert found.use[0] == f"U2NET_HOME={tmp_path / 'to'} raypipe label METHOD --foreground rembg:u2netp"
    assert found.use[1] == f"raypipe label METHOD --foreground rembg:{file}"
    monkeypatch.setenv("U2NET_HOME", str(tmp_path / "to"))
    for option in ("u2netp", str(file)):
        segmenter = Rembg(model=option)
        segmenter.load("cpu")
        (segments,) = segmenter.segment([np.eye(40, dtype=np.uint8)[..., None].repeat(3, 2) * 255])
        assert segments.masks.any()


def test_rembg_without_internet_is_one_line(tmp_path, without_internet, capsys):
    assert main(["weights", "rembg", "--to", str(tmp_path)]) == 1
    assert "weights: u2net could not be fetched: no connection" in capsys.readouterr().err.splitlines()[-1]


def test_rembgs_non_commercial_model_needs_consent(tmp_path, without_internet, capsys, monkeypatch):
    monkeypatch.setenv("U2NET_HOME", str(tmp_path / "home"))
    words = ["weights", "rembg", "--weights", "bria-rmbg", "--to", str(tmp_path / "to")]
    assert main(words) == 2
    assert "bria-rmbg is not for commercial use (licence CC-BY-NC-4.0)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="raypipe weights rembg --weights bria-rmbg --to DIR --accept-license"):
        Rembg(model="bria-rmbg").load("cpu")
    assert main([*words, "--accept-license"]) == 1  # it went on as far as the network
    assert "bria-rmbg could not be fetched" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_a_non_commercial_model_that_is_there_was_accepted_before(tmp_path, monkeypatch):
    write_network(tmp_path / "bria-rmbg.onnx")
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    segmenter = Rembg(model="bria-rmbg")
    segmenter.load("cpu")
    assert "CC-BY-NC-4.0" in segmenter.licence and "bria-rmbg.onnx" in segmenter.checksums()


def test_every_model_of_rembg_has_a_licence():
    assert all(rembg.MODELS.values())
    assert [name for name, licence in rembg.MODELS.items() if networks.is_non_commercial(licence)] == ["bria-rmbg"]
