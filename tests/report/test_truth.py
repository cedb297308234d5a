"""The page with ground truth: masks or boxes beside what was found, their measures, and what is said without any."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support import browsing
from support.browsing import open_uri
from support.layouts import MASKS, voc_xml, write_photos
from support.shares import row, write_run

from raypipe import masks
from raypipe.cli.verbs import main
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.pictures.layers import draw, draw_truth
from raypipe.report import measures
from raypipe.report.report import Report, report
from raypipe.run import Run
from raypipe.types import BadImage

SIZE = (10, 20)
SHARES = [0.1, 0.35, 0.45, 0.6]  # of the images 0.png to 3.png that the first run's masks cover
TRUE = 0.4  # what labels cover, from the left as well


def left(share: float) -> np.ndarray:
    return np.arange(200).reshape(SIZE) < 200 * share


def write_label(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


@pytest.fixture
def labelled(tmp_path) -> Path:
    """Two runs of seven images, `near` and `exact`; of the labels three are missing, of another size and broken."""
    others = [row(f"{name}.png") for name in ("broken", "large", "none")]
    write_run(tmp_path / "near", [*(row(f"{i}.png", [share]) for i, share in enumerate(SHARES)), *others])
    write_run(tmp_path / "exact", [*(row(f"{i}.png", [TRUE]) for i in range(4)), *others])
    for i in range(4):
        write_label(tmp_path / f"labels/{i}.png", left(TRUE))
    write_label(tmp_path / "labels/large.png", np.ones((30, 20), bool))
    (tmp_path / "labels/broken.png").write_bytes(b"no image")
    return tmp_path


def runs_of(folder: Path) -> tuple[str, str]:
    return str(folder / "near"), str(folder / "exact")


def measured(folder: Path, labels: str = "labels", **options) -> None:
    evaluate(Evaluate(runs_of(folder), str(folder / labels), task="saliency", label_kind="light", **options))


def page_of(folder: Path, **options) -> tuple[str, object]:
    options = {"labels": str(folder / "labels"), "label_kind": "light"} | options
    result = report(Report(runs_of(folder), output=str(folder / "page.html"), **options))
    return (folder / "page.html").read_text(), result


def card_of(page: str, name: str) -> str:
    return re.search(rf'<li class="card"[^>]*data-name="{name}".*?</li>', page, re.S)[0]


# Masks


def test_the_truth_stands_beside_all_runs_and_what_lacks_it_says_why(labelled):
    page, result = page_of(labelled)
    reasons = {"no label": 1, "the label has another size": 1, "the label cannot be read": 1}
    assert result.unlabelled == reasons and "1 image without ground truth: no label" in result.text()
    assert "3 of 7 images on this page have none" in unescape(page)
    for i in range(4):
        card = card_of(page, f"{i}.png")
        assert card.count('class="pane of-truth"') == 1 and card.count('class="pane"') == 2
        fill = open_uri(re.search(r'of-truth.*?class="mask" src="([^"]*)"', card, re.S)[1]).convert("RGBA")
        np.testing.assert_array_equal(np.asarray(fill)[..., 3] > 0, left(TRUE))
        assert "40 %" in card and "no ground truth" not in card
    for name, why in zip(("none", "large", "broken"), reasons, strict=True):
        assert f"no ground truth: {why}" in card_of(page, f"{name}.png")


def test_a_label_of_another_size_and_the_same_shape_is_shown_scaled(labelled):
    write_label(labelled / "labels/large.png", np.repeat(np.repeat(left(0.5), 2, 0), 2, 1))
    page, result = page_of(labelled)
    assert "the label has another size" not in result.unlabelled and "50 %" in card_of(page, "large.png")


def test_without_labels_no_word_of_truth_is_on_the_page(labelled):
    report(Report(runs_of(labelled), output=str(labelled / "page.html")))
    page = (labelled / "page.html").read_text().partition("<body>")[2].partition("<script>")[0]
    assert not re.search("truth|<kbd>t</kbd>", page, re.I)


def test_the_truth_of_a_data_set_is_that_of_its_layout(tmp_path):
    images, labels = (tmp_path / place for place in MASKS["ecssd"][0])
    write_photos(images, ["0.jpg", "1.jpg"], SIZE)
    write_label(labels / "0.png", left(TRUE))
    write_run(tmp_path / "near", [row("0.jpg"), row("1.jpg"), row("cat.jpg")])
    assert main(["report", str(tmp_path / "near"), "--dataset", "ecssd", "--root", str(tmp_path)]) == 0
    page = (tmp_path / "near/report.html").read_text()
    assert "<strong>ecssd</strong>" in page and "40 %" in card_of(page, "0.jpg")
    assert "no ground truth: no label" in card_of(page, "1.jpg")
    assert "no ground truth: none of the data set" in unescape(card_of(page, "cat.jpg"))


def test_a_hostile_name_of_the_labels_stays_text(labelled):
    (labelled / "labels").rename(labelled / "<img src=x onerror=alert(1)>")
    measured(labelled, "<img src=x onerror=alert(1)>")
    page, _ = page_of(labelled, labels=str(labelled / "<img src=x onerror=alert(1)>"))
    assert "<img src=x" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;") == 2


def test_options_without_effect_and_labels_of_nothing_say_what_to_do(labelled):
    runs = runs_of(labelled)
    for options, text in (
        ({"root": "x"}, "--root has no effect without --dataset"),
        ({"label_kind": "light"}, "--label-kind has no effect without --labels or --dataset"),
        ({"box_rule": "largest_area"}, "--box-rule has no effect without --labels or --dataset"),
        ({"labels": str(labelled / "labels"), "box_rule": "largest_area"}, "without boxes; add --task boxes"),
        ({"labels": str(labelled / "labels"), "dataset": "ecssd"}, "--labels has no effect with --dataset"),
        ({"dataset": "ecssd"}, "add --root"),
    ):
        with pytest.raises(ValueError, match=text):
            report(Report(runs, **options))
    write_label(labelled / "strange/cat.png", left(TRUE))
    with pytest.raises(ValueError, match="has the path or the stem of an image of the runs"):
        page_of(labelled, labels=str(labelled / "strange"))


# Boxes


@pytest.fixture
def boxed(tmp_path) -> Path:
    """Masks of a wide flat part and of a small square of more pixels; true boxes fit one of them, or nothing."""
    mask = np.zeros((1, *SIZE), bool)
    mask[0, 0, :19] = mask[0, 1:3, 0] = True  # its box is 19 x 3
    mask[0, 5:10, 15:20] = True
    keys = ("wide", "square", "empty", "nothing", "broken")
    rows = [row(f"{key}.png", segments=masks.encode_segments(mask)) for key in keys]
    rows[2]["segments"] = masks.encode_segments(mask & False)
    write_run(tmp_path / "near", rows)
    (tmp_path / "boxes").mkdir()
    true = {"wide": [(0, 0, 19, 3), (1, 1, 2, 2)], "square": [(15, 5, 20, 10)], "empty": [(0, 0, 9, 9)], "nothing": []}
    for key, boxes in true.items():
        (tmp_path / f"boxes/{key}.xml").write_text(voc_xml(boxes, SIZE))
    (tmp_path / "boxes/broken.xml").write_text("<annotation>")
    return tmp_path


def boxes_of(card: str) -> dict[str, list[tuple]]:
    """Left, top, right and bottom of the boxes in a card by what they are."""
    paths = re.findall(r'<path class="([\w ]+) line" d="([^"]*)"', card)
    box = re.compile(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H[\d.]+Z")
    return {kind: [tuple(map(float, sides)) for sides in box.findall(path)] for kind, path in paths}


def test_boxes_are_drawn_and_the_correct_ones_told_from_the_wrong_ones(boxed):
    options = {"labels": str(boxed / "boxes"), "task": "boxes"}
    result = report(Report((str(boxed / "near"),), **options))
    page, wide = (boxed / "near/report.html").read_text(), (0, 0, 19, 3)
    assert boxes_of(card_of(page, "wide.png")) == {"truth true": [wide, (1, 1, 2, 2)], "correct": [wide]}
    assert boxes_of(card_of(page, "square.png")) == {"truth true": [(15, 5, 20, 10)], "wrong": [wide]}
    assert boxes_of(card_of(page, "empty.png")) == {"truth true": [(0, 0, 9, 9)]}
    for name, text in (("wide", "Box correct"), ("square", "Box wrong"), ("empty", "No box: wrong")):
        assert text in card_of(page, f"{name}.png")
    assert result.unlabelled == {"the label cannot be read": 1, "no object in the label": 1}
    assert "of-truth" not in page.partition("<body>")[2].partition("<script>")[0]
    report(Report((str(boxed / "near"),), **options, box_rule="largest_area"))
    page = (boxed / "near/report.html").read_text()
    assert boxes_of(card_of(page, "square.png")) == {"truth true": [(15, 5, 20, 10)], "correct": [(15, 5, 20, 10)]}


# Measures


def test_the_worst_and_the_best_by_each_measure_are_among_the_cards(tmp_path):
    rng = np.random.default_rng(5)
    run = write_run(tmp_path / "run", [row(f"{i:03d}.png") for i in range(200)], per_part=64)
    columns = {"key": [f"{i:03d}.png" for i in range(200)], "iou": rng.random(200), "mae": rng.random(200)}
    columns["iou"][7] = np.nan
    run.folder.write_table(pa.table(columns), "metrics", "task=saliency", "a.parquet")
    table = measures.good(measures.read(run))
    chosen = {choice.key for choice in measures.choose([table], 40)}
    for name in ("iou", "mae"):
        order = [i for i in np.argsort(columns[name]) if np.isfinite(columns[name][i])]
        assert {f"{i:03d}.png" for i in (*order[:2], *order[-2:])} <= chosen, name
    assert len(chosen) <= 40 and len(measures.extremes([table], 10)) == 10
    assert measures.extremes([table.slice(0, 0)], 10) == []


def test_a_measure_is_that_against_the_labels_that_are_shown(labelled):
    for i in range(4):
        write_label(labelled / f"other/{i}.png", left(SHARES[i]))
    measured(labelled, "other")
    measured(labelled)
    for labels, iou in (("other", [1.0] * 4), ("labels", [min(s, TRUE) / max(s, TRUE) for s in SHARES])):
        page, _ = page_of(labelled, labels=str(labelled / labels) + "/")
        for i in range(4):
            figures = json.loads(unescape(re.search('data-figures="([^"]*)"', card_of(page, f"{i}.png"))[1]))
            assert figures[0]["saliency_iou"] == pytest.approx(iou[i], abs=0.02)


def test_sizes_stand_side_by_side_with_their_difference(labelled):
    for i in range(4):
        write_label(labelled / f"labels/{i}.png", left(0.22 if i < 2 else 0.62))
    measured(labelled)
    page, _ = page_of(labelled)
    (bins,) = measures.by_size([Run(run) for run in runs_of(labelled)])
    for ious, covered in zip(bins.ious, (SHARES, [TRUE] * 4), strict=True):
        slow = [min(s, t) / max(s, t) for s, t in zip(covered, [0.22, 0.22, 0.62, 0.62], strict=True)]
        assert [ious[4], ious[12]] == pytest.approx([np.mean(slow[:2]), np.mean(slow[2:])], abs=0.02)
        assert [i for i, iou in enumerate(ious) if iou is not None] == [4, 12]
    assert bins.images[0] == bins.images[1] == tuple(2 * (i in (4, 12)) for i in range(20))
    assert bins.differences[4] == bins.ious[1][4] - bins.ious[0][4] and bins.differences[5] is None
    table = unescape(re.search('<figure class="chart bins">.*?</figure>', page, re.S)[0])
    assert table.count('title="near, ') == table.count('title="exact, ') == 20
    assert f"height: {100 * bins.ious[0][12]}%" in table and f"{bins.differences[12]:+.2f}" in table


def test_sizes_of_other_labels_make_another_chart_and_one_run_has_no_difference(labelled):
    measured(labelled)
    write_label(labelled / "other/0.png", left(TRUE))
    evaluate(Evaluate((str(labelled / "near"),), str(labelled / "other"), task="saliency", label_kind="light"))
    runs = [Run(run) for run in runs_of(labelled)]
    for first, second in (("labels", "other"), ("other", "labels")):
        found = measures.by_size(runs, reference=str(labelled / first))
        assert [each.reference for each in found] == [str(labelled / name) for name in (first, second)]
        for each in found:
            is_both = each.reference.endswith("labels")
            assert bool(each.ious[1]) == is_both and bool(each.differences) == is_both
    page, _ = page_of(labelled)
    assert page.count('<figure class="chart bins">') == 2


# Pictures


def test_the_outline_lies_around_the_true_mask_and_a_picture_with_it_fits_its_bytes():
    truth = np.zeros((40, 60), bool)
    truth[10:30, 10:40] = True
    fill, lines = (np.asarray(open_uri(uri).convert("RGBA")) for uri in draw_truth(truth, (40, 60)))
    np.testing.assert_array_equal((fill == 255).all(2), truth)
    assert tuple(lines[9, 20]) == tuple(lines[8, 20]) == (255, 255, 255, 255) and tuple(lines[7, 20]) == (0, 0, 0, 150)
    assert not lines[truth].any() and not lines[5].any()
    noise = np.random.default_rng(0).random((400, 600)) > 0.5
    found = row("a.png", height=400, width=600, segments=[])
    small = draw(BadImage("fetch", "missing", "gone"), [found], truth=noise, side=480, max_bytes=20_000)
    assert small.width < 480 and small.truth and small.nbytes <= 20_000


# In a browser


@pytest.fixture(scope="module")
def browser():
    yield from browsing.started()


def test_the_truth_is_switched_by_its_key_and_measures_are_sorted_by_what_is_worst(labelled, browser):
    measured(labelled)
    page_of(labelled)
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    complaints = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto((labelled / "page.html").as_uri())

    def visible(place: str) -> list[bool]:
        script = "images => images.map(each => getComputedStyle(each).visibility === 'visible' && each.src !== '')"
        return tab.eval_on_selector_all(f"{place} img.truth", script)

    card = ".card[data-name='1.png']"
    assert visible(card) == [True] * 3
    tab.keyboard.press("t")
    assert visible(card) == [False, False, True] and tab.get_attribute("#toolbar .truths", "aria-pressed") == "false"
    tab.click(f"{card} .open")
    assert visible("#viewer") == [False, False, True]
    tab.keyboard.press("t")
    assert visible("#viewer") == [True] * 3
    tab.keyboard.press("4")
    assert visible("#viewer") == [False] * 3
    tab.keyboard.press("Escape")
    tab.select_option("#sort", label="IoU, first mask, worst first")
    script = "cards => cards.map(card => card.dataset.name)"
    assert tab.eval_on_selector_all(".card", script)[:4] == ["0.png", "3.png", "1.png", "2.png"]
    tab.select_option("#sort", label="IoU, first mask, best first")
    assert set(tab.eval_on_selector_all(".card", script)[:2]) == {"1.png", "2.png"}
    tab.close()
    assert complaints == []


@pytest.mark.parametrize("width, scheme", [(1366, "light"), (390, "dark")])
def test_the_page_with_truth_fits_the_screen(labelled, browser, width, scheme):
    measured(labelled)
    page_of(labelled)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto((labelled / "page.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tops = tab.eval_on_selector_all(".card[data-name='1.png'] .frame", "all => all.map(each => each.offsetTop)")
    assert len(tops) == 3 and len(set(tops)) == 1
    bars = tab.eval_on_selector_all(".bars i", "all => all.map(each => each.offsetHeight)")
    assert max(bars) > 20
    context.close()
