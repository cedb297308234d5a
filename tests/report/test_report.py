"""The page about a run: what is chosen for it, its figures, its safety, and how it works in a browser."""

import json
import os
import re
import shlex
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import browsing
from support.shares import row, write_run

import raypipe
from raypipe.cli import verbs as cli
from raypipe.report import words
from raypipe.report.report import Report, report
from raypipe.run import Run
from raypipe.run.rows import load, run_names
from raypipe.segmenters.kmeans import Kmeans

HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "<script>alert(1)</script>.png",
    "\" onmouseover=alert(1) x='.png",
    "{{ 7 * 7 }} ${7 * 7}.png",
    "&lt;b&gt;.png",
]


def write_photographs(folder: Path) -> None:
    """A dozen small photographs with good names, hostile ones, and two files that are none."""
    rng = np.random.default_rng(0)
    names = [*HOSTILE, *(f"animals/{i:02d}.png" for i in range(8))]
    for i, name in enumerate(names):
        pixels = rng.integers(0, 80, (60, 80, 3), np.uint8)
        pixels[10 : 20 + 3 * i, 10:60] += 150
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    (folder / "<b onclick=alert(1)>broken.png").write_bytes((folder / "animals/00.png").read_bytes()[:500])
    (folder / "broken.png").write_bytes(b"no image")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Two runs, k2 and k3, over the same photographs; k2 also has measures."""
    folder = tmp_path_factory.mktemp("report")
    write_photographs(folder / "photos")
    for name, k in (("k2", 2), ("k3", 3)):
        raypipe.label("kmeans", str(folder / "photos"), str(folder / name), foreground="whole", k=k, local=True)
    keys = raypipe.load(str(folder / "k2"))["key"]
    agreements = pa.table({"key": keys, "agreement": np.linspace(0.5, 1, len(keys))})
    trusts = pa.table({"key": keys, "trust": np.linspace(0.01, 0.99, len(keys))})
    for name, table in (("agreement", agreements), ("trust", trusts)):
        (folder / f"k2/metrics/{name}").mkdir(parents=True)
        pq.write_table(table, folder / f"k2/metrics/{name}/{name}.parquet")
    (folder / "photos/animals/07.png").unlink()
    return folder


@pytest.fixture(scope="module")
def page(labelled) -> Path:
    report(Report(runs=(str(labelled / "k2"), str(labelled / "k3")), output=str(labelled / "both.html")))
    return labelled / "both.html"


# The page


def test_the_page_names_errors_and_the_command_that_tries_them_again(labelled, capsys):
    assert cli.main(["report", str(labelled / "k2"), "--sample", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = unescape((labelled / "k2/report.html").read_text())
    assert result["images"] == 15 and result["shown"] <= 5 and result["bytes"] == os.path.getsize(result["report"])
    assert "decode: truncated" in text and "broken.png" in text
    command = shlex.split(re.search(r"<code[^>]*>(raypipe label .*?)</code>", text)[1])
    expected = ["--input", str(labelled / "photos"), "--output", str(labelled / "k2"), "--foreground", "whole"]
    assert sorted(command) == sorted(["raypipe", "label", "kmeans", *expected, "--local", "--retry-errors"])
    assert cli.main(command[1:]) in (0, 3)  # it is a command, and the images that cannot be read still cannot
    assert len(load(Run(str(labelled / "k2")))) == 15


def test_a_page_is_the_same_each_time_and_small_for_many_rows(tmp_path):
    rows = [row(f"{i:05d}.png", [0.2, 0.7]) for i in range(2000)]
    run = write_run(tmp_path / "run", rows, per_part=500)
    result = report(Report(runs=(str(run),), output=str(tmp_path / "a/b.html"), sample=50))
    assert result.shown == 50 and result.bytes < 500_000
    first = (tmp_path / "a/b.html").read_text()
    report(Report(runs=(str(run),), output=str(tmp_path / "a/b.html"), sample=50))
    assert re.sub("Made by.*", "", first) == re.sub("Made by.*", "", (tmp_path / "a/b.html").read_text())


def test_runs_without_good_rows_or_without_any_row_get_a_page(tmp_path):
    failed = write_run(tmp_path / "failed", [row("a.png", segments=[], height=0, width=0, error="fetch: io: x")])
    empty = write_run(tmp_path / "empty", [])
    report(Report(runs=(str(failed), str(empty))))
    text = (tmp_path / "failed/report.html").read_text()
    assert "has masks to show" in text and "fetch: io" in text


def test_wrong_options_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a raypipe run"):
        report(Report(runs=(str(tmp_path),)))
    with pytest.raises(ValueError, match="named twice"):
        report(Report(runs=("a", "./a")))
    with pytest.raises(ValueError, match="--sample must be positive, got 0"):
        report(Report(runs=("a",), sample=0))
    with pytest.raises(ValueError, match="--sample can be 1000 at most"):
        report(Report(runs=("a",), sample=1001))
    with pytest.raises(ValueError, match="--column has no effect without --input"):
        report(Report(runs=("a",), column="image"))
    assert cli.main(["report"]) == 2


def test_a_run_named_after_its_method_is_not_named_twice(tmp_path):
    runs = [str(write_run(tmp_path / name, [row("a.png")])) for name in ("kmeans", "other")]
    report(Report(runs=tuple(runs)))
    heads = re.findall(
        r'<p class="what">(.*?)<span class="place">', (tmp_path / "kmeans/report.html").read_text(), re.S
    )
    assert [" ".join(re.sub("<[^>]+>", " ", head).split()) for head in heads] == ["kmeans", "other kmeans"]


def test_runs_are_named_by_what_tells_them_apart():
    assert run_names(("/runs/a/coat", "/runs/b/coat/")) == ["a/coat", "b/coat"]
    assert run_names(("s3://bucket/runs/coat",)) == ["coat"]


def test_hostile_names_stay_text(page):
    text = page.read_text()
    for name in HOSTILE[:3]:
        assert name not in text
    assert "<b onclick" not in text and "onmouseover=alert(1) x='.png" not in text
    assert text.count("<script") == 1 and not re.search(r"(src|href)=\"?(https?:)?//", text)


def test_the_page_explains_its_colours_and_words(labelled):
    report(Report(runs=(str(labelled / "k3"),), output=str(labelled / "k3.html")))
    text = plain(labelled / "k3.html")
    assert "cluster 0: darkest cluster 1 cluster 2: lightest" in text and "ordered dark to light" in text
    assert "kmeans on whole images" in text
    for word in ("Overlay", "First mask", "Masks per image", "Time in the method"):
        assert re.search(f"{word} (the|how|what) ", text), word
    report(Report(runs=(str(labelled / "k2"),), output=str(labelled / "k2.html")))
    assert "Trust how far the first mask can be trusted" in plain(labelled / "k2.html")
    assert "trust, worst first" in plain(labelled / "k2.html")


def test_the_page_and_the_list_of_methods_caution_of_names(labelled, monkeypatch, capsys):
    monkeypatch.setattr(Kmeans, "caution", "Names may be wrong & offend.")
    report(Report(runs=(str(labelled / "k2"), str(labelled / "k3")), output=str(labelled / "careful.html")))
    assert (labelled / "careful.html").read_text().count('<p class="caution">Names may be wrong &amp; offend.</p>') == 2
    assert "Unlike the other: k <strong><bdi>2</bdi></strong>. <a" in (labelled / "careful.html").read_text()
    assert cli.main(["methods", "kmeans", "rembg"]) == 0
    assert capsys.readouterr().out.count("caution  Names may be wrong & offend.") == 1


def test_every_remark_of_a_method_or_refiner_is_explained():
    rooms = (Path(raypipe.__file__).parent / name for name in ("segmenters", "refiners"))
    lines = [line for room in rooms for path in room.rglob("*.py") for line in path.read_text().splitlines()]
    notes = {note for line in lines if "note" in line for note in re.findall(r'"([a-z]+_[a-z]+)"', line)}
    assert len(notes) > 5 and notes <= words.NOTES.keys()
    meaning = words.glossary({}, [], ["label_blocked:asian", "label_blocked:poor", "of_another_version"])
    assert [*meaning][len(words.VIEWS) :] == ["label_blocked"]


def test_a_measure_is_shown_with_the_mean_that_evaluate_gives_and_the_median(tmp_path):
    run = write_run(tmp_path / "kmeans", [row(f"{i}.png") for i in range(3)])
    dice = pa.table({"key": ["0.png", "1.png", "2.png"], "dice_best": [0.1, 0.7, 0.8]})
    run.folder.write_table(dice, "metrics", "task=pattern", "labels.parquet")
    report(Report(runs=(str(run),)))
    text = plain(tmp_path / "kmeans/report.html")
    assert "Dice, better polarity 0.533 mean, 0.7 median" in text
    assert "the rest of the foreground" in text


def test_what_is_odd_about_an_image_is_explained_where_it_stands(tmp_path):
    run = write_run(tmp_path / "run", [row("a.png", [0.0]), row("b.png", [0.5], note="too_small")])
    report(Report(runs=(str(run),)))
    text = unescape((tmp_path / "run/report.html").read_text())
    for word in ("empty mask", "too_small"):
        assert re.search(f'class="chip[^>]* title="(a mask without|the image or)[^>]*>(<bdi>)?{word}<', text), word


def test_one_of_anything_is_not_called_images_and_empty_columns_are_left_out(tmp_path):
    failed = row("b.png", segments=[], height=0, width=0, error="fetch: missing: gone")
    run = write_run(tmp_path / "run", [row("a.png"), failed])
    run.folder.write_json({"exit_code": 0, "seconds": 4.0}, "_runs", "20260101T000000000000Z-aaaa.json")
    report(Report(runs=(str(run),)))
    text = plain(tmp_path / "run/report.html")
    assert "1 images" not in text and "1 image" in text and "To try it again" in text
    assert "Images/s" in text and " How " not in text


def plain(page: Path) -> str:
    """The text of a page without its head, tags and script; words parted by single spaces."""
    body = page.read_text().partition("<body>")[2].partition("<script>")[0]
    return " ".join(unescape(re.sub("<[^>]+>", " ", body)).split())


# In a browser


@pytest.fixture(scope="module")
def browser():
    yield from browsing.started()


@pytest.fixture
def opened(browser, page):
    """The page of two runs, opened. At the end no script failed, no address was asked for and nothing popped up."""
    complaints = []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab = context.new_page()
    tab.on("pageerror", lambda error: complaints.append(f"script error: {error}"))
    tab.on("console", lambda message: complaints.append(f"console: {message.text}"))
    tab.on("dialog", lambda dialog: (complaints.append("a dialog opened"), dialog.dismiss()))
    tab.on("request", lambda request: request.url.startswith(("data:", "file:")) or complaints.append(request.url))
    tab.goto(page.as_uri())
    yield tab
    tab.wait_for_timeout(50)
    context.close()
    assert complaints == []


def names(tab) -> list[str]:
    return tab.eval_on_selector_all(".card:not([hidden])", "cards => cards.map(card => card.dataset.name)")


def test_filters_search_and_order_work(opened):
    everything = names(opened)
    assert len(everything) == 13 and opened.inner_text("#count") == "13 of 13"
    opened.fill("#search", "ANIMALS 0")
    assert sorted(names(opened)) == [f"animals/{i:02d}.png" for i in range(8)]
    opened.select_option("#sort", "name")
    assert names(opened) == [f"animals/{i:02d}.png" for i in range(8)]
    opened.select_option("#sort", "-share")
    shares = opened.eval_on_selector_all(
        ".card:not([hidden])", "cards => cards.map(card => JSON.parse(card.dataset.figures)[0].share)"
    )
    assert shares == sorted(shares, reverse=True) and len(set(shares)) > 4
    opened.click("#filters summary")
    for width in (420, 700, 950, 1100, 1280):  # wherever the button stands
        opened.set_viewport_size({"width": width, "height": 900})
        box = opened.locator(".panel").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    opened.fill("[data-figure=agreement][data-end=low]", "0.8")
    assert 0 < len(names(opened)) < 8 and opened.inner_text("#active").strip() == "(1)"
    opened.fill("[data-figure=agreement][data-end=low]", "2")
    assert names(opened) == [] and opened.is_visible("#nothing")
    opened.click("#reset-too")
    assert sorted(names(opened)) == sorted(everything)
    opened.click("[data-part=odd]")
    odd = names(opened)
    opened.click("[data-part=random]")
    assert set(odd) < set(everything) and len(names(opened)) == 13


def test_views_switch_for_the_page_and_for_one_image(opened):
    def seen() -> set[str]:
        script = "(card) => card.querySelectorAll('.frame')[0].querySelectorAll('img')"
        return set(
            opened.evaluate(
                f"[...({script})(document.querySelector('.card:not(:has(.gone))'))]"
                ".filter(image => getComputedStyle(image).visibility === 'visible').map(image => image.className)"
            )
        )

    wanted = {"overlay": {"original", "mask"}, "contour": {"original", "contour"}}
    wanted |= {"mask": {"mask"}, "original": {"original"}}
    for i, (view, layers) in enumerate(wanted.items(), 1):
        opened.click(f"#toolbar [data-view={view}]")
        assert seen() == layers
        opened.keyboard.press("1" if view != "overlay" else "2")
        opened.keyboard.press(str(i))
        assert seen() == layers
    opened.click(".card:not(:has(.gone)) .flip")  # from original on to overlay
    assert seen() == {"original", "mask"}
    views = opened.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.view)")
    assert sorted(set(views)) == ["original", "overlay"] and views.count("overlay") == 1


def test_the_gallery_works_by_keyboard_alone(opened):
    opened.focus("#filters summary")
    opened.keyboard.press("Tab")
    order = names(opened)
    focused = "document.activeElement.closest('.card')?.dataset.name"
    assert opened.evaluate(focused) == order[0]
    opened.keyboard.press("ArrowRight")
    assert opened.evaluate(focused) == order[1]
    opened.keyboard.press("ArrowDown")
    assert opened.evaluate(focused) == order[1 + opened.evaluate("Math.round(cards.clientWidth / 600)")]
    opened.keyboard.press("End")
    assert opened.evaluate(focused) == order[-1]
    opened.keyboard.press("Home")
    shadow = opened.evaluate("getComputedStyle(document.activeElement.closest('.card')).boxShadow")
    assert shadow != "none"
    opened.keyboard.press("Enter")
    assert opened.is_visible("#viewer") and opened.inner_text("#viewer-name") == order[0]
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("3")
    assert opened.inner_text("#viewer-name") == order[1]
    assert opened.get_attribute("#viewer-picture", "data-view") == "mask"
    opened.keyboard.press("Escape")
    opened.wait_for_selector(".card:nth-child(2):focus-within")
    assert not opened.is_visible("#viewer") and opened.evaluate(focused) == order[1]
    opened.keyboard.press("/")
    assert opened.evaluate("document.activeElement.id") == "search"


def test_the_keys_work_right_after_loading(opened):
    order = names(opened)
    opened.keyboard.press("Enter")
    assert opened.inner_text("#viewer-name") == order[0]
    opened.reload()
    for _ in range(2):
        opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    assert opened.inner_text("#viewer-name") == order[1]
    opened.reload()
    opened.keyboard.press("ArrowDown")
    assert opened.evaluate("document.activeElement.closest('.card')?.dataset.name") == order[0]
    opened.focus("#search")
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    assert not opened.is_visible("#viewer")


def test_the_words_open_where_they_are_asked_for(opened):
    assert not opened.is_visible("#words dd")
    opened.click("#explain")
    assert opened.locator("#words dd").first.is_visible()


def test_hostile_names_inject_nothing_and_are_shown_as_they_are(opened):
    shown = opened.eval_on_selector_all(".card .name", "names => names.map(name => name.textContent.trim())")
    assert set(HOSTILE) <= set(shown)
    for name in HOSTILE:
        opened.locator(".card", has_text=name).locator(".open").first.click()
        assert opened.inner_text("#viewer-name") == name
        opened.keyboard.press("Escape")
    assert opened.locator("img[src='x'], [onmouseover], [onclick], [onerror]").count() == 0
    assert opened.locator("script").count() == 1


def test_several_runs_stand_side_by_side_over_one_original(opened):
    card = opened.locator(".card:not(:has(.gone))").first
    assert card.locator(".pane-name").all_inner_texts() == ["k2", "k3"]
    heads = opened.locator(".what").all_inner_texts()
    assert [head.splitlines()[0] for head in heads] == ["k2 kmeans on whole images", "k3 kmeans on whole images"]
    sources = card.locator(".original").evaluate_all("images => images.map(image => image.src)")
    assert len(sources) == 2 and sources[0] == sources[1] != ""
    assert (
        opened.locator(".card", has=opened.locator(".gone")).locator(".name").text_content().strip() == "animals/07.png"
    )


@pytest.mark.parametrize("width, scheme", [(1366, "light"), (390, "light"), (390, "dark")])
def test_the_page_fits_the_screen_and_text_stands_out(browser, page, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.add_style_tag(content=".card { content-visibility: visible !important; }")
    cut = """[...document.querySelectorAll(".tiles *, .name, .shares *, .chips *, .facts *, .legend *, td")]
        .filter((element) => element.clientWidth && element.scrollWidth > element.clientWidth + 1)
        .map((element) => element.textContent.trim())"""
    assert tab.evaluate(cut) == []
    for text, behind in ((".lead", "body"), (".tiles dt", ".tiles div"), (".chip", ".chip"), ("nav a", "body")):
        colours = [colour(tab, text, "color"), colour(tab, behind, "backgroundColor")]
        assert contrast(*colours) >= 4.5, (text, scheme)
    context.close()


def colour(tab, selector: str, name: str) -> list[float]:
    style = tab.eval_on_selector(selector, f"element => getComputedStyle(element).{name}")
    return [int(value) / 255 for value in re.findall(r"\d+", style)[:3]]


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG 2.2's contrast ratio of two sRGB colours."""
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour] for colour in (one, other)]
    light, dark = sorted((np.dot(colour, [0.2126, 0.7152, 0.0722]) for colour in linear), reverse=True)
    return (light + 0.05) / (dark + 0.05)
