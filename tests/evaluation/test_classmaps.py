"""Label maps of classes as files store them: what is read, and what is refused with its reason."""

import json

import numpy as np
import pytest
from PIL import Image
from support.layouts import picture_of, write_classes, write_instances, write_photos

from raypipe import classes
from raypipe.evaluation import classmaps
from raypipe.evaluation.datasets import find
from raypipe.types import BadImage

LIMITS = {"max_bytes": 10**6, "max_pixels": 10**4}


def read(path, known: str = "voc2012", **options) -> np.ndarray:
    return classmaps.read(str(path), classes.read(known), **LIMITS | options)


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("a.jpg", np.zeros((4, 6), np.uint8), "a lossy format, whose numbers are gone; save it as PNG"),
        ("a.tif", np.full((4, 6), 0.5, np.float32), "a label map of fractions, expected numbers of classes"),
        ("a.png", np.zeros((4, 6, 3), np.uint8), "in colours, expected numbers of a palette, or grey levels"),
        ("a.png", np.full((4, 6), 21, np.uint8), "the value 21 at row 0, column 0 is no class: they are 0 to 20"),
        ("a.png", np.zeros((400, 600), np.uint8), "600 x 400 pixels, the limit is 10000"),
    ],
)
def test_a_file_that_holds_no_class_numbers_says_why(tmp_path, name, pixels, message):
    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(BadImage, match=message):
        read(tmp_path / name)


def test_grey_levels_of_any_depth_are_numbers_and_a_class_is_never_ignored(tmp_path):
    label = np.array([[0, 1, 254, 255, 300, 65535]])
    known = ",".join(f"class {i}" for i in range(1, 301))
    for name, kind in (("a.png", np.uint16), ("a.tif", np.int32)):
        Image.fromarray(label.astype(kind)).save(tmp_path / name)
        assert read(tmp_path / name, known).tolist() == [[0, 1, 254, 255, 300, -1]]
    Image.fromarray(np.array([[0, 254, 255]], np.uint8)).save(tmp_path / "b.png")
    assert read(tmp_path / "b.png", ",".join(f"class {i}" for i in range(254))).tolist() == [[0, 254, -1]]


def test_ids_of_cityscapes_that_are_no_object_are_background(tmp_path):
    Image.fromarray(np.array([[0, 7, 16, 17, 21, 24, 33, 34, 255]], np.uint8)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png", "cityscapes_object", form="ids").tolist() == [[0, 0, 0, 1, 0, 5, 14, 0, 0]]


def test_small_objects_of_coco_lie_on_large_ones(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "x.jpg", "height": 4, "width": 6}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "area": 4, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]},
            {"image_id": 7, "category_id": 90, "area": 24, "segmentation": [[0, 0, 6, 0, 6, 4, 0, 4]]},
            {"image_id": 8, "category_id": 90, "area": 24, "segmentation": []},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    (place,) = classmaps.instances(classmaps.Location(str(tmp_path / "a.json"))).values()
    expected = np.full((4, 6), 80)
    expected[:2, :2] = 1
    assert (read(place, "coco2017") == expected).all()
    wrong = place.replace('"category_id": 90', '"category_id": 12')
    with pytest.raises(BadImage, match="no objects as COCO has them: KeyError: 12"):
        read(wrong, "coco2017")
    with pytest.raises(BadImage, match="6 x 4 pixels, the limit is 20"):
        read(place, "coco2017", max_pixels=20)


@pytest.mark.parametrize("text", ["{", "[]", '{"images": [{"id": 1}], "annotations": []}', '{"images": []}'])
def test_a_file_that_is_not_of_coco_is_refused(tmp_path, text):
    write_photos(tmp_path / "val2017", ["a.jpg"])
    write_instances(tmp_path / "annotations/instances_val2017.json", {})
    (tmp_path / "annotations/instances_val2017.json").write_text(text)
    with pytest.raises(ValueError, match="expected COCO's instances as JSON, with images and annotations, got"):
        find("coco2017", str(tmp_path))


def test_photographs_of_coca_with_one_name_are_told_apart_by_their_folder(tmp_path):
    labels = {f"{folder}/1": np.full((8, 8), i + 1, np.int32) for i, folder in enumerate(("UAV", "key"))}
    write_classes(tmp_path, "coca", labels)
    found = find("coca", str(tmp_path))
    matches = found.match(["image/UAV/1.jpg", "key/1.jpg", "1.jpg"])
    assert matches.location.keys() == {"image/UAV/1.jpg", "key/1.jpg"} and not matches.unused
    number = classes.read("coca").numbers
    for key, name in (("image/UAV/1.jpg", "uav"), ("key/1.jpg", "key")):
        assert (read(matches.location[key], "coca") == number[name]).all()
    assert found.outside(["image/UAV/1.jpg", "1.jpg"]) == {"1.jpg"} and found.match([]).unused == ["UAV/1", "key/1"]
    (tmp_path / "CoCA/binary/UAV").rename(tmp_path / "CoCA/binary/drone")
    with pytest.raises(ValueError, match="binary/drone/1.png: its folder is none of the classes of coca"):
        find("coca", str(tmp_path))


@pytest.mark.parametrize("names", [["cat", "dog"], [f"class {i}" for i in range(300)]])
@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_masks_in_folders_of_classes_are_told_by_their_values(tmp_path, mode, names):
    known = classes.read(",".join(names))
    for i, name in enumerate(names[:2]):
        (tmp_path / name).mkdir()
        pixels = np.zeros((4, 6), np.uint8)
        pixels[i] = 255
        Image.fromarray(pixels).convert(mode).save(tmp_path / name / f"{i}.png")
    found = classmaps.match(str(tmp_path), ["0.jpg", "1.jpg"], known)
    for i in range(2):
        assert read(found.location[f"{i}.jpg"], ",".join(names))[:, 0].tolist() == [
            (i + 1) * (y == i) for y in range(4)
        ]
        Image.fromarray(np.full((4, 6), i + 1, np.uint8)).save(tmp_path / names[i] / f"{i}.png")
    found = classmaps.match(str(tmp_path), ["0.jpg", "1.jpg"], known)  # label maps now
    assert [read(found.location[f"{i}.jpg"], ",".join(names)).max() for i in range(2)] == [1, 2]
    Image.fromarray(np.ones((4, 6), np.uint8)).save(tmp_path / names[1] / "1.png")
    with pytest.raises(ValueError, match="masks of 0 and 1 in a folder per class, or label maps of one class only"):
        classmaps.match(str(tmp_path), ["0.jpg", "1.jpg"], known)


def test_masks_of_an_images_classes_have_one_size_and_the_smaller_one_lies_on_top(tmp_path):
    for folder, size, box in (("cat", (6, 8), (0, 6)), ("dog", (6, 8), (2, 4)), ("cow", (6, 7), (0, 1))):
        (tmp_path / "masks" / folder).mkdir(parents=True)
        mask = np.zeros(size, np.uint8)
        mask[slice(*box)] = 255
        Image.fromarray(mask).save(tmp_path / f"masks/{folder}/1.png")
    known = classes.read("dog,cow,cat")
    place = classmaps.match(str(tmp_path / "masks"), ["1.jpg"], known).location["1.jpg"]
    with pytest.raises(BadImage, match="the masks of an image's classes have several sizes"):
        read(place, "dog,cow,cat")
    (tmp_path / "masks/cow/1.png").unlink()
    place = classmaps.match(str(tmp_path / "masks"), ["1.jpg"], known).location["1.jpg"]
    assert read(place, "dog,cow,cat")[:, 0].tolist() == [3, 3, 1, 1, 3, 3]
    before = classmaps.contents(place, max_bytes=10**6)
    Image.fromarray(np.full((6, 8), 255, np.uint8)).save(tmp_path / "masks/dog/1.png")
    assert classmaps.contents(place, max_bytes=10**6) != before


def test_numbers_of_imagenet_s_lie_in_red_and_green(tmp_path):
    label = np.array([[0, 1, 254, 255, 256, 511, 919, -1]], np.int32)
    picture_of("imagenet_s919", label).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png", "imagenet_s919", form="packed") == label).all()
    Image.fromarray(label[:, :3].astype(np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"a palette or grey levels, expected RGB, R \+ 256 G"):
        read(tmp_path / "a.png", "imagenet_s919", form="packed")
