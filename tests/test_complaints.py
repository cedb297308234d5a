"""Twenty complaints that users of other tools repeat most, each as a user meets it: here none of them holds.

Each test names threads in which people report it; `test_complaints_in_peers.py` has those that still hold there.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
from PIL import Image, ImageOps
from pycocotools import mask as coco
from support.faulty import GOOD, RAISES, Faulty, write_images
from support.tiny.rembg import write_network
from support.tiny.sam import write_model
from support.written import masks_row, write_run

import raypipe
from raypipe import schema
from raypipe.cli.verbs import main
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label as label_with
from raypipe.run import Run, new_attempt
from raypipe.storage import hold

RING = np.zeros((40, 60), bool)  # with a hole, and a second part
RING[5:30, 5:30], RING[12:20, 12:20], RING[33:38, 40:55] = True, False, True


def picture(path: Path, *, mode: str = "RGB", size: tuple[int, int] = (40, 60), **options) -> Path:
    """A file whose upper left quarter is bright, of (height, width)."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[: size[0] // 2, : size[1] // 2] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(path, **options)
    return path


def label(folder: Path, *words: str, input: str = "photos", output: str = "run", method: str = "kmeans") -> int:
    foreground = ["--foreground", "whole"] if method == "kmeans" else []
    place = ["--input", str(folder / input), "--output", str(folder / output)]
    return main(["label", method, *place, *foreground, "--local", *words])


def rows(run: Path) -> dict[str, dict]:
    """The run's rows by key; a key that comes twice is an error."""
    table = raypipe.load(str(run)).to_pylist()
    found = {row["key"]: row for row in table}
    assert len(found) == len(table)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Files as cameras, people and programs leave them


def test_photographs_that_are_stored_turned_have_masks_as_they_are_seen(tmp_path):
    """rembg: danielgatis/rembg#304, #13. FiftyOne: voxel51/fiftyone#3778."""
    exif = Image.Exif()
    exif[274] = 6
    path = picture(tmp_path / "photos/phone.jpg", exif=exif, quality=95)
    assert label(tmp_path) == 0
    (row,) = rows(tmp_path / "run").values()
    seen = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("L")) > 127
    assert seen.shape == (60, 40) == (row["height"], row["width"])
    assert (raypipe.decode(row)[1] == seen).mean() > 0.99


def test_grey_transparent_cmyk_and_16_bit_pictures_are_pictures(tmp_path):
    """segment-anything: facebookresearch/segment-anything#413. rembg: danielgatis/rembg#276."""
    modes = {"L": "png", "LA": "png", "P": "png", "RGBA": "png", "1": "png", "I;16": "png", "CMYK": "jpg"}
    for i, (mode, kind) in enumerate(modes.items()):
        picture(tmp_path / f"photos/{i}.{kind}", mode=mode)
    assert label(tmp_path) == 0
    bright = np.zeros((40, 60), bool)
    bright[:20, :30] = True
    found = rows(tmp_path / "run")
    assert len(found) == len(modes)
    for row in found.values():
        assert row["error"] == "" and (raypipe.decode(row)[1] == bright).mean() > 0.99, row["key"]


def test_a_file_that_cannot_be_read_is_a_row_that_says_why(tmp_path):
    """autodistill: autodistill/autodistill#101."""
    for name in "abc":
        picture(tmp_path / f"photos/{name}.png")
    whole = (tmp_path / "photos/b.png").read_bytes()
    (tmp_path / "photos/b.png").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "photos/c.png").write_bytes(b"")
    assert label(tmp_path) == 3
    found = rows(tmp_path / "run")
    assert found["a.png"]["error"] == "" and len(found["a.png"]["segments"]) == 2
    assert all(found[f"{name}.png"]["error"].startswith("decode: ") for name in "bc")


def test_names_and_endings_decide_nothing_and_an_empty_folder_is_no_success(tmp_path, capsys):
    """autodistill: autodistill/autodistill#181, #90."""
    for name, kind in {"A.JPG": "JPEG", "b.jpeg": "JPEG", "no ending": "PNG", "wrong.jpg": "PNG"}.items():
        picture(tmp_path / "photos" / name, format=kind)
    assert label(tmp_path) == 0
    assert rows(tmp_path / "run").keys() == {"A.JPG", "b.jpeg", "no ending", "wrong.jpg"}
    (tmp_path / "nothing").mkdir()
    assert label(tmp_path, input="nothing", output="other") == 2 and "no image" in capsys.readouterr().err


def test_photographs_of_any_sizes_go_through_in_one_batch(tmp_path):
    """Ray Data: ray-project/ray#38050, #49883."""
    sizes = [(40, 60), (60, 40), (1, 1), (7, 300), (64, 64)]
    for i, size in enumerate(sizes):
        picture(tmp_path / f"photos/{i}.png", size=size, mode="L" if i % 2 else "RGB")
    assert label(tmp_path, "--batch-size", "5") == 0
    found = rows(tmp_path / "run")
    assert [(row["height"], row["width"]) for _, row in sorted(found.items())] == sizes
    assert not any(row["error"] for row in found.values())


# Runs that end, fail and start again


def test_an_image_that_raises_is_a_row_and_the_others_are_labelled(tmp_path):
    """Ray Data: ray-project/ray#41213."""
    write_images(tmp_path / "photos", [GOOD, RAISES, GOOD])
    label_with(Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True), Faulty())
    found = rows(tmp_path / "run")
    assert "this image is not liked" in found["0001.png"]["error"]
    assert all(len(found[key]["segments"]) == 1 for key in ("0000.png", "0002.png"))


def test_what_was_labelled_is_not_labelled_again(tmp_path):
    """img2dataset: rom1504/img2dataset#155, #358. segment-anything: facebookresearch/segment-anything#398."""
    write_images(tmp_path / "photos", [GOOD] * 4)
    assert label(tmp_path, "--limit", "2") == 0
    before = rows(tmp_path / "run")
    assert label(tmp_path) == 0
    after = rows(tmp_path / "run")
    assert len(before) == 2 and len(after) == 4 and all(after[key] == row for key, row in before.items())


def test_only_what_failed_is_tried_again(tmp_path):
    """img2dataset: rom1504/img2dataset#333, #452."""
    write_images(tmp_path / "photos", [GOOD] * 3)
    good = (tmp_path / "photos/0001.png").read_bytes()
    (tmp_path / "photos/0001.png").write_bytes(b"not yet downloaded")
    assert label(tmp_path) == 3
    before = rows(tmp_path / "run")
    (tmp_path / "photos/0001.png").write_bytes(good)
    assert label(tmp_path, "--retry-errors") == 0
    after = rows(tmp_path / "run")
    assert {key for key in after if after[key] != before[key]} == {"0001.png"} and after["0001.png"]["error"] == ""


def test_a_list_that_was_edited_since_adds_what_is_new(tmp_path):
    """img2dataset: rom1504/img2dataset#438."""
    write_images(tmp_path / "photos", [GOOD] * 4)
    paths = [str(tmp_path / f"photos/{i:04d}.png") for i in range(4)]
    (tmp_path / "list.txt").write_text("\n".join(paths[:3]))
    assert label(tmp_path, input="list.txt") == 0
    before = rows(tmp_path / "run")
    (tmp_path / "list.txt").write_text("\n".join([paths[3], paths[2], paths[0], paths[3]]))  # one gone, one twice
    assert label(tmp_path, input="list.txt") == 0
    after = rows(tmp_path / "run")
    assert len(before) == 3 and len(after) == 4 and all(after[key] == row for key, row in before.items())


def test_the_same_command_may_run_twice_and_moves_no_photograph(tmp_path):
    """autodistill: autodistill/autodistill#58, #148."""
    write_images(tmp_path / "photos", [GOOD] * 2)
    photos = contents(tmp_path / "photos")
    assert label(tmp_path) == 0
    run = raypipe.load(str(tmp_path / "run"))
    assert label(tmp_path) == 0
    assert raypipe.load(str(tmp_path / "run")).equals(run) and contents(tmp_path / "photos") == photos


def test_results_are_not_written_among_the_photographs(tmp_path, capsys):
    """rembg: danielgatis/rembg#94."""
    write_images(tmp_path / "photos", [GOOD] * 2)
    photos = contents(tmp_path / "photos")
    for output in ("photos", "photos/run"):
        assert label(tmp_path, output=output) == 2 and "the next run would label its files" in capsys.readouterr().err
    assert contents(tmp_path / "photos") == photos


def test_writers_side_by_side_and_another_run_on_the_same_output_overwrite_nothing(tmp_path):
    """Ray Data: ray-project/ray#54949, #55043."""
    run, attempt = Run(str(tmp_path / "many"), "kmeans"), new_attempt()
    parts = [pa.Table.from_pylist([masks_row(f"{i}.png", RING[None])], schema=schema.MASKS) for i in range(12)]
    with hold(run.folder, attempt), ThreadPoolExecutor(4) as pool:
        run.freeze({"k": 2}, {"weights": {}})
        list(pool.map(lambda i: run.commit(attempt, i, parts[i]), range(len(parts))))
        run.finish(attempt)
    assert len(rows(tmp_path / "many")) == len(parts)
    write_images(tmp_path / "photos", [GOOD] * 2)
    assert label(tmp_path) == 0
    before = contents(tmp_path / "run/masks")
    assert label(tmp_path, "--k", "3") == 4 and contents(tmp_path / "run/masks") == before


# Masks


def test_finding_nothing_is_an_answer(tmp_path):
    """segment-anything: facebookresearch/segment-anything#614; in transformers: huggingface/transformers#25806."""
    picture(tmp_path / "photos/a.png")
    sure = ["--weights", str(write_model(tmp_path / "sam")), "--preset", "library", "--points-per-side", "3"]
    sure += ["--crop-n-layers", "1", "--pred-iou-thresh", "0.99"]
    assert label(tmp_path, *sure, method="sam") == 0
    (row,) = rows(tmp_path / "run").values()
    assert row["segments"] == [] and row["error"] == ""


def test_masks_are_smaller_than_their_photographs(tmp_path):
    """rembg: danielgatis/rembg#391."""
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos/astronaut.jpg"
    Image.fromarray(skimage.data.astronaut()).save(photo, quality=90)
    assert label(tmp_path) == 0
    parts = (tmp_path / "run/masks").rglob("*.parquet")
    assert 0 < sum(part.stat().st_size for part in parts) < photo.stat().st_size


def test_a_mask_from_the_network_of_rembg_needs_none_of_what_makes_its_import_slow(tmp_path):
    """rembg: danielgatis/rembg#169, pymatting/pymatting#84."""
    picture(tmp_path / "photos/a.png")
    words = ["label", "rembg", "--model", str(write_network(tmp_path / "tiny.onnx")), "--local"]
    words += ["--input", str(tmp_path / "photos"), "--output", str(tmp_path / "run")]
    code = "import sys; sys.modules.update(numba=None, pymatting=None)\nfrom raypipe.cli.verbs import main; "
    done = subprocess.run([sys.executable, "-c", f"{code}sys.exit(main({words!r}))"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = rows(tmp_path / "run").values()
    assert row["error"] == "" and len(row["segments"]) == 1


# Handing masks on


@pytest.fixture
def overlapping(tmp_path) -> tuple[Path, np.ndarray]:
    """A run of one picture whose two masks overlap, one with a hole and two parts, and the masks."""
    picture(tmp_path / "photos/a.png")
    found = np.stack([RING, np.roll(RING, 8, 1)])
    write_run(str(tmp_path / "run"), [row_of(tmp_path / "photos/a.png", "a.png", found, labels=["left", "right"])])
    return tmp_path, found


def row_of(path: Path, key: str, found: np.ndarray, **cells) -> dict:
    return masks_row(key, found, uri=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **cells)


def exported(folder: Path, form: str, *words: str) -> Path:
    output = folder / "out" / form
    assert main(["export", str(folder / "run"), "--format", form, "--output", str(output), *words]) == 0
    return output


def coco_masks(file: Path) -> list[np.ndarray]:
    """The masks of a COCO file, as COCO's own tools read them."""
    content = json.loads(file.read_text())
    found = []
    for annotation in content["annotations"]:
        rle = annotation["segmentation"]
        rle = coco.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle
        found.append(coco.decode(rle).astype(bool))
    return found


def test_holes_and_parts_of_a_mask_stay_what_they_are(overlapping):
    """FiftyOne: voxel51/fiftyone#6421. CVAT: open-edge-platform/datumaro#168."""
    folder, found = overlapping
    file = exported(folder, "coco") / "annotations.json"
    np.testing.assert_array_equal(coco_masks(file)[0], found[0])


def test_masks_that_overlap_keep_what_they_share(overlapping):
    """CVAT: cvat-ai/cvat#718."""
    folder, found = overlapping
    assert (found[0] & found[1]).any()
    np.testing.assert_array_equal(coco_masks(exported(folder, "cvat") / "annotations/instances_default.json"), found)


def test_brushes_for_label_studio_are_the_masks_and_coco_has_them_too(overlapping):
    """Label Studio: HumanSignal/label-studio#382, #5899, #7737, HumanSignal/label-studio-converter#72."""
    brush = pytest.importorskip("label_studio_converter.brush", reason="needs label-studio-converter")
    folder, found = overlapping
    (file,) = (path for path in exported(folder, "labelstudio").glob("*.json") if path.name[0] != "_")
    results = json.loads(file.read_text())[0]["predictions"][0]["result"]
    for region, mask in zip(results, found, strict=True):
        alpha = brush.decode_rle(region["value"]["rle"]).reshape(*mask.shape, 4)[..., 3]
        np.testing.assert_array_equal(alpha > 0, mask)
    file = exported(folder, "coco") / "annotations.json"
    np.testing.assert_array_equal(coco_masks(file), found)


def test_pictures_of_one_name_do_not_collide(tmp_path):
    """CVAT: cvat-ai/cvat#7523, #8076. segment-anything: facebookresearch/segment-anything#398."""
    table, expected = [], {}
    for i, key in enumerate(("1.png", "1.jpg", "a/1.png", "b/1.png")):
        found = np.roll(RING, 3 * i, 1)[None]
        expected[found.tobytes()] = key
        table.append(row_of(picture(tmp_path / "photos" / key), key, found))
    write_run(str(tmp_path / "run"), table)
    files = list(exported(tmp_path, "png").rglob("*.png"))
    assert len(files) == 4 and {(np.asarray(Image.open(file)) > 0).tobytes() for file in files} == expected.keys()
    content = exported(tmp_path, "cvat")
    assert len(list((content / "images").iterdir())) == 4


def test_a_second_export_overwrites_nothing_unasked(overlapping, capsys):
    """FiftyOne: voxel51/fiftyone#6346."""
    folder, _ = overlapping
    output = exported(folder, "png")
    before = contents(output)
    assert main(["export", str(folder / "run"), "--format", "png", "--output", str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err and contents(output) == before
    shutil.rmtree(folder / "out")
    (output / "my work").mkdir(parents=True)
    (output / "my work/notes.txt").write_text("of mine")
    assert main(["export", str(folder / "run"), "--format", "png", "--output", str(output), "--overwrite"]) == 2
    assert contents(output) == {"my work/notes.txt": b"of mine"}
