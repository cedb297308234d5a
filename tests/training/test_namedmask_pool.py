"""What NamedMask learns from: archives joined with masks, by ids and names, and all that does not fit together."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.archives import make
from support.namedmask import draw_photos, small, work_of, write_backbone, write_masks

from raypipe.masks import encode_rle
from raypipe.storage import Folder
from raypipe.training.job import Train
from raypipe.training.namedmask import pool
from raypipe.training.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> dict[Path, np.ndarray]:
    """Eight photographs by file, with their masks."""
    return draw_photos(tmp_path_factory.mktemp("drawn") / "photos", 8)


@pytest.fixture
def options(photos, tmp_path) -> dict[str, str]:
    """Of a recipe on an archive in which one image serves both categories; its masks are still to be written."""
    files = list(photos)
    archive = make(tmp_path / "archive", {"disc": files[::2], "tall square": [files[0], *files[1::2]]})
    backbone = write_backbone(tmp_path / "resnet.pth")
    return {"archive": str(archive), "masks": str(tmp_path / "run"), "backbone": backbone}


def rows_of(recipe) -> list[dict]:
    return recipe.rows(None).to_pylist()


def test_each_image_comes_once_for_each_category_with_that_label(options, photos, caplog):
    caplog.set_level(logging.INFO)
    write_masks(options["archive"], options["masks"], photos)
    rows, files = rows_of(small(options)), [file.name for file in photos]
    assert [row["key"] for row in rows[:4]] == [f"disc/{name}" for name in files[::2]]
    assert [row["key"] for row in rows[4:]] == [f"tall square/{name}" for name in [files[0], *files[1::2]]]
    assert [row["label"] for row in rows] == [1] * 4 + [2] * 5
    assert "11.1 % of the pool are images of more than one category" in caplog.text
    work = work_of(small(options), "out")
    assert work.samples.keys == sorted(row["key"] for row in rows) and not work.samples.skipped
    sample, mask = work.samples[0], photos[next(iter(photos))]
    assert np.array_equal(np.unpackbits(sample["mask"], count=mask.size).reshape(mask.shape), mask)
    assert int(sample["label"]) == 1


def test_masks_that_teach_nothing_are_left_out_and_counted_but_full_ones_are_kept(options, photos, caplog):
    changed = dict(photos)
    first, second, third, *_ = photos
    changed[first] = np.zeros_like(photos[first])
    changed[second] = np.ones_like(photos[second])
    changed[third] = np.arange(photos[third].size).reshape(photos[third].shape) < 3
    del changed[list(photos)[3]]
    write_masks(options["archive"], options["masks"], changed)
    rows = rows_of(small(options, min_object_fraction=1e-3))
    assert len(rows) == 9 - 2 - 1 - 1 and any(row["key"].endswith(second.name) for row in rows)
    assert "4 images left out: 3 with an empty mask, 1 without a mask" in caplog.text
    assert len(rows_of(small(options, min_object_fraction=0.0))) == 6


def test_masks_of_other_images_are_refused(options, photos, tmp_path):
    other = draw_photos(tmp_path / "others", 2)
    archive = make(tmp_path / "another", {"disc": other})
    write_masks(str(archive), options["masks"], other)
    with pytest.raises(ValueError, match="--masks .*run has none of the 8 images of .*archive, by the ids"):
        rows_of(small(options))


def test_a_mask_of_another_size_and_a_photograph_that_changed_are_named(options, photos, tmp_path):
    turned = dict(photos)
    first, second, *_ = photos
    turned[first] = photos[first].T
    write_masks(options["archive"], options["masks"], turned)
    copy = tmp_path / second.name
    copy.write_bytes(second.read_bytes())
    Image.fromarray(np.zeros((50, 63, 3), np.uint8)).save(second)
    try:
        done = train(Train(output=str(tmp_path / "out"), local=True), small(options, iterations=2))
    finally:
        second.write_bytes(copy.read_bytes())
    assert set(done.skipped) == {f"disc/{first.name}", f"tall square/{first.name}", f"tall square/{second.name}"}
    assert done.skipped[f"disc/{first.name}"].startswith("mask: size: its mask has 64 x 48 px, the image 48 x 64")
    assert done.skipped[f"tall square/{second.name}"].startswith("fetch: changed: ")
    assert done.images == 6 and done.steps == 2


def test_a_run_that_names_its_masks_gives_that_of_the_category(options, photos, caplog):
    write_masks(options["archive"], options["masks"], photos, labels=["Tall-Square"])
    assert {row["label"] for row in rows_of(small(options))} == {2}
    assert "4 images left out: 4 whose masks are of other categories" in caplog.text
    assert "1 class without any image: disc" in caplog.text


def test_where_masks_have_names_one_of_another_class_is_nobodys_object(tmp_path, photos):
    archive = make(tmp_path / "archive", {"tvmonitor": list(photos)})
    recipe = small({"archive": str(archive), "masks": "run", "backbone": "random", "classes": "voc2012"})
    numbers, counts = recipe.known.numbers, encode_rle(np.ones((4, 5), bool))["counts"]

    def found(*labels: str | None) -> pool.Mask:
        segments = [{"size": [4, 5], "counts": counts, "label": label} for label in labels]
        return pool.Mask(segments, None, "")

    assert not pool.names_categories([found(None), found("stripes"), found()], numbers)
    assert pool.chosen_of(found(None, None), "tvmonitor", {}, 0.0)[0] is not None
    assert pool.names_categories([found("stripes"), found("cat")], numbers)
    assert pool.chosen_of(found("stripes"), "tvmonitor", numbers, 0.0) == (None, "whose masks are of other categories")
    chosen, why = pool.chosen_of(found("cat", "TV/monitor"), "tvmonitor", numbers, 0.0)  # another name of it
    assert chosen["label"] == "TV/monitor" and not why


def published(folder: Path, photos: dict[Path, np.ndarray]) -> dict[str, str]:
    """An archive and masks as the authors of NamedMask publish them."""
    names = {"tall_square": list(photos)[1::2], "disc": list(photos)[::2]}
    (folder / "archive.json").write_text(json.dumps({name: [each.name for each in its] for name, its in names.items()}))
    (folder / "selfmask").mkdir()
    for file, mask in photos.items():
        (folder / "selfmask" / f"{file.stem}.json").write_text(json.dumps(encode_rle(mask)))
    root = str(next(iter(photos)).parent)
    return {"archive": str(folder / "archive.json"), "masks": str(folder / "selfmask"), "image_root": root}


def test_the_authors_files_are_read_and_labels_are_bound_by_name(photos, tmp_path):
    given = published(tmp_path, photos) | {"backbone": write_backbone(tmp_path / "resnet.pth")}
    with pytest.raises(ValueError, match="classes is needed with an archive that is a file"):
        small(given)
    rows = rows_of(small(given, classes="disc, tall square"))
    assert {(row["category"], row["label"]) for row in rows} == {("disc", 1), ("tall_square", 2)}
    samples = work_of(small(given, classes="disc, tall square"), "out").samples
    assert not samples.skipped and len(samples) == 8
    with pytest.raises(ValueError, match="has the category 'tall_square', which is none of the 2 of classes"):
        rows_of(small(given, classes="disc, square"))
    (tmp_path / "selfmask/00.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="00.json: expected a mask as COCO's {size, counts}"):
        rows_of(small(given, classes="disc, tall square"))


def test_some_categories_alone_are_one_class(options, photos):
    write_masks(options["archive"], options["masks"], photos)
    recipe = small(options, only=("Tall square",))
    assert recipe.names == ("Tall square",) and {row["label"] for row in rows_of(recipe)} == {1}
    both = small(options, only=("disc", "tall square"))
    assert both.names == ("disc or tall square",) and len(rows_of(both)) == 9
    with pytest.raises(ValueError, match="only 'circle' is none of the categories disc, tall square"):
        small(options, only=("circle",))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2, for batch norms"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"min_scale": 0.9, "max_scale": 0.5}, "min_scale must be above 0 and at most max_scale, 0.5"),
        ({"jitter": 1.5}, r"jitter must be a probability in \[0, 1\]"),
        ({"n_max": 1, "copy_paste_bbox": "reference"}, "copy_paste_bbox must be inclusive where n_max is 1"),
        ({"padding": "centre"}, "unknown padding 'centre'"),
        ({"output_stride": 4}, "unknown output_stride 4; choose one of: 8, 16"),
        ({"classes": "disc, disc"}, "disc"),
        ({"archive": "/nowhere"}, "no archive.json there"),
    ],
)
def test_options_that_make_no_sense_are_refused(given, text, options):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        small(options, **given)


def test_options_without_effect_are_refused(options, photos, tmp_path):
    write_masks(options["archive"], options["masks"], photos)
    for given, text in (
        ({"tail": "drop"}, "--tail drop has no effect on namedmask"),
        ({"input": str(next(iter(photos)).parent)}, "--input has no effect"),
        (
            {"validate": str(tmp_path), "labels": str(tmp_path)},
            "--validate has no effect: namedmask is not given crops",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            train(Train(output=str(tmp_path / "out"), local=True, **given), small(options))
    assert Folder(str(tmp_path / "out")).files() == {}
