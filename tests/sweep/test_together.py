"""Trials that share the features of an image: computed once, with the rows of trials by themselves; no Ray."""

import contextlib
import dataclasses
import itertools
import typing
from collections import Counter
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.sweepable import SIZE, Staged, sweep_of, write_labelled

from raypipe import segmenters
from raypipe.run.rows import load
from raypipe.sweep.plan import check, draw, plan, settled
from raypipe.sweep.together import groups, share_stages
from raypipe.sweep.trials import Trial, labelled, read_state, with_images
from raypipe.sweep.tuning import advance, advance_together
from raypipe.types import Segmenter

STAGED = [name for name in segmenters.names() if segmenters.find(name).stages]


@pytest.fixture
def folder(tmp_path):
    """A folder with six labelled photographs."""
    write_labelled(tmp_path, 6)
    return tmp_path


def plan_staged(folder: Path, **values: tuple) -> list[Trial]:
    """Trials of a method with features, in every combination of the values; its counts go to `counts.txt`."""
    over = tuple(f"{name}={','.join(map(str, each))}" for name, each in values.items())
    job, *rest = settled(sweep_of(folder, *over), None)
    common = Trial(job, Staged(counts=str(folder / "counts.txt")), None, *rest)
    return with_images(plan(common, draw(common, check(common))), labelled(common))


def counted(folder: Path) -> Counter:
    """How often the network was loaded, the features of each image computed, and images gained, since the last call."""
    lines = (folder / "counts.txt").read_text().split()
    (folder / "counts.txt").write_text("")
    return Counter(lines)


def test_trials_that_differ_after_the_features_are_one_group(folder):
    found = groups(plan_staged(folder, power=(1, 1.1), tau=(90, 110, 120)))
    assert [[each.segmenter.tau for each in group] for group in found] == [[90, 110, 120]] * 2
    assert [[each.segmenter.power for each in group] for group in found] == [[1.0] * 3, [1.1] * 3]
    assert groups(found[0]) == found[:1]


def test_features_are_computed_once_for_all_trials_and_rows_are_as_without(folder):
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / "photos/wild/cat_0.png")  # fails before its mask
    (folder / "photos/wild/cat_1.png").write_bytes(b"nothing")
    trials = plan_staged(folder, tau=(90, 100, 7, 110, 120))
    advance_together(trials, threads=1)
    count = counted(folder)
    assert count.pop("load") == 1 and count.pop("0.000000") > 0 and count.pop("gained") == 4
    assert sorted(count.values()) == [1] * 4
    for trial in trials:
        state, run = read_state(trial.output), trial.run
        assert (state["status"], len(run.plan(trial.images))) == ("done", 0) and run.is_complete()
        alone = dataclasses.replace(trial, output=f"{trial.output}-alone", segmenter=copy(trial.segmenter))
        for name in ("features", "gained", "load"):
            vars(alone.segmenter).pop(name)
        advance(alone, 6)
        names = ["image_id", "segments", "error", "note"]
        assert load(run).select(names).equals(load(alone.run).select(names)), trial.segmenter
        assert run.configuration()["settings"] == alone.run.configuration()["settings"]
        (record,) = (run.folder.read_json("_runs", name) for name in run.folder.files("_runs") if name.startswith("2"))
        assert (record["labelled"], record["exit_code"]) == (6, 0)
        failures = Counter(error.partition(":")[0] for error in load(run)["error"].to_pylist() if error)
        assert failures == ({"segment": 5, "decode": 1} if trial.segmenter.tau == 7 else {"segment": 1, "decode": 1})


def test_features_of_an_image_that_any_trial_lacks_are_computed_once(folder):
    trials = plan_staged(folder, tau=(90, 100, 110))
    for trial, count in zip(trials, (2, 0, 5), strict=True):
        advance(trial, count)
    parts = {file: file.stat().st_mtime_ns for file in (folder / "sweep").rglob("part-*")}
    known = counted(folder)
    trials = plan_staged(folder, tau=(90, 100, 110))
    advance_together(trials, threads=1)
    count = counted(folder)
    assert known["load"] == 2 and count.pop("load") == 1 and count.pop("gained") == 6
    assert sorted(count.values()) == [1] * 6
    assert [len(trial.run.commits()) for trial in trials] == [6, 6, 6]
    assert {file: file.stat().st_mtime_ns for file in parts} == parts
    advance_together(plan_staged(folder, tau=(90, 100, 110)), threads=1)
    assert not counted(folder)


def test_each_stage_is_computed_once_for_all_that_agree_on_what_comes_before_its_end(folder):
    advance(plan_staged(folder, gain=(0.9, 1.1), tau=(90, 100, 110))[0], 6)  # then it was interrupted
    counted(folder)
    (trials,) = groups(plan_staged(folder, gain=(0.9, 1.1), tau=(90, 100, 110)))
    advance_together(trials, threads=1)
    count = counted(folder)
    assert count.pop("load") == 1 and count.pop("gained") == 2 * 6 and sorted(count.values()) == [1] * 6
    for trial in trials:
        alone = Staged(**{name: getattr(trial.segmenter, name) for name in ("tau", "gain", "counts")})
        alone.load("cpu")
        stored = load(trial.run).to_pylist()
        images = [np.asarray(Image.open(folder / "photos" / row["key"])) for row in stored]
        areas = [found.masks.sum() for found in alone.segment(images)]
        assert [row["segments"][0]["area"] for row in stored] == areas


def others(method: Segmenter, names: Sequence[str]) -> list[Segmenter]:
    """The method with another value of each of some options, one by one."""
    found, kinds = [], typing.get_type_hints(type(method))
    for name in names:
        value = getattr(method, name)
        if typing.get_origin(kinds[name]) is typing.Literal:
            values = [each for each in typing.get_args(kinds[name]) if each != value]
        elif name == "polarity":
            values = [each for each in ("global", "image", "none", "invert") if each != value]
        elif isinstance(value, bool):
            values = [not value]
        elif isinstance(value, tuple):
            values = [value[:1]]
        elif isinstance(value, str):
            values = ['["wall"]']  # a list of words
        else:
            values = [16 if value is None else value + 1 if isinstance(value, int) else value / 2 or 1.0]
        for each in values:
            with contextlib.suppress(ValueError):  # of no effect with the others
                found.append(dataclasses.replace(method, **{name: each}))
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", STAGED)
def test_options_after_a_stage_change_neither_this_nor_what_is_loaded(name, tmp_path, monkeypatch):
    method, rng = segmenters.find(name)(**tiny.options(name, tmp_path) | {"threshold": None}), np.random.default_rng(0)
    images = [rng.integers(0, 256, size, np.uint8) for size in ((48, 64, 3), (64, 48, 3))]
    images[0][10:30, 20:50] //= 4
    calls, after = [], [{*options} for options in method.stages.values()]
    assert all(later < before for before, later in itertools.pairwise(after))

    def noted(stage: str):
        right = getattr(type(method), stage)
        return lambda self, images: calls.extend([stage] * len(images)) or right(self, images)

    for stage in method.stages:
        monkeypatch.setattr(type(method), stage, noted(stage))
    for i, options in enumerate(method.stages.values()):
        before = [*method.stages][: i + 1]
        alone, together = others(method, options), others(method, options)
        lead = copy(method)
        share_stages([lead, *together])
        for one, other in zip(alone, together, strict=True):
            one.load("cpu"), other.load("cpu")
            calls.clear()
            expected = list(one.segment(images))
            assert calls.count(before[-1]) == len(images), "segment does not call the method of the stage's name"
            calls.clear()
            for each, wanted in zip(other.segment(images), expected, strict=True):
                np.testing.assert_array_equal(each.masks, wanted.masks)
                assert (list(each.scores), each.note) == (list(wanted.scores), wanted.note)
            counts = {calls.count(stage) for stage in before}
            assert counts == {len(images) if other is together[0] else 0}
            assert other.checksums() == one.checksums()
