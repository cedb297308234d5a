"""The published sweeps of zero-guidance segmentation (supplement, figures 14 to 16), on networks of random weights."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import tiny
from support.sweepable import sweep_of
from support.tiny._sentences import write_sentences

from raypipe.evaluation.tasks.naming import Naming
from raypipe.segmenters.zero_guidance import SEGMENTER
from raypipe.storage import Folder
from raypipe.sweep.plan import check, draw, plan, settled
from raypipe.sweep.sweep import report
from raypipe.sweep.together import groups
from raypipe.sweep.trials import Trial, labelled, with_images
from raypipe.sweep.tuning import advance, advance_together

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = "cat,dog,grass,tree"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Options of the method and of the task."""
    folder = tmp_path_factory.mktemp("networks")
    method = tiny.options("zero_guidance", folder)
    (clip,) = {*folder.glob("clip*")}
    return method, {"sentence_model": str(write_sentences(folder / "words")), "clip": str(clip)}


@pytest.fixture
def folder(tmp_path):
    """Three photographs of coloured quarters, whose labels are their classes."""
    rng = np.random.default_rng(0)
    for name in ("photos", "labels"):
        (tmp_path / name).mkdir()
    for i in range(3):
        label = np.kron(np.array([[1, 2], [3, 4]]), np.ones((32 + 4 * i, 40), int))
        colours = rng.integers(0, 256, (5, 3))[label] + rng.integers(-20, 20, (*label.shape, 3))
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(tmp_path / f"photos/{i}.png")
        Image.fromarray(label.astype(np.uint8)).save(tmp_path / f"labels/{i}.png")
    return tmp_path


def planned(folder, networks, *over: str, search: str = "grid") -> tuple[Trial, list[Trial]]:
    """What all trials have in common, and the trials."""
    method, task = networks
    job = sweep_of(folder, *over, task="naming", label_classes=CLASSES, search=search)
    job, *rest = settled(job, Naming(**task))
    common = Trial(job, SEGMENTER(**method), None, *rest)
    trials = plan(common, draw(common, check(common)))
    common = labelled(common)
    return common, with_images(trials, common)


@pytest.fixture
def counts(monkeypatch):
    """How many images have gone through each stage so far."""
    found = Counter()

    def noted(stage: str):
        right = getattr(SEGMENTER, stage)
        return lambda self, images: found.update({stage: len(images)}) or right(self, images)

    for stage in SEGMENTER.stages:
        monkeypatch.setattr(SEGMENTER, stage, noted(stage))
    return found


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("sigma2=0.5,1,2.5,5,10", {"trees": 3, "parts_of": 3, "leaves": 15}),
        ("tau_merge=0.6,0.7,0.8,0.9,0.95", {"trees": 3, "parts_of": 3, "leaves": 3}),
        ("t_dino=0.5,0.9", {"trees": 3, "parts_of": 6, "leaves": 6}),
    ],
)
def test_what_does_not_change_is_computed_once_per_image_and_both_measures_are_told(
    over, expected, folder, networks, counts
):
    common, trials = planned(folder, networks, over)
    (group,) = groups(trials)
    advance_together(group, threads=1)
    assert counts == expected
    name = over.partition("=")[0]
    swept = report(common, [name], 0.0)
    assert swept.trials["done"] == len(trials) and {"iou_tt", "iou_st"} < {*swept.rows[0]}
    table = pq.read_table(swept.table).sort_by(name)
    values = [getattr(trial.segmenter, name) for trial in trials]
    assert table[name].to_pylist() == sorted(values)
    for metric in ("iou_tt", "iou_st"):
        assert all(0 <= value <= 1 for value in table[metric].to_pylist())
    page = Folder(common.sweep.output).read("sweep.html").decode()
    for value in values:
        for title in ("IoU, text to text, names", "IoU, segment to text, embeddings"):
            assert page.count(f"<title>{name} {value:.4g}: {title}") == 1


def test_lines_through_the_defaults_share_the_parts_and_each_has_its_curve(folder, networks, counts):
    over = {"mask_last_layers": "0:2", "sigma2": "0.5,2.5", "tau_merge": "0.6,0.8,0.9"}
    common, trials = planned(folder, networks, *map("=".join, over.items()), search="lines")
    (group,) = groups(trials)
    advance_together(group, threads=1)
    assert len(trials) == 3 + 1 + 2 and counts == {"trees": 3, "parts_of": 3, "leaves": 3 * (3 + 1)}
    swept = report(common, [*over], 0.0)
    page = Folder(common.sweep.output).read("sweep.html").decode()
    for name, values in {"mask_last_layers": (0, 1, 2), "sigma2": (0.5, 2.5), "tau_merge": (0.6, 0.8, 0.9)}.items():
        assert all(page.count(f"<title>{name} {value}: IoU, text to text, names") == 1 for value in values)
    assert swept.settings == 6


def test_an_interrupted_sweep_goes_on_with_what_is_there(folder, networks, counts):
    _, trials = planned(folder, networks, "tau_merge=0.6,0.8")
    advance(trials[0], 2)
    counts.clear()
    _, trials = planned(folder, networks, "tau_merge=0.6,0.8")
    advance_together(trials, threads=1)
    assert counts == dict.fromkeys(("trees", "parts_of", "leaves"), 3)
    assert all(len(trial.run.commits()) == 3 for trial in trials)
    counts.clear()
    _, trials = planned(folder, networks, "tau_merge=0.6,0.8", "num_parts=none,20,3")
    (group,) = groups(trials)
    advance_together(group, threads=1)
    assert counts == {"trees": 3, "parts_of": 6, "leaves": 6}  # 20 is the default, whose trials are there
