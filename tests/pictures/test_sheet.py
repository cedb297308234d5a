"""The picture sheet shows what the rows say."""

import hashlib
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.faulty import GOOD, Faulty, write_images
from support.sweepable import Levels

from raypipe import masks
from raypipe.pictures import legend, sheet, text
from raypipe.pictures.overlay import COLOURS, overlay
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.run import Run
from raypipe.run.rows import load
from raypipe.segmenters.kmeans import Kmeans
from raypipe.types import Segments


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


def test_an_orange_mask_shows_on_an_orange_animal():
    image = np.full((20, 20, 3), COLOURS[0], np.uint8)
    left = np.zeros((1, 20, 20), bool)
    left[0, :, :10] = True
    drawn = overlay(image, left).astype(int)
    assert np.abs(drawn[10, 5] - drawn[10, 15]).max() > 60


def test_a_sheet_is_written_with_an_even_tile_per_image(job):
    summary = label(Label(**job), Faulty())
    pixels = np.asarray(Image.open(summary.sheet))
    tile, line = round(sheet.TILE * 120 / 160), round(sheet.TILE * 120 / 160) + sheet.CAPTION + sheet.GAP
    column = 2 * sheet.TILE + sheet.SLIT + sheet.GAP
    assert pixels.shape[1] == 3 * column + sheet.GAP
    below = pixels[-2 * line :, sheet.GAP :]
    places = [below[y * line :, x * column :][:tile, : 2 * sheet.TILE + sheet.SLIT] for y in (0, 1) for x in (0, 1, 2)]
    assert [bool((place != 255).any()) for place in places] == [True] * 5 + [False]
    assert all((place[:, sheet.TILE : sheet.TILE + sheet.SLIT] == 255).all() for place in places)


class Sided(Faulty):
    """The left third is a crane, on every image but the first; the middle one is an otter."""

    def segment(self, images, foregrounds=None):
        for image in images:
            height, width = image.shape[:2]
            left, middle = (np.tile(np.arange(width) * 3 // width == part, (height, 1)) for part in (0, 1))
            names = ["otter"] if image[0, 0, 0] == 1 else ["crane", "otter"]
            yield Segments(np.stack([left, middle][-len(names) :]), names)


def test_a_named_class_has_one_colour_on_all_images_wherever_it_comes_among_them(job):
    write_images(Path(job["input"]), [1, 0], size=(240, 320))
    job["input"] = f"{job['input']}/000[01].png"
    pixels = np.asarray(Image.open(label(Label(**job), Sided()).sheet)).astype(int)
    tile = round(sheet.TILE * 120 / 160)
    row = pixels[-sheet.GAP - sheet.CAPTION - tile // 2]
    step = 2 * sheet.TILE + sheet.SLIT + sheet.GAP
    starts = [sheet.GAP + i * step + sheet.TILE + sheet.SLIT for i in (0, 1)]
    otter, crane = COLOURS[:2].astype(int)  # what covers most comes first

    def is_like(start: int, third: int, colour: np.ndarray) -> bool:
        place = start + third * sheet.TILE // 3
        grey = row[place + 10 : place + 70] - 0.55 * colour  # what the image adds is grey
        return bool((np.abs(grey - grey.mean(1, keepdims=True)) < 2).all())

    assert all(is_like(start, 1, otter) and not is_like(start, 1, crane) for start in starts)
    assert sorted(is_like(start, 0, crane) for start in starts) == [False, True]


def test_classes_that_are_nowhere_change_no_sheet(job, tmp_path):
    jobs = [Label(**job), Label(**job | {"output": str(tmp_path / "soft/run"), "keep_soft": True})]
    hard, soft = (label(each, Levels(levels=16, threshold=0.99)) for each in jobs)
    counts = [[len(row["segments"]) for row in load(Run(done.output)).to_pylist()] for done in (hard, soft)]
    assert sum(counts[0]) < sum(counts[1])
    np.testing.assert_array_equal(Image.open(hard.sheet), Image.open(soft.sheet))


def test_names_of_classes_are_told_also_where_colours_repeat(job):
    run = Run(label(Label(**job), Levels(levels=16)).output)
    found = load(run).to_pylist()
    found[0]["segments"] = found[0]["segments"][1:]  # so that names are not told by their place
    names = legend.by_label([row["segments"] for row in found])
    heading = sheet._heading(run, Levels, found, names, shown=5, good=5, all_=5)
    assert heading.colours == names and len(names) == 16
    assert heading.lines[-1] == "The colours repeat after 7 names, which are written on the masks."
    more = sheet._heading(run, Levels, found, [*map(str, range(40))], shown=5, good=5, all_=5)
    assert more.lines[-1] == "Of 40 names those 21 that cover most are told." and more.colours[-1] == "20"
    drawn = sheet._draw_heading(heading, 1000)
    boxes = [(drawn[:, :-14] == colour).all(2).sum() // 225 for colour in COLOURS]
    assert boxes == [3, 3, *[2] * 5]


def test_names_are_written_on_their_masks_where_colours_repeat(tmp_path):
    strips = np.stack([np.arange(160) // 20 == i for i in range(8)])[:, None].repeat(100, 1)
    Image.fromarray(np.zeros((100, 160, 3), np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    row = {"height": 100, "width": 160, "sha256": hashlib.sha256(content).hexdigest(), "key": "a", "foreground": None}
    row["segments"] = masks.encode_segments(strips, labels=[*"abcdefgh"])
    named, plain = (sheet._tile(content, row, (162, 260), labels, 10**6).overlay for labels in ([*"abcdefgh"], []))
    white = (named > plain.max()).all(2)
    assert all(white[:, 20 * i : 20 * i + 20].any() for i in range(8))


def test_pictures_of_any_shape_stand_in_the_middle_of_equal_tiles():
    box = (100, sheet.TILE)
    wide, narrow = (np.zeros((*size, 3), np.uint8) for size in ((40, 260), (100, 30)))
    tiles = [sheet.Tile(picture, picture, "a.png") for picture in (wide, narrow)]
    pixels = sheet.draw_sheet(sheet.Heading("kmeans", [], [], False), tiles, box)
    line = pixels[-(100 + sheet.CAPTION + sheet.GAP) :][:100]
    for i, (height, width) in enumerate(((40, 260), (100, 30))):
        place = line[:, sheet.GAP + i * (2 * sheet.TILE + sheet.SLIT + sheet.GAP) :][:, : sheet.TILE]
        black = np.argwhere((place == 0).all(2))
        top, left = (100 - height) // 2, (260 - width) // 2
        assert black.min(0).tolist() == [top, left] and black.max(0).tolist() == [99 - top, 259 - left]
        assert ((place == 0) | (place == sheet.MAT)).all()


def test_a_sheet_says_what_it_shows_and_which_colour_is_what(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 14, size=(60, 80))
    job = Label(input=str(tmp_path / "photos"), output=str(tmp_path / "coats"), local=True, sheet=True)
    label(job, Kmeans(foreground="whole", k=3))
    rows = load(Run(job.output)).to_pylist()
    heading = sheet._heading(Run(job.output), Kmeans, rows, shown=12, good=14, all_=15)
    assert heading.title == "kmeans on whole images"
    date = Run(job.output).configuration()["provenance"]["time"][:10]
    assert heading.lines[0] == f"run coats of {date}: 12 of 14 images, drawn at random (1 more failed)"
    assert heading.lines[1].startswith("k 3, ") and "dark to light" in heading.lines[2]
    assert heading.colours == ["cluster 0: darkest", "cluster 1", "cluster 2: lightest"]
    pixels = np.asarray(Image.open(tmp_path / "coats/sheet.png"))
    head = pixels[: -4 * (sheet.CAPTION + sheet.GAP + round(sheet.TILE * 60 / 80))]
    assert [bool((head == colour).all(2).any()) for colour in COLOURS] == [True] * 3 + [False] * 4


def test_a_sheet_of_one_image_with_more_masks_than_colours_explains_itself_in_a_narrow_place(tmp_path):
    write_images(tmp_path / "photos", [GOOD], size=(90, 60))
    job = Label(input=str(tmp_path / "photos"), output=str(tmp_path / "run"), local=True, sheet=True)
    pixels = np.asarray(Image.open(label(job, Kmeans(foreground="whole", k=9)).sheet))
    assert pixels.shape[1] == 2 * sheet.TILE + sheet.SLIT + 2 * sheet.GAP
    assert all((pixels == colour).all(2).any() for colour in COLOURS)
    assert (pixels[:, -sheet.GAP // 2 :] == 255).all()
    heading = sheet._heading(Run(job.output), Kmeans, load(Run(job.output)).to_pylist(), shown=1, good=1, all_=1)
    assert heading.lines[-1] == "The colours repeat after 7 masks." and ": 1 image" in heading.lines[0]


def test_long_names_are_all_told_within_a_narrow_sheet():
    names = [f"a man number {i} before a large building by the sea in the evening sun" for i in range(sheet.MOST_NAMES)]
    blank = np.zeros((60, 90, 3), np.uint8)
    heading = sheet.Heading("zero_guidance", ["a fact of many words " * 40] * 6, names, False)
    drawn = sheet.draw_sheet(heading, [sheet.Tile(blank, blank, "a.png")], (60, 90))
    keys = (drawn[:-110, sheet.GAP : sheet.GAP + 15, None] == COLOURS).all(axis=(1, 3)).any(1)
    assert np.count_nonzero(np.diff(keys.astype(int)) == 1) == len(names)
    assert (drawn[:, -sheet.GAP // 2 :] == 255).all() and text.begun("ab", 1000, size=16) == "ab"


def test_names_tell_masks_apart_unless_several_images_have_the_same_at_each_index():
    one, other = [{"label": "sea"}, {"label": "sky"}], [{"label": "sea"}, {"label": "moss"}]
    for found, expected in (
        ([one, other], True),
        ([one, one], False),
        ([one], True),
        ([one, []], True),
        ([[{}]], False),
    ):
        assert legend.has_names(iter(found)) is expected


def test_colours_are_named_by_labels_where_all_images_have_the_same():
    named = [{"label": "eye"}, {"label": "shell"}]
    assert legend.names(None, [named, named]) == ["eye", "shell"]
    assert legend.names(None, [named, named[::-1]]) == ["mask 1", "mask 2"]
    assert legend.names(None, [[{"label": None}], []]) == ["mask"]
    assert legend.names(Kmeans, [named]) == ["eye: darkest", "shell: lightest"]
    areas = [[{"label": "eye", "area": 2}], [{"label": None, "area": 4}, {"label": "eye", "area": 3}]]
    assert legend.by_label(areas) == ["eye", ""]
    assert legend.names(None, []) == [] and len(legend.names(None, [[{}] * 40])) == len(COLOURS)


@pytest.mark.parametrize("name", ["Süd Łódź ñ", "жираф", "Ελλάδα", "斑马 シマウマ 얼룩말", "זברה حمار", "Su\u0308d"])
def test_names_of_most_scripts_are_written_as_they_are(name):
    assert text.visible(name) == unicodedata.normalize("NFC", name)
    drawn, boxes = (np.full((40, 400, 3), 255, np.uint8) for _ in range(2))
    text.write(drawn, name, (10, 25), size=15)
    text.write(boxes, "?" * len(name), (10, 25), size=15)
    assert (drawn != 255).any() and (drawn != boxes).any()


def test_what_has_no_glyph_is_written_as_an_escape_and_not_as_a_box():
    assert text.visible("बाघ\n\udcff?.png") == r"\u092c\u093e\u0918\n\udcff?.png"
    assert text.visible("Screenshot 9.41\u202fAM.png") == "Screenshot 9.41 AM.png"


def test_long_texts_are_shortened_or_wrapped_to_the_room_that_there_is():
    short = text.shortened("folder/" * 30 + "cat_1.jpg", 300, size=15)
    assert short.startswith("…") and short.endswith("cat_1.jpg") and text.width(short, size=15) <= 300
    lines = text.wrapped("attempts 20, max_iter 100, " * 8 + "x" * 200, 300, size=15)
    assert len(lines) > 2 and all(text.width(line, size=15) <= 300 for line in lines)


def test_a_changed_or_lost_original_is_left_out_with_a_warning(job, tmp_path, caplog):
    label(Label(**job), Faulty())
    write_images(tmp_path / "photos", [GOOD], size=(50, 70), seed=9)
    (tmp_path / "photos/0001.png").write_bytes(b"broken")
    summary = label(Label(**job), Faulty())
    assert summary.sheet and "0000.png is left out" in caplog.text and "0001.png is left out" in caplog.text


def test_long_and_hostile_names_fit_their_tile(job, tmp_path):
    (tmp_path / "photos/0000.png").rename(tmp_path / "photos" / ("x" * 200 + "\n\t<b>.png"))
    assert label(Label(**job), Faulty()).sheet
