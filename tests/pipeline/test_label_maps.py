"""Methods whose masks never overlap: label maps between stages, after a refiner, and in a run."""

import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from support.sweepable import Levels

from raypipe import masks
from raypipe.pipeline.job import Label, plan_work
from raypipe.pipeline.stages import Segment, encode
from raypipe.refiners.guided import Guided
from raypipe.types import LabelMap, Segments

SIZE = (24, 31)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)


def row(image: np.ndarray) -> dict:
    return {"image_id": "i", "image": image, "error": "", "note": "", "height": image.shape[0], "width": image.shape[1]}


def labelled(method, image: np.ndarray, refiner=None) -> tuple[dict, np.ndarray, np.ndarray]:
    """The finished row of one image, its masks, and its probabilities as they are stored."""
    work = replace(plan_work(Label("photos", "run", keep_soft=True), method, refiner), device="cpu")
    (done,) = encode(Segment(work)([row(image)]), work)
    assert done["error"] == ""
    soft = np.stack([masks.decode_soft(segment["soft"]) for segment in done["segments"]])
    return done, masks.decode_segments(done["segments"], SIZE), soft


def test_the_masks_of_a_label_map_are_its_values_where_each_label_is():
    index = np.array([[0, 1, 2], [2, 2, 3]], np.uint8)
    found = LabelMap(index, np.full((2, 3), 0.5, np.float32), ["a", "b", "c"])
    expected = np.stack([np.where(index == i, 0.5, 0) for i in (1, 2, 3)]).astype(np.float32)
    np.testing.assert_array_equal(found.masks, expected)
    assert found.masks.dtype == np.float32
    assert LabelMap(index * 0, found.values).masks.shape == (0, 2, 3)


@pytest.mark.parametrize("count", [1, 3, 300])
def test_the_largest_value_and_of_equal_ones_the_first_keeps_a_pixel(count):
    soft = np.random.default_rng(1).integers(0, 5, (count, *SIZE)).astype(np.float32) / 4
    found = LabelMap.largest(Segments(soft, [str(i) for i in range(count)], note="n"))
    np.testing.assert_array_equal(found.index, soft.argmax(0) + 1)
    np.testing.assert_array_equal(found.values, soft.max(0))
    assert found.index.dtype == (np.uint8 if count < 256 else np.uint16)
    assert (len(found.labels), found.count, found.note) == (count, count, "n")
    unnamed = LabelMap.largest(Segments(soft > 0.5))
    first = np.cumsum(soft > 0.5, axis=0) == 1
    np.testing.assert_array_equal(unnamed.masks, first & (soft > 0.5))


def test_a_label_map_crosses_as_one_plane_of_labels_and_one_of_values():
    from raypipe.pipeline.workers import from_columns, to_columns

    (found,) = Levels(levels=7).segment([np.random.default_rng(2).integers(0, 256, (*SIZE, 3)).astype(np.uint8)])
    columns = to_columns({"image_id": "i", "found": found})
    area = SIZE[0] * SIZE[1]
    assert sorted(len(each) for each in columns["arrays"][0].as_py()) == [area, 4 * area]
    ((back,),) = [from_columns(pa.concat_tables([columns]))]
    np.testing.assert_array_equal(back["found"].masks, found.masks)
    assert list(back["found"].labels) == [f"level {i}" for i in range(7)]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).masks, found.masks)


@pytest.mark.parametrize("threshold", [0.0, 0.3, None])
def test_a_label_map_gives_the_rows_that_its_stack_of_masks_gives(image, threshold):
    class Stack(Levels):
        def segment(self, images, foregrounds=None):
            return (Segments(found.masks, found.labels) for found in super().segment(images))

    done, binary, soft = labelled(Levels(threshold=threshold), image)
    assert done["segments"] == labelled(Stack(threshold=threshold), image)[0]["segments"]
    (found,) = Levels().segment([image])
    np.testing.assert_array_equal(binary, found.masks > (0.5 if threshold is None else threshold))
    np.testing.assert_allclose(soft, found.masks, atol=1e-5)


def test_a_class_that_is_nowhere_above_the_threshold_is_not_there_unless_soft_masks_are_kept(image):
    image[:, :4] = 40  # 0.625 of the way through the first of four levels; its value is 0.875
    image[:, 4:] = np.where(image[:, 4:] < 192, 140, 195)
    (found,) = Levels().segment([image])
    tops = dict(zip(found.labels, found.masks.max((1, 2)), strict=True))
    assert tops["level 0"] > 0.8 and tops["level 1"] == 0 and 0 < tops["level 3"] < 0.6
    kept, binary, soft = labelled(Levels(threshold=0.6), image)
    assert [segment["label"] for segment in kept["segments"]] == list(found.labels)
    work = replace(plan_work(Label("photos", "run"), Levels(threshold=0.6), None), device="cpu")
    (done,) = encode(Segment(work)([row(image)]), work)
    assert [segment["label"] for segment in done["segments"]] == ["level 0", "level 2"]
    assert (
        [segment["area"] for segment in kept["segments"]]
        == [*binary.sum((1, 2))]
        == [96, 0, (found.index == 3).sum(), 0]
    )
    np.testing.assert_array_equal(masks.decode_segments(done["segments"], SIZE), binary[[0, 2]])
    assert soft[3].max() > 0.5


def test_after_a_refiner_each_pixel_is_of_the_class_that_is_largest_there(image):
    refiner, method = Guided(refine_radius=2, refine_working_size=None), Levels(threshold=0.2)
    done, binary, soft = labelled(method, image, refiner)
    (found,) = method.segment([image])
    refined, _ = refiner(found.masks, image)
    for y, x in np.ndindex(SIZE):
        best = refined[:, y, x].argmax()
        alone = np.arange(len(refined)) == best
        np.testing.assert_array_equal(binary[:, y, x], alone & (refined[best, y, x] > 0.2))
        np.testing.assert_allclose(soft[:, y, x], alone * refined[:, y, x], atol=1e-5)
    overlapping = replace(method)
    overlapping.exclusive = False
    assert (labelled(overlapping, image, refiner)[1].sum(0) > 1).any()
    assert [segment["label"] for segment in done["segments"]] == list(found.labels)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"index": np.full(SIZE, 9, np.uint8)}, "label map of 2 segments is (24, 31) with labels up to 9"),
        ({"index": np.ones((4, 4), np.uint8)}, "label map of 2 segments is (4, 4)"),
        ({"values": np.full(SIZE, 1.5, np.float32)}, "values outside [0, 1]"),
        ({"values": np.ones(SIZE)}, "masks are float64"),
        ({"values": np.ones(SIZE, bool)}, "masks are bool"),
        ({"values": np.ones((3, 3), np.float32)}, "masks are float32 (1, 3, 3) for an image of (24, 31)"),
    ],
)
def test_a_label_map_that_breaks_its_contract_becomes_an_error_row(image, broken, message):
    class Broken(Levels):
        def segment(self, images, foregrounds=None):
            planes = {"index": np.ones(SIZE, np.uint8), "values": np.ones(SIZE, np.float32)} | broken
            yield LabelMap(**planes, labels=["a", "b"])

    work = replace(plan_work(Label("photos", "run"), Broken(), None), device="cpu")
    (done,) = encode(Segment(work)([row(image)]), work)
    assert done["error"].startswith("segment: invalid: ") and message in done["error"]
