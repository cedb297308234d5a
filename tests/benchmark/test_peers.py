"""raypipe beside other tools: how they are compared, those that are here, and what is said of those that are not."""

import dataclasses
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import ray
from support.tiny.rembg import write_network
from support.tiny.sam import write_model

from raypipe.benchmark import peers, processes
from raypipe.benchmark.commands import FEW, Arm, alike, compared, crops
from raypipe.benchmark.figures import QUICK, Figure
from raypipe.benchmark.plain import _ray_data
from raypipe.cli.verbs import main

TINY = dataclasses.replace(QUICK, side=96, photographs=2, peers=5)


def by_title(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.figure: figure for figure in figures}


def masks(*planes: str) -> np.ndarray:
    """Masks of one row, written as in "0110"."""
    return np.array([[[pixel == "1" for pixel in plane]] for plane in planes])


# Comparing


@pytest.mark.parametrize(
    ("others", "share", "least"),
    [
        ({"a": masks("0110", "0000"), "b": masks("1111")}, 1, 1),
        ({"a": masks("0111", "0000"), "b": masks("1111")}, 1 / 2, 2 / 3),
        ({"a": masks("0110", "1000"), "b": masks("1111")}, 1 / 2, 0),  # beside an empty one
        ({"a": masks("0110"), "b": masks("1111")}, 1 / 2, 0),  # one less
        ({"b": masks("1111")}, 1 / 2, 0),  # not found
        ({"a": masks("0110", "0000"), "b": masks("1111"), "c": masks("1111")}, 2 / 3, 0),
    ],
)
def test_masks_of_two_tools_are_compared_image_by_image(others, share, least):
    ours = {"a": masks("0110", "0000"), "b": masks("1111")}
    equal, overlap = alike("any", ours, others)
    assert equal.values == [pytest.approx(share)] and overlap.values == [pytest.approx(least)]


def test_commands_run_in_turns_on_the_same_images_and_on_a_few(tmp_path):
    """Each writes what it saw, and who came when."""
    log = tmp_path / "log"
    code = (
        "import json, os, sys; name, photos, output = sys.argv[1:]; files = sorted(os.listdir(photos));"
        f"open({str(log)!r}, 'a').write(name + str(len(files)) + ' ');"
        "json.dump([files, os.environ.get('OMP_NUM_THREADS')], open(output, 'w'))"
    )

    def command(name: str):
        return lambda photos, output: [sys.executable, "-c", code, name, photos, output]

    def found(output: str, shift: int = 0) -> dict:
        files, threads = json.loads(Path(output).read_text())
        assert threads is None  # all cores, as a user has it
        return {Path(file).stem: np.full((1, 2, 2), int(file[:4]) > shift) for file in files}

    photos, work = crops(str(tmp_path), TINY), tmp_path / "work"
    work.mkdir()
    arms = Arm("a", command("a"), found), Arm("b", command("b"), lambda output: found(output, 1))
    rows = by_title(compared("any", arms[:1], arms[1], photos, str(work), 2))
    few, all_ = f"a{FEW} a{TINY.peers}", f"b{FEW} b{TINY.peers}"
    assert log.read_text().split() == [f"a{FEW}", f"b{FEW}", *f"{few} {all_} {few} {all_}".split()]
    assert rows["share of images with equal masks, a"].values == [4 / 5]  # all but 0001
    for title in ("images per second, a", "images per second, b", "images per second: a / b", "peak memory, a"):
        assert len(rows[title].values) == 2 and min(rows[title].values) > 0
    product = np.multiply(rows["images per second: a / b"].values, rows["images per second, b"].values)
    np.testing.assert_allclose(product, rows["images per second, a"].values)


def test_images_of_a_comparison_are_all_different(tmp_path):
    folder = Path(crops(str(tmp_path), TINY))
    assert len({file.read_bytes() for file in folder.iterdir()}) == TINY.peers


def test_a_command_that_fails_passes_on_its_last_words():
    with pytest.raises(RuntimeError, match="ended with 1: .*ValueError: no luck"):
        processes.ran([sys.executable, "-c", "raise ValueError('no luck')"])


# Peers that are here


def test_rembg_gives_the_same_masks(tmp_path, monkeypatch):
    """By its command or, where that is not installed, its loop; with a tiny network in the place of U2-Net."""
    write_network(tmp_path / "u2net.onnx")
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    ours, other = peers.COMMANDS["rembg"]()
    assert [arm.name for arm in ours] == ["--local", "Ray"]
    photos, found = crops(str(tmp_path), TINY), []
    for arm in (ours[0], other):
        output = str(tmp_path / f"of {arm.name}")
        processes.ran(arm.command(photos, output))
        found.append(arm.masks(output))
    share, _ = alike("rembg", *found)
    assert share.values == [1.0] and share.note == "5 images"
    assert all(0 < mask.mean() < 1 for mask in found[1].values())


def test_the_script_on_ray_data_gives_the_same_masks(tmp_path):
    photos, run = crops(str(tmp_path), TINY), str(tmp_path / "run")
    try:
        _ray_data.main(photos, str(tmp_path / "script"))
    finally:
        ray.shutdown()
    assert main(["label", "kmeans", "--foreground", "whole", "--local", "--input", photos, "--output", run]) == 0
    (arm,), script = peers.COMMANDS["ray-data"]()
    equal, overlap = alike("ray-data", arm.masks(run), script.masks(str(tmp_path / "script")))
    assert equal.values == overlap.values == [1.0] and equal.note == "5 images"


@pytest.mark.slow
def test_transformers_pipeline_is_measured_with_the_same_network(tmp_path):
    import torch
    from transformers import SamImageProcessor, SamModel

    folder = write_model(tmp_path / "sam")
    network = SamModel.from_pretrained(folder)
    with torch.no_grad():  # sure of itself, and of where its masks end
        network.mask_decoder.iou_prediction_head.proj_out.bias.fill_(0.95)
        for head in network.mask_decoder.output_hypernetworks_mlps:
            head.proj_out.weight *= 1000
    network.save_pretrained(folder)
    SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    sizes = dataclasses.replace(TINY, photographs=1)
    rows = by_title(peers.measure("mask-generation", sizes, str(tmp_path), weights=str(folder)))
    assert rows["masks per image, ours"].values[0] > 0 and rows["masks per image, transformers' pipeline"].values[0] > 0
    assert 0 <= rows["least best IoU with the peer's masks"].values[0] <= 1
    case = "images per second, 16 x 16 prompts"
    assert rows[f"{case}: ours / transformers' pipeline"].values[0] > 0


def test_our_eigenvectors_are_those_of_a_dense_solver():
    features = np.random.default_rng(0).normal(size=(120, 5)).astype(np.float32)
    vectors = peers._eigenvectors(features)
    weights = peers._affinity(features).double().numpy()
    root = np.sqrt(weights.sum(1))
    _, exact = np.linalg.eigh(weights / root / root[:, None])
    np.testing.assert_allclose(np.abs((vectors * exact[:, ::-1][:, : peers.EIGENVECTORS]).sum(0)), 1, atol=1e-6)
    assert peers._residual(features, vectors) < 1e-5 < peers._residual(features, np.eye(120)[:, :3])


# Peers that are not


def test_peers_that_are_not_here_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    found = {name: peers.measure(name, TINY, str(tmp_path)) for name in ("rembg", "mask-generation")}
    assert "raypipe weights rembg --to DIR" in found["rembg"][0].note
    assert "--weights DIR" in found["mask-generation"][0].note
    for name, module in {"segment-anything": "segment_anything", "ncut": "ncut_pytorch"}.items():
        if not find_spec(module):
            (row,) = peers.measure(name, TINY, str(tmp_path))
            assert not row.values and row.note.startswith("skipped: needs ") and "pip install" in row.note


def test_peers_are_asked_for_by_name(tmp_path, capsys):
    place = ["benchmark", "--output", str(tmp_path / "out")]
    assert main([*place, "--peers", "--only", "rembgg"]) == 2
    assert "did you mean 'rembg'" in capsys.readouterr().err
    assert main([*place, "--photos", str(tmp_path)]) == 2
    assert "--photos has no effect without --peers" in capsys.readouterr().err
    for files in ([], ["1.jpg", "2.jpg", "3.jpg", "more/4.jpg"]):
        for file in files:
            (tmp_path / "photos" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "photos" / file).touch()
        assert main([*place, "--peers", "--photos", str(tmp_path / "photos")]) == 2
        assert "--photos: expected a folder with more than 2 image files" in capsys.readouterr().err
    for option, only in (("--photos", "ncut"), ("--weights", "ray-data")):
        assert main([*place, "--peers", "--only", only, option, str(tmp_path / "photos")]) == 2
        assert f"{option} has no effect on {only}; it is for " in capsys.readouterr().err
    assert main([*place, "--peers", "--only", "mask-generation"]) == 0
    assert "| mask-generation | images per second | - | - | 0 | skipped: needs the folder" in capsys.readouterr().out
