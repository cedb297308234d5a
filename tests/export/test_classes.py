"""Exports whose categories are numbered as a data set numbers them."""

import csv
import hashlib
import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from support.written import masks_row, write_run

from raypipe import classes
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.export.export import Export, export
from raypipe.images import ORIENTATION, UPRIGHT

HEIGHT, WIDTH = 8, 12


def run_of(folder, names: list[str], *, turn: int = 1) -> np.ndarray:
    """A run over one photograph `sub/x.jpg` with a stripe for each name. Returns the label map of the stripes."""
    (folder / "in/sub").mkdir(parents=True)
    exif, path = Image.Exif(), folder / "in/sub/x.jpg"
    exif[ORIENTATION] = turn
    size = (HEIGHT, WIDTH) if turn < 5 else (WIDTH, HEIGHT)
    Image.new("RGB", size[::-1]).save(path, exif=exif)
    stripes = np.tile(np.arange(WIDTH) // 2, (HEIGHT, 1)) % (len(names) + 1)
    found = np.stack([stripes == i for i in range(1, len(names) + 1)])
    row = masks_row(
        "sub/x.jpg", found, labels=names, uri=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    write_run(str(folder / "run"), [row])
    return stripes


def test_values_and_order_are_those_of_the_list_whatever_occurs(tmp_path):
    stripes = run_of(tmp_path, ["tvmonitor", "Cat"])  # 20 and 8
    export(Export(str(tmp_path / "run"), "png", classes="voc2012"))
    picture = Image.open(tmp_path / "run/export/png/sub/x.png")
    assert picture.mode == "P" and (np.asarray(picture) == np.array([0, 20, 8])[stripes]).all()
    lines = list(csv.DictReader(io.StringIO((tmp_path / "run/export/png/values.csv").read_text())))
    names = ["background", *classes.read("voc2012").names]
    assert [(int(line["value"]), line["name"]) for line in lines] == list(enumerate(names))
    export(Export(str(tmp_path / "run"), "yolo", classes="voc2012"))
    text = (tmp_path / "run/export/yolo/labels/sub/x.txt").read_text()
    assert {line.split()[0] for line in text.splitlines()} == {"19", "7"}
    data = yaml.safe_load((tmp_path / "run/export/yolo/data.yaml").read_text())
    assert data["names"] == dict(enumerate(names[1:]))
    export(Export(str(tmp_path / "run"), "webdataset", classes="voc2012"))


@pytest.mark.parametrize(("method", "labels"), [("maskclip", "dog"), ("clipseg", "cat; dog")])
def test_a_class_that_is_nowhere_is_not_exported_where_masks_never_overlap(tmp_path, method, labels):
    found = np.stack([np.zeros((HEIGHT, WIDTH), bool), np.ones((HEIGHT, WIDTH), bool)])
    row = masks_row("x.png", found, labels=["cat", "dog"])  # as of a run with soft masks
    write_run(str(tmp_path / "run"), [row], method=method)
    export(Export(str(tmp_path / "run"), "csv"))
    (line,) = csv.DictReader(io.StringIO((tmp_path / "run/export/csv/images.csv").read_text("utf-8-sig")))
    assert (line["labels"], line["segments"]) == (labels, str(len(labels.split("; "))))
    assert line["area_1"] == str(HEIGHT * WIDTH)
    export(Export(str(tmp_path / "run"), "coco"))
    content = json.loads((tmp_path / "run/export/coco/annotations.json").read_text())
    assert [each["name"] for each in content["categories"]] == labels.split("; ")


def test_categories_of_coco_have_the_ids_of_coco(tmp_path):
    run_of(tmp_path, ["stop sign", "toothbrush"])
    export(Export(str(tmp_path / "run"), "coco", classes="coco2017"))
    content = json.loads((tmp_path / "run/export/coco/annotations.json").read_text())
    assert [each["category_id"] for each in content["annotations"]] == [13, 90]
    assert content["categories"][11:13] == [{"id": 13, "name": "stop sign"}, {"id": 14, "name": "parking meter"}]
    export(Export(str(tmp_path / "run"), "coco", classes="toothbrush, stop sign", overwrite=True))
    content = json.loads((tmp_path / "run/export/coco/annotations.json").read_text())
    assert [each["category_id"] for each in content["annotations"]] == [2, 1]


@pytest.mark.parametrize("turn", UPRIGHT)
def test_the_test_server_of_imagenet_s_gets_numbers_in_red_and_green(tmp_path, turn):
    known = classes.read("imagenet_s919")
    stripes = run_of(tmp_path, [known.names[number - 1] for number in (1, 255, 256, 919)], turn=turn)
    result = export(Export(str(tmp_path / "run"), "imagenets", classes="imagenet_s919"))
    assert (result.images, result.left_out) == (1, {}) and bool(result.remarks) == (turn > 1)
    stored = np.asarray(Image.open(tmp_path / "run/export/imagenets/sub/x.png")).astype(int)
    assert (UPRIGHT[turn](stored[..., 0] + 256 * stored[..., 1]) == np.array([0, 1, 255, 256, 919])[stripes]).all()
    assert not stored[..., 2].any()


def test_an_export_is_a_label_of_the_same_classes_and_refused_for_others(tmp_path):
    run_of(tmp_path, ["cat", "dog"])
    out = str(tmp_path / "labels")
    export(Export(str(tmp_path / "run"), "png", output=out, classes="dog,cat,cow"))
    run = (str(tmp_path / "run"),)
    assert evaluate(Evaluate(run, out, classes="dog,cat,cow")).means["miou"] == 1
    with pytest.raises(ValueError, match="an export in which 1 is 'dog', which is another one in the classes"):
        evaluate(Evaluate(run, out, classes="cat,dog"))
    with pytest.raises(ValueError, match="names segments 'dog'; did you mean 'dogs'"):
        export(Export(str(tmp_path / "run"), "png", classes="cat,dogs"))
