"""`--jitter`: further views of an image, and how much of each segment comes back in them."""

import csv
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.faulty import GOOD, RAISES, Faulty, Soft, write_images
from support.naming import NamedMap
from support.written import as_version, random_masks

import raypipe
from raypipe import masks, schema
from raypipe.export.export import Export, export
from raypipe.maintenance.compact import Compact, compact
from raypipe.maintenance.verify import Verify, verify
from raypipe.pipeline import stages
from raypipe.pipeline.job import Label, plan_work
from raypipe.pipeline.label import label
from raypipe.pipeline.views import View, stability, views
from raypipe.pipeline.workers import from_columns, to_columns
from raypipe.refiners.guided import Guided
from raypipe.run import OtherConfiguration, Run, rows
from raypipe.segmenters.gloper import Gloper
from raypipe.types import PatternSegmenter, Segmenter, Segments

EVERY = [view for view in views(Faulty()) for view in (view, replace(view, is_mirrored=True))]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@dataclass
class Left(Segmenter):
    """The left half of an image. The red value of a corner tells what happens to its views."""

    source = "the tests"
    licence = "Apache-2.0"
    SPOILS: ClassVar[int] = 9  # the mirrored view of an image that begins with this

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for image in images:
            if image[0, -1, 0] == self.SPOILS and image.shape[1] > 1:
                raise RuntimeError("a mirror is not liked")
            yield Segments((np.arange(image.shape[1]) < image.shape[1] // 2) & np.ones(image.shape[:2], bool)[None])


@dataclass
class Few(Left):
    """The same with memory for two images."""

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        if len(images) > 2:
            raise MemoryError("too many images at once")
        yield from super().segment(images)


@dataclass
class Lost(Left):
    """The same on a GPU that is lost when an image is mirrored."""

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for image, found in zip(images, super().segment(images), strict=True):
            if image[0, 0, 0] != GOOD:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            yield found


@dataclass
class Drawn(Segmenter):
    """Each pixel by a coin."""

    source = "the tests"
    licence = "Apache-2.0"
    random = True

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for image in images:
            yield Segments(np.random.default_rng(self.seed).random((2, *image.shape[:2])) > 0.5)


@dataclass
class Inside(PatternSegmenter):
    """What is given as the foreground."""

    source = "the tests"
    licence = "Apache-2.0"

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for foreground in foregrounds:
            yield Segments(foreground[None].copy())


def job_in(folder, name="run", **options) -> Label:
    return Label(str(folder / "photos"), str(folder / name), local=True, max_bad_fraction=1.0, **options)


def found_in(folder, name="run") -> dict[str, tuple]:
    """By key the note, the error and the stabilities of an image."""
    table = raypipe.load(str(folder / name)).to_pylist()
    return {r["key"]: (r["note"], r["error"], [each["stability"] for each in r["segments"]]) for r in table}


def mean_iou(mask: np.ndarray, others: list[np.ndarray]) -> float:
    return np.mean([(mask & other).sum() / (mask | other).sum() for other in others])


def test_the_order_of_views_is_fixed_and_none_stands_twice():
    assert views(Faulty())[:4] == [View(is_mirrored=True), View(scale=0.8), View(crop=0.9), views(Faulty())[3]]
    assert views(Drawn())[:4] == [View(is_mirrored=True), View(scale=0.8), View(crop=0.9), View(seed=1000)]
    assert len(set(views(Faulty()))) == 12 and len(set(views(Drawn()))) == 16 and View() not in views(Drawn())
    assert [view for view in views(Drawn()) if not view.seed] == views(Faulty())
    gloper = Gloper(preset="fast")
    own = [range(gloper.seed + view.seed, gloper.seed + view.seed + gloper.seeds) for view in [View(), *views(gloper)]]
    assert len({*itertools.chain(*own)}) == 5 * gloper.seeds  # a view that tries the same ones would find the same


@pytest.mark.parametrize("view", EVERY, ids=str)
def test_a_view_keeps_what_it_shows_where_it_was(view):
    y, x = np.mgrid[:90, :120]
    disc = (x - 52) ** 2 + (y - 50) ** 2 < 20**2
    image = np.where(disc, 255, 0)[..., None].astype(np.uint8).repeat(3, 2)
    seen = view.row({"image": image, "foreground": disc, "regions": np.where(disc, 70_000, 3).astype(np.int32)})
    assert seen["image"].dtype == np.uint8 and seen["foreground"].dtype == bool
    assert seen["image"].shape[:2] == seen["foreground"].shape and (seen["regions"] == 70_000).sum() > 300
    np.testing.assert_array_equal(seen["regions"] == 70_000, seen["foreground"])
    for mask in (seen["image"][..., 0] > 127, seen["foreground"]):
        back = view.back(mask, disc.shape)
        shown = np.zeros_like(disc)
        shown[view.window(disc.shape)] = True
        assert not back[~shown].any() and mean_iou(disc & shown, [back]) > (0.95 if view.scale < 1 else 0.9999)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 3)])
def test_of_the_smallest_images_a_view_has_a_pixel(size):
    image, mask = np.full((*size, 3), 200, np.uint8), np.ones(size, bool)
    for view in EVERY:
        assert (view.of(image) == 200).all() and view.of_numbers(mask).all()
        assert view.of(image).shape[:2] == view.of_numbers(mask).shape
        assert view.back(view.of_numbers(mask), size)[view.window(size)].all()


def plain_stability(one: list[np.ndarray], other: list[np.ndarray]) -> set[tuple[float, ...]]:
    """IoU of each of the masks with its partner, of all one-to-one choices of partners those of the greatest sum."""
    some = [*other, *[None] * len(one)]
    choices = [
        tuple(0.0 if b is None else (a & b).sum() / (a | b).sum() for a, b in zip(one, chosen, strict=True))
        for chosen in itertools.permutations(some, len(one))
    ]
    best = max(map(sum, choices))
    return {choice for choice in choices if sum(choice) > best - 1e-12}


@pytest.mark.parametrize("counts", [(3, 3), (2, 4), (4, 2), (3, 0), (0, 2)])
def test_segments_without_names_are_matched_one_to_one_by_their_iou(counts, rng):
    one, other = (random_masks(rng, (9, 11), count) for count in counts)
    found = stability(*pair(one, other), (9, 11), is_ordered=False)
    assert any(np.allclose(found, choice) for choice in plain_stability(list(one), list(other)))
    by_index = stability(*pair(one, other), (9, 11), is_ordered=True)
    expected = [mean_iou(one[i], [other[i]]) if i < len(other) else 0 for i in range(len(one))]
    np.testing.assert_allclose(by_index, expected)


def pair(one: np.ndarray, other: np.ndarray) -> tuple[list[dict], list[tuple[View, list[dict]]]]:
    return masks.encode_segments(one), [(View(), masks.encode_segments(other))]


def test_segments_with_names_are_matched_by_these_and_a_name_that_is_gone_is_not_stable(rng):
    one, size = random_masks(rng, (9, 11), 3), (9, 11)
    mine = masks.encode_segments(one, labels=["cat", "dog", "cat"])
    theirs = masks.encode_segments(one[[2, 1, 0]], labels=["cat", "cow", "cat"])
    assert stability(mine, [(View(), theirs)], size, is_ordered=True) == [1, 0, 1]
    assert stability(mine, [(View(), theirs), (View(), mine)], size, is_ordered=False) == [1, 0.5, 1]


def test_an_empty_mask_is_stable_where_its_views_are_empty_too(rng):
    nothing, something = np.zeros((1, 9, 11), bool), random_masks(rng, (9, 11), 1)
    for other, expected in ((nothing, 1), (nothing[:0], 1), (something, 0)):
        assert stability(*pair(nothing, other), (9, 11), is_ordered=False) == [expected]
    assert stability(*pair(something, nothing), (9, 11), is_ordered=False) == [0]


def test_of_a_crop_the_common_area_counts_and_what_lies_outside_is_not_judged():
    size, crop = (40, 40), View(crop=0.5)
    mine = np.zeros((2, *size), bool)
    mine[0, 5:30, 5:30], mine[1, :5] = True, True  # 10..30 is seen
    theirs = np.zeros((1, 20, 20), bool)
    theirs[0, :20, :10] = True
    segments, its = masks.encode_segments(mine), masks.encode_segments(theirs)
    assert stability(segments, [(crop, its)], size, is_ordered=False) == [0.5, None]
    assert stability(segments, [(crop, its), (View(), segments)], size, is_ordered=False) == [0.75, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_stability_is_how_much_comes_back_whatever_the_batch(tmp_path, batch_size):
    write_images(tmp_path / "photos", [GOOD] * 5, size=(20, 32))
    label(job_in(tmp_path, "soft", jitter=1, batch_size=batch_size), Soft())
    assert {str(each) for each in found_in(tmp_path, "soft").values()} == {"('', '', [1.0])"}
    label(job_in(tmp_path, "left", jitter=3, batch_size=batch_size), Few())
    widths = {f"{i:04d}.png": 32 + i % 3 for i in range(5)}
    for key, (note, error, (value,)) in found_in(tmp_path, "left").items():
        half, width = widths[key] // 2, widths[key]
        mask, mirrored = np.arange(width) < half, np.arange(width) >= width - half
        cut = int(width * 0.1 / 2)
        cropped = (np.arange(width) >= cut) & (np.arange(width) < cut + (width - 2 * cut) // 2)
        small = Image.fromarray((np.arange(round(width * 0.8)) < round(width * 0.8) // 2)[None]).convert("L")
        scaled = np.asarray(small.resize((width, 1), Image.Resampling.BILINEAR))[0] > 127
        values = [mean_iou(mask[shown], [other[shown]]) for other, shown in (
            (mirrored, mask | True), (scaled, mask | True), (cropped, slice(cut, width - cut))
        )]  # fmt: skip
        assert (note, error) == ("", "") and value == pytest.approx(np.mean(values), abs=0.02)
        assert mean_iou(mask, [mirrored]) == 0


def test_another_seed_is_a_view_of_a_method_that_draws_numbers(tmp_path):
    write_images(tmp_path / "photos", [GOOD], size=(30, 30))
    label(job_in(tmp_path, "one", jitter=3), Drawn(seed=2**31 - 1))
    label(job_in(tmp_path, "two", jitter=4), Drawn(seed=2**31 - 1))
    size, ((*_, three),), ((*_, four),) = (30, 30), *(found_in(tmp_path, name).values() for name in ("one", "two"))
    one, other = (np.random.default_rng(seed).random((2, *size)) > 0.5 for seed in (2**31 - 1, 999))
    np.testing.assert_allclose(
        np.array(four) * 4 - np.array(three) * 3, stability(*pair(one, other), size, is_ordered=False), atol=1e-5
    )


def test_a_view_that_fails_is_noted_and_its_image_is_good(tmp_path):
    write_images(tmp_path / "photos", [GOOD, Left.SPOILS, GOOD])
    with Image.open(tmp_path / "photos/0001.png") as image:
        pixels = np.asarray(image).copy()
    pixels[0, -1] = 0
    Image.fromarray(pixels).save(tmp_path / "photos/0001.png")
    label(job_in(tmp_path, jitter=2), Left())
    found = [*found_in(tmp_path).values()]
    assert found[1] == ("jitter_failed", "", [None]) and None not in found[0][2] + found[2][2]


def test_an_image_that_fails_has_no_views_and_a_lost_gpu_ends_the_process(tmp_path):
    write_images(tmp_path / "photos", [RAISES, GOOD])
    label(job_in(tmp_path, jitter=2), Faulty())
    found = [*found_in(tmp_path).values()]
    assert found[0][1].startswith("segment: RuntimeError") and found[0][2] == [] and len(found[1][2]) == 1
    write_images(tmp_path / "lost/photos", [GOOD])
    with pytest.raises(RuntimeError, match="CUDA error"):
        label(job_in(tmp_path / "lost", jitter=1), Lost())


@pytest.mark.parametrize("refiner", [None, Guided(refine_radius=2)])
@pytest.mark.parametrize("method", [Soft(threshold=0.4), NamedMap(threshold=0.6)])
def test_views_come_through_processes_and_are_filtered_as_the_image_is(tmp_path, method, refiner):
    write_images(tmp_path / "photos", [GOOD], size=(40, 50))
    image = np.asarray(Image.open(tmp_path / "photos/0000.png"))
    row = {"image_id": "a", "error": "", "image": image, "note": "", "height": 40, "width": 50}
    work = plan_work(Label("photos", "run", jitter=1), method, refiner)
    (seen,) = stages.Segment(work)([row])
    assert isinstance(seen["views"][0], Segments) == (refiner is not None)  # else nothing large crosses
    crossed = from_columns(to_columns(seen))
    (segments,) = stages.table(stages.encode(crossed, work), work)["segments"].to_pylist()
    mirror = np.ascontiguousarray(image[:, ::-1])
    soft = next(method.segment([mirror])).masks
    soft = refiner(soft, mirror)[0] if refiner else soft
    expected = [
        mean_iou(masks.decode_rle(a), [b[:, ::-1]]) for a, b in zip(segments, soft > method.threshold, strict=True)
    ]
    assert [each["stability"] for each in segments] == pytest.approx(expected)
    label(job_in(tmp_path, jitter=1, keep_soft=True, refine=refiner and "guided"), method, refiner)
    assert [*found_in(tmp_path).values()] == [("", "", [each["stability"] for each in segments])]


def test_foregrounds_and_regions_go_with_the_view(tmp_path):
    write_images(tmp_path / "photos", [GOOD], size=(40, 60))
    given = np.zeros((40, 60), np.uint8)
    given[5:20, 5:20] = 255
    (tmp_path / "given").mkdir()
    Image.fromarray(given).save(tmp_path / "given/0000.png")
    for foreground, least in ((f"given:{tmp_path}/given", 0.9), ("whole", 1)):
        label(job_in(tmp_path, foreground[:5], jitter=3), Inside(foreground=foreground))
        ((*_, (value,)),) = found_in(tmp_path, foreground[:5]).values()
        assert least <= value <= 1


def test_the_time_limit_counts_all_views_and_too_many_of_these_are_refused(tmp_path):
    assert plan_work(Label("photos", "run", jitter=4), Left(), None).timeout == 5 * Left.timeout
    assert plan_work(Label("photos", "run", jitter=4, timeout=7), Left(), None).timeout == 7
    write_images(tmp_path / "photos", [GOOD])
    for method, jitter, most in ((Left(), 13, 12), (Left(), -1, 12), (Drawn(), 17, 16)):
        with pytest.raises(ValueError, match=rf"--jitter must be in 0\.\.{most} for test_jitter, got {jitter}"):
            label(job_in(tmp_path, jitter=jitter), method)


def test_conditions_and_exports_know_it(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 3, size=(20, 31))
    label(job_in(tmp_path, jitter=4), Drawn())
    label(job_in(tmp_path, "without"), Drawn())
    run, found = Run(str(tmp_path / "run")), found_in(tmp_path)
    middle = sorted(value for *_, its in found.values() for value in its)[2]
    chosen = [s for row in rows.select(run, where=f"stability <= {middle}") for s in row["segments"]]
    assert len(chosen) == 3 and not list(rows.select(Run(str(tmp_path / "without")), where="stability >= 0"))
    for form, name in itertools.product(("csv", "coco", "hf", "webdataset"), ("run", "without")):
        export(Export(str(tmp_path / name), form))
    with open(tmp_path / "run/export/csv/images.csv", encoding="utf-8-sig", newline="") as file:
        told = {line["key"]: float(line["mean_stability"]) for line in csv.DictReader(file)}
    assert told == {key: pytest.approx(np.mean(its), abs=1e-6) for key, (*_, its) in found.items()}
    annotations = json.loads((tmp_path / "run/export/coco/annotations.json").read_text())["annotations"]
    assert [each["stability"] for each in annotations] == [value for *_, its in found.values() for value in its]
    assert "stability" not in (tmp_path / "without/export/coco/annotations.json").read_text()
    (table,) = (tmp_path / "run/export/hf/data").glob("*.parquet")
    pictures = pq.read_table(table).to_pylist()
    assert {each["key"]: [s["stability"] for s in each["segments"]] for each in pictures} == {
        key: its for key, (*_, its) in found.items()
    }
    with tarfile.open(tmp_path / "run/export/webdataset/shard-000000.tar") as archive:
        samples = [json.load(archive.extractfile(name)) for name in archive.getnames() if name.endswith(".json")]
    assert {each["key"]: [s["stability"] for s in each["segments"]] for each in samples} == {
        key: its for key, (*_, its) in found.items()
    }


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_run_is_read_goes_on_without_views_and_is_joined(tmp_path, version):
    write_images(tmp_path / "photos", [GOOD] * 4)
    label(job_in(tmp_path, limit=3), Drawn())
    run = Run(str(tmp_path / "run"))
    before = found_in(tmp_path)
    as_version(run, version)
    (part,) = run.parts()
    fields = pq.read_schema(run.folder.path(run.data, part)).field("segments").type.value_type.names
    assert "stability" not in fields and ("embedding" in fields) == (version > 1)
    assert verify(Verify(str(run), deep=True)).exit_code == 0 and found_in(tmp_path) == before
    with pytest.raises(OtherConfiguration, match="jitter: 0 there, 2 now"):
        label(job_in(tmp_path, jitter=2), Drawn())
    assert label(job_in(tmp_path), Drawn()).labelled == 1 and len(run.parts()) == 2
    assert not list(rows.select(run, where="stability < 2")) and len(list(rows.select(run, where="area > 0"))) == 4
    export(Export(str(run), "csv"))
    compact(Compact(str(run)))
    (part,) = run.parts()
    assert pq.read_schema(run.folder.path(run.data, part)).equals(schema.MASKS)
    assert verify(Verify(str(run), deep=True)).exit_code == 0 and len(found_in(tmp_path)) == 4
