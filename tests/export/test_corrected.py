"""The final data set has the masks that people corrected in the place of the run's, and all others as they are."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools.coco import COCO
from support.corrected import annotation, data, stroke, task, write_coco
from support.written import masks_row, random_masks, write_run

from raypipe.cli.verbs import main
from raypipe.export.export import Export, export
from raypipe.export.formats.cvat import label_names

SIZE = (9, 14)
KEYS = ("a/1.jpg", "a/2.jpg", "3.jpg", "4.jpg")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def run_of(folder, rng, count: int, method: str = "kmeans", labels=()) -> tuple[str, dict[str, np.ndarray]]:
    """A run of KEYS with so many masks each, and its masks by key."""
    found = {key: random_masks(rng, SIZE, count) for key in KEYS}
    rows = [masks_row(key, masks, labels=labels) for key, masks in found.items()]
    write_run(str(folder / "run"), rows, method=method)
    return str(folder / "run"), found


def exported(run: str, out, corrections) -> dict[str, list[tuple[str, bytes]]]:
    """The name and the pixels of each mask of a COCO export, as pycocotools reads it."""
    export(Export(run, "coco", output=str(out), corrections=str(corrections)))
    coco = COCO(str(out / "annotations.json"))
    return {
        image["file_name"]: [
            (coco.cats[each["category_id"]]["name"], coco.annToMask(each).astype(bool).tobytes())
            for each in coco.loadAnns(coco.getAnnIds(image_id))
        ]
        for image_id, image in coco.imgs.items()
    }


def back(path, drawn: dict[str, list]) -> str:
    """What Label Studio gives back. drawn: name and mask of each stroke by key; None for a task that was skipped."""
    tasks = []
    for key, strokes in drawn.items():
        result = [stroke(mask, name) for name, mask in strokes or ()]
        tasks.append(task(data(key, SIZE), annotation(result, cancelled=strokes is None)))
    path.write_text(json.dumps(tasks))
    return str(path)


def test_strokes_are_one_mask_where_a_run_has_one_for_each_image(tmp_path, rng):
    run, found = run_of(tmp_path, rng, 1, "grabcut")
    one, other = random_masks(rng, SIZE, 2)
    drawn = {"a/1.jpg": [("anything", one), ("anything", other)], "3.jpg": [], "4.jpg": None}
    masks = exported(run, tmp_path / "out", back(tmp_path / "back.json", drawn))
    assert masks.pop("a/1.jpg") == [("grabcut", (one | other).tobytes())] and masks.pop("3.jpg") == []
    assert masks == {key: [("grabcut", found[key][0].tobytes())] for key in ("a/2.jpg", "4.jpg")}
    assert json.loads((tmp_path / "out/_export.json").read_text())["corrections"] == str(tmp_path / "back.json")


def test_parts_keep_their_places(tmp_path, rng):
    run, found = run_of(tmp_path, rng, 2)
    one, other = random_masks(rng, SIZE, 2)
    drawn = {
        "a/1.jpg": [("cluster 1", one), ("cluster 0", other)],
        "a/2.jpg": [("cluster 1", one), ("cluster 1", other)],
    }
    masks = exported(run, tmp_path / "out", back(tmp_path / "back.json", drawn))
    assert sorted(masks.pop("a/1.jpg")) == [("cluster 0", other.tobytes()), ("cluster 1", one.tobytes())]
    assert masks.pop("a/2.jpg") == [("cluster 1", (one | other).tobytes())]
    export(Export(run, "png", output=str(tmp_path / "png"), corrections=str(tmp_path / "back.json")))
    values = np.array(Image.open(tmp_path / "png/a/2.png"))
    np.testing.assert_array_equal(values > 0, one | other)
    assert set(np.unique(values)) == {0, 2}
    assert masks == {key: [(f"cluster {i}", found[key][i].tobytes()) for i in (0, 1)] for key in ("3.jpg", "4.jpg")}


def test_objects_stay_apart_and_bear_the_names_of_the_run(tmp_path, rng):
    long = "a very long name of a cat, " * 3
    run, _ = run_of(tmp_path, rng, 2, "zero_guidance", labels=(long, "dog"))
    one, other = random_masks(rng, SIZE, 2)
    names = label_names([long, "dog"])
    drawn = {"a__1.jpg": [(names[0], one), (names[0], other), (names[1], one)]}
    path = write_coco(tmp_path / "back/annotations/instances_default.json", drawn, names)
    masks = exported(run, tmp_path / "out", path)
    assert masks["a/1.jpg"] == [(long, one.tobytes()), (long, other.tobytes()), ("dog", one.tobytes())]


def test_a_correction_that_cannot_be_used_is_listed_and_its_image_left_out(tmp_path, rng):
    run, _ = run_of(tmp_path, rng, 1, "grabcut")
    small = np.ones((3, 3), bool)
    tasks = [task(data("a/1.jpg", (3, 3)), annotation([stroke(small)])), task(data("3.jpg", SIZE), annotation([{}]))]
    tasks.append(task(data("3.jpg", SIZE), annotation([stroke(small)], at="2027-01-01T00:00:00Z")))
    (tmp_path / "back.json").write_text(json.dumps(tasks))
    result = export(Export(run, "coco", output=str(tmp_path / "out"), corrections=str(tmp_path / "back.json")))
    assert result.images == 2 and result.exit_code == 3
    assert result.left_out == {"correction: other_size": 1, "correction: corrupt": 1}
    listed = (tmp_path / "out/_left_out.csv").read_text()
    assert "drawn on 3 x 3 pixels, the image has 14 x 9" in listed and "pictures of several sizes in one task" in listed


def test_corrections_of_other_images_or_other_names_are_refused(tmp_path, rng, capsys):
    run, found = run_of(tmp_path, rng, 2)
    for drawn, why in (
        ({"b.jpg": [("cluster 0", found["3.jpg"][0])]}, "has none of an image of"),
        ({"3.jpg": [("claster 0", found["3.jpg"][0])]}, "the label 'claster 0'; did you mean 'cluster 0'?"),
    ):
        place = back(tmp_path / "back.json", drawn)
        assert main(["export", run, "--format", "csv", "--corrections", place]) == 2
        assert why in capsys.readouterr().err
    rows = [masks_row("1.jpg", found["3.jpg"]) | {"image_id": name * 32} for name in "ab"]  # from two inputs
    write_run(str(tmp_path / "two"), rows)
    place = back(tmp_path / "back.json", {"1.jpg": [("cluster 0", found["3.jpg"][0])]})
    assert main(["export", str(tmp_path / "two"), "--format", "csv", "--corrections", place]) == 2
    assert "several images of that key" in capsys.readouterr().err


def test_more_objects_than_the_run_has_in_an_image_keep_values_of_their_own(tmp_path, rng):
    run, _ = run_of(tmp_path, rng, 2, "sam")
    pixels = [np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) == i for i in range(5)]
    place = back(tmp_path / "back.json", {"a/1.jpg": [("sam", mask) for mask in pixels]})
    export(Export(run, "png", output=str(tmp_path / "out"), corrections=place))
    values = np.array(Image.open(tmp_path / "out/a/1.png"))
    assert all((values[mask] == i).all() for i, mask in enumerate(pixels, 1))
    assert (tmp_path / "out/values.csv").read_text().splitlines()[-1] == "5,segment 4"
    many = [("sam", pixels[i % 5]) for i in range(300)]  # more than 8 bits hold
    export(Export(run, "png", output=str(tmp_path / "many"), corrections=back(tmp_path / "back.json", {"3.jpg": many})))
    assert np.array(Image.open(tmp_path / "many/3.png")).max() == 301  # 255 is left out


def test_more_names_than_the_run_has_in_an_image_have_files_of_their_own(tmp_path, rng):
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "x.png")
    known = {"uri": str(tmp_path / "x.png"), "sha256": hashlib.sha256((tmp_path / "x.png").read_bytes()).hexdigest()}
    found = random_masks(rng, SIZE, 3)
    labels = ("cat", "dog", "cow")
    rows = [masks_row(key, found[:1], labels=[name], **known) for key, name in zip(KEYS, labels, strict=False)]
    write_run(str(tmp_path / "run"), rows, method="zero_guidance")
    place = back(tmp_path / "back.json", {"3.jpg": list(zip(labels, found, strict=True))})
    export(Export(str(tmp_path / "run"), "cutout", output=str(tmp_path / "cut"), corrections=place))
    assert sorted(file.name for file in (tmp_path / "cut").glob("3*")) == ["3_0.png", "3_1.png", "3_2.png"]
    export(Export(str(tmp_path / "run"), "csv", output=str(tmp_path / "csv"), corrections=place))
    table = next((tmp_path / "csv").glob("[!_]*.csv")).read_text(encoding="utf-8-sig")
    assert "area_2" in table.splitlines()[0]


def test_what_people_drew_has_no_embedding(tmp_path, rng):
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "x.png")
    known = {"uri": str(tmp_path / "x.png"), "sha256": hashlib.sha256((tmp_path / "x.png").read_bytes()).hexdigest()}
    found = random_masks(rng, SIZE, 2)
    rows = [masks_row(key, found, embeddings=np.ones((2, 3)), **known) for key in KEYS]
    write_run(str(tmp_path / "run"), rows, settings={"k": 2, "keep_embeddings": True})
    place = back(tmp_path / "back.json", {"3.jpg": [("cluster 0", found[0]), ("cluster 1", found[1])]})
    for form in ("webdataset", "hf"):
        export(Export(str(tmp_path / "run"), form, output=str(tmp_path / form), corrections=place))
    with tarfile.open(tmp_path / "webdataset/shard-000000.tar") as file:
        shapes = {key: np.load(io.BytesIO(file.extractfile(f"{key}.embeddings.npy").read())).shape for key in "34"}
    assert shapes == {"3": (2, 0), "4": (2, 3)}
    (file,) = (tmp_path / "hf").rglob("*.parquet")
    table = {row["key"]: [each["embedding"] for each in row["segments"]] for row in pq.read_table(file).to_pylist()}
    assert table["3.jpg"] == [None, None] and table["4.jpg"] == [[1, 1, 1]] * 2
