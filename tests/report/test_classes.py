"""The page with named masks: names on objects, the classes of labels beside them, and their measure."""

import json
import re
from html import unescape

import numpy as np
import pytest
from PIL import Image
from support.browsing import open_uri
from support.layouts import write_classes
from support.shares import row, write_run

from raypipe import classes, masks
from raypipe.cli.verbs import main
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.pictures.overlay import COLOURS
from raypipe.report.report import Report, report

SIZE = (40, 60)
IGNORED = np.s_[36:, :]


def label_map(left: int, right: int) -> np.ndarray:
    """One class at the left and one at the right, background between; the last rows do not count."""
    label = np.zeros(SIZE, np.uint8)
    label[5:30, :25], label[5:30, 35:] = left, right
    label[IGNORED] = 255
    return label


def named(key: str, label: np.ndarray, names: dict[int, str]) -> dict:
    found = masks.encode_segments(np.stack([label == i for i in names]), labels=[*names.values()])
    return row(key, height=SIZE[0], width=SIZE[1], segments=found)


@pytest.fixture
def animals(tmp_path):
    """Two images of a cat and a dog; in the second one the run takes them for one another, under other spellings."""
    for name, label in (("right", label_map(1, 2)), ("wrong", label_map(2, 1))):
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(label).save(tmp_path / f"labels/{name}.png")
    rows = [named("right.png", label_map(1, 2), {1: "wild cat", 2: "dog"})]
    rows.append(named("wrong.png", label_map(1, 2), {2: "DOG", 1: "Wild_Cat"}))
    write_run(tmp_path / "run", [*rows, named("other.png", label_map(1, 1), {1: "tree"})])
    return tmp_path


def page_of(folder, **options) -> str:
    report(Report((str(folder / "run"),), **options))
    return (folder / "run/report.html").read_text()


def panes_of(page: str, name: str) -> list[str]:
    card = re.search(rf'<li class="card"[^>]*data-name="{name}.*?</li>', page, re.S)[0]
    return re.split(r'<span class="pane[ "]', card)[1:]


def texts(pane: str) -> dict[str, tuple[float, float]]:
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">([^<]*)(?:<title>[^<]*</title>)?</text>', pane)
    return {unescape(text): (float(x), float(y)) for x, y, text in found}


def layer(pane: str, kind: str = "mask") -> np.ndarray:
    return np.asarray(open_uri(re.search(rf'class="{kind}" src="([^"]*)"', pane)[1]).convert("RGBA"))


def test_truth_and_masks_have_one_colour_for_a_class_and_its_name_on_its_object(animals):
    page = page_of(animals, labels=str(animals / "labels"), classes="wild cat,dog")
    found, true = panes_of(page, "right.png")
    assert (layer(found)[:30] == layer(true)[:30]).all() and (layer(true)[IGNORED] == 255).all()
    assert tuple(layer(true)[10, 10]) == (*COLOURS[0], 255) and tuple(layer(true)[10, 50]) == (*COLOURS[1], 255)
    assert texts(found) == texts(true) and texts(true).keys() == {"wild cat", "dog"}
    assert texts(true)["dog"][0] > 30 > texts(true)["wild cat"][0]
    found, true = panes_of(page, "wrong.png")
    assert texts(found)["wild cat"] == texts(true)["dog"]  # the classes' own spelling
    assert (layer(found)[10, 10] == layer(true)[10, 50]).all() and (layer(found)[10, 10] != layer(true)[10, 10]).any()
    found, _ = panes_of(page, "other.png")
    assert texts(found).keys() == {"tree"} and "no ground truth: no label" in page
    head = page[: page.index('id="cards"')]
    assert "white: pixels that do not count" in head and "whose names are written on their masks" in head


def test_the_worst_and_the_best_by_miou_can_be_sorted_after_evaluate(animals):
    options = {"labels": str(animals / "labels"), "classes": "wild cat,dog"}
    evaluate(Evaluate((str(animals / "run"),), **options))
    page = page_of(animals, **options)
    for value, order in (("", "worst"), ("-", "best")):
        assert f'<option value="{value}semantic_miou">mIoU, mean over the classes, {order} first</option>' in page
    figures = dict(re.findall(r'data-name="(\w+)\.png".*?data-figures="([^"]*)"', page, re.S))
    values = {name: json.loads(unescape(text))[0].get("semantic_miou") for name, text in figures.items()}
    assert values == {"right": 1.0, "wrong": pytest.approx(1 / 3), "other": None}
    assert "the worst and the best" not in page  # all images are on the page
    assert "How well" not in page and "how well the named masks meet the classes" in page


def test_a_data_set_brings_its_classes_and_their_other_names(tmp_path):
    label = label_map(9, 20).astype(np.int32)
    label[IGNORED] = -1
    write_classes(tmp_path, "voc2012", {"2007_1": label, "2007_2": label})
    names = [*map(classes.read("voc2012").names.__getitem__, (8, 19))]
    rows = [
        named(f"2007_{i}.jpg", label_map(9, 20), {9: names[0], 20: other})
        for i, other in ((1, "TVmonitor"), (2, "tree"))
    ]
    write_run(tmp_path / "run", rows)
    page = page_of(tmp_path, dataset="voc2012", root=str(tmp_path))
    found, true = panes_of(page, "2007_1.jpg")
    assert [*texts(found)] == [*texts(true)] == names and (layer(true)[IGNORED] == 255).all()
    assert [*texts(panes_of(page, "2007_2.jpg")[0])] == [names[0], "tree"]


def test_names_stand_on_masks_without_labels_too_and_hostile_ones_stay_text(animals):
    rows = [named(f"{i}.png", label_map(1, 2), {1: f"<b>{i}</b>", 2: "dog"}) for i in range(2)]
    write_run(animals / "hostile", rows)
    report(Report((str(animals / "hostile"),)))
    page = (animals / "hostile/report.html").read_text()
    (pane,) = panes_of(page, "1.png")
    assert texts(pane).keys() == {"<b>1</b>", "dog"} and "<b>1</b>" not in page
    write_run(animals / "same", [named(f"{i}.png", label_map(1, 2), {1: "cat", 2: "dog"}) for i in range(2)])
    report(Report((str(animals / "same"),)))
    page = (animals / "same/report.html").read_text()
    assert "<text" not in page and "written on" not in page  # the legend tells


def test_classes_without_effect_are_refused(animals, capsys):
    assert main(["report", str(animals / "run"), "--classes", "cat,dog"]) == 2
    assert "--classes has no effect without --labels or --dataset" in capsys.readouterr().err
    options = ["--labels", str(animals / "labels"), "--classes", "cat,dog", "--task", "saliency"]
    assert main(["report", str(animals / "run"), *options]) == 2
    assert "--classes has no effect: task saliency" in capsys.readouterr().err
