"""Named segments against classes: the stored scores, the plain loop, networks asked once, what is refused and said."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.golden import arrays
from support.layouts import write_classes
from support.tiny._clip import write_model
from support.tiny._sentences import write_sentences
from support.written import as_version, masks_row, write_run

from raypipe import classes
from raypipe.benchmark.plain import naming_evaluation as twin
from raypipe.evaluation import datasets
from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.summary import published
from raypipe.evaluation.tasks import _alike, _naming_scores
from raypipe.evaluation.tasks.naming import TABLE, Naming
from raypipe.masks import encode_segments
from raypipe.run import Run

SIZE = (24, 32)
STORED = {"union": "union", "argmax": "best", "recall": "recall", "recall_area": "area"}  # golden names and ours
PRINTED = {  # percent, of the supplement's tables 6 and 7
    "pascal_context_59": (
        [8.1, 8.1, 8.2, 9.4, 11.2, 11.4, 9.8, 8.6, 6.5, 5.6, 5.3],
        [19.6, 19.6, 19.6, 19.5, 16.0, 2.2, 0, 0],
    ),
    "voc2012": (
        [11.2, 11.2, 11.6, 16.0, 23.9, 27.3, 24.2, 21.5, 15.3, 12.0, 11.2],
        [20.1, 20.1, 20.1, 20.8, 24.8, 4.2, 0, 0],
    ),
}
VECTORS = {
    "tt": ("class_text_embeddings", "caption_text_embeddings"),
    "st": ("class_clip_embeddings", "segment_embeddings"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Options with tiny networks."""
    folder = tmp_path_factory.mktemp("networks")
    return {"sentence_model": str(write_sentences(folder / "words")), "clip": str(write_model(folder / "clip"))}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows.astype(float), axis=-1, keepdims=True)


def blocks(rng, values, side: int) -> np.ndarray:
    """A label map of squares with these values."""
    return np.kron(rng.choice(values, (-(-SIZE[0] // side), -(-SIZE[1] // side))), np.ones((side, side), int))[
        : SIZE[0], : SIZE[1]
    ].astype(np.int32)


def row_of(key: str, masks: np.ndarray, names, vectors=None) -> dict:
    """A row of a run whose segments have names and perhaps embeddings."""
    row = masks_row(key, masks, labels=names)
    for i, each in enumerate(row["segments"]):
        each["embedding"] = None if vectors is None else vectors[i].astype(np.float16).tolist()
    return row


def measured(task: Naming, row: dict, label: np.ndarray) -> dict:
    return task.values(task.sums([task.cells(row, label)]))


@pytest.mark.parametrize("kind", ["tt", "st"])
def test_all_scores_at_all_thresholds_are_the_stored_ones(kind):
    case = arrays(Path(__file__).parents[1] / "golden/naming_reassign_iou.npz")
    known, thresholds = unit(case[VECTORS[kind][0]]), case[f"{kind}_thresholds"]
    for i in range(int(case["n_images"])):
        label, small = case[f"im{i}_gt"].astype(np.int32), case[f"im{i}_pred"]
        label[label == 255] = -1
        rows, columns = (np.arange(n) * m // n for n, m in zip(label.shape, small.shape, strict=True))
        number = small[rows[:, None], columns]  # from the nearest pixels, floor
        masks = np.stack([number == k for k in range(len(case[f"im{i}_captions"]))])
        similarity = unit(case[f"im{i}_{VECTORS[kind][1]}"]) @ known.T
        found = _naming_scores.scores(
            _naming_scores.overlaps(encode_segments(masks), label),
            similarity,
            np.arange(20) + 1,
            np.bincount(small.ravel(), minlength=len(masks)).astype(float),
            thresholds,
            at=0,
            tau_iou=0.5,
            open_ground=True,
        )
        for stored, ours in STORED.items():
            expected = case[f"{kind}_{stored}_per_image"][:, i]
            np.testing.assert_allclose(getattr(found, ours), expected, rtol=0, atol=1e-6, err_msg=stored)


@pytest.mark.parametrize("open_ground", [True, False])
def test_scores_equal_a_loop_over_thresholds_classes_and_segments(rng, open_ground):
    thresholds, nothing = np.array([-1.0, 0.1, 0.3, 0.301, 0.5, 1.0]), 0
    for case in range(60):
        label = blocks(rng, rng.choice([-1, 0, 1, 2, 5], rng.integers(1, 5)), 5)
        number = blocks(rng, range(-1, 4), 7)
        masks = np.stack([number == i for i in range(rng.integers(0, 5))] or [number > 9])[case % 9 == 0 and 1 :]
        if case % 3 == 0 and len(masks) > 1:  # they overlap
            masks[0] |= masks[1] | (blocks(rng, range(2), 6) > 0)
        if case % 5 == 0 and len(masks):
            masks[-1] = False
        similarity = np.round(rng.uniform(-0.2, 0.6, (len(masks), 6)), 1)  # many are equal, and equal to thresholds
        found = _naming_scores.scores(
            _naming_scores.overlaps(encode_segments(masks), label),
            similarity,
            np.arange(6) + 1,
            masks.sum((1, 2)).astype(float),
            thresholds,
            at=2,
            tau_iou=0.5,
            open_ground=open_ground,
        )
        expected = twin.plain(masks, label, similarity, thresholds, open_ground=open_ground)
        for name in twin.NAMES:
            np.testing.assert_allclose(
                getattr(found, name), expected[name], rtol=0, atol=1e-9, err_msg=f"{case} {name}"
            )
        nothing += np.isnan(found.union).sum()
        np.testing.assert_array_equal(found.precise[50], found.precision[2])
        if not np.isnan(found.recall[2]):
            assert np.trapezoid(found.curve, dx=0.01) == pytest.approx(found.area[2], abs=1e-12)
    assert 5 < nothing < 200


def test_other_overlaps_divide_by_the_truth_or_by_the_segment():
    label = np.zeros((4, 6), np.int32)
    label[:, :3] = 1
    mask = np.zeros((1, 4, 6), bool)
    mask[:, :2, 2:5] = True  # 2 of 6 pixels right, of 12 wanted
    found = _naming_scores.scores(
        _naming_scores.overlaps(encode_segments(mask), label), np.ones((1, 1)), np.array([1]), np.ones(1), np.zeros(1),
        at=0, tau_iou=0.3, open_ground=True,
    )  # fmt: skip
    assert found.classes == {1: 2 / 16} and found.recall[0] == 0
    assert found.precise.tolist() == found.curve.tolist() == [1] * 13 + [0] * 88
    assert found.of_truth == (0, pytest.approx(0.165)) and found.of_segment == (1, pytest.approx(0.335))


def test_names_and_embeddings_are_compared_as_the_networks_say(models, rng, one_thread):
    from raypipe.features.clip import Clip
    from raypipe.features.sentences import Sentences

    names, said = ["cat", "dog", "tv"], ["a cat", "dog", "sky", "sky"]
    task = Naming(**models, tau_sbert=0.9, tau_clip=-1).of_classes(",".join(names))
    number, label = blocks(rng, range(4), 8), blocks(rng, [0, 1, 2, 3], 6)
    masks, vectors = np.stack([number == i for i in range(4)]), rng.normal(size=(4, 24)) * 9
    vectors[1] = vectors[1].astype(np.float16)
    sentences, clip = (
        Sentences(Path(models["sentence_model"]), method="t"),
        Clip(Path(models["clip"]), method="t", device="cpu", vision=False),
    )
    similar = {"tt": sentences(said).astype(float) @ sentences(names).astype(float).T}
    similar["st"] = unit(vectors.astype(np.float16)) @ clip.texts([f"Image of a {name}." for name in names], "none").T
    row = row_of("a.jpg", masks, said, vectors)
    cells, values = task.cells(row, label), measured(task, row, label)
    for kind, similarity in similar.items():
        thresholds = sorted({*TABLE[kind], task._tau(kind)})
        expected = twin.plain(masks, label, similarity, np.array(thresholds) - 1e-7)
        for name in twin.NAMES:
            ours = [np.nan if value is None else value for value in cells[f"{name}_at_{kind}"]]
            np.testing.assert_allclose(ours, expected[name], rtol=0, atol=1e-9, err_msg=name)
        at = thresholds.index(task._tau(kind))
        assert values[f"iou_{kind}"] == pytest.approx(expected["union"][at], abs=1e-12)
        accepted = (similarity.max(1) >= task._tau(kind) - 1e-7).sum()
        assert values[f"discarded_{kind}"] == pytest.approx(1 - accepted / 4)
    assert cells["accepted_at_tt"][TABLE["tt"].index(1.0)] == 1  # a name that is the class's has exactly 1
    outside = [(label[mask] <= 0).mean() > 0.5 for mask in masks]
    assert json.loads(cells["names_on_unlabelled"]) == [
        name for name, is_out in zip(said, outside, strict=True) if is_out
    ]
    assert values["unlabelled"] == (label <= 0).mean() and values["on_unlabelled"] == np.mean(outside)


def test_names_of_classes_need_no_embedding_and_other_names_say_what_is_lacking(models, rng, one_thread):
    label = blocks(rng, [1, 2, 15], 8)
    masks = np.stack([label == i for i in (1, 2, 15)])
    task = Naming(**models).of_classes("voc2012", "voc2012")
    known = row_of("a.jpg", masks, ["aeroplane", "bicycle", "person"])
    assert measured(task, known, label)["iou_st"] == measured(task, known, label)["iou_tt"] == 1
    label[label == 15] = 20  # MaskCLIP's list has tv/monitor, the data set tvmonitor
    known["segments"][2]["label"] = "tv/monitor"
    assert measured(task, known, label)["iou_tt"] == measured(task, known, label)["iou_st"] == 1
    other = row_of("b.jpg", masks, ["aeroplane", "bicycle", "a man"])
    sums = task.sums([task.cells(known, label), task.cells(other, label)])
    values, details = task.values(sums), task.details(sums)
    assert values["iou_tt"] is not None and values["iou_st"] is values["recall_st"] is None
    assert details["union_at_st"] is None and details["why_no_st"].startswith("1 segments have no embedding")
    assert "--keep-embeddings" in task.remarks(details)[1]
    alone = Naming(sentence_model=models["sentence_model"], clip="none").of_classes("voc2012")
    assert measured(alone, known, label)["iou_st"] == 1
    for each in (other, row_of("c.jpg", masks, ["aeroplane", "bicycle", "person"], rng.normal(size=(3, 24)))):
        sums = alone.sums([alone.cells(each, label)])
        assert alone.values(sums)["iou_tt"] is not None and alone.values(sums)["iou_st"] is None
        assert alone.remarks(alone.details(sums))[1] == "no iou_st: --clip none"


def test_given_regions_are_scored_by_their_names_and_similarities(models, rng, one_thread):
    from raypipe.features.clip import Clip
    from raypipe.features.sentences import Sentences

    task = Naming(**models).of_classes("cat,dog,tv")
    label = blocks(rng, [0, 1, 3], 8)
    masks, said = np.stack([label == 0, label == 3, label == 1]), ["sky", "television", "cat"]
    vectors = rng.normal(size=(3, 24))
    cells = task.cells(row_of("a.jpg", masks, said, vectors), label)
    values, sums = task.values(task.sums([cells])), task.sums([cells])
    sentences = Sentences(Path(models["sentence_model"]), method="t")
    clip = Clip(Path(models["clip"]), method="t", device="cpu", vision=False)
    text = [sentences(["television"])[0] @ sentences(["tv"])[0], 1.0]
    rows = unit(vectors.astype(np.float16))
    own = [rows[i] @ clip.texts([said[i]], "none")[0] for i in (1, 2)]
    to_class = rows @ clip.texts([f"Image of a {name}." for name in ("cat", "dog", "tv")], "none").T
    assert values["name_similarity"] == pytest.approx(np.mean(text), abs=1e-6)
    assert values["name_alike"] == np.mean(np.array(text) >= 0.5) and values["clip_score"] == pytest.approx(
        np.mean(own)
    )
    pairs = [(2.5 * max(c, 0), max(t, 0)) for c, t in zip(own, text, strict=True)]
    expected = np.mean([2 * a * b / (a + b) if a + b else 0 for a, b in pairs])
    assert values["reference_score"] == pytest.approx(expected, abs=1e-6)
    assert values["top1_st"] == np.mean([to_class[1].argmax() == 2, to_class[2].argmax() == 0])
    counts = task.details(sums)["similarities"]
    found = np.array([to_class[1, 2], to_class[2, 0]])
    assert counts == np.histogram(found, [-9, *np.arange(-10, 51) / 100, 9])[0].tolist()
    below = {
        row["threshold"]: row["regions_below"] for row in task._at_each(task.details(sums), []) if "st" in row["metric"]
    }
    assert all(below[tau] == pytest.approx((found < tau).mean()) for tau in TABLE["st"])
    masks[2, 0] ^= True  # one pixel row less or more: another region
    other = task.sums([cells, task.cells(row_of("b.jpg", masks, said, vectors), label)])
    assert task.values(other)["name_similarity"] is task.details(other)["similarities"] is None


def test_no_more_names_are_kept_than_there_is_room_for(models, monkeypatch, one_thread):
    from raypipe.features.sentences import Sentences

    monkeypatch.setattr(_alike, "KEPT", 3)
    names, sentences = ["a", "cat", "b", "c", "a", "d"], Sentences(Path(models["sentence_model"]), method="t")
    found = _alike.Names(sentences, ("cat", "dog"))
    expected = sentences(names).astype(float) @ sentences(["cat", "dog"]).T
    for _ in range(2):
        rows = found(names)
        np.testing.assert_allclose(rows, expected, atol=1e-6)
        assert len(found._rows) == 3 and (rows[0] == rows[4]).all()


def test_what_cannot_be_measured_is_refused(models, tmp_path, one_thread):
    mask, label = np.ones((1, *SIZE), bool), np.ones(SIZE, np.int32)
    task = Naming(**models).of_classes("cat,dog")
    with pytest.raises(ValueError, match="a.jpg: a mask without a name.*--task saliency"):
        task.measure(masks_row("a.jpg", mask), label)
    with pytest.raises(ValueError, match="an embedding of 5 numbers, but those of --clip .*clip have 24"):
        task.measure(row_of("a.jpg", mask, ["cat"], np.ones((1, 5))), label)
    with pytest.raises(ValueError, match="--tau-sbert must be from 0 to 1, got 50"):
        Naming(tau_sbert=50)
    with pytest.raises(ValueError, match="--readable-names has no effect"):
        Naming(readable_names=True).of_classes("cat,dog")
    with pytest.raises(ValueError, match="task naming needs the classes of the labels"):
        Naming(**models).load()
    for name in ("sentence_model", "clip"):
        with pytest.raises(FileNotFoundError, match=f"naming: .*{tmp_path}/none"):
            Naming(**models | {name: str(tmp_path / "none")}).of_classes("cat").load()
    with pytest.raises(FileNotFoundError, match="or add --clip none, without iou_st"):
        Naming(**models | {"clip": "./none"}).of_classes("cat").load()


def test_names_are_compared_as_the_data_set_writes_them_or_as_people_do():
    voc, context = classes.read("voc2012"), classes.read("pascal_context_59")
    raw, plain = (Naming(readable_names=each).of_classes("voc2012")._texts for each in (False, True))
    assert {"diningtable", "pottedplant", "tvmonitor"} <= set(raw) and {"dining table", "potted plant"} <= set(plain)
    assert len(raw) == len(voc.names) and list(raw) == sorted(raw)
    assert Naming().of_classes("voc2012")._is_open and not Naming().of_classes("[a]", "pascal_context_459")._is_open
    raw, plain = (Naming(readable_names=each).of_classes("pascal_context_59")._texts for each in (False, True))
    assert sorted(raw) == sorted(context.names) and {"potted plant", "tv monitor"} == {*plain} - {*raw}


@pytest.mark.parametrize("name", PRINTED)
def test_what_is_printed_stands_beside_every_threshold_of_both_tables(name, models, tmp_path, rng, one_thread):
    label = blocks(rng, [0, 1, 2], 8)
    write_classes(tmp_path, name, {"a": label})
    printed = published(datasets.find(name, str(tmp_path)), Naming.SHOWN)
    task = Naming(**models, tau_clip=0.33).of_classes(name, name)  # the headline's own has none
    row = row_of("a.jpg", (label == 1)[None], ["a plane"], rng.normal(size=(1, 24)))
    details = task.details(task.sums([task.cells(row, label)]))
    found = [each["published"] for each in task._at_each(details, printed) if each["variant"] == "union"]
    tt, st = (np.array(each) / 100 for each in PRINTED[name])
    assert found[:11] == pytest.approx(tt) and [*found[11:18], found[19]] == pytest.approx(st) and found[18] is None
    notes = " ".join(task.remarks(details, printed))
    assert ("first 1,000 images" in notes) == (name == "pascal_context_59") and "--regions given:DIR" in notes


def test_a_run_is_evaluated_with_the_published_tables_beside(models, tmp_path, rng, one_thread):
    labels = {f"{i:03d}": blocks(rng, [-1, 0, 1, 2, 20], 8) for i in range(3)} | {"empty": np.zeros(SIZE, np.int32)}
    write_classes(tmp_path, "voc2012", labels)
    rows = []
    for stem, label in labels.items():
        masks = np.stack([label == 1, label == 2, label < 1])
        rows.append(masks_row(f"{stem}.jpg", masks, labels=["aeroplane", "a bike", "<wall>"]))
    write_run(str(tmp_path / "run"), rows, settings={"keep_embeddings": False})
    options = Evaluate((str(tmp_path / "run"),), dataset="voc2012", root=str(tmp_path), task="naming")
    before = dict(_alike._names.cache_info()._asdict())
    result = evaluate(options, Naming(**models))
    assert _alike._names.cache_info().misses <= before["misses"] + 1
    assert result.counts["ok"] == 4 and result.empty_labels == 1 and result.means["iou_st"] is None
    assert [each["value"] for each in result.published if each["metric"] == "iou_tt"] == [0.273]
    text = result.text()
    assert "no iou_st: " in text and "published values of iou_tt are with sentence-transformers/all-mpnet" in text
    (line,) = (line for line in text.splitlines() if line.startswith("iou tt at 0.50 *"))
    assert line.split()[5:7] == [f"{result.means['iou_tt']:.3f}", "0.273"]
    (file,) = (tmp_path / "run/metrics/thresholds").rglob("*.parquet")
    table = pq.read_table(file, partitioning=None).to_pylist()
    union = [each for each in table if each["variant"] == "union"]
    assert [each["published"] for each in union][:3] == [0.112, 0.112, 0.116] and len(union) == 11
    assert {each["dataset"] for each in table} == {"voc2012"} and union[5]["is_headline"]
    as_version(Run(str(tmp_path / "run")), 1)
    assert evaluate(options, Naming(**models)).means == result.means
    (file,) = (tmp_path / "run/metrics/names").rglob("*.parquet")
    names = {
        (each["of"], each["name"]): each["segments"] for each in pq.read_table(file, partitioning=None).to_pylist()
    }
    assert names["on_unlabelled", "<wall>"] == sum((label < 1).sum() > 0 for label in labels.values())


def test_runs_are_compared_a_line_for_each_of_many_values(models, tmp_path, rng, one_thread):
    label = blocks(rng, [0, 1, 2], 8)
    write_classes(tmp_path, "voc2012", {"a": label})
    for name, said in (("one", "aeroplane"), ("other", "a wall")):
        write_run(str(tmp_path / name), [masks_row("a.jpg", (label == 1)[None], labels=[said])])
    folders = (str(tmp_path / "one"), str(tmp_path / "other"))
    lines = evaluate(Evaluate(folders, dataset="voc2012", root=str(tmp_path), task="naming"), Naming(**models)).text()
    lines = lines.splitlines()
    assert lines[0].split() == ["one", "other"] and lines[1].split() == ["images", "1", "1"]
    (line,) = (line for line in lines if line.startswith("iou_st: "))
    assert line.split()[-2:] == ["0.500", "-"]
    (line,) = (line for line in lines if line.startswith("iou st at 0.10 *"))
    assert line.split()[-2:] == ["0.500", "-"]
    (line,) = (line for line in lines if "no iou_st: " in line)
    assert line.startswith("other: ")


def test_stored_embeddings_of_given_regions_make_the_histogram(models, tmp_path, rng, one_thread):
    labels = {f"{i:03d}": blocks(rng, [0, 3, 4], 8) for i in range(3)}
    write_classes(tmp_path, "voc2012", labels)
    rows = []
    for stem, label in labels.items():
        masks = np.stack([label == i for i in (3, 4)])
        rows.append(row_of(f"{stem}.jpg", masks, ["a bird", "boat"], rng.normal(size=(2, 24))))
    write_run(str(tmp_path / "run"), rows)
    options = Evaluate((str(tmp_path / "run"),), dataset="voc2012", root=str(tmp_path), task="naming")
    result = evaluate(options, Naming(**models, tau_clip=-1))
    task, dataset = Naming(**models, tau_clip=-1).of_classes("voc2012", "voc2012"), labels.values()
    alone = task.sums(task.cells(row, label) for row, label in zip(rows, dataset, strict=True))
    assert result.means == task.values(alone) and result.means["iou_st"] is not None and not result.lacking
    (file,) = (tmp_path / "run/metrics/similarities").rglob("*.parquet")
    table = pq.read_table(file, partitioning=None)
    assert table["regions"].to_pylist() == task.details(alone)["similarities"]
    (summary,) = (tmp_path / "run/metrics/summary").rglob("*.parquet")
    page = Path(result.page).read_text()
    assert page.count("<figure") == 4 and page.count("<rect") == 60 and "cosines of 6 regions" in page
    curve = pq.read_table(summary, partitioning=None)["precision_curve_st"][0].as_py()
    assert len(curve) == 101 and curve[50] == result.means["precision_st"] and "precision, segment to text" in page


def test_labels_of_unknown_numbers_and_other_sizes_are_rows_that_say_so(models, tmp_path, one_thread):
    (tmp_path / "labels").mkdir()
    pictures = {"a": np.ones(SIZE, np.uint8), "b": np.full(SIZE, 9, np.uint8), "c": np.ones((5, 5), np.uint8)}
    for stem, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / f"labels/{stem}.png")
    masks = np.ones((1, *SIZE), bool)
    write_run(str(tmp_path / "run"), [masks_row(f"{stem}.jpg", masks, labels=["cat"]) for stem in pictures])
    options = Evaluate((str(tmp_path / "run"),), str(tmp_path / "labels"), classes="cat,dog", task="naming")
    result = evaluate(options, Naming(**models))
    assert result.counts == {"ok": 1, "failed": 0, "no_label": 0, "other_size": 1, "bad_label": 1}
    assert result.means["iou_tt"] == result.means["iou_st"] == 1 and "is no class: they are 0 to 2" in result.text()
