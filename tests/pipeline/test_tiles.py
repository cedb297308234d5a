"""Large images tile by tile: one row each, whatever fails, fills a batch, or stands beside them."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from support.islands import BROKEN, HUGE, Bright, Islands, picture, write
from support.written import rows_of

from raypipe import segmenters
from raypipe.pipeline import stages, tiles
from raypipe.pipeline.job import Label, check_job, plan_work
from raypipe.pipeline.label import label
from raypipe.run import OtherConfiguration
from raypipe.types import Segmenter

TILES = "32:12"


def row_of(image: np.ndarray, **more) -> dict:
    return {"image_id": "a", "key": "a", "error": "", "image": image, "note": ""} | more


def segmented(segmenter, images, *, tiles=TILES, **options) -> list[dict]:
    work = plan_work(Label("photos", "run", tiles=tiles, **options), segmenter, None)
    rows = [each if isinstance(each, dict) else row_of(each) for each in images]
    return list(stages.Segment(work)(rows))


def masks_of(row: dict) -> np.ndarray:
    assert row["error"] == ""
    return row["found"].masks


def truth(image: np.ndarray) -> np.ndarray:
    (found,) = Islands().segment([image])
    return found.masks[np.argsort(-found.masks.sum((1, 2)), kind="stable")]


def test_islands_over_many_tiles_are_those_of_the_whole_image():
    for row, image in zip(segmented(Islands(), images := [picture(seed) for seed in range(3)]), images, strict=True):
        expected = truth(image)
        assert {mask.tobytes() for mask in masks_of(row)} == {mask.tobytes() for mask in expected}
        assert len(row["found"].masks) == len(expected)


@pytest.mark.parametrize("method", [Islands(), Bright(foreground="grabcut")])
def test_an_image_no_larger_than_a_tile_is_as_without_tiles(method):
    images = [picture()[:size, :size] for size in (32, 20, 1)]
    for tiled, plain in zip(segmented(method, images), segmented(method, images, tiles=None), strict=True):
        np.testing.assert_array_equal(masks_of(tiled), masks_of(plain))
        assert tiled["found"].note == plain["found"].note and tiled.keys() == plain.keys()
        assert [*tiled["found"].labels] == [*plain["found"].labels]


def test_tiles_of_several_images_fill_batches_and_neither_these_nor_the_order_change_a_row():
    images = [picture(0), picture(1)[:30, :30], picture(2), picture(3)[:40]]
    method = Islands()
    rows = segmented(method, images)
    assert [len(call) for call in method.calls] == [5, 5, 5, 5, 5]  # of 9, 1, 9 and 6 tiles
    for size in (1, 3, 100):
        for row, other in zip(rows, segmented(Islands(), images, batch_size=size), strict=True):
            np.testing.assert_array_equal(masks_of(row), masks_of(other))
    for row, other in zip(rows[::-1], segmented(Islands(), images[::-1]), strict=True):
        np.testing.assert_array_equal(masks_of(row), masks_of(other))
        assert [*row["found"].labels] == [*other["found"].labels]


def test_a_tile_that_fails_is_named_and_the_others_count():
    image = picture()
    image[0, 0], image[59, 71] = BROKEN, BROKEN
    broken, whole = segmented(Islands(), [image, picture(1)])
    assert broken["note"] == "tile_failed:0/0,tile_failed:2/2"
    assert whole["note"] == "" and len(masks_of(whole)) == len(truth(picture(1)))
    seen = masks_of(broken).any(0)
    assert not seen[:14, :14].any()  # no other tile covers it
    np.testing.assert_array_equal(seen[14:46, 20:52], truth(picture()).any(0)[14:46, 20:52])


def test_an_image_of_which_all_tiles_fail_is_an_error_row_and_the_next_one_is_not():
    image = picture()
    image[::8, ::8] = BROKEN
    broken, whole = segmented(Islands(), [image, picture(1)])
    assert broken["error"] == "segment: RuntimeError: not liked" and "found" not in broken
    assert len(masks_of(whole)) == len(truth(picture(1)))


def test_an_image_has_the_time_of_one_for_each_of_its_tiles():
    work = plan_work(Label("photos", "run", tiles=TILES, timeout=2.0), Islands(), None)
    segment = stages.Segment(work)
    list(segment([row_of(picture()), row_of(picture()[:30, :30])]))
    assert segment.granted() == (9 - 1) * 2.0  # beside what each image has
    assert work.patience > 9 * 2.0


def test_tiles_are_tried_by_halves_where_memory_runs_out():
    image = picture()
    image[0, 0] = HUGE
    method = Islands()
    (row,) = segmented(method, [image])
    assert row["note"] == "" and row["error"] == ""
    assert [len(call) for call in method.calls][:4] == [5, 2, 1, 1]


def test_a_lost_device_is_nobodys_error():
    class Lost(Islands):
        def segment(self, images, foregrounds=None):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="CUDA error"):
        segmented(Lost(), [picture()])


def test_the_foreground_is_that_of_the_whole_image_and_tiles_without_any_are_not_looked_at():
    class Square(Bright):
        pass

    foreground = np.zeros((60, 72), bool)
    foreground[:10, :70] = True
    method = Square(foreground="given:masks")
    (row,) = segmented(method, [row_of(picture() + 9, foreground=foreground)])
    assert sum(map(len, method.calls)) == 3  # those of the first row
    assert not masks_of(row)[0, ~foreground].any() and masks_of(row)[0, foreground].all()
    method = Square(foreground="given:masks")
    (row,) = segmented(method, [row_of(picture(), foreground=np.zeros((60, 72), bool))])
    assert method.calls == [[(60, 72)]] and not masks_of(row).any()  # the method says what an empty one is


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("kmeans", {}, "colours in one tile"),
        ("dino_pca", {}, "components in one tile"),
        ("grabcut", {}, "in the middle"),
        ("sam", {}, "add --result masks"),
        ("tokencut", {"result": "box"}, "leave out --result box"),
        ("deep_spectral", {"result": "segments"}, "leave out --result segments"),
        ("clipseg", {}, "add --no-stretch"),
        ("zero_guidance", {"regions": "given:maps"}, "regions as they are"),
    ],
)
def test_a_method_of_which_tiles_make_no_sense_says_why(tmp_path, name, options, reason):
    segmenter = segmenters.find(name)(**options)
    with pytest.raises(ValueError, match=f"--tiles 64:8: not with {name}, .*{reason}"):
        check_job(Label(str(tmp_path / "photos"), str(tmp_path / "run"), tiles="64:8"), segmenter, None)


@pytest.mark.parametrize(("method", "says"), [("lost", True), ("maskclip", False), ("watershed", False)])
def test_what_looks_for_one_object_says_that_it_does_so_in_each_tile(tmp_path, caplog, method, says):
    caplog.set_level("INFO", logger="raypipe")
    tiles._say_each.cache_clear()
    options = {"classes": "cat, dog"} if method == "maskclip" else {}
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), tiles="64:8")
    check_job(job, segmenters.find(method)(**options), None)
    assert ("looks for an object in each tile" in caplog.text) == says


def test_objects_need_an_overlap_and_nobody_takes_another_grammar(tmp_path):
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), tiles="64:0")
    with pytest.raises(ValueError, match="OVERLAP must be above 0"):
        check_job(job, Islands(), None)
    check_job(job, Bright(), None)
    for text in ("64", ""):
        with pytest.raises(ValueError, match=f"--tiles '{text}': write SIZE:OVERLAP"):
            check_job(replace(job, tiles=text), Bright(), None)


def test_a_run_in_tiles_is_one_row_per_image_and_another_run_than_without(tmp_path):
    write(tmp_path / "photos", [picture(0), picture(1), picture(2)[:30, :30]])
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), tiles="32:37%", local=True)
    label(replace(job, limit=2), Bright(), None)
    frozen = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert frozen["tiles"] == TILES
    label(replace(job, tiles=TILES), Bright(), None)  # the same, said otherwise
    assert len(rows_of(tmp_path / "run")) == 3
    for other in (None, "32:8"):
        with pytest.raises(OtherConfiguration, match=f"tiles: '?{TILES}'? there, '?{other}'? now"):
            label(replace(job, tiles=other), Bright(), None)


def test_a_run_from_before_there_were_tiles_goes_on_without(tmp_path):
    write(tmp_path / "photos", [picture(0), picture(1)])
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True)
    label(replace(job, limit=1), Bright(), None)
    frozen = json.loads((tmp_path / "run/run.json").read_text())
    del frozen["settings"]["tiles"]
    (tmp_path / "run/run.json").write_text(json.dumps(frozen))
    label(job, Bright(), None)
    assert len(rows_of(tmp_path / "run")) == 2
    with pytest.raises(OtherConfiguration, match="tiles: None there"):
        label(replace(job, tiles=TILES), Bright(), None)


def test_views_of_an_image_go_through_in_tiles_too(tmp_path):
    write(tmp_path / "photos", [picture(0), picture(1)[:20, :20]])
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), tiles=TILES, jitter=1, local=True)
    method = Islands()
    label(job, method, None)
    assert [len(call) for call in method.calls] == [5, 5, 5, 5]  # 9 tiles and an image, and once more mirrored
    for row in rows_of(tmp_path / "run"):
        assert [segment["stability"] for segment in row["segments"]] == [1.0] * len(row["segments"])


def test_the_refiner_and_the_threshold_see_the_whole(tmp_path):
    shapes = []

    class Refiner:
        def __call__(self, values, image):
            shapes.append((values.shape, image.shape))
            return values / 2, ""

    work = plan_work(Label("photos", "run", tiles=TILES, refine="guided", keep_soft=True), Bright(), Refiner())
    (found,) = stages.Segment(work)([row_of(picture() + 9)])
    ((segment,),) = (row["segments"] for row in stages.encode([found], work))
    assert shapes == [((1, 60, 72), (60, 72, 3))] and segment["size"] == [60, 72]
    assert not segment["area"] and segment["soft"]  # half of at most 1 is not above 0.5


def peak(method: Segmenter, image: np.ndarray) -> tuple[float, int]:
    """The most bytes for each pixel of an image besides the image itself, and how many masks were found."""
    work = plan_work(Label("photos", "run", tiles="256:64", batch_size=2), method, None)
    segment, row = stages.Segment(work), row_of(image)
    tracemalloc.start()
    try:
        (row,) = segment([row])
        return tracemalloc.get_traced_memory()[1] / image[..., 0].size, len([*row["found"].planes()])
    finally:
        tracemalloc.stop()


def test_memory_is_the_result_and_a_few_tiles():
    image = np.zeros((1600, 1600, 3), np.uint8)
    for i in range(40):
        image[40 * i : 40 * i + 20, 200:1000] = 200
    bytes_, count = peak(Islands(), np.ascontiguousarray(image[:1000, :1000]))
    assert count == 25 and bytes_ < 4  # and not 25 masks of the whole, or of all tiles
    bytes_, count = peak(Bright(), image)
    assert count == 1 and bytes_ < 8  # the mask itself takes 4, the stack of all tiles' 7 more
