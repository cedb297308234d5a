"""Corrections of Label Studio and CVAT are the masks that people see in the tool, of the images that they belong to."""

import json
import zipfile

import numpy as np
import pytest
from support.corrected import annotation, data, region, stroke, task, write_coco
from support.written import random_masks

from raypipe.export.formats.labelstudio import brush
from raypipe.inputs import corrections, shapes
from raypipe.types import BadImage

SIZE = (9, 14)
MANY = 10**9


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def masks(rng) -> list[np.ndarray]:
    return list(random_masks(rng, SIZE, 4))


def written(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def found(place: str, *keys: str) -> dict[str, np.ndarray | str]:
    """The masks of images, or why they cannot be read."""
    masks = {}
    for key, location in corrections.match(str(place), keys).location.items():
        try:
            masks[key] = corrections.mask(location, max_pixels=MANY)
        except BadImage as error:
            masks[key] = str(error)
    return masks


def same(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all(np.array_equal(mask, other[key]) for key, mask in one.items())


def packed(values: list[int], rng, sizes=(3, 4, 8, 16)) -> list[int]:
    """Values as @thi.ng/rle-pack may write them: runs, and pieces of single values, each of a random length."""
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    at = 0
    while at < len(values):
        which = int(rng.integers(4))
        run = next((i for i in range(at, len(values)) if values[i] != values[at]), len(values)) - at
        is_run = run > 1 and rng.random() < 0.7
        length = min(run if is_run else int(rng.integers(1, 9)), 1 << sizes[which], len(values) - at)
        its = values[at : at + 1] if is_run else values[at : at + length]
        bits += f"{is_run:b}{which:02b}{length - 1:0{sizes[which]}b}" + "".join(f"{value:08b}" for value in its)
        at += length
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def test_brush_masks_come_back_pixel_by_pixel_however_they_are_packed(rng):
    for size in ((1, 1), (1, 5), (7, 1), (9, 14), (40, 60)):
        mask = rng.random(size) > 0.4
        np.testing.assert_array_equal(shapes.brushed(bytes(brush(mask)), size), mask)
        soft = np.where(mask, rng.integers(128, 256, size), rng.integers(0, 128, size))  # a brush's edges are soft
        rgba = np.repeat(soft, 4).tolist()
        np.testing.assert_array_equal(shapes.brushed(bytes(packed(rgba, rng)), size), mask)


def test_the_converter_of_label_studio_packs_what_is_read(rng):
    converter = pytest.importorskip("label_studio_converter.brush", reason="needs label-studio-converter")
    for mask in (rng.random((12, 17)) > 0.5, np.ones((150, 150), bool), np.zeros((3, 3), bool)):
        rle = bytes(converter.mask2rle(mask.astype(np.uint8) * 255))
        np.testing.assert_array_equal(shapes.brushed(rle, mask.shape), mask)


def test_any_byte_that_is_lost_or_changed_is_a_mask_or_a_reason(rng):
    content = bytes(brush(rng.random((6, 7)) > 0.5))
    for i in range(len(content)):
        with pytest.raises(BadImage, match="ends early|not 7 x 6 pixels"):
            shapes.brushed(content[:i], (6, 7))
        for value in rng.integers(0, 256, 4).tolist():
            try:
                changed = shapes.brushed(content[:i] + bytes([value]) + content[i + 1 :], (6, 7))
                assert changed.shape == (6, 7)
            except BadImage as error:
                assert error.kind == "corrupt"
    with pytest.raises(BadImage, match="not 7 x 5 pixels"):
        shapes.brushed(content, (5, 7))


def test_the_newest_annotation_that_was_not_cancelled_counts(tmp_path, masks):
    early, late, later = "2026-11-26T20:00:48Z", "2026-11-26T20:00:48.5Z", "2026-11-27T00:00:00+00:00"
    tasks = [
        task(data("a/1.jpg", SIZE), annotation([stroke(masks[1])], at=late), annotation([stroke(masks[0])], at=early)),
        task(data("a/2.jpg", SIZE), annotation([stroke(masks[2])]), annotation([], at=later, cancelled=True)),
        task(data("3.jpg", SIZE), annotation([])),  # looked at: there is nothing
        task(data("4.jpg", SIZE), annotation([stroke(masks[0])], cancelled=True)),  # skipped
        task(data("5.jpg", SIZE)),
        task(data("6.jpg", SIZE), annotation([stroke(masks[0]), stroke(masks[1]), {"type": "choices", "value": {}}])),
    ]
    keys = [f"a/{i}.jpg" if i < 3 else f"{i}.jpg" for i in range(1, 7)]
    expected = dict(zip(keys, masks[1:3], strict=False)) | {"3.jpg": np.zeros(SIZE, bool), "6.jpg": masks[0] | masks[1]}
    assert same(found(written(tmp_path / "one.json", tasks), *keys), expected)
    later = [task(data("a/1.jpg", SIZE), annotation([stroke(masks[3])], at=later))]
    written(tmp_path / "two.json", later)  # imported a second time
    assert same(found(tmp_path, *keys), expected | {"a/1.jpg": masks[3]})


def test_images_are_found_by_what_tools_make_of_their_names(tmp_path, masks):
    place = "/data/local-files/?d=images/s%C3%BCd/a%20b.jpg"
    names = [{"image": place}, {"x": 1, "image": "/data/upload/3/0a1b2c3d-c.png"}, {"url": "s3://b/x/d.webp"}]
    names += [{"image": "https://host/e.jpg?X-Amz-Signature=1"}, {"image": "/data/upload/3/0a1b2c3d-nobody.png"}]
    tasks = [task(each, annotation([stroke(masks[i % 4])])) for i, each in enumerate(names)]
    keys = ("süd/a b.jpg", "deep/c.png", "d.webp", "e.jpg", "f.jpg")
    matches = corrections.match(written(tmp_path / "x.json", tasks), keys)
    assert matches.unused == ["nobody.png"] and set(matches.location) == {*keys[:4]}
    assert same(found(tmp_path / "x.json", *keys), dict(zip(keys, masks, strict=False)))
    images = ["00001__a__b.jpg", "00002__b.jpg", "task/00003__b.png", "c__d.png", "sub/e.jpg", "Z_E.jpg", "nobody.jpg"]
    keys = ("a/b.jpg", "b.jpg", "b.png", "c/d.webp", "deep/sub/e.jpg", "z-e.jpeg")
    path = write_coco(tmp_path / "in/annotations/instances_default.json", {name: [] for name in images}, ["coat"])
    matches = corrections.match(str(path), keys)
    assert matches.unused == ["nobody.jpg"] and set(matches.location) == {*keys}


def test_images_that_are_one_without_folders_never_get_the_mask_of_the_other(tmp_path, masks):
    keys, drawn = ("a/b.jpg", "a__b.jpg", "c.jpg"), {"a__b.jpg": [("coat", masks[0])], "a__b-0a1b2c3d.jpg": []}
    path = write_coco(tmp_path / "x.json", drawn | {"c.jpg": [("coat", masks[1])]}, ["coat"])
    assert corrections.match(str(path), keys).unused == list(drawn) and same(found(path, *keys), {"c.jpg": masks[1]})
    tasks = [task(data(key, SIZE), annotation([stroke(mask)])) for key, mask in zip(keys, masks, strict=False)]
    place = written(tmp_path / "y.json", tasks)  # whose tasks have the key
    assert same(found(place, *keys), dict(zip(keys, masks, strict=False)))


def test_polygons_and_rectangles_cover_the_pixels_inside(tmp_path):
    mask = np.zeros(SIZE, bool)
    mask[2:7, 3:9] = True
    box = {
        "x": 300 / 14,
        "y": 200 / 9,
        "width": 600 / 14,
        "height": 500 / 9,
        "rotation": 0,
        "rectanglelabels": ["coat"],
    }
    corners = [(3, 2), (9, 2), (9, 7), (3, 7)]
    points = {"points": [[100 * x / 14, 100 * y / 9] for x, y in corners], "closed": True, "polygonlabels": ["coat"]}
    upright = {"x": 900 / 14, "y": 200 / 9, "width": 500 / 14, "height": 600 / 9, "rotation": 90, "rectanglelabels": []}
    regions = [region("rectanglelabels", box, SIZE), region("polygonlabels", points, SIZE)]
    regions.append(region("rectanglelabels", upright, SIZE))
    tasks = [task(data(f"{i}.jpg", SIZE), annotation([each])) for i, each in enumerate(regions)]
    assert same(
        found(written(tmp_path / "x.json", tasks), "0.jpg", "1.jpg", "2.jpg"),
        dict.fromkeys(["0.jpg", "1.jpg", "2.jpg"], mask),
    )
    drawn = {
        "0.jpg": [("coat", [side for corner in corners for side in corner])],
        "1.jpg": [("coat", {"bbox": [3, 2, 6, 5]})],
        "2.jpg": [("coat", mask)],
        "3.jpg": [("coat", {"bbox": [3.5, 1.5, 5, 6], "attributes": {"rotation": 90.0}})],  # about its middle
    }
    path = write_coco(tmp_path / "y.json", drawn, ["coat"])
    assert same(found(path, *drawn), dict.fromkeys(drawn, mask))
    bar = {"a.jpg": [("coat", {"bbox": [3, 4, 8, 1], "attributes": {"rotation": 45.0}})]}  # clockwise
    turned = found(write_coco(tmp_path / "z.json", bar, ["coat"]), "a.jpg")["a.jpg"]
    assert turned[2, 4] and turned[6, 8] and not turned[2, 8] and not turned[6, 4]


def test_shapes_and_their_names_may_be_tags_of_their_own(tmp_path, masks):
    one, other = (stroke(mask) for mask in masks[:2])
    bare = one | {"type": "brush", "value": {name: one["value"][name] for name in ("format", "rle")}}
    named = bare | {"type": "labels", "from_name": "tag", "value": bare["value"] | {"labels": ["coat"]}}
    tasks = [
        task(data("a.jpg", SIZE), annotation([bare, named, other | {"value": other["value"] | {"brushlabels": ["x"]}}]))
    ]
    assert same(found(written(tmp_path / "x.json", tasks), "a.jpg"), {"a.jpg": masks[0]})


def test_of_several_names_the_first_masks_own_counts(tmp_path, masks, caplog):
    caplog.set_level("INFO", "raypipe")
    both = [stroke(masks[0], "cluster 0"), stroke(masks[1], "cluster 1")]
    tasks = [task(data(f"{i}.jpg", SIZE, each), annotation(both)) for i, each in enumerate(["cluster 0", "cluster 1"])]
    tasks.append(task(data("2.jpg", SIZE, None), annotation(both)))
    tasks.append(task(data("3.jpg", SIZE, "coat"), annotation(both)))
    tasks.append(task(data("4.jpg", SIZE, None), annotation([])))
    read = found(written(tmp_path / "x.json", tasks), *(f"{i}.jpg" for i in range(5)))
    np.testing.assert_array_equal([read["0.jpg"], read["1.jpg"]], masks[:2])
    assert not read["4.jpg"].any()  # nothing is nothing, whatever it is called
    assert "nothing tells which one is the mask" in read["2.jpg"] and "its first label is 'coat'" in read["3.jpg"]
    drawn = {"a.jpg": [("cluster 0", masks[0]), ("cluster 1", masks[1])], "b.jpg": [("cluster 1", masks[0])]}
    path = write_coco(tmp_path / "y.json", drawn, ["cluster 0", "cluster 1"])
    assert same(found(path, *drawn), {"a.jpg": masks[0], "b.jpg": np.zeros(SIZE, bool)})
    assert "labels: the first mask is what is named 'cluster 0', of 'cluster 0', 'cluster 1'" in caplog.messages


def test_a_download_is_read_packed_unpacked_and_in_a_folder_of_several(tmp_path, masks):
    first = write_coco(tmp_path / "one/annotations/instances_default.json", {"a.jpg": [("coat", masks[0])]}, ["coat"])
    (tmp_path / "one/images").mkdir()
    (tmp_path / "one/images/a.jpg").write_bytes(b"a picture")
    second = write_coco(tmp_path / "two.json", {"b.jpg": [("coat", masks[1])]}, ["coat"])
    (tmp_path / "all").mkdir()
    with zipfile.ZipFile(tmp_path / "all/task-00001.zip", "w") as file:
        file.write(first, "annotations/instances_default.json")
        file.writestr("images/default/a.jpg", b"a picture")
    (tmp_path / "all/two.json").write_bytes(second.read_bytes())
    (tmp_path / "all/_export.json").write_text("{}")
    for place in ("one", "all/task-00001.zip", "all"):
        assert corrections.are_at(str(tmp_path / place))
        expected = {"a.jpg": masks[0]} | ({"b.jpg": masks[1]} if place == "all" else {})
        assert same(found(tmp_path / place, "a.jpg", "b.jpg"), expected)
    (tmp_path / "all/mask.png").write_bytes(b"a mask beside them")
    assert not corrections.are_at(str(tmp_path / "all"))
    write_coco(tmp_path / "one/again.json", {"a.jpg": []}, ["coat"])
    with pytest.raises(
        ValueError, match="'a.jpg' is labelled in .*again.json and in .*instances_default.json; leave one"
    ):
        corrections.match(str(tmp_path / "one"), ["a.jpg"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('[{"data": {"image": "a.jpg"}}', "JSONDecodeError"),
        ('[{"data": {"image": "a.jpg"}} {}', "JSONDecodeError|KeyError: 'data'"),
        ("7", "a int without images and annotations"),
        ('{"images": [], "detections": []}', "a dict without images and annotations"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "KeyError: 'height'"),
        ('{"images": [], "annotations": [{"image_id": 1}], "categories": []}', "KeyError: 'bbox'"),
        ('{"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 1}], '
         '"categories": [{"id": 1, "name": "x"}]}', "annotations of images that it does not have"),
        ('[{"image": "a.jpg", "label": []}]', "not JSON-MIN.*KeyError: 'data'"),
        ('[{"data": {"text": ""}, "annotations": [{"result": [], "created_at": "2026-01-01"}]}]', "without a picture"),
        ('[{"data": {"image": "a.jpg"}, "annotations": [{"result": [], "created_at": "today"}]}]', "Invalid isoformat"),
        ('[{"data": {"image": "a.jpg"}, "predictions": []}]', "no task in it has an annotation"),
    ],
)  # fmt: skip
def test_files_of_other_kinds_are_told_apart(tmp_path, content, why):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=why):
        corrections.match(str(tmp_path / "x.json"), ["a.jpg"])


def test_archives_of_other_kinds_are_told_apart(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="a zip that cannot be read"):
        corrections.match(str(tmp_path / "a.zip"), ["a.jpg"])
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("SegmentationClass/a.png", b"a mask")
    with pytest.raises(ValueError, match="a zip without JSON: SegmentationClass/a.png"):
        corrections.match(str(tmp_path / "b.zip"), ["a.jpg"])
    with pytest.raises(FileNotFoundError):
        corrections.match(str(tmp_path / "c.zip"), ["a.jpg"])


def test_what_cannot_be_drawn_is_a_reason_of_its_image_alone(tmp_path, masks):
    good, far = stroke(masks[0]), {"points": [[0, 0], [900, 0], [0, 90]], "polygonlabels": ["coat"]}
    wrong = {
        "cut": good | {"value": good["value"] | {"rle": good["value"]["rle"][:9]}},
        "no byte": good | {"value": good["value"] | {"rle": [256]}},
        "sizes": good | {"original_width": 15},
        "turned": good | {"image_rotation": 90},
        "ellipse": region(
            "ellipselabels", {"x": 1, "y": 1, "radiusX": 3, "radiusY": 2, "ellipselabels": ["coat"]}, SIZE
        ),
        "far": region("polygonlabels", far, SIZE),
        "line": region("polygonlabels", far | {"points": [[0, 0], [9, 9]]}, SIZE),
        "nan": region("polygonlabels", far | {"points": [[0, 0], [9, float("nan")], [9, 9]]}, SIZE),
        "no value": good | {"value": [1]},
    }
    tasks = [task(data(f"{name}.jpg", SIZE), annotation([good, each])) for name, each in wrong.items()]
    tasks.append(task(data("huge.jpg", (10**9, 10**9)), annotation([])))
    tasks.append(task({"image": "empty.jpg"}, annotation([])))
    tasks.append(task(data("good.jpg", SIZE), annotation([good])))
    keys = [task["data"].get("key", "empty.jpg") for task in tasks]
    read = found(written(tmp_path / "x.json", tasks), *keys)
    np.testing.assert_array_equal(read.pop("good.jpg"), masks[0])
    assert len(read) == len(keys) - 1 and all(isinstance(why, str) for why in read.values())
    whys = ("ends early", "bytes must be in range", "several sizes", "turned", "another tool", "outside", "2 points")
    for name, why in zip(wrong, whys, strict=False):
        assert why in read[f"{name}.jpg"]
    assert "the limit is" in read["huge.jpg"] and "no size of the picture" in read["empty.jpg"]


def test_run_lengths_that_do_not_fill_their_image_are_a_reason(tmp_path, masks):
    path = write_coco(tmp_path / "x.json", {name: [("coat", masks[0])] for name in "abcdef"}, ["coat"])
    content = json.loads(path.read_text())
    counts = [[1], [-5, SIZE[0] * SIZE[1] + 5], "not run lengths", "", [2.5, "x"]]
    for each, wrong in zip(content["annotations"], counts, strict=False):
        each["segmentation"]["counts"] = wrong
    content["annotations"][5]["segmentation"]["size"] = [14, 9]
    read = found(written(tmp_path / "x.json", content), *"abcdef")
    assert all(isinstance(why, str) and "corrupt" in why for why in read.values())
    assert "another size" in read["f"]


def replaced(content, at: int, value):
    """JSON with one of its nodes, counted from the root, as another value; and how many nodes there are."""
    count = -1

    def walk(node):
        nonlocal count
        count += 1
        if count == at:
            return value
        if isinstance(node, dict):
            return {name: walk(each) for name, each in node.items()}
        return [walk(each) for each in node] if isinstance(node, list) else node

    return walk(content), count + 1


@pytest.mark.parametrize("tool", ["labelstudio", "cvat"])
def test_any_value_that_is_another_is_a_mask_or_a_reason(tmp_path, masks, tool, rng):
    small, corners = masks[0][:2, :3], [[0, 0], [90, 0], [0, 90]]
    polygon = region("polygonlabels", {"points": corners, "polygonlabels": ["coat"]}, small.shape)
    box = {"x": 1, "y": 2, "width": 3, "height": 4, "rotation": 5, "rectanglelabels": ["spot"]}
    shapes = [stroke(small), polygon, region("rectanglelabels", box, small.shape)]
    content = [task(data(key, small.shape), annotation(shapes), annotation([])) for key in "ab"]
    if tool == "cvat":
        drawn = {"a": [("coat", small), ("spot", [0, 0, 2, 0, 0, 2])], "b": [("coat", {"bbox": [0, 0, 1, 1]})]}
        content = json.loads(write_coco(tmp_path / "y.json", drawn, ["coat", "spot"]).read_text())
    read, nodes = 0, replaced(content, -1, None)[1]
    values = [None, -1, 0, 1e308, 10**30, float("nan"), "x", [], {}, [[]], ["a"], True]
    for at in range(nodes):
        for value in (values[i] for i in rng.choice(len(values), 3, replace=False)):
            try:
                its = found(written(tmp_path / "x.json", replaced(content, at, value)[0]), "a", "b")
                read += all(isinstance(mask, str) or mask.dtype == bool for mask in its.values())
            except ValueError:
                pass
    assert read > nodes
