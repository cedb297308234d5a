"""The figures of a run's images, which of them are odd, and which are chosen for the page."""

import json

import numpy as np
import pyarrow as pa
from support.shares import row, write_run

from raypipe.report import measures


def test_figures_agree_with_a_slow_loop(tmp_path):
    rng = np.random.default_rng(1)
    rows = [row(f"{i}.png", list(rng.random(rng.integers(1, 4)))) for i in range(30)]
    rows[4]["segments"], rows[9]["error"] = [], "decode: corrupt: a: b"
    table = measures.read(write_run(tmp_path / "run", rows))
    for wanted, found in zip(rows, table.to_pylist(), strict=True):
        shares = [segment["area"] / 200 for segment in wanted["segments"]]
        assert found["count"] == len(shares) and found["share"] == (shares or [0])[0]
        assert found["largest"] == max(shares, default=0) and found["smallest"] == min(shares, default=1)
        assert found["reason"] == ("decode: corrupt" if wanted["error"] else "")
        assert found["megapixels"] == 0.0002 and np.isnan(found["score"])
    assert measures.reasons(table) == [("decode: corrupt", 1)] and len(measures.good(table)) == 29


def test_a_class_that_is_nowhere_counts_as_none_where_masks_never_overlap(tmp_path):
    rows = [row("a.png", [0.25, 0.0]), row("b.png", [0.0])]  # as of a run with soft masks
    for method, count, smallest in (("kmeans", [2, 1], [0, 0]), ("maskclip", [1, 0], [0.25, 1])):
        table = measures.read(write_run(tmp_path / method, rows, method=method)).to_pydict()
        assert (table["count"], table["smallest"], table["share"]) == (count, smallest, [0.25, 0])


def test_a_row_that_was_done_again_counts_once(tmp_path):
    write_run(tmp_path / "run", [row("a.png", error="fetch: network: gone"), row("b.png")])
    run = write_run(tmp_path / "run", [row("a.png")])
    assert sorted(measures.read(run)["key"].to_pylist()) == ["a.png", "b.png"]
    assert measures.reasons(measures.read(run)) == []


def test_an_agreement_counts_for_every_run_that_it_compares(tmp_path):
    first, second, third = (write_run(tmp_path / name, [row("a.png"), row("b.png")]) for name in "xyz")
    compared = {b"raypipe.runs": json.dumps([str(first), str(second)]).encode()}
    agreement = pa.table({"key": ["a.png", "b.png"], "agreement": [0.25, 0.75]}).replace_schema_metadata(compared)
    first.folder.write_table(agreement, "metrics", "agreement", "agreement.parquet")
    for run, others in ((first, []), (second, [first, third])):
        table = measures.read(run, others)
        assert dict(zip(table["key"].to_pylist(), table["agreement"].to_pylist(), strict=True)) == {
            "a.png": 0.25,
            "b.png": 0.75,
        }
    assert "agreement" not in measures.read(third, [first, second]).column_names
    assert "agreement" not in measures.read(second).column_names


def test_the_oddest_come_first_and_the_rest_is_the_same_random_sample_each_time(tmp_path):
    rows = [row(f"{i:03d}.png", [0.2 + 0.001 * (i % 9), 0.7]) for i in range(200)]
    rows[50], rows[60] = row("050.png", [0.995]), row("060.png", [0.2, 0.0])
    rows[70] = row("070.png", [0.2, 0.7], note="few_colours")
    table = measures.good(measures.read(write_run(tmp_path / "run", rows, per_part=64)))
    chosen = measures.choose([table], 20)
    assert [choice.key for choice in chosen[:3]] == ["050.png", "060.png", "070.png"]
    assert all(choice.oddness >= measures.ODD for choice in chosen[:3]) and chosen[3].oddness == 0
    smallest = sorted(rows, key=lambda row: row["image_id"])[:17]
    assert {choice.key for choice in chosen if choice.is_random} == {row["key"] for row in smallest}
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    assert measures.choose([shuffled], 20) == chosen


def test_at_most_half_of_the_sample_is_odd(tmp_path):
    rows = [row(f"{i:03d}.png", [0.2 if i % 3 else 0.9]) for i in range(90)]
    chosen = measures.choose([measures.good(measures.read(write_run(tmp_path / "run", rows)))], 20)
    assert len(chosen) <= 20 and sum(choice.is_random for choice in chosen) == 10


def test_histograms_agree_with_a_slow_loop_and_share_their_edges():
    rng = np.random.default_rng(2)
    values = [rng.gamma(2, 1, 500), np.append(rng.gamma(3, 1, 300), np.nan)]
    found = measures.histogram(values)
    for counts, array in zip(found.counts, values, strict=True):
        pairs = list(zip(found.edges[:-1], found.edges[1:], strict=True))
        slow = [sum(low <= value < high for value in array) for low, high in pairs]
        slow[-1] += sum(array == found.edges[-1])
        assert counts.tolist() == slow
    assert found.medians == [np.median(values[0]), np.nanmedian(values[1])]
    whole = measures.histogram([np.array([2.0, 2.0, 4.0])])
    assert whole.counts[0].tolist() == [0, 2, 0, 1, 0]
    assert measures.histogram([np.array([np.nan])]).counts[0].sum() == 0


def test_the_least_trusted_are_odd_and_both_ends_of_trust_are_shown(tmp_path):
    rows = [row(f"{i:03d}.png", [0.2, 0.7]) for i in range(100)]
    run = write_run(tmp_path / "run", rows, per_part=64)
    keys = [row["key"] for row in rows]
    trust = pa.table({"key": keys, "trust": [*(i / 100 + 0.005 for i in range(99)), None]})
    run.folder.write_table(trust, "metrics", "trust", "trust.parquet")
    figures = measures.good(measures.read(run))
    low = measures.signs(figures)["low trust"]
    assert [key for key, sign in zip(figures["key"].to_pylist(), low, strict=True) if sign] == ["000.png", "001.png"]
    shown = measures.choose([figures], 20)
    assert [choice.key for choice in shown[:2]] == ["000.png", "001.png"] and shown[0].oddness == measures.ODD
    assert "098.png" in {choice.key for choice in shown}
