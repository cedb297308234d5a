"""The rooms of the package: a file in its room is all that a new method, refiner, task or format needs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import raypipe

METHOD = '''"""The brighter pixels."""

from dataclasses import dataclass

import numpy as np

from raypipe.types import PatternSegmenter, Segments


@dataclass
class Bright(PatternSegmenter):
    """One soft mask: the image's brightness inside the foreground."""

    gain: float = 1.0  # of the brightness

    source, licence, soft = "a test", "none needed", True

    def segment(self, images, foregrounds):
        for image, foreground in zip(images, foregrounds, strict=True):
            yield Segments((image.mean(2) / 255 * self.gain * foreground).clip(0, 1)[None].astype(np.float32))


SEGMENTER = Bright
'''
REFINER = '''"""Masks turned over."""

from dataclasses import dataclass


@dataclass
class Inverted:
    """What was background."""

    refine_share: float = 1.0  # of the turn

    def __call__(self, masks, image):
        return (masks * (1 - self.refine_share) + (1 - masks) * self.refine_share).astype("float32"), "turned"


REFINER = Inverted
'''
TASK = '''"""How many labelled pixels the first mask finds."""

from dataclasses import dataclass

import pyarrow as pa

from raypipe.evaluation.task import Task, Value
from raypipe.masks import decode_rle


@dataclass(frozen=True)
class Hits(Task):
    """Recall of the first mask over all pixels of the data set."""

    least: int = 1  # pixels of a label that counts

    COLUMNS = (("hit", pa.int64()), ("pixels", pa.int64()))
    SHOWN = {"recall": Value("Recall")}
    METRIC = "recall"

    def measure(self, row, label):
        if label.sum() < self.least:
            return {}
        return {"hit": int((decode_rle(row["segments"][0]) & label).sum()), "pixels": int(label.sum())}

    def summary(self, sums):
        return {"recall": sums.total("hit") / sums.total("pixels") if sums.count("hit") else None}


TASK = Hits
'''
FORMAT = '''"""A line per image."""

from collections import Counter

ORIGINALS, CATEGORIES = False, False


def write(images, target, about):
    with target.stream("keys.txt") as file:
        file.writelines(f"{row['key']}\\\\n".encode() for row in images)
    return Counter()
'''.replace("\\\\n", "\\n")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package with one file more in four rooms, and a function that runs its command line."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(Path(raypipe.__file__).parent, folder / "raypipe", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "raypipe/segmenters/bright.py").write_text(METHOD)
    (folder / "raypipe/refiners/inverted.py").write_text(REFINER)
    (folder / "raypipe/evaluation/tasks/hits.py").write_text(TASK)
    (folder / "raypipe/export/formats/keys.py").write_text(FORMAT)
    for name in ("photos", "labels"):
        (folder / name).mkdir()
    picture = np.zeros((8, 10, 3), np.uint8)
    picture[:, 5:] = 200
    Image.fromarray(picture).save(folder / "photos/a.png")
    Image.fromarray(picture[..., 0] // 200 * 255).save(folder / "labels/a.png")

    def run(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, "-m", "raypipe", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return folder, run


def test_a_method_a_refiner_a_task_and_a_format_are_one_file_each(copy):
    folder, run = copy
    label = ["label", "bright", "--input", "photos", "--local", "--foreground", "whole", "--gain", "1.2", "--json"]
    assert json.loads(run(*label, "--output", "plain").splitlines()[-1])["labelled"] == 1
    refined = [*label, "--output", "turned", "--refine", "inverted", "--refine-share", "1"]
    assert json.loads(run(*refined).splitlines()[-1])["labelled"] == 1
    (plain,), (turned,) = (raypipe.load(str(folder / name)).to_pylist() for name in ("plain", "turned"))
    assert plain["segments"][0]["area"] == turned["segments"][0]["area"] == 40 and turned["note"] == "turned"
    evaluate = ["evaluate", "plain", "turned", "--labels", "labels", "--task", "hits", "--least", "2", "--json"]
    runs = json.loads(run(*evaluate).splitlines()[-1])["runs"]
    assert {name: found["means"] for name, found in runs.items()} == {"plain": {"recall": 1}, "turned": {"recall": 0}}
    assert "1 images with 1 segments" in run("export", "plain", "--format", "keys")
    assert (folder / "plain/export/keys/keys.txt").read_text() == "a.png\n"


def test_they_are_listed_explained_and_swept(copy):
    folder, run = copy
    assert "The brighter pixels." in run("methods")
    sweep = ["sweep", "bright", "--input", "photos", "--labels", "labels", "--foreground", "whole", "--task", "hits"]
    result = run(*sweep, "--output", "sweep", "--over", "threshold=0.2,0.9", "--json")
    swept = json.loads(result.splitlines()[-1])
    assert (swept["metric"], swept["value"], swept["best"]) == ("recall", 1.0, {"threshold": 0.2})
    run("report", "plain")
    assert "recall" in (folder / "sweep/sweep.html").read_text()
