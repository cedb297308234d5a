"""Trust on runs whose truth is known: it orders images and methods without a label, and says where it cannot."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.written import masks_row, write_run

from raypipe import masks
from raypipe.cli.verbs import main
from raypipe.evaluation import signals
from raypipe.evaluation.combined import Ranks, loadings, run_weights, weighted
from raypipe.evaluation.trust import SIGNALS, TRUST, Trust, least, read, trust
from raypipe.run import Run

SIDE = 40


def disk(x: float, y: float, radius: float, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    rows, columns = np.indices(size)
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * (one & other).sum() / max(one.sum() + other.sum(), 1)


def made(tmp_path, noise: dict[str, float], images: int = 30, seed: int = 0):
    """Runs of disks that miss the truth by a run's noise times an image's difficulty: (runs, Dice by run and key)."""
    rng, places, truth = np.random.default_rng(seed), [], {}
    hard = np.linspace(0, 1, images)
    for name, factor in noise.items():
        table = []
        for i in range(images):
            x, y, radius = rng.normal([20, 20, 10], 9 * factor * hard[i])
            found = disk(x, y, max(radius, 2))
            truth[name, f"{i:02}.png"] = dice(found, disk(20, 20, 10))
            table.append(masks_row(f"{i:02}.png", found[None]))
        rng.shuffle(table)
        places.append(str(write_run(str(tmp_path / name), table, method=name)))
    return places, truth


def ranks_of(values) -> np.ndarray:
    return np.argsort(np.argsort(values))


def test_trust_orders_images_and_methods_as_their_unknown_dice_does(tmp_path):
    places, truth = made(tmp_path, {"kmeans": 0.5, "watershed": 0.6, "grabcut": 0.7, "lost": 2.0})
    result = trust(Trust(tuple(places)))
    found = {}
    for place, name in zip(places, ("kmeans", "watershed", "grabcut", "lost"), strict=True):
        table = pq.read_table(f"{place}/metrics/trust/trust.parquet", partitioning=None)
        assert table.schema.equals(TRUST) and len(table) == 30
        found |= {(name, row["key"]): row["trust"] for row in table.to_pylist()}
    keys = sorted(truth)
    assert np.corrcoef(ranks_of([found[key] for key in keys]), ranks_of([truth[key] for key in keys]))[0, 1] > 0.85
    assert result.mean["lost"] == min(result.mean.values()) and result.run_weights["lost"] == min(
        result.run_weights.values()
    )
    assert np.isclose(np.mean(list(found.values())), 0.5) and 0 <= min(found.values()) < max(found.values()) <= 1
    again = trust(Trust(tuple(places)))
    assert again == result
    worst = least(Run(places[0]), 0.2)
    by_trust = read(Run(places[0]), ["image_id", "trust"]).sort_by("trust")["image_id"].to_pylist()
    assert worst == by_trust[:6] and least(Run(places[0]), 0.0) == by_trust[:1]


def test_each_mask_is_compared_with_the_nearest_of_the_other_run():
    rng = np.random.default_rng(0)
    foregrounds = rng.random((2, 6, 9)) < 0.8
    found = [foregrounds[0] & (rng.random((3, 6, 9)) < 0.5), foregrounds[1] & (rng.random((2, 6, 9)) < 0.4)]
    rows = [
        {"height": 6, "width": 9, "masks": [masks.encode_rle(mask)["counts"] for mask in its]}
        | {"foreground": masks.encode_rle(foreground)["counts"]}
        for its, foreground in zip(found, foregrounds, strict=True)
    ]

    def iou(one, other):
        return (one & other).sum() / (one | other).sum()

    fixed = [max(iou(mask, other) for other in found[1]) for mask in found[0]]
    np.testing.assert_allclose(signals.matches(*rows), fixed, atol=1e-12)
    both = foregrounds.any(0)
    best = [max(iou(mask, each) for other in found[1] for each in (other, both & ~other)) for mask in found[0]]
    np.testing.assert_allclose(signals.matches(*rows, polarity="best"), best, atol=1e-12)
    nothing = rows[0] | {"masks": []}
    np.testing.assert_array_equal(signals.matches(nothing, nothing), [1.0])
    np.testing.assert_array_equal(signals.matches(nothing, rows[1]), [0.0])


def test_settings_of_one_method_count_as_one_voice():
    ious = np.array(
        [[np.nan, 0.9, 0.2, 0.2], [0.9, np.nan, 0.2, 0.2], [0.2, 0.2, np.nan, 0.6], [0.2, 0.2, 0.6, np.nan]]
    )
    runs = np.arange(4)
    weights = run_weights(ious, runs, ["a", "a", "b", "c"])
    np.testing.assert_allclose(weights, [0.1, 0.1, 1 / 3, 1 / 3])
    np.testing.assert_allclose(weighted(ious, weights)[2], (0.02 + 0.02 + 0.2) / (0.2 + 1 / 3))
    np.testing.assert_allclose(run_weights(ious[:2, :2], runs[:2], ["a", "a"]), [0.45, 0.45])
    assert np.isnan(weighted(np.full((1, 4), np.nan), weights)[0])


def test_a_signal_that_contradicts_the_others_counts_nothing():
    rng = np.random.default_rng(0)
    quality = rng.random(300)
    noisy = [quality + rng.normal(0, scale, 300) for scale in (0.1, 0.2, 0.4)]
    values = np.column_stack([*noisy, -quality, np.full(300, 0.5), np.full(300, np.nan)])
    values[rng.random(values.shape) < 0.2] = np.nan
    weights = loadings(values, np.ones(300))
    assert weights[0] > weights[1] > weights[2] > 0.1
    np.testing.assert_allclose(weights[3:], 0, atol=1e-9)
    assert weights.sum() == pytest.approx(1)


def test_ranks_are_the_share_below_with_ties_half_and_by_group():
    values, groups = np.array([3.0, 1.0, 1.0, np.nan, 7.0]), np.array([0, 0, 0, 0, 1])
    ranks = Ranks(values, np.ones(5), groups)
    np.testing.assert_allclose(ranks(values, groups), [5 / 6, 1 / 3, 1 / 3, np.nan, 0.5])
    np.testing.assert_allclose(ranks(np.array([0.0, 9.0, 2.0]), np.array([0, 0, 2])), [0, 1, np.nan])
    heavy = Ranks(values, np.array([2.0, 1, 1, 1, 1]), groups)
    np.testing.assert_allclose(heavy(values, groups)[:3], [0.75, 0.25, 0.25])


def test_images_that_fail_or_are_in_one_run_alone_are_said(tmp_path, capsys):
    found = disk(20, 20, 10)[None]
    one = [masks_row(f"{i}.png", found) for i in range(4)] + [masks_row("bad.png", found, error="decode: corrupt: x")]
    other = [masks_row(f"{i}.png", found) for i in range(2)] + [
        masks_row("2.png", found[:, :30]),
        masks_row("bad.png", found),
    ]
    one.append(masks_row("none.png", found[:0]))
    places = [str(write_run(str(tmp_path / name), its)) for name, its in (("one", one), ("other", other))]
    assert main(["trust", *places, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["key"]: row for row in read(Run(places[0]), TRUST.names).to_pylist()}
    assert rows["bad.png"]["trust"] is None and rows["bad.png"]["status"] == "failed" and not rows["bad.png"]["masks"]
    assert rows["0.png"]["agreement"] == 1 and rows["0.png"]["masks"] == [rows["0.png"]["trust"]]
    for key in ("2.png", "3.png", "none.png"):
        assert (
            rows[key]["status"] == "in no other run"
            and rows[key]["agreement"] is None
            and rows[key]["trust"] is not None
        )
    assert rows["none.png"]["masks"] == []
    assert result["left_out"] == {"in no other run": 5, "failed": 1}
    assert result["images"] == {"one": 5, "other": 4}
    assert set(result["weights"]) == set(SIGNALS)


def test_a_condition_of_an_export_names_trust_without_a_join(tmp_path, capsys):
    places, _ = made(tmp_path, {"kmeans": 0.5, "watershed": 0.6})
    words = ["export", places[0], "--format", "csv", "--output", str(tmp_path / "out")]
    assert main([*words, "--where", "mask_trust < 0.3"]) == 2
    assert f"make it first: raypipe trust {places[0]}" in capsys.readouterr().err
    trust(Trust(tuple(places)))
    assert main([*words, "--where", "trust < 0.3 and mask_trust < 0.3", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out.splitlines()[-1])["images"]
    assert exported == sum(value < 0.3 for value in read(Run(places[0]), ["trust"])["trust"].to_pylist()) > 3
