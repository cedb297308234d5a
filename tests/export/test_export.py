"""Each format is read back by the tool that it is for, and gives the masks of the run."""

import csv
import doctest
import hashlib
import io
import json
import re
import tarfile
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from support.written import masks_row, random_masks, write_run

import raypipe
from raypipe import masks, storage
from raypipe.cli.verbs import main
from raypipe.export import formats
from raypipe.export.export import Export, export
from raypipe.export.formats import find, names
from raypipe.export.target import Target, safe_stem
from raypipe.inputs.originals import portable
from raypipe.run import Run

HOSTILE = {  # key of an image -> size of its picture
    "plain.jpg": (20, 31),
    "plain.png": (17, 9),  # the same name but for the extension
    "sub/ünï 'code'.png": (8, 8),
    "=cmd|' /C calc'!A0.png": (5, 7),
    "../../escape.png": (6, 6),
    "/etc/absolute.png": (6, 4),
    "a\\..\\b\n.png": (3, 3),
    "x" * 250 + ".png": (4, 4),
    "v1.2/photo.final.JPG": (11, 13),
}


@pytest.fixture
def made(tmp_path, rng) -> tuple[str, dict[str, dict]]:
    """A run of pictures with hostile keys, two masks each, one without any, one that failed; its rows by key."""
    table = []
    (tmp_path / "originals").mkdir()
    for i, (key, size) in enumerate(HOSTILE.items()):
        path = tmp_path / "originals" / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        count = 0 if i == 4 else 2
        table.append(masks_row(key, random_masks(rng, size, count), uri=str(path), sha256=sha256))
    table.append(masks_row("broken.png", np.zeros((0, 1, 1)), error="decode: truncated: it ends early"))
    write_run(str(tmp_path / "run"), table)
    return str(tmp_path / "run"), {row["key"]: row for row in table}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def good(by_key: dict[str, dict]) -> dict[str, np.ndarray]:
    """The masks of the images that did not fail, by key."""
    return {key: raypipe.decode(row) for key, row in by_key.items() if not row["error"]}


def expected_map(found: np.ndarray) -> np.ndarray:
    """The label map, pixel by pixel: of the masks that hold it, the smallest."""
    areas, result = [mask.sum() for mask in found], np.zeros(found.shape[1:], np.uint8)
    for place in np.ndindex(result.shape):
        holders = [i for i in range(len(found)) if found[i][place]]
        result[place] = min(holders, key=lambda i: (areas[i], -i)) + 1 if holders else 0
    return result


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_example_of_a_format_runs():
    assert doctest.testmod(formats).failed == 0 < doctest.testmod(formats).attempted


def test_a_format_is_found_by_its_name(made, capsys):
    assert main(["export", made[0], "--format", "cocoo"]) == 2
    assert capsys.readouterr().err == "raypipe: unknown format 'cocoo'; did you mean 'coco'?\n"
    with pytest.raises(ValueError, match="unknown format 'tfrecord'; choose one of: camtrapdp, coco, csv"):
        find("tfrecord")


def test_coco_is_read_by_pycocotools_with_the_same_masks(made, tmp_path):
    from pycocotools.coco import COCO

    run, by_key = made
    result = export(Export(run, "coco"))
    coco = COCO(f"{run}/export/coco/annotations.json")
    assert (result.images, result.segments) == (len(HOSTILE), 2 * len(HOSTILE) - 2) and result.exit_code == 0
    assert result.left_out == {"labelling failed: decode: truncated": 1}
    assert len(coco.anns) == result.segments and all(isinstance(i, int) and i > 0 for i in coco.anns)
    assert coco.dataset["info"]["method"] == "kmeans" and [each["name"] for each in coco.cats.values()] == [
        "cluster 0",
        "cluster 1",
    ]
    for image in coco.dataset["images"]:
        found = good(by_key)[image["file_name"]]
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(annotations) == len(found)
        for annotation, mask in zip(annotations, found, strict=True):
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
            assert coco.cats[annotation["category_id"]]["name"] == f"cluster {annotation['segment']}"


def test_a_label_map_is_read_by_pillow_and_never_leaves_the_folder(made, tmp_path):
    run, by_key = made
    result = export(Export(run, "png", output=str(tmp_path / "out/maps")))
    assert files(tmp_path / "out") == [name for name in files(tmp_path / "out") if name.startswith("maps/")]
    assert not (tmp_path / "escape.png").exists() and not (tmp_path / "out/escape.png").exists()
    maps = {np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "out/maps").rglob("*.png")}
    assert maps == {expected_map(found).tobytes() for found in good(by_key).values()}
    assert {"maps/plain.png", "maps/v1.2/photo.final.png"} <= set(files(tmp_path / "out"))
    assert result.remarks["images have overlapping masks: the smaller one lies on top"] == len(HOSTILE) - 1
    assert result.remarks["files have their image's id in the name: another image has that name"] == 1


def test_a_label_map_has_colours_to_look_at_and_keeps_its_values(made, tmp_path):
    run, by_key = made
    export(Export(run, "png", output=str(tmp_path / "out")))
    picture, found = Image.open(tmp_path / "out/plain.png"), expected_map(good(by_key)["plain.jpg"])
    assert picture.mode == "P" and picture.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    np.testing.assert_array_equal(np.asarray(picture), found)
    colours = np.array(picture.getpalette()).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 256
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), colours[found])
    assert (tmp_path / "out/values.csv").read_text().split("\n")[1:3] == ["0,background", "1,cluster 0"]


def test_cutouts_are_the_original_within_the_mask(made, tmp_path):
    run, by_key = made
    export(Export(run, "cutout", output=str(tmp_path / "out")))
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2 * len(HOSTILE) - 2
    found, original = good(by_key)["plain.jpg"], np.asarray(Image.open(by_key["plain.jpg"]["uri"]))
    for i, mask in enumerate(found):
        picture = np.asarray(Image.open(tmp_path / f"out/plain_{i}.png"))
        np.testing.assert_array_equal(picture[..., 3] == 255, mask)
        np.testing.assert_array_equal(picture[mask][:, :3], original[mask])


def fill(mask: np.ndarray) -> np.ndarray:
    """Holes filled, slowly: background that reaches the border by steps to 4 neighbours stays."""
    outside = np.pad(np.zeros_like(mask), 1, constant_values=True)
    while True:
        grown = outside.copy()
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            grown |= np.roll(outside, shift, axis)
        grown[1:-1, 1:-1] &= ~mask
        if (grown == outside).all():
            return ~outside[1:-1, 1:-1]
        outside = grown


def test_yolo_polygons_give_the_masks_with_their_holes_filled(made, tmp_path):
    import cv2

    run, by_key = made
    result = export(Export(run, "yolo", output=str(tmp_path / "out"), where="segment = 0"))
    assert yaml.safe_load((tmp_path / "out/data.yaml").read_text())["names"] == {0: "cluster 0", 1: "cluster 1"}
    pictures = {np.asarray(Image.open(row["uri"])).tobytes(): key for key, row in by_key.items() if not row["error"]}
    read = 0
    for image in map(tmp_path.joinpath, [name for name in files(tmp_path) if name.startswith("out/images/")]):
        pixels = np.asarray(Image.open(image))
        label = tmp_path / "out/labels" / image.relative_to(tmp_path / "out/images").with_suffix(".txt")
        drawn = np.zeros(pixels.shape[:2], np.uint8)
        for line in label.read_text().splitlines():
            category, *values = line.split()
            points = np.array(values, float).reshape(-1, 2)
            assert category == "0" and len(points) >= 3 and (points > 0).all() and (points < 1).all()
            cv2.fillPoly(drawn, [(points * pixels.shape[1::-1]).astype(np.int32)], 1)  # as ultralytics does
        mask = good(by_key)[pictures[pixels.tobytes()]][0]
        np.testing.assert_array_equal(drawn > 0, fill(mask))
        read += 1
    assert read == len(HOSTILE) - 1 and result.remarks["masks have holes, which polygons fill"] > 0


def decode_brush(values: list[int]) -> np.ndarray:
    """@thi.ng/rle-pack, bit by bit."""
    bits = "".join(f"{value:08b}" for value in values)
    at = 0

    def read(size: int) -> int:
        nonlocal at
        at += size
        return int(bits[at - size : at], 2)

    count, word = read(32), read(5) + 1
    sizes, decoded = [read(4) + 1 for _ in range(4)], []
    while len(decoded) < count:
        is_run, length = read(1), read(sizes[read(2)]) + 1
        decoded += [read(word)] * length if is_run else [read(word) for _ in range(length)]
    return np.array(decoded, np.uint8)


def test_label_studio_brushes_hold_the_masks(made):
    run, by_key = made
    export(Export(run, "labelstudio", category="spot & stripe"))
    tasks = json.loads(open(f"{run}/export/labelstudio/tasks.json").read())
    labels = ElementTree.parse(f"{run}/export/labelstudio/config.xml").findall(".//Label")
    assert [label.get("value") for label in labels] == ["spot & stripe"] and len(tasks) == len(HOSTILE)
    for task in tasks:
        assert task["data"]["image"].startswith("/data/local-files/?d=")
        for region, mask in zip(task["predictions"][0]["result"], good(by_key)[task["data"]["key"]], strict=True):
            alpha = decode_brush(region["value"]["rle"]).reshape(*mask.shape, 4)[..., 3]
            np.testing.assert_array_equal(alpha > 0, mask)
            assert region["value"]["brushlabels"] == ["spot & stripe"] and region["original_height"] == len(mask)


@pytest.mark.parametrize("size", [(1, 1), (1, 16384), (200, 300), (257, 64), (129, 127)])
def test_label_studios_own_converter_decodes_brushes(size, rng):
    brush = pytest.importorskip("label_studio_converter.brush", reason="needs label-studio-converter")
    from raypipe.export.formats.labelstudio import brush as encode

    stripes = np.zeros(size, bool)
    stripes[::3] = True
    for mask in (np.zeros(size, bool), np.ones(size, bool), stripes, rng.random(size) > 0.999):
        np.testing.assert_array_equal(
            brush.decode_rle(encode(mask)).reshape(*size, 4), np.repeat(mask[..., None] * 255, 4, 2)
        )


def test_hugging_face_datasets_loads_images_and_masks(made, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    run, by_key = made
    export(Export(run, "hf", output=str(tmp_path / "out")))
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == len(HOSTILE) and isinstance(loaded.features["image"], datasets.Image)
    for row in loaded:
        found = good(by_key)[row["key"]]
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(Image.open(by_key[row["key"]]["uri"])))
        np.testing.assert_array_equal(np.asarray(row["mask"]), expected_map(found))
        for segment, mask in zip(row["segments"], found, strict=True):
            np.testing.assert_array_equal(masks.decode_rle(segment), mask)
    card = (tmp_path / "out/README.md").read_text()
    assert "kmeans" in card and "Licence" in card and '"k": 2' in card


def test_webdataset_reads_one_sample_per_image(made, tmp_path, monkeypatch):
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset")
    run, by_key = made
    monkeypatch.setattr("raypipe.export.formats.webdataset.SHARD_BYTES", 1500)
    export(Export(run, "webdataset", output=str(tmp_path / "out")))
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert len(shards) > 1
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil"))
    keys = [sample["__key__"] for sample in samples]
    assert len(set(keys)) == len(HOSTILE) and not any("." in key for key in keys)
    for sample in samples:
        found = good(by_key)[sample["json"]["key"]]
        np.testing.assert_array_equal(np.asarray(sample["mask.png"])[..., 0], expected_map(found))
        for segment, mask in zip(sample["json"]["segments"], found, strict=True):
            np.testing.assert_array_equal(masks.decode_rle(segment), mask)
    names = [name for shard in shards for name in tarfile.open(shard).getnames()]
    assert not any(name.startswith("/") or ".." in name.split("/") for name in names)


def test_a_spreadsheet_gets_one_line_per_image_and_no_formula(made):
    run, by_key = made
    export(Export(run, "csv"))
    content = open(f"{run}/export/csv/images.csv", "rb").read()
    assert content.startswith("\ufeff".encode())
    lines = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert [line["key"].removeprefix("'") for line in lines] == sorted(by_key)
    assert not any(cell.startswith(("=", "+", "-", "@")) for line in lines for cell in line.values())
    failed = next(line for line in lines if line["key"] == "broken.png")
    assert failed["error"].startswith("decode") and failed["area"] == failed["segments"] == failed["area_0"] == ""
    for line in lines:
        if line is failed:
            continue
        found = good(by_key)[line["key"].removeprefix("'")]
        assert int(line["area"]) == found.any(0).sum() and int(line["segments"]) == len(found)
        for i, mask in enumerate(found):
            assert int(line[f"area_{i}"]) == mask.sum()
            assert float(line[f"share_{i}"]) == pytest.approx(mask.mean(), abs=1e-6)
        share = found.any(0).mean() if len(found) else 0
        assert float(line["share_of_image"]) == float(line["share_of_foreground"]) == pytest.approx(share, abs=1e-6)


def test_originals_that_are_gone_or_changed_are_listed(made, tmp_path, capsys):
    run, by_key = made
    (tmp_path / "originals/0.png").unlink()
    Image.new("RGB", (9, 17)).save(tmp_path / "originals/1.png")
    assert main(["export", run, "--format", "cutout", "--output", str(tmp_path / "out")]) == 3
    assert "1  original missing: give the --input" in capsys.readouterr().out
    lines = list(csv.DictReader(open(tmp_path / "out/_left_out.csv", newline="")))
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons.keys() == {"plain.jpg", "plain.png", "broken.png"}
    assert "--input" in reasons["plain.jpg"] and "sha256 differs" in reasons["plain.png"]
    record = json.loads((tmp_path / "out/_export.json").read_text())
    assert record["left_out"]["original changed"] == 1 and record["finished"]


def test_originals_in_a_tar_or_moved_are_found_by_the_input(tmp_path, rng):
    archive = tmp_path / "photos.tar"
    Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8)).save(tmp_path / "x.png")
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "x.png", "x.png")
    raypipe.label("kmeans", str(archive), str(tmp_path / "run"), foreground="whole", local=True)
    assert export(Export(str(tmp_path / "run"), "yolo")).left_out == {"original missing": 1}
    archive.rename(tmp_path / "elsewhere.tar")  # another id and another key
    elsewhere = str(tmp_path / "elsewhere.tar")
    assert export(Export(str(tmp_path / "run"), "yolo", input=elsewhere, overwrite=True)).images == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "elsewhere.tar").rename(tmp_path / "b/photos.tar")  # another id, the same key
    result = export(Export(str(tmp_path / "run"), "yolo", input=str(tmp_path / "b/photos.tar"), overwrite=True))
    assert result.images == 1 and result.exit_code == 0
    export(Export(str(tmp_path / "run"), "labelstudio", input=str(tmp_path / "b/photos.tar")))
    (task,) = json.loads((tmp_path / "run/export/labelstudio/tasks.json").read_text())
    assert task["data"]["image"] == "/data/local-files/?d=images/photos/x.png"
    assert (tmp_path / "run/export/labelstudio/images/photos/x.png").read_bytes() == (tmp_path / "x.png").read_bytes()


@pytest.mark.parametrize("form", [form for form in names() if find(form).ORIGINALS])
def test_whoever_needs_pictures_is_told_how_to_find_them(tmp_path, capsys, form):
    row = masks_row("a.png", np.ones((1, 2, 2), bool), uri=str(tmp_path / "photos.tar#a.png"), sha256="0")
    write_run(str(tmp_path / "run"), [row])
    row = masks_row("a.png", np.ones((1, 2, 2), bool), uri=row["uri"], sha256="0", labels=["vase"])
    write_run(str(tmp_path / "named"), [row])
    options = {name: value for name, value in needed(form, tmp_path).items() if value}
    words = [
        "export",
        str(tmp_path / ("named" if "classes" in options or form == "rating" else "run")),
        "--format",
        form,
    ]
    assert main(words + [word for name, value in options.items() for word in (f"--{name}", value)]) == 3
    assert "1  original missing: give the --input (and --column) that was labelled\n" in capsys.readouterr().out


def test_a_picture_of_another_size_than_its_masks_is_left_out(tmp_path):
    for key, kind in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("c.bmp", "BMP")):
        Image.new("RGB", (3, 2)).save(tmp_path / key, kind)
    rows = [
        masks_row(
            path.name, np.ones((1, 3, 2), bool), uri=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(tmp_path.glob("?.*"))
    ]
    write_run(str(tmp_path / "run"), rows)
    for form in ("yolo", "cutout"):
        result = export(Export(str(tmp_path / "run"), form))
        assert (result.images, result.left_out, result.exit_code) == (0, {"original wrong_size": 3}, 3)


def test_a_rotated_photograph_is_exported_upright(tmp_path, rng):
    pixels = rng.integers(0, 256, (8, 16, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", exif=exif)
    content, suffix = portable({"height": 16, "width": 8}, file.getvalue())
    assert suffix == ".png" and np.asarray(Image.open(io.BytesIO(content))).shape == (16, 8, 3)
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG")
    assert portable({"height": 8, "width": 16}, file.getvalue()) == (file.getvalue(), ".jpg")


def test_a_folder_with_other_files_is_never_touched(made, tmp_path):
    run, _ = made
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            export(Export(run, "csv", output=str(tmp_path / "out"), overwrite=overwrite))
    assert files(tmp_path / "out") == ["mine.txt"]
    export(Export(run, "csv"))
    with pytest.raises(ValueError, match="--overwrite"):
        export(Export(run, "csv"))
    assert export(Export(run, "csv", overwrite=True)).images == len(HOSTILE) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "coco", "input": "photos"}, "--input and --column have no effect"),
        ({"format": "csv", "category": "spot"}, "--category has no effect"),
        ({"format": "csv", "classes": "voc2012"}, "--classes has no effect: csv does not number"),
        ({"format": "png", "classes": "voc2012", "category": "cat"}, "--category has no effect with --classes"),
        ({"format": "png", "classes": "voc2012"}, "segments without a name, which have no number; leave it out"),
        ({"format": "imagenets"}, "needs the numbers of its data set: --classes imagenet_s50|imagenet_s300|"),
        ({"format": "imagenets", "classes": "voc2012"}, "needs the numbers of its data set: --classes imagenet_s50"),
        ({"format": "coco", "join": "a.parquet"}, "--join has no effect without --where"),
        ({"format": "yolo", "input": "/photos", "output": "/photos/out"}, "lies inside the input"),
    ],
)
def test_options_without_effect_are_refused(made, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        export(Export(made[0], **options))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a raypipe run"):
        export(Export(str(tmp_path), "coco"))
    assert not list(tmp_path.iterdir())


def needed(form: str, folder) -> dict:
    """The options without which a format does nothing."""
    if form == "camtrapdp":
        head = "deploymentID,latitude,longitude,deploymentStart,deploymentEnd"
        (folder / "deployments.csv").write_text(f"{head}\nsite,1.5,-2,2026-01-01T00:00:00Z,2026-02-01T00:00:00Z\n")
        return {"deployments": str(folder / "deployments.csv")}
    return {"classes": getattr(find(form), "LISTS", (None,))[0]}


@pytest.mark.parametrize("form", [form for form in names() if form != "rating"])  # which asks about names
def test_a_run_without_rows_and_one_without_masks_can_be_exported(tmp_path, form):
    write_run(str(tmp_path / "empty"), [])
    options = needed(form, tmp_path)
    assert export(Export(str(tmp_path / "empty"), form, **options)).images == 0
    exif = Image.Exif()
    exif[271], exif.get_ifd(0x8769)[36867] = "camera", "2026:01:02 03:04:05"  # when it was taken
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.pgw").write_text("1 0 0 -1 0 0")  # its place on a map
    sha256 = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    row = masks_row("site/a.png", np.zeros((0, 2, 3), bool), uri=str(tmp_path / "a.png"), sha256=sha256)
    write_run(str(tmp_path / "bare"), [row])
    result = export(Export(str(tmp_path / "bare"), form, **options))
    assert (result.images, result.segments, result.left_out) == (1, 0, {})


MAIN_FILE = {
    "coco": "annotations.json",
    "png": "x.png",
    "csv": "images.csv",
    "webdataset": "shard-000000.tar",
    "labelstudio": "tasks.json",
    "cvat": "labels.json",
    "fiftyone": "samples.json",
    "megadetector": "megadetector.json",
}


@pytest.mark.parametrize("form", MAIN_FILE)
def test_a_run_on_an_object_store_is_exported_there(bucket, tmp_path, rng, form):
    filesystem, uri = bucket
    Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8)).save(file := io.BytesIO(), "PNG")
    storage.put(filesystem, "photos/in/sub/x.png", file.getvalue())
    raypipe.label("kmeans", uri("in"), uri("run"), foreground="whole", local=True)
    source = uri("in") if find(form).ORIGINALS else None
    result = export(Export(uri("run"), form, input=source, where="error = ''"))
    assert result.images == 1 and result.exit_code == 0 and "endpoint" not in result.output
    folder = Run(uri("run")).folder
    written = folder.files("export", form).keys() | folder.files("export", form, "sub").keys()
    assert MAIN_FILE[form] in written
    if form == "labelstudio":  # it reads the store itself
        (task,) = json.loads(folder.read("export", form, "tasks.json"))
        assert task["data"]["image"] == "s3://photos/run/export/labelstudio/images/sub/x.png"
        assert folder.read("export", form, "images", "sub", "x.png") == file.getvalue()


def test_names_of_files_and_folders_never_clash(tmp_path):
    target = Target(str(tmp_path))
    ids = [f"{i:032x}" for i in range(5)]
    keys = ["a.png/b.jpg", "a.jpg", "A.PNG", "..", "C:/x/./y.jpg"]
    paths = [target.name({"key": key, "image_id": i}, ".png") for key, i in zip(keys, ids, strict=True)]
    assert paths == ["a.png/b.png", "a-00000000.png", f"{ids[2]}.png", f"{ids[3]}.png", "C_/x/y.png"]
    for path in paths:
        target.put(b"", path)
    assert safe_stem("ü" * 200 + ".png", ids[1]).encode()[-9:] == b"-00000000"
