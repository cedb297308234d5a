"""What a sweep plans and refuses, which setting it calls best, and how its page shows it; no Ray."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tyro
from PIL import Image
from skimage.data import astronaut, chelsea, coffee, rocket
from support import tiny
from support.area import Area
from support.layouts import write_classes, write_voc
from support.sweepable import SIZE, Gamma, Levels, sweep_of, write_labelled
from support.tiny import namedmask, reco

from raypipe import images, masks, segmenters
from raypipe.cli.verbs import main
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.tasks.pattern import Pattern
from raypipe.evaluation.tasks.saliency import Saliency
from raypipe.evaluation.tasks.semantic import Semantic
from raypipe.pipeline.job import Label, check_job
from raypipe.pipeline.label import label
from raypipe.refiners.bilateral import Bilateral
from raypipe.refiners.guided import Guided
from raypipe.run import Run
from raypipe.run.rows import load
from raypipe.segmenters.gloper import Gloper
from raypipe.segmenters.kmeans import Kmeans
from raypipe.segmenters.maskclip import Maskclip
from raypipe.sweep import page
from raypipe.sweep.plan import check, draw, plan, refuse_given, settled
from raypipe.sweep.ranking import Setting, best, order, per_image, read, read_trial
from raypipe.sweep.scoring import Scorer, read_scores, score
from raypipe.sweep.search import canonical
from raypipe.sweep.trials import STORED_POST, Sweep, Trial, labelled, with_images, write_state
from raypipe.sweep.tuning import advance, count_commits, run_trial, rungs


@pytest.fixture
def folder(tmp_path):
    """A folder with six labelled photographs."""
    write_labelled(tmp_path, 6)
    return tmp_path


def command(folder: Path, *options: str, output: str = "sweep") -> int:
    places = ["--input", str(folder / "photos"), "--labels", str(folder / "labels"), "--output", str(folder / output)]
    return main(["sweep", "kmeans", *places, "--foreground", "whole", *options])


def test_lines_meet_where_the_options_are_given(folder):
    job = sweep_of(folder, "k=2,3,4", "refine_radius=1,2", search="lines")
    refuse_given(job, {"k"})
    job, *rest = settled(job, None)
    common = Trial(job, Kmeans(k=5, foreground="whole"), Guided(refine_radius=7), *rest)
    found = [tuple(each.values()) for each in draw(common, check(common))]
    assert found == [(2, 7), (3, 7), (4, 7), (5, 1), (5, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--over", "kk=2,3"], "unknown option 'kk' (value '2'); did you mean 'k'?"),
        (["--over", "k=2,many"], "option 'k': expected a whole number, got 'many'"),
        (["--over", "k=1,2"], "kmeans: k must be between 2 and 255, got 1"),
        (["--over", "k=2,3", "--k", "4"], "k is both given and swept"),
        (["--over", "threshold=0.3,0.5"], "--threshold has no effect: kmeans gives binary masks; add --refine "),
        (["--over", "refine_radius=3,4"], "'refine_radius' (value '3') has no effect without a refiner"),
        (["--over", "threshold=0.5,1.5", "--refine", "guided"], "--threshold must be at least 0 and below 1, got 1.5"),
        (["--over", "refine_radius=0,4", "--refine", "guided"], "guided: refine_radius must be at least 1, got 0"),
        (["--over", "k=2..5"], "an interval has no grid"),
        (["--over", "k=2,3", "--trials", "4"], "--trials has no effect on a grid"),
        (["--over", "k=2,3", "--search", "lines"], "--search lines has no effect on a single field"),
        (["--over", "k=2,3", "--search", "random", "--trials", "0"], "--trials must be positive, got 0"),
        (["--over", "k=2,3", "--metric", "auc"], "--metric 'auc': task 'pattern' has dice_fixed, dice_best"),
        (["--over", "k=2,3", "--limit", "0"], "--limit must be positive, got 0"),
        (["--over", "k=2,3", "--task", "patern"], "unknown task 'patern'; did you mean 'pattern'?"),
        (["--over", "k=2,3", "--device", "cuda"], "--device cuda has no effect"),
        (["--over", "refine_radius=3,4", "--refine", "guided", "--search", "asha"], "asha has nothing to stop"),
        (["--over", "foreground=whole,wohle"], "unknown foreground 'wohle'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(folder, capsys, options, message):
    given = [] if "foreground" in options[1] else ["--foreground", "whole"]
    places = ["--input", str(folder / "photos"), "--labels", str(folder / "labels"), "--output", str(folder / "sweep")]
    assert main(["sweep", "kmeans", *places, *given, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "sweep").exists()


def test_labels_that_belong_to_no_image_are_an_error(folder, capsys):
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(folder / "labels/dog.png")
    for file in (folder / "labels/wild").iterdir():
        file.unlink()
    assert command(folder, "--over", "k=2,3") == 2
    assert "has the path or the stem of an image; images are named as" in capsys.readouterr().err


def store_labels(folder: Path, make) -> None:
    """Each label stored in another way: `make` makes the file of a bool (H, W)."""
    for file in (folder / "labels").rglob("*.png"):
        make(np.asarray(Image.open(file)) >= 128).save(file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda mask: Image.fromarray(mask[::2, ::2]),
            "6 labels have another size than their image, such as 'wild/cat_",
        ),
        (lambda mask: Image.fromarray(mask & False), "no pixel of any of the labels is set"),
        (lambda mask: Image.fromarray(1 + mask.astype(np.uint8)), "which of them is the object? --label-kind"),
    ],
)
def test_labels_by_which_nothing_can_be_measured_are_said_before_anything_is_made(folder, capsys, make, message):
    store_labels(folder, make)
    assert command(folder, "--over", "k=2,3") == 2
    assert message in capsys.readouterr().err
    assert not (folder / "sweep").exists()


def test_labels_are_read_as_they_look_or_as_is_said(folder):
    trial = plan_one(folder)
    advance(trial, 6)
    expected = read_trial(trial.output, task=Pattern(), images=trial.images)[0][0].means
    store_labels(folder, lambda mask: Image.fromarray(~mask))
    ink = plan_one(folder)
    assert str(ink.labels.kind) == "ink"
    score(ink)
    assert read_trial(ink.output, task=Pattern(), images=ink.images)[0][0].means == expected
    light = plan_one(folder, label_kind="light")  # the same files, which are scored anew
    score(light)
    assert (
        read_trial(light.output, task=Pattern(), images=light.images)[0][0].means["dice_fixed"] < expected["dice_fixed"]
    )


@pytest.mark.filterwarnings("ignore:get_parser:DeprecationWarning")
def test_every_option_has_a_help_text_and_no_method_has_one_of_the_same_name():
    actions = tyro.extras.get_parser(Sweep)._actions
    texts = {action.dest: re.sub(r"\((default: .*|required|repeatable)\)", "", action.help or "") for action in actions}
    assert len(texts) > len(dataclasses.fields(Sweep)) and all(text.strip() for text in texts.values()), texts
    own = {field.name for field in dataclasses.fields(Sweep)}
    for name in segmenters.names():
        assert not own & {field.name for field in dataclasses.fields(segmenters.find(name))}, name


def test_help_without_a_method_lists_the_methods(capsys):
    assert main(["sweep", "--help"]) == 0 and main(["sweep"]) == 2
    text = capsys.readouterr().out
    assert "usage: raypipe sweep METHOD" in text and "kmeans" in text


def test_a_stopped_trial_is_never_the_best(folder):
    def setting(status, value, failed=0):
        return Setting("t", {}, status, {"dice": value}, 4, failed, 1.0, "")

    full, half, holes = setting("done", 0.5), setting("stopped", 0.9), setting("done", 0.8, failed=1)
    assert best([half, full, holes], "dice", "max") is full  # and so is one that failed on images others could do
    assert order([setting("failed", None), half, full], "dice", "max")[0] is full
    low, high = setting("done", 0.1), setting("done", 0.7)
    assert (best([high, low], "dice", "min"), best([low, high], "dice", "max")) == (low, high)
    assert best([half, setting("done", None)], "dice", "max") is None


def test_rungs_are_shares_of_the_images():
    assert [rungs(count) for count in (1, 2, 3, 8, 20)] == [[1], [1, 2], [1, 2, 3], [2, 4, 8], [5, 10, 20]]


def test_rungs_are_milestones_of_the_scheduler():
    from ray.tune.schedulers import ASHAScheduler

    for count in range(2, 200):
        found = rungs(count)
        scheduler = ASHAScheduler("images", "score", "max", max_t=count, grace_period=found[0], reduction_factor=2)
        milestones = {milestone for milestone, _ in scheduler._brackets[0]._rungs}
        assert milestones | {count} == set(found)


def test_the_mask_before_its_inverse():
    def setting(best, fixed):
        return Setting("t", {}, "done", {"dice_best": best, "dice_fixed": fixed}, 4, 0, 1.0, "")

    inverse, mask, worse = setting(0.9, 0.2), setting(0.9, 0.9), setting(0.8, 0.95)
    assert order([inverse, worse, mask], "dice_best", "max", "dice_fixed") == [mask, inverse, worse]
    assert best([inverse, mask], "dice_best", "max", "dice_fixed") is mask
    assert best([mask, inverse], "dice_fixed", "min") is inverse
    blank = dict.fromkeys(dict(Pattern.COLUMNS)) | {"status": "ok", "dice_best": 0.9}
    rows = [blank | {"k": k, "group": group, "dice_fixed": 0.1 * k} for group in "ab" for k in (2, 3)]
    chosen = page.groups(pa.Table.from_pylist(rows), ["k"], Pattern(), "dice_best", "max")
    assert [each["values"] for each in chosen] == [{"k": 3}] * 2


def test_given_options_stay_when_a_preset_is_swept(folder):
    job = sweep_of(folder, "preset=fast,paper")
    drawn = [{"preset": "fast"}, {"preset": "paper"}]

    def seeds(method, given=()):
        return [trial.segmenter.seeds for trial in plan(Trial(job, method, None, Pattern(), job.labels), drawn, given)]

    standard = [Gloper(preset=name).seeds for name in ("fast", "paper")]
    same = Gloper().seeds  # as its preset has it: only the caller knows that it was given
    assert seeds(Gloper()) == seeds(Gloper(seeds=same)) == standard != [same, same]
    assert seeds(Gloper(seeds=same), ["seeds"]) == [same, same] and seeds(Gloper(seeds=7)) == [7, 7]


def test_a_refiners_swept_preset_fills_what_was_not_given(folder):
    job = sweep_of(folder, "refine_preset=tokencut,sempart", refine="bilateral")
    drawn = [{"refine_preset": "tokencut"}, {"refine_preset": "sempart"}]

    def sigmas(refiner, given=()):
        (trial,) = plan(Trial(job, Gamma(), refiner, Pattern(), job.labels), drawn, given)
        return [(post["refine_preset"], post["refine_sigma_space"], post["refine_sigma_luma"]) for post in trial.posts]

    assert sigmas(Bilateral()) == [("tokencut", 16, 16), ("sempart", 24, 4)]
    assert sigmas(Bilateral(refine_sigma_luma=9.0)) == [("tokencut", 16, 9), ("sempart", 24, 9)]
    assert sigmas(Bilateral(refine_sigma_luma=16.0), ["refine_sigma_luma"])[1] == ("sempart", 24, 16)


def test_the_command_knows_which_options_were_given(folder, monkeypatch):
    found = {}

    def sweep(job, segmenter, refiner, *task, given):
        found["given"] = given
        raise ValueError("enough")

    monkeypatch.setattr("raypipe.sweep.sweep.sweep", sweep)
    (folder / "some.yaml").write_text("eps: 2\nthreshold: null\n")
    assert command(folder, "--over", "k=2,3", "--seed=0", "--config", str(folder / "some.yaml")) == 2
    assert {"foreground", "seed", "eps"} <= found["given"] and "threshold" not in found["given"]


def test_every_post_processing_value_is_planned_with_every_trial_and_each_checked_once(folder, monkeypatch):
    calls, right = [], check_job
    monkeypatch.setattr("raypipe.sweep.plan.check_job", lambda *given: calls.append(given) or right(*given))
    over = ("gamma=1:10:1", "threshold=0.1:0.9:0.1", "refine_radius=3,4")
    job = sweep_of(folder, *over, refine="guided")
    common = Trial(job, Gamma(), Guided(), Pattern(), job.labels)
    trials = plan(common, draw(common, check(common)))
    assert [trial.segmenter.gamma for trial in trials] == [*range(1, 11)]
    values = [(post["threshold"], post["refine_radius"]) for post in trials[9].posts]
    assert values == [(round(0.1 * i, 1), radius) for i in range(1, 10) for radius in (3, 4)]
    assert len(calls) < 10 + 18 and all(trial.posts == trials[0].posts for trial in trials)


def plan_one(folder: Path, task=None, values=(0.5,), **options):
    """A trial on all images, of which none is labelled yet."""
    job, *rest = settled(sweep_of(folder, "threshold=0.5", **options), task)
    common = Trial(job, Gamma(), None, *rest)
    return with_images(plan(common, [{"threshold": value} for value in values]), labelled(common))[0]


@pytest.mark.parametrize(("status", "reported"), [("stopped", [2, 3]), ("running", [2, 3, 6])])
def test_a_stopped_trial_reports_again_as_far_as_it_came(folder, monkeypatch, status, reported):
    trial, reports = plan_one(folder), []
    advance(trial, 3)
    write_state(trial, status=status)
    monkeypatch.setattr("ray.tune.report", reports.append)
    run_trial(trial, [2, 3, 6])
    assert [each["images"] for each in reports] == reported and all(0 < each["score"] <= 1 for each in reports)
    assert len(trial.run.commits()) == reported[-1]


def test_a_limit_takes_the_first_labelled_images_of_the_fixed_order_and_may_grow(folder):
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / "photos/alone.png")
    every = plan_one(folder)
    for limit in (2, 4, 100):
        trial = plan_one(folder, limit=limit)
        assert trial.images.equals(every.images.slice(0, limit)) and trial.output == every.output
        advance(trial, limit)
        ((setting,), _) = read_trial(trial.output, task=Pattern(), images=trial.images)
        assert (setting.status, setting.images, len(trial.run.commits())) == ("done", *[min(limit, 6)] * 2)
    ((setting,), _) = read_trial(trial.output, task=Pattern(), images=plan_one(folder, limit=2).images)
    assert setting.images == 2  # what a larger limit has seen does not count for a smaller one


def test_a_data_set_gives_its_photographs_and_labels_and_no_others(tmp_path):
    boxes = {stem: [(6, 4, 20, 12), (0, 0, 9, 9)] for stem in "abcdef"}
    write_voc(tmp_path / "VOCdevkit/VOC2007", boxes, listed="abcd")
    (tmp_path / "VOCdevkit/VOC2007/Annotations/b.xml").unlink()
    options = {"dataset": "voc07", "root": str(tmp_path), "output": str(tmp_path / "sweep")}
    job, *rest = settled(Sweep(**options, over=("gamma=1",)), None)
    assert (
        job.task == "boxes" and job.input == str(tmp_path / "VOCdevkit/VOC2007/JPEGImages") and job.split == "trainval"
    )
    common = Trial(job, Gamma(), None, *rest)
    (trial,) = with_images(plan(common, draw(common, check(common))), labelled(common))
    assert sorted(trial.images["key"].to_pylist()) == ["a.jpg", "c.jpg", "d.jpg"]
    advance(trial, 3)
    ((setting,), _) = read_trial(trial.output, task=rest[0], images=trial.images)
    expected = evaluate(Evaluate((trial.output,), dataset="voc07", root=str(tmp_path), task="boxes"))
    assert setting.means == expected.means and setting.images == 3 and 0 < setting.means["box_iou"] < 1
    (cell, *_) = page.draw_sample(trial, page.sampled_rows(trial), "corloc").values()
    assert cell["picture"] and cell["value"] is not None
    elsewhere, *_ = settled(dataclasses.replace(Sweep(**options, over=("gamma=1",)), input=str(tmp_path)), None)
    assert elsewhere.input == str(tmp_path)


def test_a_label_of_a_data_set_is_turned_like_its_photograph(tmp_path):
    exif, turned = Image.Exif(), np.zeros((40, 20), bool)
    turned[10:30, 5:9] = True
    exif[images.ORIENTATION] = 6
    pixels = np.where(turned, 220, 30).astype(np.uint8)
    for place, options in (("images/a.png", {"exif": exif}), ("ground_truth_mask/a.png", {})):
        (tmp_path / "ECSSD" / place).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "ECSSD" / place, **options)
    over, output = ("gamma=1",), str(tmp_path / "sweep")
    job, *rest = settled(Sweep(dataset="ecssd", root=str(tmp_path), output=output, over=over), Pattern())
    common = Trial(job, Gamma(), None, *rest)
    (trial,) = with_images(plan(common, draw(common, check(common))), labelled(common))
    advance(trial, 1)
    ((setting,), _) = read_trial(trial.output, task=Pattern(), images=trial.images)
    assert setting.means["iou_fixed"] == 1


def test_metric_and_goal_are_those_of_the_task_unless_told_otherwise(folder):
    job = Sweep(input="photos", labels="labels", output="sweep", over=("k=2",))
    standard, task, _ = settled(job, None)
    assert (standard.metric, standard.goal, task) == ("dice_best", "max", Pattern())
    other, task, _ = settled(dataclasses.replace(job, metric="excess"), Area(least=3))
    assert (other.task, other.goal, task) == ("area", "min", Area(least=3)) and Path(other.input).is_absolute()
    assert settled(dataclasses.replace(job, metric="excess", goal="max"), Area())[0].goal == "max"


def test_settings_and_groups_have_the_tasks_own_values(folder):
    for i in (0, 1):
        blank = np.zeros((SIZE[0], SIZE[1] + i % 3), np.uint8)
        Image.fromarray(blank).save(folder / f"labels/wild/cat_{i}.png")  # no excess, which is a ratio to the label
    trial = plan_one(folder, Area(), (0.3, 0.5, 0.7))
    advance(trial, 6)
    settings, measures = read(str(folder / "sweep"), task=Area(), images=trial.images, by="none")
    rows = measures.to_pylist()
    for setting in settings:
        chosen = [row for row in rows if f'"threshold": {setting.values["threshold"]}' in row[STORED_POST]]
        assert len(chosen) == 6 == setting.images and sum(row["excess"] is None for row in chosen) == 2
        assert setting.means["iou"] == sum(row["both"] for row in chosen) / sum(row["either"] for row in chosen)
        excess = [row["excess"] for row in chosen if row["excess"] is not None]
        assert setting.means["excess"] == pytest.approx(np.mean(excess), abs=1e-12)
    assert min(setting.means["excess"] for setting in settings) < 0
    smallest = best(settings, "excess", "min")
    assert smallest.values["threshold"] == 0.7 and best(settings, "iou", "max", "right").means["iou"] > 0.2
    table = per_image(measures, settings, ["threshold"])
    halves = pa.array(["a", "b"] * (len(table) // 2))
    table = table.set_column(table.column_names.index("group"), "group", halves)
    for group in page.groups(table, ["threshold"], Area(), "iou", "max"):
        rows = [row for row in table.to_pylist() if row["group"] == group["group"]]
        rows = [row for row in rows if row["threshold"] == group["values"]["threshold"]]
        expected = sum(row["both"] for row in rows) / sum(row["either"] for row in rows)
        assert group["means"]["iou"] == expected and group["means"].keys() == {"iou", "right"}


@pytest.mark.parametrize("refiner", [None, Guided()])
@pytest.mark.parametrize("segmenter", [Gamma(), Kmeans(foreground="whole")])
def test_measures_of_soft_masks_are_what_evaluate_gives(folder, segmenter, refiner):
    task, refine, is_soft = Saliency(f_variants=True), refiner and "guided", bool(segmenter.soft or refiner)
    job, *rest = settled(sweep_of(folder, "threshold=None,0.4", refine=refine, metric="adaptive_f"), task)
    common, values = Trial(job, segmenter, refiner, *rest), [None, 0.4] if is_soft else [None]
    trials = plan(common, [{"threshold": value} for value in values])
    (trial,) = with_images(trials, labelled(common))
    advance(trial, 6)
    settings, _ = read_trial(trial.output, task=task, images=trial.images)
    for setting, threshold in zip(settings, values, strict=True):
        output = str(folder / f"run-{threshold}")
        options = {"keep_soft": is_soft, "refine": refine, "local": True}
        label(Label(job.input, output, **options), dataclasses.replace(segmenter, threshold=threshold), refiner)
        means = evaluate(Evaluate((output,), job.labels, task="saliency"), task).means
        if segmenter.soft and refiner:  # what is refined was stored in 16 bits
            assert setting.means == pytest.approx(means, abs=1e-5)
        else:
            assert setting.means == means
        assert None not in setting.means.values()
    assert settings[0].means["f_half"] != settings[-1].means["f_half"] or not is_soft
    trial = dataclasses.replace(trial, posts=trial.posts[:1])
    cells = page.draw_sample(trial, page.sampled_rows(trial), "mae").values()
    assert len(cells) == 6 and all(cell["value"] is not None for cell in cells)


@pytest.mark.parametrize("refiner", [None, Guided()])
def test_stored_masks_of_an_exclusive_method_stay_exclusive(folder, refiner):
    values, kept = (0.0, 0.6, 0.5, 0.75), {}
    job, *rest = settled(sweep_of(folder, "threshold=0.0,0.6,0.5,0.75", refine=refiner and "guided"), Pattern())
    common = Trial(job, Levels(), refiner, *rest)
    (trial,) = with_images(plan(common, [{"threshold": value} for value in values]), labelled(common))
    advance(trial, 6)
    scorer = Scorer(trial)
    for threshold, post in zip(values, trial.posts, strict=True):
        output = str(folder / f"run-{threshold}")
        label(Label(job.input, output, refine=refiner and "guided", local=True), Levels(threshold=threshold), refiner)
        rows = {row["image_id"]: row for row in load(Run(output)).to_pylist()}
        for row in load(trial.run).to_pylist():
            ((_, found),) = scorer.labelled(row, {canonical(post)})
            size = (row["height"], row["width"])
            stored, direct = (masks.decode_segments(each["segments"], size) for each in (found, rows[row["image_id"]]))
            assert stored.sum(0).max() == 1 and (stored != direct).mean() < (1e-3 if refiner else 1e-4)
            assert stored.any((1, 2)).all() and len(row["segments"]) >= len(stored)
            kept.setdefault(threshold, []).append(len(stored))
    assert sum(kept[0.75]) < sum(kept[0.5])  # levels that are nowhere above a threshold are not there


def test_labels_of_ones_own_have_the_methods_classes_unless_others_are_named(folder):
    job = Sweep(input="photos", labels="labels", output="sweep", over=("threshold=0.5",))
    method = Maskclip(classes="a,b")
    for options, names in (({}, ("a", "b")), ({"label_classes": "b,c"}, ("b", "c"))):
        found, task, _ = settled(dataclasses.replace(job, **options), None, method)
        assert (found.task, found.metric, task.known.names) == ("semantic", "miou", names)
        assert task.options()["label_classes"] == list(names)
    assert settled(dataclasses.replace(job, task="pattern"), None, method)[1] == Pattern()
    write_classes(folder, "imagenet_s50", {"1": np.zeros((8, 8), np.int32)})
    place = {"input": None, "labels": None, "dataset": "imagenet_s50", "root": str(folder), "metric": "miou_s"}
    found, task, _ = settled(dataclasses.replace(job, **place), None, method)
    assert task.known.source == "imagenet_s50" and found.input.endswith("ImageNetS50/validation")
    with pytest.raises(ValueError, match=r"needs the classes of the labels: add --classes \(of a sweep"):
        settled(dataclasses.replace(job, task="semantic"), None, Gamma())
    with pytest.raises(ValueError, match="--classes has no effect with --dataset imagenet_s50"):
        settled(dataclasses.replace(job, label_classes="a", **place), None, method)


@pytest.mark.parametrize("refiner", [None, Guided()])
def test_twenty_thresholds_are_scored_in_one_pass_as_each_alone(folder, refiner):
    for path in (folder / "labels/wild").iterdir():  # class numbers beside the blots
        blot = np.asarray(Image.open(path)) > 0
        columns = np.broadcast_to(np.arange(blot.shape[1]) // 12, blot.shape)
        Image.fromarray(np.where(blot, 4, columns % 4).astype(np.uint8)).save(path)
    task = Semantic().of_classes("level 3,level 2,level 1,level 0")  # in another order than the method's
    over = "threshold=0:0.95:0.05"
    job, *rest = settled(sweep_of(folder, over, refine=refiner and "guided"), task, Levels())
    common = Trial(job, Levels(), refiner, *rest)
    (trial,) = with_images(plan(common, draw(common, check(common))), labelled(common))
    advance(trial, 6)
    found = {(row["image_id"], row[STORED_POST]): row for row in read_scores(trial.output, task.schema()).to_pylist()}
    assert len(found) == 6 * 20
    scorer, mious = Scorer(trial), set()
    for row in load(trial.run).to_pylist():
        label, _ = trial.labels.read(row)
        for post, alone in scorer.labelled(row, {canonical(post) for post in trial.posts}):
            expected, measured = task.cells(alone, label), found[row["image_id"], post]
            assert {name: measured[name] for name in expected} == expected and measured["status"] == "ok"
            mious.add(expected["miou"])
    assert len(mious) > 40


def test_maskclip_is_swept_over_thresholds_of_the_background_in_one_trial(tmp_path, one_thread):
    rng, photographs = np.random.default_rng(0), [coffee(), chelsea(), astronaut(), rocket()]
    labels = {str(i): np.kron(rng.integers(0, 21, (9, 12)), np.ones((8, 8), np.int32)) for i in range(4)}
    folder = write_classes(tmp_path / "data", "voc2012", labels)
    for i, photograph in enumerate(photographs):
        Image.fromarray(photograph[:288:4, :384:4]).save(folder / f"{i}.jpg")
    method = Maskclip(**tiny.options("maskclip", tmp_path / "clip") | {"short_side": 96})
    options = {"dataset": "voc2012", "root": str(tmp_path / "data")}
    sweep = Sweep(**options, output=str(tmp_path / "sweep"), over=("threshold=0:0.95:0.05",))
    job, task, source = settled(sweep, None, method)
    common = Trial(job, method, None, task, source)
    (trial,) = with_images(plan(common, draw(common, check(common))), labelled(common))
    advance(trial, 4)
    settings, _ = read_trial(trial.output, task=task, images=trial.images)
    means = {setting.values["threshold"]: setting.means for setting in settings}
    assert [*means] == [i / 20 for i in range(20)] and len({each["miou"] for each in means.values()}) > 10
    for threshold in (0.0, 0.25):
        output = str(tmp_path / f"run-{threshold}")
        label(Label(job.input, output, local=True), dataclasses.replace(method, threshold=threshold))
        direct = evaluate(Evaluate((output,), **options)).means
        # what was stored has 16 bits: a pixel or two may lie on the other side
        assert means[threshold] == pytest.approx({name: direct[name] for name in means[threshold]}, abs=1e-4)


@pytest.mark.parametrize(("name", "known"), [("reco", reco.NAMES), ("namedmask", namedmask.CLASSES)])
def test_labels_of_ones_own_are_of_the_classes_that_the_weights_name(folder, name, known, one_thread):
    for path in (folder / "labels/wild").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8) * 2).save(path)
    method = segmenters.find(name)(**tiny.options(name, folder / "weights"))
    job, task, source = settled(sweep_of(folder, "threshold=0:0.95:0.05", limit=2), None, method)
    assert task.name == "semantic" and task.known.names == known
    common = Trial(job, method, None, task, source)
    (trial,) = with_images(plan(common, draw(common, check(common))), labelled(common))
    advance(trial, 2)
    scores = read_scores(trial.output, task.schema())
    assert len(scores) == 2 * 20 and set(scores["status"].to_pylist()) == {"ok"}
    assert len(set(scores["miou"].to_pylist())) > 2


@pytest.mark.parametrize(("method", "words", "is_semantic"), [
    ("maskclip", (), True), ("reco", (), True), ("namedmask", (), True), ("maskclip", ("--task", "saliency"), False),
    ("reco", ("--dataset", "ecssd"), False), ("kmeans", (), False), ("kmeans", ("--label-classes", "cat"), True),
])  # fmt: skip
def test_what_names_its_masks_is_swept_against_classes(method, words, is_semantic, capsys):
    labels = [] if "--dataset" in words else ["--labels", "labels"]
    over = ["--output", "out", "--over", "threshold=0.2,0.4"]
    assert main(["sweep", method, *labels, *words, *over, "--print-config"]) == 0
    assert ("absent_zero: false" in capsys.readouterr().out) == is_semantic  # an option of task semantic


def test_scores_of_reco_are_swept_beside_thresholds_that_only_some_pass(folder):
    method = segmenters.find("reco")(**tiny.options("reco", folder / "weights"))
    over = ("threshold=0:0.95:0.05", "background_score=softmax100,crf,raw")
    job, task, source = settled(sweep_of(folder, *over), None, method)
    common = Trial(job, method, None, task, source)
    trials = plan(common, draw(common, check(common)))
    assert [(each.segmenter.background_score, len(each.posts)) for each in trials] == [
        ("softmax100", 20), ("crf", 20), ("raw", 20),
    ]  # fmt: skip


def test_commits_are_counted_while_trials_run(folder):
    (folder / "photos/wild/cat_0.png").write_bytes(b"nothing")
    trial = plan_one(folder)
    advance(trial, 6)
    assert count_commits([trial])()[:2] == (6, 1)


def test_pictures_are_drawn_of_the_sampled_images_only_and_failed_ones_are_empty(folder, monkeypatch):
    monkeypatch.setattr(page, "STRIP_IMAGES", 3)
    trial = plan_one(folder)
    advance(trial, 6)
    stored = page.sampled_rows(trial)
    assert [row["image_id"] for row in stored] == trial.images["image_id"].to_pylist()[:3]
    (folder / "photos" / stored[1]["key"]).write_bytes(b"another")  # changed since
    cells = list(page.draw_sample(trial, stored, "dice_best").values())
    assert cells[1] == {"picture": None, "value": None}
    assert all(cell["picture"].startswith("data:image/jpeg") and cell["value"] > 0.5 for cell in cells[::2])


def test_a_point_without_a_value_does_not_move_the_others(folder):
    means = [{"dice": 0.5, "other": 0.5}, {"dice": 0.6, "other": None}, {"dice": 0.7, "other": 0.7}]
    found = [Setting("t", {"k": k}, "done", mean, 4, 0, 1.0, "") for k, mean in zip((2, 3, 4), means, strict=True)]
    shown = {
        "title": "a",
        "verb": "label",
        "method": "a",
        "images": 4,
        "best": found[2],
        "swept": ["k"],
        "metric": "dice",
        "tie": None,
    }
    shown |= {
        "settings": found,
        "table": found,
        "curves": page.curves("k", found, found, "dice"),
        "more": [],
        "planes": [],
    }
    shown |= {"first": ["dice"], "titles": {"dice": "dice", "other": "other"}, "caution": ""}
    html = page.render(**shown, folder="a b", groups=[], strips=[], published=[], made="2026", version="1")
    points = [line.split() for line in re.findall(r'points="([^"]*)"', html)]
    width = page.PLOT[0]
    ticks = [[float(point.partition(",")[0]) for point in line] for line in points]
    assert ticks == [[0, width / 2, width], [0, width]]
    assert re.findall(r"<title>(k \S+ other .*)</title>", html) == ["k 2: other 0.5", "k 4: other 0.7"]
    assert "--config &#39;a b/best.yaml&#39; --input" in html
