"""The rembg adapter with networks of U2-Net's layout that are made here."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support.faulty import GOOD, write_images
from support.tiny.rembg import write_network

from raypipe.cli.verbs import main
from raypipe.pipeline.job import Label, plan_work
from raypipe.pipeline.stages import Segment
from raypipe.segmenters.rembg import Rembg
from raypipe.types import PatternSegmenter, Segments


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return write_network(tmp_path_factory.mktemp("weights") / "tiny.onnx")


@pytest.fixture
def image() -> np.ndarray:
    """Dark on the left, bright on the right."""
    return np.repeat(np.linspace(0, 255, 60).astype(np.uint8)[None, :, None], 40, 0).repeat(3, 2)


def loaded(model: str) -> Rembg:
    segmenter = Rembg(model=model)
    segmenter.load("cpu")
    return segmenter


def test_a_local_network_gives_a_soft_mask(network, image):
    (found,) = loaded(str(network)).segment([image])
    assert found.masks.shape == (1, 40, 60) and found.masks.dtype == np.float32
    assert found.masks[0, :, :5].max() < 0.1 and found.masks[0, :, -5:].min() > 0.9
    assert (np.diff(found.masks[0, 20]) > -0.02).all()
    assert found.note == ""


def test_a_local_network_gives_what_rembg_gives_for_the_same_weights(network, image, tmp_path, monkeypatch):
    from rembg import new_session, remove

    home = tmp_path / "home"
    home.mkdir()
    (home / "tiny.onnx").write_bytes(network.read_bytes())
    monkeypatch.setenv("U2NET_HOME", str(home))
    session = new_session("u2net_custom", model_path=str(home / "tiny.onnx"), providers=["CPUExecutionProvider"])
    expected = remove(image, session=session, only_mask=True).astype(np.float32) / 255
    (found,) = loaded(str(network)).segment([image])
    np.testing.assert_array_equal(found.masks[0], expected)


def test_weights_in_u2net_home_are_used_as_they_are(network, image, tmp_path, monkeypatch):
    (tmp_path / "u2netp.onnx").write_bytes(network.read_bytes())
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    monkeypatch.setenv("MODEL_CHECKSUM_DISABLED", "1")
    segmenter = loaded("u2netp")
    (found,) = segmenter.segment([image])
    assert found.masks[0, :, -5:].min() > 0.9
    assert segmenter.checksums() == {"u2netp.onnx": hashlib.sha256(network.read_bytes()).hexdigest()}


def test_a_flat_map_is_an_empty_mask(tmp_path, image):
    flat = loaded(str(write_network(tmp_path / "flat.onnx", contrast=0)))
    (found,) = flat.segment([image])
    assert not found.masks.any() and found.note == "flat_map"


def test_a_flat_map_does_not_disturb_the_next_image(network, image):
    one_colour = np.full((20, 30, 3), 90, np.uint8)
    flat, found = loaded(str(network)).segment([one_colour, image])
    assert flat.note == "flat_map" and found.note == ""


def test_images_are_seen_side_by_side_and_come_back_in_their_order(network, image, monkeypatch):
    class Meeting(Rembg):
        """Goes on only when two of its images are under way."""

        name, gate = "rembg", threading.Barrier(2, timeout=60)

        def _alpha(self, image):
            self.gate.wait()
            return super()._alpha(image)

    images = [image[:, :width] for width in (60, 50, 40, 30)]
    images[1] = np.full((20, 30, 3), 90, np.uint8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = loaded(str(network))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    meeting = Meeting(model=str(network))
    meeting.load("cpu")
    assert [found.note for found in meeting.segment(images)] == ["", "flat_map", "", ""]
    for ours, expected in zip(meeting.segment(images), alone.segment(images), strict=True):
        np.testing.assert_array_equal(ours.masks, expected.masks)


def test_missing_weights_without_network_are_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there: refused at once
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(FileNotFoundError) as caught:
        Rembg().load("cpu")
    for word in ("u2net.onnx", str(tmp_path), "U2NET_HOME", "internet", "rembg:/path/file.onnx", "grabcut", "whole"):
        assert word in str(caught.value)


def test_missing_weights_are_one_sentence_before_anything_starts(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "photos", [GOOD])
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    place = ["--input", str(tmp_path / "photos"), "--output", str(tmp_path / "run")]
    assert main(["label", "kmeans", *place]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(
        "raypipe: rembg: u2net.onnx is not on this machine and could not be fetched (127.0.0.1 cannot"
    )
    for word in ("--foreground grabcut", "`raypipe weights rembg --to DIR`", f"{tmp_path}/u2net.onnx"):
        assert word in last
    assert not list((tmp_path / "run").rglob("*.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1",
            "is a pointer of Git LFS, not an ONNX file; run `git lfs pull`",
        ),
        (b"<html>", "is not an ONNX file: it begins with b'<html>'; fetch it again"),
        (b"", "is not an ONNX file: it begins with b''"),
    ],
)
def test_a_file_that_is_no_network_is_seen_from_afar(content, message, network, tmp_path):
    Rembg(model=str(network)).fetch()
    (tmp_path / "other.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=f"rembg: .*other.onnx {re.escape(message)}"):
        Rembg(model=str(tmp_path / "other.onnx")).fetch()


def test_a_relative_file_means_the_same_from_anywhere(network, monkeypatch):
    monkeypatch.chdir(network.parent)
    assert Rembg(model=network.name).model == str(network)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.onnx"):
        Rembg(model=str(tmp_path / "nowhere.onnx")).load("cpu")


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'u2net'"):
        Rembg(model="u2nett")


def test_models_that_need_points_or_send_images_away_are_refused():
    for model in ("sam", "withoutbg", "u2net_cloth_seg"):
        with pytest.raises(ValueError, match="unknown model"):
            Rembg(model=model)


def test_cuda_without_a_cuda_runtime_is_an_error(network):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(RuntimeError, match="onnxruntime-gpu"):
        Rembg(model=str(network)).load("cuda")


def test_without_a_cuda_runtime_it_finds_the_foreground_for_a_method_on_a_gpu(network, image):
    if Rembg().gpus:
        pytest.skip("this onnxruntime has CUDA")

    class OnGpu(PatternSegmenter):
        gpus = 1.0

        def segment(self, images, foregrounds):
            return (Segments(foreground[None]) for foreground in foregrounds)

    method = OnGpu(foreground=f"rembg:{network}")
    work = dataclasses.replace(plan_work(Label("photos", "run"), method, None), device="cuda")
    assert work.gpus == 1
    height, width = image.shape[:2]
    (row,) = Segment(work)([{"image": image, "error": "", "height": height, "width": width}])
    assert row["error"] == "" and row["foreground"].shape == (height, width)


def test_what_is_missing_is_named_without_a_look_at_the_network(network, tmp_path, monkeypatch):
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    assert Rembg().missing() == "u2net.onnx" and Rembg(model=str(network)).missing() == ""
    assert Rembg(model=str(tmp_path / "no.onnx")).missing() == str(tmp_path / "no.onnx")
    (tmp_path / "u2net.onnx").touch()
    assert Rembg().missing() == ""


def test_it_needs_no_numba_and_leaves_torch_its_threads(tmp_path):
    """Which `import rembg` does: numba compiles its mattes for most of a minute after an installation."""
    network = write_network(tmp_path / "tiny.onnx")
    code = "import sys, torch; sys.modules.update(numba=None, pymatting=None)\n"
    code += f"from raypipe.segmenters.rembg import Rembg\nRembg(model={str(network)!r}).load('cpu')\n"
    code += "print(torch.get_num_threads())"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "1"


def test_missing_weights_are_told_before_rembg_is_imported(tmp_path):
    code = "import sys; from raypipe.segmenters.rembg import Rembg\ntry: Rembg().fetch()\n"
    code += "except FileNotFoundError as error: print('_rembg' in sys.modules, error)"
    environment = os.environ | {"U2NET_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "https_proxy": "http://127.0.0.1:9"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("False rembg: u2net.onnx is not on this machine")
