"""Which rows of a run a condition chooses, against slow loops."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.written import masks_row, random_masks, write_run

from raypipe import schema
from raypipe.cli.verbs import main
from raypipe.run import Run, new_attempt, rows
from raypipe.storage import hold


@pytest.fixture
def made(tmp_path) -> tuple[str, dict[str, dict]]:
    """A run of six images, two masks each, one without any, one that failed; its rows by key."""
    rng = np.random.default_rng(0)
    sizes = {"a.jpg": (20, 31), "b.png": (17, 9), "sub/c.png": (8, 8), "d.png": (5, 7)}
    table = [masks_row(key, random_masks(rng, size, 2)) for key, size in sizes.items()]
    table.append(masks_row("none.png", np.zeros((0, 6, 6), bool)))
    table.append(masks_row("broken.png", np.zeros((0, 1, 1)), error="decode: truncated: it ends early"))
    write_run(str(tmp_path / "run"), table)
    return str(tmp_path / "run"), {row["key"]: row for row in table}


def slow_choice(by_key: dict[str, dict], holds) -> dict[str, list[int]]:
    """Keys and segment indices for which holds(row, segment or None), in Python."""
    chosen = {}
    for key, row in by_key.items():
        for i, segment in enumerate(row["segments"] or [None]):
            if holds(row, segment):
                chosen.setdefault(key, []).extend([] if segment is None else [i])
    return chosen


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("area > 30", lambda row, s: s is not None and s["area"] > 30),
        (
            "share <= 0.5 and height < 10",
            lambda r, s: s and s["area"] <= 0.5 * r["height"] * r["width"] and r["height"] < 10,
        ),
        ("error = ''", lambda row, s: row["error"] == ""),
        ("segments = 0 -- none", lambda row, s: not row["segments"]),
        ("bbox[3] > 8 or key like '%broken%'", lambda r, s: (s and s["bbox"][2] > 8) or "broken" in r["key"]),
        ("label is null", lambda row, s: True),
        ("label is not null", lambda row, s: False),
    ],
)
def test_a_condition_chooses_what_a_slow_loop_chooses(made, where, holds):
    run, by_key = made
    found = {row["key"]: [s["segment"] for s in row["segments"]] for row in rows.select(Run(run), where=where)}
    assert found == slow_choice(by_key, holds)


def test_without_a_condition_all_rows_come_in_order_with_all_segments(made):
    run, by_key = made
    found = list(rows.select(Run(run)))
    assert [row["key"] for row in found] == list(by_key) and {row["method"] for row in found} == {"kmeans"}
    assert [len(row["segments"]) for row in found] == [len(row["segments"]) for row in by_key.values()]


@pytest.mark.parametrize(
    "where",
    ["areas > 3", "area >", "area > 1; select 1", "sum(area) > 1", "1) or (1", "area > (select 1)", "1 limit 3"],
)
def test_a_condition_that_does_not_work_says_which_columns_there_are(made, capsys, where):
    run, _ = made
    assert main(["export", run, "--format", "coco", "--where", where]) == 2
    error = capsys.readouterr().err
    assert f"--where {where!r}: " in error and "the columns are image_id, uri, key" in error
    assert not Run(run).folder.folders("export")


@pytest.mark.parametrize("where", ['label = "spot"', "label = spot", "label like “spot”", "label in (\"spot\", 'x')"])
def test_text_without_single_quotes_is_told_apart_from_a_column(made, where):
    with pytest.raises(ValueError, match=r"\"\W?spot\W?\" not found .*text stands in single quotes, 'spot';"):
        list(rows.select(Run(made[0]), where=where))
    with pytest.raises(ValueError, match='column "shar" not found') as error:
        rows.select(Run(made[0]), where="shar > 0.01")
    assert "single quotes" not in str(error.value)


def test_a_value_that_a_condition_cannot_take_is_a_wrong_option(made, capsys):
    assert main(["export", made[0], "--format", "coco", "--where", "key::int > 3"]) == 2
    assert "--where 'key::int > 3': Conversion Error: Could not convert string" in capsys.readouterr().err


def test_a_condition_cannot_read_files(made, tmp_path):
    (tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="--where"):
        list(rows.select(Run(made[0]), where=f"exists (select * from read_csv('{tmp_path}/secret.csv'))"))


def test_a_table_of_one_row_per_image_adds_columns_to_the_condition(made, tmp_path):
    run, by_key = made
    keys = list(by_key)[:3]
    pq.write_table(pa.table({"key": keys, "agreement": [0.9, 0.2, None], "height": [0, 0, 0]}), tmp_path / "a.parquet")
    joined = rows.read_joined(str(tmp_path / "a.parquet"))
    found = [row["key"] for row in rows.select(Run(run), where="agreement > 0.5 and height > 0", joined=[joined])]
    assert found == keys[:1]
    pq.write_table(pa.table({"key": [keys[0]] * 2}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="one row per image"):
        rows.read_joined(str(tmp_path / "b.parquet"))
    with pytest.raises(FileNotFoundError, match="--join .*/nope.parquet does not exist; give a Parquet"):
        rows.read_joined(str(tmp_path / "nope.parquet"))
    pq.write_table(pa.table({"iou": [1.0]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="expected a column key or image_id, got iou"):
        rows.read_joined(str(tmp_path / "c.parquet"))


def test_an_id_that_an_unfinished_retry_left_twice_is_read_once(tmp_path):
    found = random_masks(np.random.default_rng(0), (5, 6), 1)
    run = write_run(
        str(tmp_path / "run"), [masks_row("a.png", found, error="fetch: network: gone"), masks_row("b.png", found)]
    )
    with hold(run.folder, later := new_attempt()):
        run.commit(later, 0, pa.Table.from_pylist([masks_row("a.png", found)], schema=schema.MASKS))
    read = list(rows.select(run))
    assert sorted(row["key"] for row in read) == ["a.png", "b.png"] and {row["error"] for row in read} == {""}
