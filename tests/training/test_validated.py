"""`raypipe train sempart --validate` from the command line to the tables, of heads that are there and in training."""

import pyarrow.parquet as pq
import pytest
import torch
from support.squares import SIZES, made, normalised, plain, plain_square, summaries
from support.tiny import sempart as tiny
from support.tiny.dino import write_model

from raypipe.cli.verbs import main
from raypipe.segmenters.sempart import network
from raypipe.training.sempart import Sempart

pytestmark = pytest.mark.usefixtures("one_thread")

SIDES = ["--image-size", "96", "--resize", "101"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "backbone"))


def validated(root, *words: str) -> int:
    return main(["train", "sempart", *SIDES, "--local", "--validate", "duts-te", "--root", str(root), *words])


def student_of(file, backbone: str):
    return Sempart(epochs=0, start_from=str(file), backbone=backbone, image_size=96, resize=101).student("cpu")


def write_published(file, photos, backbone: str, seed: int) -> None:
    """A random head as its authors store one, whose masks are about half of each image."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        head = tiny.head()
        torch.save({"segmenter_state_dict": tiny.published(head.state_dict())}, file)
        pixels = normalised([plain_square(each, 111, 96) for each in sorted(photos.iterdir())])
        for each in head.modules():
            if isinstance(each, torch.nn.BatchNorm2d):
                each.momentum = 0.9
        logits = head.train()(student_of(file, backbone).features(pixels), pixels)[1]
        head.fine.weight *= (1 + 0.5 * torch.randn_like(head.fine.weight)) / logits.std()
        head.fine.bias -= logits.median()
        head.fine.bias /= logits.std()
    torch.save({"segmenter_state_dict": tiny.published(head.state_dict()), "epoch": 20}, file)


@pytest.mark.parametrize("seed", [3, 4])
def test_a_published_head_is_measured_without_training(tmp_path, backbone, capsys, seed):
    photos, masks = made(tmp_path)
    write_published(tmp_path / "best.pth", photos, backbone, seed)
    words = ["--epochs", "0", "--start-from", str(tmp_path / "best.pth"), "--backbone", backbone]
    more = ["--filters", "none", "guided", "bilateral", "--statistics", "running", "batch"]
    assert validated(tmp_path, *words, *more, "--output", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "Sempart (re-implementation) (two_tricks, table 1)" in shown
    student = student_of(tmp_path / "best.pth", backbone)
    for (filter, statistics), row in summaries(tmp_path / "out").items():
        expected = plain(photos, masks, student, filter=filter, statistics=statistics)
        assert 0.02 < expected["iou"] < 0.98, "a degenerate mask shows nothing"
        for name in ("acc", "iou", "mae", "max_f"):
            assert row[name] == pytest.approx(expected[name], abs=1e-6), (filter, statistics, name)
    assert len(summaries(tmp_path / "out")) == 6
    assert network.read(tmp_path / "out", method="sempart")[1]["backbone"] == backbone


def test_while_training_every_epoch_is_measured_and_the_best_one_of_a_list_is_exported(tmp_path, backbone, capsys):
    photos, masks = made(tmp_path, SIZES[:6])
    (tmp_path / "mine.txt").write_text("00.jpg\n01.jpg\n03.jpg\n")
    words = ["--input", str(photos), "--backbone", backbone, "--hidden", "8", "--output", str(tmp_path / "out")]
    words += ["--epochs", "3", "--batch-size", "2", "--lr", "0.005", "--filters", "none"]
    assert validated(tmp_path, *words, "--validate-every", "1", "--select", str(tmp_path / "mine.txt")) == 0
    epochs = pq.read_table(tmp_path / "out/metrics/epochs.parquet").to_pylist()
    assert [row["epoch"] for row in epochs] == [1, 2, 3] and len({row["iou"] for row in epochs}) == 3
    best = max(epochs, key=lambda row: row["selected_iou"])
    ((_, row),) = summaries(tmp_path / "out").items()
    assert row["iou"] == pytest.approx(best["iou"], abs=1e-6)
    assert "none, running statistics" in (tmp_path / "out/training.html").read_text()


def test_a_finished_training_is_measured_on_another_data_set_by_the_same_command(tmp_path, backbone, capsys):
    photos, _ = made(tmp_path, SIZES[:4])
    made(tmp_path, SIZES[4:7], layout=("ECSSD/images", "ECSSD/ground_truth_mask"))
    words = ["train", "sempart", *SIDES, "--local", "--input", str(photos), "--backbone", backbone, "--hidden", "8"]
    words += ["--output", str(tmp_path / "out"), "--epochs", "1", "--batch-size", "2", "--root", str(tmp_path)]
    weights = set()
    for name in ("duts-te", "ecssd"):
        assert main([*words, "--validate", name]) == 0
        weights.add((tmp_path / "out/head.safetensors").read_bytes())
    assert len(weights) == 1 and "nothing to train" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out/metrics/summary").to_pylist()
    assert sorted((row["dataset"], row["ok"]) for row in rows) == [("duts-te", 4)] * 2 + [("ecssd", 3)] * 2
