"""The picture sheet shows what the rows say."""

import numpy as np
import pytest
from PIL import Image
from support.faulty import GOOD, Faulty, write_images

from raypipe.pictures import sheet
from raypipe.pictures.overlay import COLOURS, overlay
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label


@pytest.fixture
def job(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 5, size=(120, 160))
    return {"input": str(tmp_path / "photos"), "output": str(tmp_path / "run"), "local": True, "sheet": True}


def test_masks_are_coloured_and_what_is_outside_the_foreground_is_dark():
    image = np.full((40, 60, 3), 200, np.uint8)
    found = np.zeros((2, 40, 60), bool)
    found[0, 5:35, 5:25] = found[1, 10:20, 40:50] = True
    foreground = np.zeros((40, 60), bool)
    foreground[:, :55] = True
    drawn = overlay(image, found, foreground)
    for i, (y, x) in enumerate(((20, 15), (15, 45))):
        np.testing.assert_allclose(drawn[y, x], 0.45 * 200 + 0.55 * COLOURS[i], atol=1)
    np.testing.assert_array_equal(drawn[20, 30], image[20, 30])
    assert (drawn[:, 56:] == 70).all()


def test_a_small_mask_is_drawn_over_a_large_one():
    found = np.ones((2, 20, 20), bool)
    found[0] = False
    found[0, 8:12, 8:12] = True
    drawn = overlay(np.zeros((20, 20, 3), np.uint8), found)
    over = 0.55 * COLOURS[0] + 0.45 * 0.55 * COLOURS[1]
    np.testing.assert_allclose(drawn[9:11, 9:11], np.broadcast_to(over, (2, 2, 3)), atol=1)


def test_a_sheet_is_written_with_a_tile_per_image(job):
    summary = label(Label(**job), Faulty())
    pixels = np.asarray(Image.open(summary.sheet))
    row, column = sheet.TILE + sheet.CAPTION + sheet.GAP, 2 * sheet.TILE + sheet.GAP // 2 + 2 * sheet.GAP
    assert pixels.shape == (2 * row + sheet.GAP, 3 * column, 3)
    tiles = [pixels[y * row : y * row + row, x * column : x * column + column] for y in range(2) for x in range(3)]
    assert [bool((tile != 255).any()) for tile in tiles] == [True] * 5 + [False]


def test_a_changed_or_lost_original_is_left_out_with_a_warning(job, tmp_path, caplog):
    label(Label(**job), Faulty())
    write_images(tmp_path / "photos", [GOOD], size=(50, 70), seed=9)
    (tmp_path / "photos/0001.png").write_bytes(b"broken")
    summary = label(Label(**job), Faulty())
    assert summary.sheet and "0000.png is left out" in caplog.text and "0001.png is left out" in caplog.text


def test_long_and_hostile_names_fit_their_tile(job, tmp_path):
    (tmp_path / "photos/0000.png").rename(tmp_path / "photos" / ("x" * 200 + "\n\t<b>.png"))
    assert label(Label(**job), Faulty()).sheet
