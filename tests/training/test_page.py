"""The page of a training: curves that are right and small, names that are text, a page at any time."""

import re

import numpy as np
import pyarrow as pa
import pytest
from support import browsing

from raypipe.run import provenance
from raypipe.storage import Folder
from raypipe.training import page, record
from raypipe.training.record import Log

SCHEMA = [("epoch", pa.int32()), ("variant", pa.string()), ("images", pa.int64())]
SCHEMA += [("iou", pa.float64()), ("selected_iou", pa.float64())]
EVIL = "<script>alert(1)</script>.jpg"


def logged(folder: Folder, steps: int) -> None:
    """A log in which ncut falls from 1 to 0.5 with a jump at step 3, and step 7 is skipped."""
    log = Log(folder, after=0)
    for step in range(1, steps + 1):
        ncut = 100.0 if step == 3 else 1 - 0.5 * step / steps + 0.01 * (step % 2)
        terms = {"ncut": ncut, "crop_zoom": 0.1, "total": float("nan") if step == 7 else ncut + 0.001}
        log.add(
            step=step, epoch=1 + step * 2 // (steps + 1), lr=1e-3 / step, seconds=0.25, terms=terms, skipped=step == 7
        )
    log.flush()


def validated(epochs: range) -> pa.Table:
    rows = [
        {"epoch": epoch, "variant": variant, "images": 9, "iou": 0.1 * epoch, "selected_iou": None}
        for epoch in epochs
        for variant in ("none", "guided")
    ]
    return pa.Table.from_pylist(rows).cast(pa.schema(SCHEMA))


def points(text: str) -> np.ndarray:
    """What an SVG polyline goes through: (n, 2)."""
    return np.array([pair.split(",") for pair in text.split()], float)


def values(curve: page.Curve, text: str) -> np.ndarray:
    """The values that points of a curve stand for, read off its own axis."""
    (y0, low), *_, (y1, high) = curve.heights
    return float(low) + (points(text)[:, 1] - y0) / (y1 - y0) * (float(high) - float(low))


def test_a_curve_is_the_running_mean_and_a_jump_does_not_flatten_it(tmp_path):
    folder = Folder(str(tmp_path))
    logged(folder, 2000)
    curves = {curve.name: curve for curve in page.loss_curves(record.read(folder))}
    assert [*curves] == ["total", "ncut", "crop zoom", "learning rate"]
    ncut = record.read(folder)["ncut"].to_numpy()
    ncut = ncut[np.arange(len(ncut)) != 6]  # the skipped one
    curve = curves["ncut"]
    drawn, strong = points(curve.lines[""]), values(curve, curve.lines[""])
    assert len(drawn) == page.POINTS and len(points(curve.faint)) == 2 * page.POINTS
    assert drawn[-1, 0] == page.PLOT[0] and strong[-1] == pytest.approx(ncut[-50:].mean(), abs=0.003)
    middle = round((drawn[120, 0] / page.PLOT[0]) * 1999)
    assert strong[120] == pytest.approx(ncut[middle - 50 : middle].mean(), abs=0.003)
    assert float(curve.heights[-1][1]) < 2  # of values up to 100
    assert curve.remark == f"first 50 steps {ncut[:50].mean():.4g}, last 50 {ncut[-50:].mean():.4g}"
    assert [text for _, text in curve.ticks] == ["500", "1,000", "1,500", "2,000"]


def test_a_constant_rate_and_a_term_that_is_never_finite_are_no_curves(tmp_path):
    folder = Folder(str(tmp_path))
    log = Log(folder, after=0)
    log.add(step=1, epoch=1, lr=0.1, seconds=1.0, terms={"ranking": float("nan"), "total": 2.0})
    log.flush()
    (curve,) = page.loss_curves(record.read(folder))
    assert curve.name == "total" and len(points(curve.lines[""])) == 1


def test_validation_is_curves_from_the_second_epoch_on():
    assert page.validation_curves(validated(range(2, 3))) == []
    rows = [{"epoch": 2, "variant": variant, "images": 9, "IoU": 0.2} for variant in ("none", "guided")]
    assert page.newest(validated(range(1, 3))) == rows
    (curve,) = page.validation_curves(validated(range(1, 4)))
    assert curve.name == "IoU" and [*curve.lines] == ["none", "guided"]
    assert values(curve, curve.lines["guided"]) == pytest.approx([0.1, 0.2, 0.3], abs=0.01)


@pytest.fixture
def full(tmp_path) -> Folder:
    """The folder of a training of which all is there."""
    folder = Folder(str(tmp_path / "out"))
    logged(folder, 3000)
    folder.write_table(validated(range(1, 4)), "metrics", "epochs.parquet")
    photo = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    record.keep_pictures(folder, {EVIL: photo, "b.jpg": photo})
    for epoch in range(30):
        record.keep_masks(folder, epoch, {EVIL: np.full((60, 80), epoch / 30, np.float32)})
    skipped = [{"key": f"{i}{EVIL}", "uri": f"/photos/{i}", "error": "decode: <b>cut"} for i in range(250)]
    folder.write_table(pa.Table.from_pylist(skipped), "skipped.parquet")
    facts = {"environment": provenance.environment()}
    folder.write_json(
        facts | {"exit_code": 143, "reason": "Interrupted: <i>"}, "_runs", "20260101T000000000000Z-1.json"
    )
    folder.write_json(facts | {"exit_code": None}, "_runs", "20260102T000000000000Z-1.json")
    return folder


def test_the_page_tells_all_and_names_are_text(full):
    settings = {"tau": 0.4, "weights": "<b>dino", "filters": ["none", "guided"], "labels": None}
    where = page.write_page(full, method="sempart", settings=settings, steps=6000)
    text = full.read("training.html").decode()
    assert where.endswith("training.html")
    assert len(re.findall("<script", text)) == 1 and "<b>" not in text and "<i>" not in text
    assert "Step of 6,000</dt><dd>3,000<" in text and "Steps per second</dt><dd>4<" in text
    assert re.search(r"Skipped steps</dt><dd><a [^>]*>1<", text) and "was changed: 7<" in text
    assert "And 50 more; all are in skipped.parquet" in text and "199&lt;script" in text and "200&lt;script" not in text
    assert re.findall(r'scope="col">(epoch \d+|before)<', text) == [
        "before",
        *(f"epoch {n}" for n in (4, 8, 12, 17, 21, 25, 29)),
    ]
    assert text.count("data:image/jpeg") == 2 and text.count("data:image/png") == 8  # b.jpg has no masks
    assert "<bdi>none, guided</bdi>" in text and "under way when" in text and "interrupted" in text
    assert len(text) < 200_000


def test_the_page_is_there_before_the_first_step(tmp_path):
    folder = Folder(str(tmp_path))
    page.write_page(folder, method="selfmask", settings={}, steps=10)
    text = folder.read("training.html").decode()
    assert "No step is logged yet" in text and "Validation" not in text and "epochs" not in text


@pytest.fixture(scope="module")
def browser():
    yield from browsing.started()


def test_readers_see_curves_and_enlarge_masks_on_a_phone_too(full, browser):
    page.write_page(full, method="sempart", settings={"tau": 0.4}, steps=6000)
    view, said = browser.new_page(viewport={"width": 390, "height": 800}), []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto(f"file://{full.path('training.html')}")
    assert view.evaluate("document.documentElement.scrollWidth") == 390 and not said
    boxes = view.evaluate("[...document.querySelectorAll('polyline')].map(l => l.getBBox().width)")
    assert len(boxes) == 2 * 3 + 1 + 2 and min(boxes) > 500
    view.locator(".zoom").nth(1).click()
    assert view.locator("#viewer-name").inner_text() == f"{EVIL}, before"
    view.keyboard.press("ArrowRight")
    assert view.locator("#viewer-name").inner_text() == f"{EVIL}, epoch 4"
    assert not said
