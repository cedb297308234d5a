"""The page of runs whose segments are named in free text: odd names, and how a reader follows one back."""

import hashlib
import re

import numpy as np
import pytest
from PIL import Image
from support import browsing
from support.shares import row, write_run

from raypipe import masks
from raypipe.report import report as page
from raypipe.report.report import Report, report
from raypipe.run import Run

ODD = ["<img src=x onerror=alert(1)>", '=HYPERLINK("http://x")', 'a "quoted" dog\'s </text><script>alert(1)</script>']
ODD += ["{{ 7 * 7 }} &lt;b&gt;", "a man standing in front of a very large and very long building by the sea, " * 3]
SIZE = (60, 90)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two photographs, of nine segments in strips and of one, and its page."""
    folder = tmp_path_factory.mktemp("names")
    strips = np.stack([np.arange(SIZE[1]) // 10 == i for i in range(9)])[:, None].repeat(SIZE[0], 1)
    table = []
    for name, found, labels in (
        ("strips.png", strips, [*ODD, "sea", "sky", "sea", "moss"]),
        ("one.png", None, ["bark"]),
    ):
        Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        found = masks.encode_segments(np.ones((1, *SIZE), bool) if found is None else found, labels=labels)
        found = [segment | {"score": 0.01 * (20 + i)} for i, segment in enumerate(found)]
        where = {"height": SIZE[0], "width": SIZE[1], "uri": str(folder / name), "sha256": digest}
        table.append(row(name, segments=found, note="label_blocked:asian" if len(found) > 1 else "", **where))
    write_run(folder / "run", table)
    report(Report((str(folder / "run"),)))
    return folder


@pytest.fixture(scope="module")
def browser():
    yield from browsing.started()


@pytest.fixture
def opened(browser, made):
    complaints, tab = [], browser.new_page(viewport={"width": 1280, "height": 800})
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("dialog", lambda dialog: (complaints.append("a dialog opened"), dialog.dismiss()))
    tab.goto((made / "run/report.html").as_uri())
    yield tab
    tab.wait_for_timeout(50)
    tab.close()
    assert complaints == []


def test_odd_names_are_texts_on_their_segments_in_the_legend_and_in_the_list(made):
    text = (made / "run/report.html").read_text()
    assert (
        text.count("<script") == 1 and "<img src=x" not in text and "49" not in re.findall(r"<text[^>]*>(.*?)<", text)
    )
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") >= 4
    assert "a name was passed over for the next best one" in text and "<bdi>label_blocked:asian</bdi> 1" in text


def test_a_reader_follows_a_name_to_its_segment_its_score_and_the_settings(opened):
    shown = opened.eval_on_selector_all(".card text", "all => all.map(text => text.firstChild.textContent)")
    assert {*ODD[:2], "sky", "bark"} <= set(shown) and any(
        text.startswith("a man") and text[-1] == "…" for text in shown
    )
    tips = opened.eval_on_selector_all(".card text title", "all => all.map(title => title.textContent)")
    assert "segment 6: sky, 600 px, score 0.26" in tips
    opened.fill("#search", "MOSS")
    assert opened.eval_on_selector_all(".card:not([hidden])", "all => all.map(card => card.dataset.name)") == [
        "strips.png"
    ]
    opened.click(".card:not([hidden]) .open")
    details = opened.locator("#viewer-details")
    lines = details.locator("dt:has(.label)").all_inner_texts()
    assert [line.split(maxsplit=1) for line in lines] == [
        [str(i), " ".join(label.split())] for i, label in enumerate([*ODD, "sea", "sky", "sea", "moss"])
    ]
    assert "600 px, score 0.26" in details.inner_text() and "image_id" in details.inner_text()
    details.get_by_role("link", name="settings").click()
    opened.wait_for_selector("#viewer", state="hidden")
    assert opened.url.endswith("#provenance")
    for _ in range(100):  # it scrolls there smoothly
        opened.wait_for_timeout(50)
        if opened.locator("#provenance").bounding_box()["y"] < 800:
            break
    else:
        pytest.fail("the page did not go to the settings")


def test_runs_of_one_method_say_in_what_they_differ(made):
    one, other = (
        Run(str(made / "run")).configuration() | {"settings": its} for its in ({"k": 2, "b": 1}, {"k": 3, "b": 1})
    )
    older = one | {"settings": {"k": 2}}
    assert page.differences([one, other, older]) == [{"k": 2}, {"k": 3}, {"k": 2}]
    assert page.differences([one, other | {"method": "watershed"}]) == [{}, {}]
