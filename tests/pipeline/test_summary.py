"""What a finished job says: whom it names, what its exit code means, what the notes in the run's folder count."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.faulty import GOOD, RAISES, Faulty, write_images

from raypipe.cli.verbs import main
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.runtime import progress
from raypipe.types import Segments


@dataclass
class Naming(Faulty):
    """The same, with a name passed over in images whose first pixel says `RAISES`, or two."""

    caution = "Names may offend."

    def segment(self, images, foregrounds=None):
        for image in images:
            note = "many_segments,label_blocked:asian" if image[0, 0, 0] == RAISES else ""
            note += ",label_blocked:african_american" if note and image[0, 0, 1] else ""
            yield Segments(image.mean(2)[None] > 127, note=note)


def run_job(tmp_path: Path, **options):
    return label(Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True, **options), Faulty())


def note(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run/_runs/manifest.json").read_text())


def test_failed_images_are_named_with_their_sentence(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 2 + [RAISES])
    (tmp_path / "photos/a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    text = run_job(tmp_path).text()
    assert "\n  0002.png: this image is not liked (segment: RuntimeError)\n" in text
    assert "\n  a.heic: HEIC is not read; convert it first" in text
    assert "more in errors.parquet" not in text


def test_of_many_failed_images_ten_are_named_and_the_others_counted_by_reason(tmp_path):
    write_images(tmp_path / "photos", [RAISES] * 12 + [GOOD])
    (tmp_path / "photos/zz.png").write_bytes(b"")
    text = run_job(tmp_path).text()
    assert sum(line.endswith("this image is not liked (segment: RuntimeError)") for line in text.splitlines()) == 10
    assert "  and 3 more in errors.parquet\n       12  segment: RuntimeError\n        1  decode: empty\n" in text


def test_images_that_failed_now_are_named_before_those_of_earlier_starts(tmp_path):
    write_images(tmp_path / "photos", [RAISES] * 10)
    run_job(tmp_path)
    (tmp_path / "photos/new.png").write_bytes(b"")
    assert next(iter(run_job(tmp_path).failures.items())) == ("new.png", "the file has zero bytes (decode: empty)")


def test_code_3_is_explained_and_counts_what_this_start_did(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 8 + [RAISES] * 3)
    first = run_job(tmp_path)
    line = "exit code 3: 3 of 11 images failed (27%), more than --max-bad-fraction 0.05 allows; the others are done"
    assert first.exit_code == 3 and line in first.text().splitlines()
    again = run_job(tmp_path)
    assert again.exit_code == 0 and "exit code" not in again.text()
    assert "nothing to do: all of 11 images were done before\n3 images failed in this run so far" in again.text()
    write_images(tmp_path / "photos/new", [GOOD])
    grown = run_job(tmp_path)
    assert (grown.exit_code, grown.labelled, grown.failed) == (0, 1, 3)
    assert grown.text().startswith("1 of 12 images labelled in ") and "\n11 images were done before\n" in grown.text()


def test_a_start_in_which_too_many_fail_ends_with_3_however_good_the_run_was(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 30)
    assert run_job(tmp_path).exit_code == 0
    (tmp_path / "photos/new.png").write_bytes(b"")
    assert run_job(tmp_path).exit_code == 3


@pytest.mark.parametrize(
    ("kinds", "words"), [(set(), "once they have another file or setting: "), ({"empty"}, "to try the failed images ")]
)
def test_another_try_is_offered_as_such_only_where_it_may_help(tmp_path, capsys, monkeypatch, kinds, words):
    write_images(tmp_path / "photos", [GOOD] * 2)
    (tmp_path / "photos/empty.png").write_bytes(b"")
    monkeypatch.setattr("raypipe.run.run.RETRYABLE", kinds)
    job = ["label", "kmeans", "--input", f"{tmp_path}/photos", "--output", f"{tmp_path}/run", "--foreground", "whole"]
    assert main([*job, "--local"]) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(words) and last.endswith("--local --retry-errors")


def test_the_note_of_a_finished_run_counts_the_whole_run_and_knows_its_sheet(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 8 + [RAISES] * 3, size=(60, 80))
    run_job(tmp_path, limit=5)
    run_job(tmp_path)
    counts = {"images": 11, "labelled": 8, "failed": 3, "pending": 0, "errors": {"segment: RuntimeError": 3}}
    assert counts.items() <= note(tmp_path).items() and note(tmp_path)["sheet"] is None
    for sheet in (True, False):  # drawn by a start that has nothing to label; still there after the next
        run_job(tmp_path, sheet=sheet)
        assert note(tmp_path)["sheet"] == str(tmp_path / "run/sheet.png")
        assert counts.items() <= note(tmp_path).items()


def test_one_image_is_one_image(tmp_path, caplog):
    write_images(tmp_path / "photos", [GOOD])
    with caplog.at_level("INFO", "raypipe"):
        text = run_job(tmp_path).text()
    assert "1 of 1 image to label" in caplog.text and text.startswith("1 of 1 image labelled in ")


def test_images_of_one_block_are_counted_one_by_one_from_where_the_run_was(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    write_images(tmp_path / "photos", [GOOD] * 4)
    with caplog.at_level("INFO", "raypipe"):
        job = Label(str(tmp_path / "photos"), str(tmp_path / "again"), local=True)
        label(replace(job, limit=1), Faulty(sleep=0.1))
        label(job, Faulty(sleep=0.1))
    assert "1 of 4 images, first images in work" in caplog.text
    assert "2 of 4 images, " in caplog.text and "3 of 4 images, " in caplog.text
    assert len(list((tmp_path / "again/_commits").iterdir())) == 2


def test_slow_images_are_committed_before_their_block_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("raypipe.pipeline.graph.PORTION_SECONDS", 0.05)
    write_images(tmp_path / "photos", [GOOD] * 3)
    label(Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True), Faulty(sleep=0.1))
    assert len(list((tmp_path / "run/_commits").iterdir())) == 3


def test_names_that_were_passed_over_are_counted_by_the_entry_of_the_block_list(tmp_path):
    write_images(tmp_path / "photos", [GOOD, RAISES, RAISES])
    for number in (1, 2):
        pixels = np.array(Image.open(tmp_path / f"photos/000{number}.png"))
        pixels[0, 0, 1] = number - 1
        Image.fromarray(pixels).save(tmp_path / f"photos/000{number}.png")
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True)
    first = label(replace(job, limit=2), Naming())
    assert label(job, Naming()).blocked == {"asian": 2, "african_american": 1} == note(tmp_path)["blocked"]
    assert set(first.blocked.values()) <= {1, 2}  # of the images so far, in whatever order they came
    text = label(job, Naming()).text()  # nothing is left to do: the run's own count
    assert "passed over by the block-list: asian in 2 images, african_american in 1 image" in text
