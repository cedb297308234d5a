"""CorLoc: golden values, slow loops over made data sets of each layout, and annotations as they come."""

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.golden import arrays
from support.layouts import BOXES, SIZE, voc_xml, write_coco, write_voc
from support.written import masks_row, write_run

from raypipe import images
from raypipe.cli.verbs import main
from raypipe.evaluation import datasets
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.tasks import boxes
from raypipe.evaluation.tasks.boxes import Boxes, TrueBoxes, box_of, filled, instances, ious, of_coco, of_voc
from raypipe.types import BadImage

RULES = ("largest_bbox", "largest_area")


@pytest.mark.parametrize("rule", RULES)
def test_the_golden_boxes_are_met(shared, rule):
    case, task = arrays(shared / "golden/saliency_evaluation/corloc.npz"), Boxes(box_rule=rule)
    rows = []
    for i, (start, stop) in enumerate(itertools.pairwise(case["gt_offsets"])):
        mask = case["masks"][i]
        rows.append(task.cells(masks_row("a", mask[None]), TrueBoxes(case["gt_boxes"][start:stop].astype(float), None)))
        assert (rows[-1]["box"] or [-1] * 4) == case[f"box_{rule}"][i].tolist()
        assert rows[-1]["box_iou"] == pytest.approx(case[f"best_iou_{rule}"][i], abs=1e-6)
        assert rows[-1]["correct"] == case[f"correct_{rule}"][i]
    assert task.values(task.sums(rows))["corloc"] == pytest.approx(case[f"corloc_{rule}"], abs=1e-6)


def test_the_golden_conversions_are_met(shared):
    case = arrays(shared / "golden/saliency_evaluation/selection_and_boxes.npz")
    corners = "".join(
        "<object><bndbox>"
        + "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for box in case["voc_xml"]
    )
    assert of_voc(f"<annotation>{corners}</annotation>".encode()).boxes.tolist() == case["voc_box"].tolist()
    image = {"height": 0, "width": 0, "boxes": case["coco_xywh"].tolist()}
    assert of_coco(json.dumps(image)).boxes.tolist() == case["coco_box"].tolist()


def plain_box(mask: np.ndarray, rule: str) -> tuple | None:
    """The box of a component found by a flood, pixel by pixel in reading order."""
    left, best = {(y, x) for y, x in np.argwhere(mask).tolist()}, None
    for start in sorted(left):
        if start not in left:
            continue
        waiting, component = [start], []
        left.remove(start)
        while waiting:
            y, x = waiting.pop()
            component.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    waiting.append(near)
        ys, xs = zip(*component, strict=True)
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        size = len(component) if rule == "largest_area" else (box[2] - box[0]) * (box[3] - box[1])
        if best is None or size > best[0]:
            best = (size, box)
    return best and best[1]


def plain_iou(one, other) -> float:
    (left, top, right, bottom), (left2, top2, right2, bottom2) = one, other
    both = max(0, min(right, right2) - max(left, left2)) * max(0, min(bottom, bottom2) - max(top, top2))
    return both / ((right - left) * (bottom - top) + (right2 - left2) * (bottom2 - top2) - both)


@pytest.mark.parametrize("rule", RULES)
def test_the_box_is_that_of_a_slow_search(rule):
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.5, 0.6):
        for _ in range(30):
            mask = rng.random((9, 14)) < share
            assert box_of(mask, rule=rule) == plain_box(mask, rule)
    assert box_of(np.zeros((3, 3), bool), rule=rule) is None and box_of(np.ones((1, 1), bool)) == (0, 0, 1, 1)


def test_the_iou_of_boxes_is_that_of_their_pixels():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 20, (40, 2, 2)), axis=1)
    found = np.array([[*low, *(high + 1)] for low, high in corners])
    masks = filled(found, (21, 21))
    for box, mask in zip(found, masks, strict=True):
        both, either = (masks & mask).sum((1, 2)), (masks | mask).sum((1, 2))
        np.testing.assert_allclose(ious(box.astype(float), found.astype(float)), both / either, atol=1e-12)


@pytest.mark.parametrize("orientation", images.UPRIGHT)
def test_boxes_are_turned_as_pictures_are(orientation):
    found = np.array([[6, 4, 20, 12], [0, 0, 3, 24]])
    turned = Boxes().turned(TrueBoxes(found.astype(float), SIZE), orientation)
    expected = [images.UPRIGHT[orientation](mask) for mask in filled(found, SIZE)]
    assert turned.size == expected[0].shape
    assert (filled(turned.boxes.astype(int), turned.size) == expected).all()
    unknown = TrueBoxes(found.astype(float), None)
    assert Boxes().turned(unknown, orientation) is unknown


def made() -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """Masks and true boxes (half-open) by stem: hits and misses, an IoU of just 0.5, nothing found, no object."""
    rng = np.random.default_rng(1)
    stems = [f"COCO_train2014_{i:012d}" for i in range(8)]
    masks = {stem: rng.random(SIZE) < 0.55 for stem in stems}
    found = {stem: [[2, 3, 9, 20], [1, 1, 30, 22]] for stem in stems}
    masks[stems[1]] = filled([[0, 0, 10, 10]], SIZE)[0]
    found[stems[1]] = [[0, 0, 10, 5]]
    masks[stems[2]] &= False
    found[stems[3]] = []
    return masks, found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "i"), [*((name, i) for name in BOXES for i in range(2)), ("coco20k", 0)])
def test_a_data_set_of_each_layout_is_measured_as_by_slow_loops(tmp_path, name, i, rule):
    masks, true = made()
    if name == "coco20k":
        write_coco(tmp_path, {stem: [[x, y, r - x, b - y] for x, y, r, b in its] for stem, its in true.items()})
    else:
        write_voc(tmp_path / BOXES[name][i], true)
    write_run(str(tmp_path / "run"), [masks_row(f"{stem}.jpg", mask[None]) for stem, mask in masks.items()])
    options = Evaluate((str(tmp_path / "run"),), dataset=name, root=str(tmp_path), task="boxes")
    found, expected = evaluate(options, Boxes(box_rule=rule)), {}
    for stem, mask in masks.items():
        box = plain_box(mask, rule)
        if true[stem]:
            expected[f"{stem}.jpg"] = max(plain_iou(box, each) for each in true[stem]) if box else 0.0
    assert found.counts["ok"] == 8 and found.lacking == {"box": 2, "true_boxes": 1, "box_iou": 1, "correct": 1}
    assert found.means["corloc"] == pytest.approx(100 * np.mean([each > 0.5 for each in expected.values()]), abs=1e-9)
    assert found.means["box_iou"] == pytest.approx(np.mean(list(expected.values())), abs=1e-9)
    rows = {row["key"]: row for row in pq.read_table(found.table, partitioning=None).to_pylist()}
    assert {key: row["box_iou"] for key, row in rows.items() if row["box_iou"] is not None} == pytest.approx(expected)
    assert 0.5 in expected.values() and any(each > 0.5 for each in expected.values())


def test_boxes_may_be_given_as_a_folder_or_as_a_file(tmp_path):
    masks, true = made()
    write_run(str(tmp_path / "run"), [masks_row(f"x/{stem}.png", mask[None]) for stem, mask in masks.items()])
    write_voc(tmp_path / "voc", true)
    write_coco(tmp_path, {stem: [[x, y, r - x, b - y] for x, y, r, b in its] for stem, its in true.items()})
    places = [tmp_path / "voc/Annotations", tmp_path / "COCO/annotations/instances_train2014.json"]
    found = [evaluate(Evaluate((str(tmp_path / "run"),), str(place), task="boxes")) for place in places]
    assert found[0].means == found[1].means and found[0].counts["ok"] == 8
    assert not found[0].published and found[0].label_kind is None


def test_the_file_of_coco_is_parsed_once(tmp_path, monkeypatch):
    masks, true = made()
    write_run(str(tmp_path / "run"), [masks_row(f"{stem}.jpg", mask[None]) for stem, mask in masks.items()])
    write_coco(tmp_path, {stem: [] if not its else [[1, 2, 3, 4]] for stem, its in true.items()})
    opened, read = [], boxes.storage.read_bytes
    monkeypatch.setattr(boxes.storage, "read_bytes", lambda place, **more: opened.append(place) or read(place, **more))
    evaluate(Evaluate((str(tmp_path / "run"),), dataset="coco20k", root=str(tmp_path), task="boxes"))
    assert sum(str(place).endswith(".json") for place in opened) == 1


def test_a_label_of_coco_changes_with_its_boxes_alone(tmp_path):
    write_coco(tmp_path, {"a": [[1, 2, 3, 4]], "b": [[1, 2, 3, 4]]})
    file = tmp_path / "COCO/annotations/instances_train2014.json"

    def checksums() -> list[str]:
        return [Boxes().checksum(place, max_bytes=10**6) for place in instances(str(file)).values()]

    before = checksums()
    write_coco(tmp_path, {"a": [[1, 2, 3, 5]], "b": [[1, 2, 3, 4]]})
    after = checksums()
    assert before[0] != after[0] and before[1] == after[1]
    with pytest.raises(BadImage, match="no boxes as COCO has them"):
        of_coco('{"height": 4, "width": 6, "boxes": [[1, 2, 3]]}')


@pytest.mark.parametrize("sides", [[[0, 0], [4, 4]], [[[0, 0, 4, 4], [1, 1, 4, 4]]], [[0, 0, 4, 4, 1, 1, 4, 4]]])
def test_boxes_of_coco_have_four_numbers_each(sides):
    with pytest.raises(BadImage, match="no boxes as COCO has them"):
        of_coco(json.dumps({"height": 4, "width": 6, "boxes": sides}))


def test_names_and_sides_of_coco_may_be_of_any_type(tmp_path):
    write_coco(tmp_path, {"1": [[1, 2, 3, 4]], "2": [[1, 2, 3, 4]], "3": [[1, 2, 3, 4]]})
    file = tmp_path / "COCO/annotations/instances_train2014.json"
    content = json.loads(file.read_bytes())
    content["images"][0]["file_name"], content["images"][1]["height"] = None, str(SIZE[0])
    content["images"][2]["height"] = [SIZE[0]]
    file.write_text(json.dumps(content))
    found, task = datasets.find("coco20k", str(tmp_path)), Boxes()
    assert found.location.keys() == {"2", "3"} and found.stems == {"1", "2", "3"}
    assert task.read(found.location["2"], max_bytes=1, max_pixels=1).size == SIZE
    with pytest.raises(BadImage, match="no boxes as COCO has them"):
        task.read(found.location["3"], max_bytes=1, max_pixels=1)


BAD = {
    "no XML": b"YOLO 0.1 0.2 0.3 0.4",
    "cut": voc_xml([(1, 2, 3, 4)]).encode()[:-30],
    "another XML": b"<svg><object/></svg>",
    "no corner": b"<annotation><object><bndbox><xmin>1</xmin></bndbox></object></annotation>",
    "text for a corner": voc_xml([(1, 2, 3, 4)]).replace("<xmin>2", "<xmin>two").encode(),
    "no number": voc_xml([(1, 2, 3, 4)]).replace("<xmin>2", "<xmin>nan").encode(),
    "backwards": voc_xml([(9, 2, 3, 4)]).encode(),
    "entities": b'<!DOCTYPE a [<!ENTITY b "bbbb">]><annotation><folder>&b;&b;</folder></annotation>',
    "entities in UTF-16": '<!DOCTYPE a [<!ENTITY b "bb">]><annotation>&b;</annotation>'.encode("utf-16"),
    "another encoding": b'<?xml version="1.0" encoding="nothing"?><annotation/>',
    "endless": voc_xml([], size=("inf", "inf")).encode(),
    "JSON": b'{"images": [], "annotations": []}',
    "empty": b"",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_is_no_annotation_is_a_listed_bad_label(tmp_path, kind):
    with pytest.raises(BadImage):
        of_voc(BAD[kind])
    mask = filled([[6, 4, 20, 12]], SIZE)
    write_run(str(tmp_path / "run"), [masks_row(f"{each}.jpg", mask) for each in "abc"])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.xml").write_text(voc_xml([(6, 4, 20, 12)]))
    (tmp_path / "labels/a.txt").write_text("beside")
    (tmp_path / "labels/b.txt").write_bytes(BAD[kind])
    (tmp_path / "labels/c.XML").write_text(voc_xml([(6, 4, 20, 12)], size=(SIZE[0], SIZE[1] + 1)))
    found = evaluate(Evaluate((str(tmp_path / "run"),), str(tmp_path / "labels"), task="boxes"))
    assert found.counts == dict(ok=1, failed=0, no_label=0, other_size=1, bad_label=1) and found.means["corloc"] == 100
    assert "1 labels cannot be read: b.jpg" in found.text().splitlines()


def test_coordinates_may_be_fractions_and_the_size_unknown():
    text = voc_xml([(1, 2, 3, 4)], size=(0, 0)).replace("<xmin>2", "<xmin>2.5")
    found = of_voc(text.encode())
    assert found.boxes.tolist() == [[1.5, 2, 3, 4]] and found.size is None
    assert Boxes().fits({"height": 7, "width": 5}, found)


@pytest.mark.parametrize(
    "content", [b"no JSON", b"[1, 2]", b'{"images": [{}]}', b'{"images": 3, "annotations": []}', b"[" * 10**5]
)
def test_a_file_that_is_no_json_of_coco_is_named(tmp_path, content, capsys):
    write_run(str(tmp_path / "run"), [masks_row("a.jpg", filled([[6, 4, 20, 12]], SIZE))])
    (tmp_path / "boxes.json").write_bytes(content)
    words = ["evaluate", str(tmp_path / "run"), "--task", "boxes", "--labels"]
    assert main([*words, str(tmp_path / "boxes.json")]) == 2
    assert "boxes.json: expected COCO's instances as JSON" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_pictures_of_boxes_are_filled_rectangles():
    mask, task = filled([[6, 4, 20, 12]], SIZE), Boxes()
    row, label = masks_row("a.jpg", mask), TrueBoxes(np.array([[2.0, 3, 9, 10], [20, 1, 40, 5]]), SIZE)
    measured = task.cells(row, label)
    assert (task.counted(row, measured, "corloc") == mask).all()
    assert (task.outline(row, label) == filled([[2, 3, 9, 10], [20, 1, 32, 5]], SIZE).any(0)).all()
    assert len(task.counted(row, {}, "corloc")) == 0
