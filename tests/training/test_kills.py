"""A training that ends before any one of its writes: the same call comes to what an undisturbed one does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.attempts import Killed, end_before
from support.toy import Toy

from raypipe.storage import Folder
from raypipe.training import record
from raypipe.training.job import Train
from raypipe.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
OF_ONE_START = ("output", "seconds", "page", "measured")  # in finished.json


@pytest.fixture
def run(tmp_path, labelled):
    """Trains into a folder: three epochs of three steps, each measured, of which the best is exported."""
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / f"photos/{i:02}.png")
    (tmp_path / "photos/bad.png").write_bytes(b"no image")
    (tmp_path / "names.txt").write_text("0\n3\n")
    options = {"input": str(tmp_path / "photos"), "select": str(tmp_path / "names.txt"), "validate_every": 1} | labelled
    options |= {"local": True, "checkpoint_steps": 2, "log_steps": 1}
    return lambda output: train(Train(output=str(output), **options), Toy(epochs=3, lr=0.05))


def left_by(output: Path) -> dict:
    """All that must not depend on when a training was interrupted."""
    finished = json.loads((output / "_runs/finished.json").read_text())
    rows = record.read(Folder(str(output))).to_pylist()
    return {
        "files": sorted(str(file.relative_to(output)) for file in output.rglob("*") if not file.name.startswith("20")),
        "exported": [(output / name).read_bytes() for name in ("head.safetensors", "config.json")],
        "log": [{name: value for name, value in row.items() if name != "seconds"} for row in rows],
        "epochs": pq.read_table(output / "metrics/epochs.parquet").to_pylist(),
        "finished": {name: value for name, value in finished.items() if name not in OF_ONE_START},
    }


@pytest.mark.slow  # a minute
def test_a_training_may_end_before_any_of_its_writes(run, tmp_path, monkeypatch):
    run(tmp_path / "straight")
    expected, output, writes = left_by(tmp_path / "straight"), tmp_path / "out", 0
    while True:
        with monkeypatch.context() as patch:
            end_before(writes, patch)
            try:
                run(output)
                break
            except Killed:
                pass
        run(output)
        assert left_by(output) == expected, f"ended before write {writes + 1}"
        shutil.rmtree(output)
        writes += 1
    assert writes > 30 and left_by(output) == expected
