"""What a training leaves of its steps: the log that a later start goes on with, its line, the fixed images' masks."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from raypipe.storage import Folder
from raypipe.training import record
from raypipe.training.record import Log


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path / "out"))


def add(log: Log, steps: range, *, worth: float = 0.0) -> None:
    """Log steps of ten an epoch, flushing every fifth. Their loss tells the step, and the start by its `worth`."""
    for step in steps:
        terms = {"ncut": 0.5, "total": step + worth}
        log.add(step=step, epoch=(step - 1) // 10 + 1, lr=1e-3, seconds=0.1, terms=terms, skipped=step == 7)
        if step % 5 == 0:
            log.flush()


def totals(folder: Folder) -> list[float]:
    table = record.read(folder)
    assert table["step"].to_pylist() == list(range(1, len(table) + 1))
    return table["total"].to_pylist() if len(table) else []


def test_the_log_has_each_step_once_with_a_column_per_term(folder, monkeypatch):
    monkeypatch.setattr(record, "PART_STEPS", 20)
    assert record.read(folder).schema == record.COLUMNS
    log = Log(folder, after=0)
    add(log, range(1, 48))
    assert totals(folder) == [*range(1, 46)]  # the last two are not flushed yet
    log.flush()
    table = record.read(folder)
    assert totals(folder) == [*range(1, 48)]
    assert table.schema.names == ["step", "epoch", "seconds", "lr", "skipped", "ncut", "total"]
    assert {str(field.type) for field in table.schema if field.name in ("ncut", "total")} == {"double"}
    assert table.slice(9, 2)["epoch"].to_pylist() == [1, 2] and table["skipped"].to_pylist().index(True) == 6
    assert sorted(folder.files("log")) == [f"part-{first:08}.parquet" for first in (1, 21, 41)]
    assert record.read(folder, after=39)["step"].to_pylist() == [*range(40, 48)]


@pytest.mark.parametrize("after", [0, 3, 20, 21, 40, 45])
def test_a_start_that_goes_on_forgets_what_came_after_its_checkpoint(folder, monkeypatch, after):
    monkeypatch.setattr(record, "PART_STEPS", 20)
    add(Log(folder, after=0), range(1, 46))
    log = Log(folder, after=after)
    assert totals(folder) == [*range(1, after + 1)]
    add(log, range(after + 1, 46), worth=0.5)
    assert totals(folder) == [step + 0.5 * (step > after) for step in range(1, 46)]


def test_the_log_goes_on_in_a_bucket(bucket):
    folder = Folder(bucket[1]("out"))
    add(Log(folder, after=0), range(1, 11))
    add(Log(folder, after=8), range(9, 16), worth=0.5)
    assert totals(folder) == [*range(1, 9), *(step + 0.5 for step in range(9, 16))]


def test_a_term_cannot_take_the_name_of_a_column(folder):
    with pytest.raises(AssertionError, match=r"\['lr'\]"):
        Log(folder, after=0).add(step=1, epoch=1, lr=0.1, seconds=0.1, terms={"lr": 1.0})


def test_followers_get_new_steps_and_those_that_are_done_again(folder):
    add(Log(folder, after=0), range(1, 11))
    news = record.follow(folder)
    assert news() == []  # an earlier start's
    log = Log(folder, after=10)
    add(log, range(11, 22))
    assert [row["step"] for row in news()] == [*range(11, 21)]
    assert news() == []
    log = Log(folder, after=15)
    assert news() == []
    add(log, range(16, 26), worth=0.5)
    assert [row["total"] for row in news()] == [step + 0.5 for step in range(16, 26)]


def test_a_part_that_is_just_being_replaced_is_left_to_the_next_look(folder):
    news, log = record.follow(folder), record.Log(folder, after=0)
    log.add(step=1, epoch=1, lr=0.5, seconds=1.0, terms={"total": 1.0})
    log.flush()
    whole = folder.read("log", "part-00000001.parquet")
    folder.write(whole[:-5], "log", "part-00000001.parquet")
    assert news() == []
    folder.write(whole, "log", "part-00000001.parquet")
    assert [row["step"] for row in news()] == [1]


def test_a_log_that_was_not_there_is_followed_from_its_first_step(folder):
    news = record.follow(folder)
    add(Log(folder, after=0), range(1, 6))
    assert [row["step"] for row in news()] == [1, 2, 3, 4, 5]


def row(step: int, *, total: float, ncut: float = 0.5, seconds: float = 0.25, skipped: bool = False) -> dict:
    facts = {"step": step, "epoch": 1, "seconds": seconds, "lr": 1e-3, "skipped": skipped}
    return facts | {"ncut": ncut, "gtv_fine": 0.02, "total": total}


def test_the_line_tells_where_it_is_what_it_costs_and_how_long_it_takes():
    rows = [row(3959, total=1.0), row(3960, total=1.468, ncut=0.72)]
    said = record.line(rows, steps=39600, per_epoch=1320, epochs=30)
    assert said == (
        "epoch 3 of 30, step 3,960 of 39,600: total 1.234 (ncut 0.61, gtv fine 0.02), 4 steps/s, 2.5 h left"
    )


def test_the_line_names_skipped_steps_and_leaves_their_loss_out():
    rows = [row(1, total=2.0, seconds=math.nan), row(2, total=math.nan, skipped=True), row(3, total=1.0)]
    said = record.line(rows, steps=10, per_epoch=5, epochs=2)
    assert "total 1.5 (" in said and "1 step skipped, 4 steps/s, 2 s left" in said and "nan" not in said
    said = record.line([row(6, total=math.inf, seconds=math.nan, skipped=True)], steps=10, per_epoch=5, epochs=2)
    assert said == "epoch 2 of 2, step 6 of 10: no loss, 1 step skipped"


def test_the_fixed_images_and_their_masks_are_small_files_by_key(folder):
    assert (record.kept_pictures(folder), record.kept_epochs(folder), record.kept_masks(folder, 0)) == ({}, [], {})
    ramp = np.linspace(-0.5, 1.5, 100, dtype=np.float32)[None].repeat(50, 0)
    wide = np.full((100, 448, 3), (200, 100, 50), np.uint8)
    record.keep_pictures(folder, {"a.jpg": wide, "b.jpg": wide[:, :10]})
    for epoch in (12, 0, 2):
        record.keep_masks(folder, epoch, {"a.jpg": ramp, "b.jpg": ramp[:1, :1]})
    assert record.kept_epochs(folder) == [0, 2, 12]
    pictures, masks = (
        {key: Image.open(io.BytesIO(file)) for key, file in files.items()}
        for files in (record.kept_pictures(folder), record.kept_masks(folder, 12))
    )
    assert {key: each.size for key, each in pictures.items()} == {"a.jpg": (224, 50), "b.jpg": (10, 100)}
    assert np.abs(np.asarray(pictures["a.jpg"], int) - (200, 100, 50)).max() <= 3
    assert (masks["a.jpg"].mode, masks["b.jpg"].size) == ("L", (1, 1))
    np.testing.assert_array_equal(np.asarray(masks["a.jpg"]), np.round(ramp.clip(0, 1) * 255))
