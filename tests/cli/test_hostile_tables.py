"""Tables of strangers, each read by every verb that reads one: code that they hold never runs."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hostile import arm, objects
from support.sources import photographs
from support.written import masks_row, random_masks, write_run

from raypipe.cli import main


@pytest.fixture
def canary(tmp_path):
    """A folder that is not there, and must not come to be."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def label(source, tmp_path, *options) -> int:
    words = ["--input", str(source), "--output", str(tmp_path / "out"), "--foreground", "whole", "--local", *options]
    return main(["label", "kmeans", *words])


@pytest.mark.parametrize("place", ["uri", "bytes", "path of a struct", "bytes of a struct", "element of a list"])
def test_an_input_table_runs_no_code(place, canary, tmp_path):
    column = objects(3, canary)
    if place.endswith("struct"):
        other = pa.array([b"x"] * 3) if place.startswith("path") else pa.array(["a.jpg"] * 3)
        fields = ["path", "bytes"] if place.startswith("path") else ["bytes", "path"]
        column = pa.StructArray.from_arrays([column, other], fields)
    if place.endswith("list"):
        column = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), column)
    pq.write_table(pa.table({"image" if place != "uri" else "url": column}), tmp_path / "table.parquet")
    assert label(tmp_path / "table.parquet", tmp_path, "--dry-run", "--no-timing") in (0, 2)
    assert label(tmp_path / "table.parquet", tmp_path) in (2, 3)


@pytest.mark.parametrize("column", ["image_id", "key", "uri", "segments", "error"])
@pytest.mark.parametrize("verb", ["report", "export", "verify", "compact", "evaluate", "agree", "run:"])
def test_a_run_of_a_stranger_runs_no_code(verb, column, canary, tmp_path):
    photographs(tmp_path / "photos", 3)
    rng, run, labels = np.random.default_rng(0), tmp_path / "run", str(tmp_path / "photos")
    for place in (run, tmp_path / "other"):
        write_run(str(place), [masks_row(f"{i}.jpg", random_masks(rng, (24, 32), 2)) for i in range(3)])
    arm(run, canary, column)
    if verb == "run:":
        code = label(tmp_path / "photos", tmp_path, "--foreground", f"run:{run}")
    else:
        more = {
            "export": ["--format", "csv", "--output", str(tmp_path / "csv")],
            "evaluate": ["--labels", labels, "--task", "pattern"],
            "verify": ["--deep"],
            "agree": [str(tmp_path / "other")],
        }
        code = main([verb, str(run), *more.get(verb, [])])
    assert code in (0, 1, 2, 3)


def test_a_joined_table_runs_no_code(canary, tmp_path):
    run = tmp_path / "run"
    write_run(str(run), [masks_row("0.jpg", np.ones((1, 4, 4), bool))])
    pq.write_table(pa.table({"key": ["0.jpg"], "taken": objects(1, canary)}), tmp_path / "joined.parquet")
    words = ["--format", "csv", "--output", str(tmp_path / "csv"), "--join", str(tmp_path / "joined.parquet")]
    assert main(["export", str(run), *words, "--where", "taken IS NOT NULL"]) == 0
    pq.write_table(pa.table({"key": objects(1, canary)}), tmp_path / "joined.parquet")
    assert main(["export", str(run), *words, "--overwrite", "--where", "area > 0"]) in (0, 1, 2)
