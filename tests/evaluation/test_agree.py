"""Runs against each other: overlaps from run lengths against decoded masks, and what is left out."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.faulty import GOOD, write_images

import raypipe
from raypipe import masks, schema
from raypipe.cli.verbs import main
from raypipe.evaluation.agree import AGREEMENT, Agree, agree, best_signs, by_key, compare, overlap, pairwise_iou
from raypipe.run import Run
from raypipe.storage import hold

NAMES = ["one", "two", "three", "four"]


def row(run: int, mask: np.ndarray | None, foreground: np.ndarray | None = None, **other) -> dict:
    """A row of agree.FIRST_MASKS."""
    counts = [None if m is None else masks.encode_rle(m)["counts"] for m in (mask, foreground)]
    size = {"height": 6, "width": 9} if mask is None else dict(zip(("height", "width"), mask.shape, strict=True))
    blank = {"key": "1.png", "image_id": "x", "run": run, "mask": counts[0], "foreground": counts[1], "failed": False}
    return blank | size | other


def slow_iou(one: np.ndarray, other: np.ndarray) -> float:
    pairs = list(zip(one.ravel(), other.ravel(), strict=True))
    union = sum(a or b for a, b in pairs)
    return sum(a and b for a, b in pairs) / union if union else 1.0


def slow_means(found: list[np.ndarray]) -> list[float]:
    return [np.mean([slow_iou(one, other) for j, other in enumerate(found) if j != i]) for i, one in enumerate(found)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_agreement_is_the_mean_iou_of_all_pairs_of_decoded_masks(rng, count):
    for share in (0.0, 0.3, 0.6, 1.0):
        found = [rng.random((6, 9)) < share for _ in range(count)]
        result = compare([row(i, mask) for i, mask in enumerate(found)], NAMES[:count])
        pairs = [slow_iou(one, other) for one, other in itertools.combinations(found, 2)]
        assert result["agreement"] == pytest.approx(np.mean(pairs), abs=1e-12)
        assert result["ious"] == pytest.approx(slow_means(found), abs=1e-12)
        nearest = NAMES[int(np.argmax(np.round(slow_means(found), 9)))]
        assert result["nearest"] == (nearest if count > 2 else None)
        assert result["signs"] == [1] * count and result["status"] == "ok"


def test_the_best_polarities_are_those_of_a_slow_search(rng):
    inverted = 0
    for _ in range(30):
        foregrounds = [rng.random((6, 9)) < 0.8 for _ in range(3)]
        found = [foreground & (rng.random((6, 9)) < 0.5) for foreground in foregrounds]
        union = np.logical_or.reduce(foregrounds)
        slow = {}
        for signs in itertools.product((1, -1), repeat=2):
            signed = [mask if sign > 0 else union & ~mask for mask, sign in zip(found, (1, *signs), strict=True)]
            slow[1, *signs] = np.mean(slow_means(signed))
        rows = [row(i, mask, foreground) for i, (mask, foreground) in enumerate(zip(found, foregrounds, strict=True))]
        overlaps, pixels = overlap(rows)
        for signs, expected in slow.items():
            iou = pairwise_iou(overlaps, pixels, signs)
            np.testing.assert_allclose((iou.sum() - 3) / 6, expected, atol=1e-12)
        result = compare(rows, NAMES[:3], polarity="best")
        assert slow[tuple(result["signs"])] == pytest.approx(max(slow.values()), abs=1e-12)
        assert result["agreement"] == pytest.approx(max(slow.values()), abs=1e-12)
        inverted += -1 in result["signs"]
    assert inverted > 5


def test_a_mask_and_its_inverse_agree_only_with_the_best_polarity():
    dark = np.zeros((6, 9), bool)
    dark[:, :3] = True
    rows = [row(0, dark), row(1, ~dark)]
    assert compare(rows, NAMES[:2])["agreement"] == 0
    assert compare(rows, NAMES[:2], polarity="best")["agreement"] == 1
    assert best_signs(np.diag([18, 36]), 54) == (1, -1)


def test_finding_nothing_twice_is_agreement_and_once_is_none():
    some = np.eye(6, 9, dtype=bool)
    assert compare([row(0, None), row(1, np.zeros((6, 9), bool))], NAMES[:2])["agreement"] == 1
    assert compare([row(0, None), row(1, some)], NAMES[:2])["agreement"] == 0


def test_among_equals_the_first_run_is_nearest():
    mask = np.eye(6, 9, dtype=bool)
    assert compare([row(0, ~mask), row(1, mask), row(2, mask), row(3, mask)], NAMES)["nearest"] == "two"


def test_an_image_that_some_run_lacks_is_listed_and_not_compared():
    some = np.eye(6, 9, dtype=bool)
    for rows, status in (
        ([row(0, some)], "missing: two"),
        ([row(0, some), row(1, None, failed=True, height=0, width=0)], "failed: two"),
        ([row(0, some), row(1, np.eye(9, 6, dtype=bool))], "another size: two"),
        ([row(0, some), row(0, some), row(1, some)], "several of this key: one"),
    ):
        result = compare(rows, NAMES[:2])
        assert result["status"] == status and "agreement" not in result and result["height"] == 6


def write_run(place, images: dict[str, np.ndarray | None]) -> Run:
    """A run with one mask per key; None is an error row."""
    run = Run(str(place), "kmeans")
    run.freeze({}, {"weights": {}})
    rows = []
    for key, mask in images.items():
        good = mask is not None
        height, width = mask.shape if good else (0, 0)
        segments = masks.encode_segments(mask[None]) if good else []
        common = {"image_id": key, "uri": key, "key": key, "note": "", "error": "" if good else "decode: corrupt: x"}
        rows.append(common | {"height": height, "width": width, "segments": segments})
    with hold(run.folder, "attempt"):
        for task, start in enumerate(range(0, len(rows), 7)):
            run.commit("attempt", task, pa.Table.from_pylist(rows[start : start + 7], schema=schema.MASKS))
    return run


def test_rows_meet_by_key_whatever_their_order_and_the_number_of_temporary_files(tmp_path, rng):
    keys = [f"{i}.png" for i in range(40)]
    places = {}
    for name, some in (("a", keys), ("b", keys[:30]), ("c", keys[5:])):
        places[name] = {str(key): rng.random((5, 6)) < 0.5 for key in rng.permutation(some)}
        places[name][str(some[7])] = None
    runs = [write_run(tmp_path / name, images) for name, images in places.items()]
    for limits in ({}, {"bucket_rows": 3}, {"bucket_bytes": 1}):
        found = list(by_key(runs, **limits))
        assert sorted(images[0]["key"] for images in found) == sorted(keys)
        for images in found:
            having = [i for i, name in enumerate("abc") if images[0]["key"] in places[name]]
            assert [image["run"] for image in images] == having
            for image in images:
                mask = places["abc"[image["run"]]][image["key"]]
                assert image["failed"] == (mask is None)
                assert mask is None or image["mask"] == masks.encode_rle(mask)["counts"]


def test_two_methods_on_real_images_give_a_table_in_the_first_run(tmp_path, capsys):
    write_images(tmp_path / "photos", [GOOD] * 5)
    (tmp_path / "photos/0005.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    runs = [str(tmp_path / name) for name in ("kmeans", "three", "watershed")]
    for run, method, options in zip(runs, ("kmeans", "kmeans", "watershed"), ({}, {"k": 3}, {}), strict=True):
        options |= {"foreground": "whole", "local": True, "max_bad_fraction": 1.0}
        raypipe.label(method, tmp_path / "photos", run, **options)
    assert main(["agree", *runs, "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("5 of 6 images compared, mean agreement 0.")
    result = json.loads(lines[-1])
    table = pq.read_table(result["table"], partitioning=None)
    assert table.schema.equals(AGREEMENT)
    assert json.loads(table.schema.metadata[b"raypipe.runs"]) == runs == result["runs"]
    loaded = [{row["key"]: row for row in raypipe.load(run).to_pylist()} for run in runs]
    values = {}
    for compared in table.to_pylist():
        if compared["status"] != "ok":
            assert compared["key"] == "0005.png" and compared["agreement"] is None
            continue
        found = [raypipe.decode(rows[compared["key"]])[0] for rows in loaded]
        values[compared["key"]] = np.mean(slow_means(found))
        assert compared["agreement"] == pytest.approx(values[compared["key"]], abs=1e-12)
    assert result["mean"] == pytest.approx(np.mean(list(values.values())), abs=1e-12)
    assert [key for key, _ in result["least"]] == sorted(values, key=values.get)
    assert sum(result["nearest"].values()) == 5 and result["images"] == 6
    first = table
    assert agree(Agree(tuple(runs[:2]), output=str(tmp_path / "out"))).table == f"{tmp_path}/out/agreement.parquet"
    assert pq.read_table(result["table"], partitioning=None).equals(first)


def test_mistakes_are_told_before_anything_is_compared(tmp_path):
    for name, key in (("a", "1.png"), ("b", "2.png")):
        write_run(tmp_path / name, {key: np.eye(4, dtype=bool)})
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for runs, message in (((a,), "two or more"), ((a, f"{a}/"), "two or more"), ((a, b), "are the keys the same")):
        with pytest.raises(ValueError, match=message):
            agree(Agree(runs))
    with pytest.raises(FileNotFoundError, match="not a raypipe run"):
        agree(Agree((a, str(tmp_path))))
    assert not (tmp_path / "a/metrics").exists()
