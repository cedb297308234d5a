"""The page of a sweep: words, round axes, a caution about labels, pictures that enlarge."""

import re

import numpy as np
import pytest
from support import browsing
from support.browsing import open_uri

from raypipe.evaluation.tasks.pattern import Pattern
from raypipe.pictures.overlay import jpeg
from raypipe.sweep.page import along, caution, curves, draw, render, strip
from raypipe.sweep.ranking import Setting


def setting(k: int, dice_best: float, dice_fixed: float) -> Setting:
    means = {"dice_fixed": dice_fixed, "dice_best": dice_best, "iou_fixed": 0.4, "iou_best": 0.5}
    return Setting(f"t{k}", {"k": k, "size": None}, "done", means, images=2, failed_images=0, seconds=1.0, error="")


SETTINGS = [setting(3, 0.7, 0.56), setting(4, 0.68, 0.5), setting(2, 0.63, 0.57)]


def test_a_metric_that_looks_at_the_label_says_so_and_which_setting_is_best_without():
    text = caution(SETTINGS[0], SETTINGS, ["k"], Pattern(), "dice_best")
    assert "Dice, first mask is 0.56 here; the best is 0.57 with k 2 (--metric dice_fixed)" in text
    assert "best.yaml does not hold it" in text
    assert "no setting is better" in caution(SETTINGS[2], SETTINGS, ["k"], Pattern(), "dice_best")
    assert caution(SETTINGS[0], SETTINGS, ["k"], Pattern(), "dice_fixed") == ""


def test_every_value_is_a_curve_and_a_small_one_is_not_flat():
    means = {"iou": 0.5, "corloc": 61.0, "mae": 0.05, "f": 0.6, "acc": 0.9, "max_f": 0.7, "never": None, "zero": 0.0}
    line = [Setting("t", {"k": k}, "done", {n: v and v * k for n, v in means.items()}, 4, 0, 1.0, "") for k in (1, 1.1)]
    other = Setting("t", {"k": 1, "size": 3}, "done", means, 4, 0, 1.0, "")
    found = curves("k", line, [*line, other], "corloc")
    assert [[*curve.lines] for curve in found] == [["corloc"], ["iou", "f", "acc", "max_f"], ["mae"], ["zero"]]
    assert [len(curve.others) for curve in found] == [1, 0, 0, 0]
    assert found[2].levels[-1] < 0.06 and found[2].lines["mae"] == [0.05, pytest.approx(0.055)]


def test_values_that_are_no_numbers_come_after_those_that_are():
    every = [setting(k, 0.5, 0.5) for k in (10, None, 5)]
    line = along("k", every[0], every, ["k"])
    (curve,) = curves("k", line, every, "dice_best")
    assert (curve.values, curve.ticks) == ([5, 10, None], [0, 0.5, 1])


def test_a_line_is_where_most_values_of_a_parameter_were_tried():
    values = [(1, 5), (2, 5), (3, 5), (2, 6), (2, 7)]  # lines through (2, 5)
    every = [Setting(f"t{k}{n}", {"k": k, "n": n}, "done", {"iou": k / n}, 2, 0, 1.0, "") for k, n in values]
    chosen = every[2]
    every += [Setting(f"x{k}", {"k": k, "n": 9}, "done", {"iou": None}, 0, 2, 1.0, "") for k in range(9)]
    assert [each.values for each in along("k", chosen, every, ["k", "n"])] == [{"k": k, "n": 5} for k in (1, 2, 3)]
    across = along("n", chosen, every, ["k", "n"])
    assert [each.values for each in across] == [{"k": 2, "n": n} for n in (5, 6, 7)]
    grid = [Setting("", {"k": k, "n": n}, "done", {"iou": 1.0}, 2, 0, 1.0, "") for k in (1, 2) for n in (1, 2)]
    assert [each.values for each in along("k", grid[3], grid, ["k", "n"])] == [{"k": k, "n": 2} for k in (1, 2)]
    drawn = strip("n", across, chosen, lambda setting: {"a": {"value": setting.values["n"]}})
    assert drawn["values"] == [5, 6, 7] and [cell["value"] for cell in drawn["lines"]["a"]] == [5, 6, 7]


def test_the_labels_contour_shows_on_white_and_on_black():
    image = np.zeros((80, 120, 3), np.uint8)
    image[:, 60:] = 255
    outline = np.zeros((80, 120), bool)
    outline[20:60, 20:100] = True
    found = np.zeros((0, 80, 120), bool)
    drawn = np.asarray(open_uri(draw(image, found, None, outline)))
    assert drawn[18:23, 40].max() > 200 and drawn[18:23, 80].min() < 60


@pytest.fixture
def page(tmp_path):
    picture = jpeg(np.full((30, 40, 3), 120, np.uint8), 80)
    cells = [{"picture": picture, "value": value} for value in (0.25, 0.75)]
    words = {"dice_fixed": "Dice, first mask", "dice_best": "Dice, better polarity"}
    words |= {"iou_fixed": "IoU, first mask", "iou_best": "IoU, better polarity"}
    text = render(
        title="kmeans: k",
        method="kmeans",
        verb="label",
        folder="/sweep",
        images=2,
        best=SETTINGS[0],
        swept=["k"],
        metric="dice_best",
        tie="dice_fixed",
        first=["dice_best", "dice_fixed"],
        titles=words,
        caution="mind the label",
        settings=SETTINGS,
        table=SETTINGS,
        curves=curves("k", [SETTINGS[2], SETTINGS[0], SETTINGS[1]], SETTINGS, "dice_best"),
        more=[],
        planes=[],
        groups=[],
        published=[],
        strips=[{"name": "k", "values": [2, 3], "lines": {"<b>.png": cells, "b.png": cells}}],
        made="2026-01-01T00:00:00",
        version="1",
    )
    (tmp_path / "sweep.html").write_text(text)
    return tmp_path / "sweep.html"


def test_the_page_speaks_in_words(page):
    text = page.read_text()
    shown = re.sub("<[^>]+>", " ", text.partition("<body>")[2].partition("<script>")[0])
    assert "Dice, better polarity: ranks the settings" in shown and "mind the label" in shown
    assert not re.search(r"dice_|iou_", shown)
    assert "size" in shown and "None" in shown


@pytest.fixture(scope="module")
def browser():
    yield from browsing.started()


def test_pictures_enlarge_and_the_arrows_go_on(browser, page):
    complaints, tab = [], browser.new_page(viewport={"width": 390, "height": 800})
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390 and not tab.is_visible("#viewer")
    tab.locator(".zoom").first.click()
    seen = [tab.inner_text("#viewer-name")]
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft"):
        tab.keyboard.press(key)
        seen.append(tab.inner_text("#viewer-name"))
    places = [text.partition(":")[0] for text in seen]
    assert places == ["<b>.png, k 2", "<b>.png, k 3", "b.png, k 3", "b.png, k 3", "b.png, k 2"]
    assert seen[0].endswith("Dice, better polarity 0.25")
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#viewer") and complaints == []
    tab.close()
