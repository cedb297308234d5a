"""Only the least trusted images go out to people, the worst first; what comes back is what they drew, to the pixel."""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support.corrected import annotation, region, stroke, task, write_coco
from support.written import masks_row, random_masks, write_run

import raypipe
from raypipe import schema
from raypipe.cli.verbs import main
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.tasks.semantic import Semantic
from raypipe.evaluation.trust import PLACE, TRUST, Trust, read, trust
from raypipe.export import doubtful
from raypipe.export.export import Export, export
from raypipe.export.formats import labelstudio, names
from raypipe.run import Run, new_attempt
from raypipe.storage import hold, open_table

KEYS = ("a/x.jpg", "b/x.jpg", "b/x.png", "b.jpg", "sub/ünï 'code' & <b>.png", "c.webp", "deep/er/c.webp")
TRUSTS = dict(zip(KEYS, (0.5, 0.1, 0.6, 0.2, 0.3, 0.9, 0.4), strict=True))
WORST = sorted(KEYS, key=TRUSTS.get)
BROKEN, EMPTY = "broken.png", "d.png"  # failed; nothing was found, and it is trusted


@pytest.fixture
def run(tmp_path) -> str:
    """Pictures of KEYS with two masks each, which are trusted as much as TRUSTS says, the second one less."""
    return write(tmp_path)


def write(folder: Path, labels: tuple[str, ...] = ()) -> str:
    rng, table, trusts = np.random.default_rng(0), [], []
    (folder / "in").mkdir()
    for i, key in enumerate((*KEYS, EMPTY)):
        size, path = (9 + i, 14 - i), folder / f"in/{i}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
        found = random_masks(rng, size, 2 * (key != EMPTY))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        table.append(masks_row(key, found, uri=str(path), sha256=sha256, labels=labels[: len(found)]))
        value = TRUSTS.get(key, 0.95)
        masks = [value, value / 2][: len(found)]
        trusts.append({"image_id": table[-1]["image_id"], "key": key, "trust": value, "masks": masks, "status": "ok"})
    table.append(masks_row(BROKEN, np.zeros((0, 1, 1)), error="decode: truncated: it ends early"))
    trusts.append({"image_id": table[-1]["image_id"], "key": BROKEN, "status": "failed"})
    made = write_run(str(folder / "run"), table)
    made.folder.write_table(pa.Table.from_pylist(trusts[::-1], schema=TRUST), *PLACE)
    return str(folder / "run")


def masks_of(run: str, keys=KEYS) -> dict[str, np.ndarray]:
    """The first mask of each image."""
    return {row["key"]: raypipe.decode(row)[0] for row in raypipe.load(run).to_pylist() if row["key"] in keys}


def tasks_of(out: Path, number: int = 1) -> list[dict]:
    return json.loads((out / f"tasks-{number:05}.json").read_text())


def dices(evaluation) -> dict[str, float]:
    table = open_table(Path(evaluation.table).read_bytes()).read(["key", "dice_fixed", "status"])
    return {row["key"]: row["dice_fixed"] for row in table.to_pylist() if row["status"] == "ok"}


def dice(one: np.ndarray, other: np.ndarray) -> float:
    total = one.sum() + other.sum()
    return 2 * (one & other).sum() / total if total else 1.0


@pytest.mark.parametrize(
    ("amount", "where", "expected"),
    [
        ("3", None, WORST[:3]),
        ("25%", None, WORST[:2]),
        ("0.1%", None, WORST[:1]),
        ("100%", None, [*WORST, EMPTY]),
        ("2", "key like 'b%'", ["b/x.jpg", "b.jpg"]),
        ("50%", "segment = 1 and mask_trust > 0.2", ["a/x.jpg", "b/x.png"]),
        ("9", "key = 'nobody'", []),
    ],
)
def test_the_least_trusted_that_match_come_first(run, tmp_path, amount, where, expected):
    out = tmp_path / "out"
    result = export(Export(run, "labelstudio", output=str(out), doubtful=amount, where=where))
    assert result.images == len(expected) and len(list(out.glob("tasks*.json"))) == bool(expected)
    found = [task["data"] for task in tasks_of(out)] if expected else []
    assert [each["key"] for each in found] == expected
    assert [each["trust"] for each in found] == [TRUSTS.get(key, 0.95) for key in expected]
    assert json.loads((out / "_export.json").read_text())["doubtful"] == amount


def test_every_format_takes_the_least_trusted_alone_and_in_their_order(run, tmp_path):
    result = export(Export(run, "coco", output=str(tmp_path / "coco"), doubtful="4"))
    content = json.loads((tmp_path / "coco/annotations.json").read_text())
    assert result.images == 4 and [image["file_name"] for image in content["images"]] == WORST[:4]
    for form in {*names()} - {"coco", "rating", "geojson", "imagenets", "camtrapdp"}:
        assert export(Export(run, form, output=str(tmp_path / form), doubtful="2")).images == 2


def test_a_task_of_cvat_shows_them_in_their_order_with_their_trust(run, tmp_path, monkeypatch):
    monkeypatch.setattr(doubtful, "MOST_TASKS", 3)
    out = tmp_path / "out"
    result = export(Export(run, "cvat", output=str(out), doubtful="7", category="coat"))
    seen = []
    for number, count in ((1, 3), (2, 3), (3, 1)):
        folder = out / f"task-{number:05}"
        content = json.loads((folder / "annotations/instances_default.json").read_text())
        pictures = sorted(path.name for path in (folder / "images").iterdir())
        assert [image["file_name"] for image in content["images"]] == pictures and len(pictures) == count
        (label,) = json.loads((folder / "labels.json").read_text())
        assert label["name"] == "coat" and [each["name"] for each in label["attributes"]] == ["trust"]
        for image in content["images"]:
            annotations = [each for each in content["annotations"] if each["image_id"] == image["id"]]
            trusts = [each["attributes"]["trust"] for each in annotations]
            assert trusts == [f"{TRUSTS[image['key']] / part:.2f}" for part in (1, 2)]
            assert image["file_name"][7:] == image["key"].replace("/", "__") + ".png" * (image["key"][-4:] != ".png")
        seen += [image["key"] for image in content["images"]]
        (line,) = [line for line in result.text().splitlines() if f"task-{number:05} && " in line]
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\n' {line.split(' && ')[1]}"], cwd=folder, capture_output=True
        )
        words = words.stdout.decode().splitlines()
        assert [f"images/{name}" for name in pictures] == words[5 : 5 + count] and words[3] == f"kmeans-{number:05}"
    assert seen == WORST


def test_12001_of_them_are_three_files():
    about = type("About", (), {"doubtful": "2%"})
    sizes = {ending: sum(1 for _ in rows) for ending, rows in doubtful.files(({} for _ in range(12_001)), about)}
    assert sizes == {"-00001": 5000, "-00002": 5000, "-00003": 2001}


def test_a_file_of_large_masks_holds_fewer_tasks(run, tmp_path, monkeypatch):
    monkeypatch.setattr(labelstudio, "MOST_BYTES", 2000)
    export(Export(run, "labelstudio", output=str(tmp_path / "out"), doubtful="7"))
    files = [tasks_of(tmp_path / "out", number) for number in range(1, 1 + len(list(tmp_path.glob("out/tasks-*"))))]
    assert [task["data"]["key"] for tasks in files for task in tasks] == WORST and 1 < len(files) < len(WORST)
    sizes = [[len(json.dumps(task)) for task in tasks] for tasks in files]
    assert all(sum(its[:-1]) <= 2000 for its in sizes) and all(sum(its) > 1900 for its in sizes[:-1])


@pytest.mark.parametrize("amount", ["2 %", "0", "0%", "101%", "-1", "few", "1.5", "", "1e3"])
def test_an_amount_that_is_none_is_refused(run, capsys, amount):
    assert main(["export", run, "--format", "csv", f"--doubtful={amount}"]) == 2
    assert "--doubtful" in (error := capsys.readouterr().err) and "such as 2%, or their number such as 500" in error


def test_a_run_without_trust_is_refused_with_the_way_out(run, capsys):
    Run(run).folder.delete(*PLACE)
    assert main(["export", run, "--format", "cvat", "--doubtful", "2%"]) == 2
    assert f"make it first: raypipe trust {run}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--doubtful", "2"], ["--where", "trust > 0.3"]])
def test_images_that_were_labelled_after_trust_was_measured_are_not_left_out_untold(run, tmp_path, capsys, words):
    made, attempt = Run(run), new_attempt()
    rows = [
        masks_row("new.jpg", random_masks(np.random.default_rng(2), (9, 14), 2)),
        masks_row("x", None, error="e: e"),
    ]
    with hold(made.folder, attempt):
        made.commit(attempt, 0, pa.Table.from_pylist(rows, schema=schema.MASKS))
        made.finish(attempt)
    assert main(["export", run, "--format", "csv", *words]) == 2
    error = capsys.readouterr().err
    assert f"1 images were labelled after its trust was measured; measure it again: raypipe trust {run}" in error


def test_what_people_drew_in_label_studio_is_what_the_run_is_measured_by(run, tmp_path):
    out, rng, masks = tmp_path / "out", np.random.default_rng(1), masks_of(run)
    export(Export(run, "labelstudio", output=str(out), doubtful="5"))
    sent, drawn, back = tasks_of(out), {}, []
    for i, each in enumerate(sent):
        key, (its,) = each["data"]["key"], each["predictions"]
        size = masks[key].shape
        if i == 0:  # accepted as it is: not a pixel is lost
            drawn[key], result = masks[key], its["result"]
        elif i == 1:  # the first mask is drawn anew, in two strokes
            one, other = random_masks(rng, size, 2)
            drawn[key] = one | other
            result = [stroke(one, "cluster 0"), stroke(other, "cluster 0"), its["result"][1]]
        elif i == 2:  # nothing is there
            drawn[key], result = np.zeros(size, bool), []
        elif i == 3:  # a rectangle over the left half
            value = {"x": 0, "y": 0, "width": 50, "height": 100, "rotation": 0, "rectanglelabels": ["cluster 0"]}
            drawn[key], result = np.arange(size[1]) < size[1] / 2 - 0.5 + np.zeros((size[0], 1)), []
            result = [region("rectanglelabels", value, size)]
        else:  # skipped
            back.append(task(each["data"], annotation(its["result"], cancelled=True)))
            continue
        back.append(task(each["data"], annotation(its["result"]), annotation(result, at="2027-01-01T00:00:00Z")))
    back.append(task(sent[0]["data"] | {"key": "another/run.jpg"}, annotation([])))
    (tmp_path / "back.json").write_text(json.dumps(back))
    found = evaluate(Evaluate((run,), labels=str(tmp_path / "back.json")))
    assert dices(found) == {key: dice(masks[key], mask) for key, mask in drawn.items()} and len(drawn) == 4
    assert found.counts | {"failed": 1} == found.counts and found.unused_examples == ["another/run.jpg"]
    assert found.empty_labels == 1 and found.counts["no_label"] == len(KEYS) + 1 - 4


def test_what_cvat_gives_back_is_what_the_run_is_measured_by(run, tmp_path, monkeypatch):
    monkeypatch.setattr(doubtful, "MOST_TASKS", 3)
    out, rng, masks = tmp_path / "out", np.random.default_rng(1), masks_of(run)
    export(Export(run, "cvat", output=str(out), doubtful="7"))
    drawn, back = {}, tmp_path / "back"
    for folder in out.glob("task-*"):
        images = {}
        for image in json.loads((folder / "annotations/instances_default.json").read_text())["images"]:
            (mask,) = random_masks(rng, (image["height"], image["width"]), 1)
            drawn[image["key"]] = mask
            images[image["file_name"]] = [("cluster 1", ~mask), ("cluster 0", mask)]
        write_coco(back / folder.name / "annotations/instances_default.json", images, ["cluster 0", "cluster 1"])
    found = evaluate(Evaluate((run,), labels=str(back)))
    assert dices(found) == {key: dice(masks[key], mask) for key, mask in drawn.items()} and drawn.keys() == {*KEYS}


def test_a_label_of_another_size_is_told_and_not_measured(run, tmp_path):
    out, masks = tmp_path / "out", masks_of(run)
    export(Export(run, "labelstudio", output=str(out), doubtful="2"))
    one, other = (each["data"] for each in tasks_of(out))
    small = np.ones((3, 3), bool)
    back = [task(one | {"width": 3, "height": 3}, annotation([stroke(small)]))]
    back.append(task(other, annotation([stroke(masks[other["key"]])])))
    (tmp_path / "back.json").write_text(json.dumps(back))
    found = evaluate(Evaluate((run,), labels=str(tmp_path / "back.json")))
    assert found.examples["other_size"] == [one["key"]] and dices(found) == {other["key"]: 1.0}


def test_named_masks_come_back_as_classes(tmp_path):
    run = write(tmp_path, labels=("cat", "dog"))
    out = tmp_path / "out"
    export(Export(run, "cvat", output=str(out), doubtful="3"))
    sent = json.loads((out / "task-00001/annotations/instances_default.json").read_text())
    images = {}
    for image in sent["images"]:
        mask = np.zeros((image["height"], image["width"]), bool)
        mask[:4, :4] = True
        images[image["file_name"]] = [("dog", mask), ("cat", np.ones_like(mask))]  # the smaller one lies on top
    path = write_coco(tmp_path / "back/annotations/x.json", images, ["cat", "dog"])
    found = evaluate(Evaluate((run,), labels=str(path), task="semantic", classes="dog,cat"), Semantic())
    pixels = dict(zip(found.details["class_names"], found.details["class_pixels"], strict=True))
    every = sum(image["height"] * image["width"] for image in sent["images"])
    assert pixels == {"background": 0, "dog": 48, "cat": every - 48} and found.counts["ok"] == 3
    with pytest.raises(ValueError, match="has the label 'cat'; did you mean 'cats'"):
        evaluate(Evaluate((run,), labels=str(path), task="semantic", classes="dog,cats"), Semantic())


def test_the_loop_closes(tmp_path):
    """Trust without labels, the worst to people; what they drew tells how good others are, and mends the set."""
    rng, truth, runs = np.random.default_rng(0), {}, {name: [] for name in ("grabcut", "rembg", "tokencut")}
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "x.png")
    known = {"uri": str(tmp_path / "x.png"), "sha256": hashlib.sha256((tmp_path / "x.png").read_bytes()).hexdigest()}
    for i in range(60):
        key, mask, hard = f"{i % 3}/{i:02}.png", np.zeros((32, 32), bool), rng.random()
        mask[6 : rng.integers(16, 28), 5 : rng.integers(15, 28)] = True
        truth[key] = mask
        for table in runs.values():  # methods err on hard images, each in its own way
            shift = np.rint(rng.normal(size=2) * 6 * hard**2).astype(int)
            table.append(masks_row(key, np.roll(mask, shift, (0, 1))[None], **known))
    for name, table in runs.items():
        write_run(str(tmp_path / name), table, method=name)
    places = tuple(str(tmp_path / name) for name in runs)
    trust(Trust(places, originals=False))
    run, before = places[0], masks_of(places[0], truth)
    export(Export(run, "labelstudio", output=str(tmp_path / "out"), doubtful="30%"))
    sent = tasks_of(tmp_path / "out")
    back = [task(each["data"], annotation([stroke(truth[each["data"]["key"]], "grabcut")])) for each in sent]
    (tmp_path / "back.json").write_text(json.dumps(back))

    found = evaluate(Evaluate((run,), labels=str(tmp_path / "back.json")))
    worst = {each["data"]["key"] for each in sent}
    assert dices(found) == {key: dice(before[key], truth[key]) for key in worst} and len(worst) == 18

    trust(Trust(places, originals=False, labels=str(tmp_path / "back.json")))
    table = read(Run(run), ["key", "trust", "dice", "low", "high"]).to_pylist()
    assert all(0 <= row["low"] <= row["dice"] <= row["high"] <= 1 for row in table) and len(table) == 60
    rising = [row["dice"] for row in sorted(table, key=lambda row: row["trust"])]
    assert rising == sorted(rising) and rising[0] < rising[-1]

    export(Export(run, "png", output=str(tmp_path / "final"), corrections=str(tmp_path / "back.json")))
    after = {key: np.array(Image.open(tmp_path / "final" / key)) > 0 for key in truth}
    assert all(np.array_equal(after[key], truth[key] if key in worst else before[key]) for key in truth)
    gains = {key: 1 - dice(before[key], truth[key]) for key in truth}
    raised, at_random = sum(gains[key] for key in worst), sum(gains.values()) * len(worst) / len(truth)
    assert raised > 1.5 * at_random  # than as many images would raise it that are drawn at random
