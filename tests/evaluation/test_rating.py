"""Rating by people: pages in a browser, their answers, and what these come to."""

import csv
import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import browsing
from support.browsing import open_uri
from support.written import masks_row, write_run

from raypipe.cli.verbs import main
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.tasks import find
from raypipe.evaluation.tasks.rating import COLUMNS, alpha, coincidences
from raypipe.export.export import Export, export
from raypipe.export.formats import rating
from raypipe.segmenters.kmeans import Kmeans

HOSTILE = ['<b onclick="x()">', '=1+1; "a", b', "Ünï 日本\r\nzwei", "</script><img src=x>", "'"]
NAMES = ["dog", "tail of a cat", "=SUM(A1)", *HOSTILE]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Four photographs, each with two named segments, and a fifth that failed."""
    folder, table, rng = tmp_path_factory.mktemp("rated"), [], np.random.default_rng(0)
    for i in range(4):
        path = folder / f"photos/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
        found = np.zeros((2, 30, 40), bool)
        found[0, 2:20, 3:30], found[1, 29, 39] = True, True
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        table.append(masks_row(f"{i}.png", found, uri=str(path), sha256=sha256, labels=NAMES[2 * i : 2 * i + 2]))
    table.append(masks_row("broken.png", np.zeros((0, 1, 1)), error="decode: truncated: it ends early"))
    write_run(str(folder / "run"), table)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run) -> Path:
    export(Export(str(run), "rating", questions=5))
    return run / "export/rating"


def template(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "template.csv").read_bytes().decode("utf-8-sig"), newline="")))


def write(path: Path, lines: list[dict], *, delimiter: str = ",", encoding: str = "utf-8") -> None:
    path.parent.mkdir(exist_ok=True)
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, COLUMNS, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(lines)
    path.write_bytes(content.getvalue().encode(encoding))


# The pages


def test_a_run_without_names_has_no_pages(tmp_path):
    write_run(str(tmp_path / "run"), [masks_row("a.png", np.ones((2, 6, 8), bool))])
    with pytest.raises(ValueError, match="rating: no segment of the run has a name to ask about"):
        export(Export(str(tmp_path / "run"), "rating", sample=3))
    assert not (tmp_path / "run/export").exists()


def test_pages_and_the_card_of_a_dataset_caution_of_names(run, exported, tmp_path, monkeypatch):
    assert '<p class="caution">' not in (exported / "batch-1/task-1.html").read_text()
    monkeypatch.setattr(Kmeans, "caution", "Names may be wrong.")
    for form, name in (("rating", "batch-3/task-1.html"), ("hf", "README.md")):
        export(Export(str(run), form, output=str(tmp_path / form)))
        assert (tmp_path / form / name).read_text().count("Names may be wrong.") == 1


def test_each_batch_asks_the_same_in_another_order_that_never_changes(run, exported, tmp_path):
    lines = template(exported)
    assert [*lines[0]] == list(COLUMNS) and len(lines) == 3 * 8 and not any(line["score"] for line in lines)
    orders = [[(line["image_id"], line["segment"]) for line in lines if line["batch"] == batch] for batch in "123"]
    assert all(set(order) == set(orders[0]) and len(set(order)) == 8 for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [line["question"] for line in lines[:8]] == [*"12345123"] and [line["task"] for line in lines[:8]] == [
        *"11111222"
    ]
    pages = sorted(str(path.relative_to(exported)) for path in exported.rglob("*.html"))
    assert pages == [f"batch-{batch}/task-{task}.html" for batch in (1, 2, 3) for task in (1, 2)]
    content = {path.relative_to(exported): path.read_bytes() for path in exported.rglob("*.*ml")}
    again = export(Export(str(run), "rating", questions=5, output=str(tmp_path / "again")))
    assert content == {
        path.relative_to(tmp_path / "again"): path.read_bytes() for path in (tmp_path / "again").rglob("*.*ml")
    }
    assert again.left_out == {"labelling failed: decode: truncated": 1} and again.segments == 8
    export(Export(str(run), "rating", questions=5, seed=1, output=str(tmp_path / "other")))
    assert [line["image_id"] for line in template(tmp_path / "other")] != [line["image_id"] for line in lines]


def test_a_sample_has_its_own_segments_and_reads_no_other_photograph(run, tmp_path):
    for seed in (None, 1):
        result = export(Export(str(run), "rating", sample=3, raters=2, seed=seed, output=str(tmp_path / f"{seed}")))
        lines = template(tmp_path / f"{seed}")
        assert len(lines) == 6 and result.segments == 3 and result.images <= 3 and not result.left_out
    drawn = [{(line["image_id"], line["segment"]) for line in template(tmp_path / name)} for name in ("None", "1")]
    assert len(drawn[0]) == 3 and drawn[0] != drawn[1]


def test_a_segment_without_a_name_or_a_pixel_is_not_asked_about(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    sha256 = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    row = masks_row("a.png", np.ones((2, 2, 3), bool), uri=str(tmp_path / "a.png"), sha256=sha256)
    row["segments"][1] |= {"label": "gone", "area": 0}
    write_run(str(tmp_path / "run"), [row])
    assert main(["export", str(tmp_path / "run"), "--format", "rating"]) == 0
    assert template(tmp_path / "run/export/rating") == [] and not list((tmp_path / "run").rglob("*.html"))


def test_only_a_rating_has_the_options_of_a_rating(run, capsys):
    for words, message in (
        (["csv", "--raters", "2"], "--raters has no effect: csv asks nobody"),
        (["rating", "--questions", "0"], "--questions must be positive, got 0"),
        (["rating", "--category", "cat"], "--category has no effect"),
    ):
        assert main(["export", str(run), "--format", *words]) == 2
        assert message in capsys.readouterr().err


def test_the_smallest_segment_is_green_in_the_picture_of_a_large_photograph():
    image, mask = np.full((50, 60, 3), 90, np.uint8), np.zeros((1000, 1200), bool)
    mask[500, 600] = True
    red, green, blue = rating.marked(image, mask).reshape(-1, 3).T.astype(int)
    assert 0 < ((green > red + 50) & (green > blue + 20)).sum() < 20
    mask[:] = True
    assert (rating.marked(image, mask)[..., 1] > rating.marked(image, mask)[..., 0]).all()


# In a browser


@pytest.fixture(scope="module")
def browser():
    yield from browsing.started()


@pytest.fixture
def opened(browser, exported):
    """What opens a page by its name, at a phone's width or a desk's. No script failed and no address was asked for."""
    complaints, contexts = [], []

    def open_page(name: str, width: int = 1280):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, offline=True))
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: complaints.append(f"script error: {error}"))
        tab.on("console", lambda message: complaints.append(f"console: {message.text}"))
        tab.on("dialog", lambda dialog: (complaints.append("a dialog opened"), dialog.dismiss()))
        tab.on(
            "request", lambda request: request.url[:5] in ("data:", "file:", "blob:") or complaints.append(request.url)
        )
        tab.goto((exported / name).as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def saved(tab) -> tuple[str, bytes]:
    with tab.expect_download() as download:
        tab.click("#save")
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def test_three_batches_are_answered_in_pages_and_measured(run, exported, opened, tmp_path):
    """Segment i gets i % 4 in batch 1, 3 in batch 2, and the same in batch 3 but for the first, which stays open."""
    segments = sorted({(line["image_id"], line["segment"]) for line in template(exported)})
    for batch, task in itertools.product((1, 2, 3), (1, 2)):
        tab = opened(f"batch-{batch}/task-{task}.html")
        for question in tab.locator(".question").all():
            *_, image_id, segment = question.get_attribute("data-line").split(",")[:5]
            i = segments.index((image_id, segment))
            if not (batch == 3 and i == 0):
                question.locator(f"input[value='{(i % 4, 3, 3)[batch - 1]}']").check()
        name, content = saved(tab)
        (tmp_path / name).write_bytes(content)
    assert sum("missing" in path.name for path in tmp_path.iterdir()) == 1
    result = evaluate(Evaluate((str(run),), str(tmp_path)), find("rating")())
    assert result.means["score"] == pytest.approx((1.5 + 3 + 3) / 3, abs=1e-12)
    assert result.means["share_2_or_3"] == pytest.approx((0.5 + 1 + 1) / 3, abs=1e-12)
    assert result.means["open"] == 1 / 24 and result.counts["ok"] == 4 and result.counts["failed"] == 1


def test_the_keys_answer_and_what_is_missing_is_said(opened):
    tab = opened("batch-2/task-1.html", width=390)
    assert tab.inner_text("#state") == "5 of 5 missing: 1, 2, 3, 4, 5"
    for key in "30np21":
        tab.keyboard.press(key)
    assert tab.inner_text("#state") == "1 of 5 missing: 5"
    with tab.expect_download() as download:
        tab.keyboard.press("s")
    assert download.value.suggested_filename == "batch-2_task-1_1-missing.csv"
    content = Path(download.value.path()).read_bytes().decode("utf-8-sig")
    assert [line["score"] for line in csv.DictReader(io.StringIO(content, newline=""))] == ["3", "0", "2", "1", ""]
    assert tab.inner_text("#state") == "1 of 5 missing: 5; saved"
    tab.keyboard.press("0")
    assert tab.inner_text("#state") == "All 5 answered" and saved(tab)[0] == "batch-2_task-1.csv"
    tab.reload()
    assert tab.inner_text("#state") == "All 5 answered"  # kept
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.focus("#q1 input:checked")
    tab.keyboard.press("ArrowLeft")  # as in any group of radio buttons
    assert tab.locator("#q1 input:checked").get_attribute("value") == "2"


def test_hostile_names_inject_nothing_and_come_back_as_they_are(exported, opened):
    shown, lines = set(), []
    for task in (1, 2):
        tab = opened(f"batch-1/task-{task}.html")
        shown |= set(tab.eval_on_selector_all("legend bdi", "names => names.map(name => name.textContent)"))
        assert tab.locator("img[src='x'], [onclick], b").count() == 0 and tab.locator("script").count() == 1
        lines += csv.DictReader(io.StringIO(saved(tab)[1].decode("utf-8-sig"), newline=""))
        pictures = tab.eval_on_selector_all(".pictures img", "images => images.map(image => image.src)")
        assert {open_uri(picture).size for picture in pictures} == {(40, 30)}
    expected = {name.replace("\r\n", "\n") for name in NAMES}
    assert shown == expected
    assert {line["label"].removeprefix("'") for line in lines} == {name.removeprefix("'") for name in expected}
    known = [line | {"label": line["label"].replace("\r\n", "\n")} for line in template(exported)[:8]]
    assert lines == known


# Answers


def answered(folder: Path, scores: dict[int, list[str]]) -> list[dict]:
    """The lines of the template with the scores of the segments in their order, by batch."""
    lines = template(folder)
    segments = sorted({(line["image_id"], line["segment"]) for line in lines})
    for line in lines:
        line["score"] = scores[int(line["batch"])][segments.index((line["image_id"], line["segment"]))]
    return lines


def test_means_shares_and_agreement_are_those_worked_out_by_hand(run, exported, tmp_path, capsys):
    scores = {1: [*"33210321"], 2: [*"3321032", ""], 3: [*"22222222"]}
    write(tmp_path / "answers/all.csv", answered(exported, scores))
    assert main(["evaluate", str(run), "--task", "rating", "--labels", str(tmp_path / "answers"), "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    means = found["means"]
    assert means["score"] == pytest.approx((15 / 8 + 14 / 7 + 16 / 8) / 3, abs=1e-12)
    assert means["share_2_or_3"] == pytest.approx((5 / 8 + 5 / 7 + 1) / 3, abs=1e-12)
    assert means["share_0"] == pytest.approx((1 / 8 + 1 / 7 + 0) / 3, abs=1e-12)
    assert means["share_3"] == pytest.approx((3 / 8 + 3 / 7 + 0) / 3, abs=1e-12)
    assert means["open"] == pytest.approx(1 / 24, abs=1e-12)
    first, second, third = found["details"]["batches"]
    assert (first["answers"], second["answers"], second["open"], third["score"]) == (8, 7, 1, 2)
    assert [first[f"share_{n}"] for n in range(4)] == [1 / 8, 2 / 8, 2 / 8, 3 / 8]
    assert any(line.split()[:5] == ["batch", "2", "2.000", "7", "1"] for line in text.splitlines())
    units = [[int(scores[batch][i]) for batch in scores if scores[batch][i]] for i in range(8)]
    assert means["alpha"] == pytest.approx(plain_alpha(units), abs=1e-12)
    rows = {row["key"]: row for row in pq.read_table(found["table"], partitioning=None).to_pylist()}
    assert rows["0.png"]["questions"] == 2 and rows["broken.png"]["status"] == "failed"
    summary = run / "metrics/summary/task=rating" / Path(found["table"]).name
    summary = pq.read_table(summary, partitioning=None)
    assert summary["batches"][0].as_py()[1]["open"] == 1 and summary["alpha"][0].as_py() == means["alpha"]


def plain_alpha(units: list[list[int]]) -> float:
    """Krippendorff's alpha from its definition: all pairs of values within units, and among all values."""
    units = [values for values in units if len(values) > 1]
    every = [value for values in units for value in values]
    count = {level: every.count(level) for level in set(every)}

    def distance(one: int, two: int) -> float:
        low, high = min(one, two), max(one, two)
        return (sum(count.get(g, 0) for g in range(low, high + 1)) - (count[low] + count[high]) / 2) ** 2

    observed = sum(
        distance(*pair) / (len(values) - 1) for values in units for pair in itertools.permutations(values, 2)
    )
    expected = sum(distance(*pair) for pair in itertools.permutations(every, 2)) / (len(every) - 1)
    return 1 - observed / expected


def test_the_agreement_is_that_of_the_published_example():
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, 12 units."""
    observers = ["123321412___", "1233224125_3", "_3332342251_", "12332441251_"]
    units = [[int(value) - 1 for value in unit if value != "_"] for unit in zip(*observers, strict=True)]
    found = coincidences(units, 5)
    np.testing.assert_allclose(found.sum(1), [9, 13, 10, 5, 3])
    assert alpha(found) == pytest.approx(0.815, abs=5e-4) and plain_alpha(units) == pytest.approx(alpha(found))
    assert alpha(coincidences([[2, 2], [2, 2, 2]], 4)) is None and alpha(np.zeros((4, 4))) is None
    assert alpha(coincidences([[0, 0], [3, 3]], 4)) == 1


@pytest.mark.parametrize(
    ("delimiter", "encoding"),
    [(";", "utf-8-sig"), (",", "utf-8"), ("\t", "utf-16"), (";", "cp1252")],
)
def test_answers_are_read_as_spreadsheets_save_them(run, exported, tmp_path, delimiter, encoding):
    lines = answered(exported, {1: [*"33210321"], 2: ["2.0"] * 8, 3: [" 2 "] * 8})
    if encoding == "cp1252":
        lines = [line for line in lines if "日" not in line["label"]]
    write(tmp_path / "answers/Antworten.CSV", lines, delimiter=delimiter, encoding=encoding)
    with open(tmp_path / "answers/Antworten.CSV", "ab") as file:
        file.write(
            (delimiter * 6 + "\r\n").encode("utf-16-le" if encoding == "utf-16" else encoding.removesuffix("-sig"))
        )
    result = evaluate(Evaluate((str(run),), str(tmp_path / "answers/Antworten.CSV")), find("rating")())
    assert result.counts["ok"] == 4 and result.means["open"] == 0 and result.details["batches"][1]["score"] == 2


def test_two_answers_to_a_question_are_an_error_row_and_none_counts_as_open(run, exported, tmp_path):
    lines = answered(exported, {batch: ["2"] * 8 for batch in (1, 2, 3)})
    open_ones = [line | {"score": ""} for line in lines]
    write(tmp_path / "answers/a.csv", [line for line in lines if line["batch"] != "3"])
    write(tmp_path / "answers/template.csv", open_ones)
    result = evaluate(Evaluate((str(run),), str(tmp_path / "answers")), find("rating")())
    assert result.counts["ok"] == 4 and result.means["open"] == 8 / 24
    assert result.details["batches"][2]["open"] == 8 and result.means["score"] == 2
    write(tmp_path / "answers/b.csv", [lines[0] | {"score": "3"}])
    result = evaluate(Evaluate((str(run),), str(tmp_path / "answers")), find("rating")())
    assert (result.counts["ok"], result.counts["bad_label"]) == (3, 1)
    assert "question 1 of batch 1 is answered in a.csv line 2 and in b.csv line 2; keep one" in result.text()
    other = next(line for line in lines if line["image_id"] != lines[0]["image_id"])
    write(tmp_path / "answers/b.csv", [lines[0] | {"score": "3"}, other | {"score": "nine"}])
    result = evaluate(Evaluate((str(run),), str(tmp_path / "answers")), find("rating")())
    assert len(result.reasons) == result.counts["bad_label"] == 2  # each says what is wrong with it
    assert all(f"{key}: {reason}" in result.text().splitlines() for key, reason in result.reasons.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": "4"}, "expected a whole number from 0 to 3 as score, got '4'"),
        ({"score": "-1"}, "got '-1'"),
        ({"score": "good"}, "got 'good'"),
        ({"score": "2.5"}, "got '2.5'"),
        ({"batch": "one"}, "as batch, got 'one'"),
        ({"segment": "7"}, "segment 7 is"),
        ({"label": "zebra"}, "in the run it is 'dog': another run's answer?"),
    ],
)
def test_an_impossible_answer_is_a_row_that_says_why(run, exported, tmp_path, change, says):
    lines = answered(exported, {batch: ["1"] * 8 for batch in (1, 2, 3)})
    write(tmp_path / "answers.csv", [lines[0] | change, *lines[1:]])
    result = evaluate(Evaluate((str(run),), str(tmp_path / "answers.csv")), find("rating")())
    assert (result.counts["ok"], result.counts["bad_label"]) == (3, 1) and says in result.text()
    assert result.means["score"] == 1


def test_answers_about_other_images_are_counted_and_without_any_of_the_run_refused(run, exported, tmp_path, capsys):
    lines = answered(exported, {batch: ["1"] * 8 for batch in (1, 2, 3)})
    write(tmp_path / "answers.csv", [*lines, lines[0] | {"image_id": "unknown"}])
    result = evaluate(Evaluate((str(run),), str(tmp_path / "answers.csv")), find("rating")())
    assert result.unused_labels == 1 and result.unused_examples == ["unknown"] and result.counts["ok"] == 4
    write(tmp_path / "answers.csv", [lines[0] | {"image_id": "unknown"}])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "columns.csv").write_text("a;b\n1;2\n")
    (tmp_path / "empty.csv").write_bytes(b"")
    write(tmp_path / "no_lines.csv", [])
    (tmp_path / "picture.csv").write_bytes(bytes(range(256)) * 9)
    for name, says in {
        "answers.csv": "got only others, such as image_id 'unknown'; is it another run's?",
        "pictures": "expected the CSVs that the pages save",
        "columns.csv": "columns.csv: expected the columns batch, task, question, image_id, segment, label, score, got",
        "empty.csv": "empty.csv: expected the columns",
        "no_lines.csv": "expected answers about the run's images in",
        "picture.csv": "picture.csv",
        "nowhere": "nowhere does not exist",
    }.items():
        assert main(["evaluate", str(run), "--task", "rating", "--labels", str(tmp_path / name)]) == 2, name
        assert says in capsys.readouterr().err, name


def test_a_report_shows_the_scores_and_neither_it_nor_a_sweep_takes_answers(run, exported, tmp_path, capsys):
    lines = answered(exported, {batch: ["1"] * 8 for batch in (1, 2, 3)})
    write(tmp_path / "answers.csv", lines)
    words = ["--task", "rating", "--labels", str(tmp_path / "answers.csv")]
    assert main(["evaluate", str(run), *words]) == 0
    assert main(["report", str(run)]) == 0
    assert "Mean score" in (run / "report.html").read_text()
    assert main(["report", str(run), *words]) == 2
    assert "no truth to show" in capsys.readouterr().err
    words += ["--input", str(run.parent / "photos"), "--output", str(tmp_path / "sweep"), "--over", "k=2,3"]
    assert main(["sweep", "kmeans", *words]) == 2
    assert "people answered about one run's masks" in capsys.readouterr().err
