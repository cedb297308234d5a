"""The run's folder without Ray: whatever moment a process dies at, the next plan is right."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.attempts import Killed, attempt_all, finished, kill_at, manifest
from support.faulty import GOOD, RAISES, Faulty, write_images

from raypipe import schema
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.run import DamagedRun, OtherConfiguration, Run, new_attempt, superseded
from raypipe.run.rows import load
from raypipe.storage import Folder, Locked, hold


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(str(tmp_path / "run"), "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    return run


@pytest.mark.parametrize("step", range(14))
def test_a_kill_before_any_change_of_the_folder_loses_and_doubles_nothing(tmp_path, monkeypatch, step):
    images, place = manifest(8), str(tmp_path / "run")
    first = Run(place, "kmeans")
    first.freeze({"k": 2}, {"weights": {}})
    attempt_all(first, images.slice(0, 4), error="fetch: network: gone")
    with monkeypatch.context() as patch:
        kill_at(step, patch)
        try:
            attempt_all(first, images, retry_errors=True)
        except Killed:
            pass
    first.folder.delete("_runs", "LOCK")  # a dead process's; that it is taken over is another test
    attempt_all(Run(place, "kmeans"), images, retry_errors=True)
    files = sorted((tmp_path / "run/masks/method=kmeans").glob("*.parquet"))
    ids = [image_id for file in files for image_id in pq.read_table(file, partitioning=None)["image_id"].to_pylist()]
    assert sorted(ids) == images["image_id"].to_pylist()
    assert set(load(Run(place, "kmeans"))["error"].to_pylist()) == {""}


def test_a_plan_holds_what_is_not_committed(run):
    images = manifest(10)
    attempt_all(run, images.slice(0, 6))
    assert run.plan(images)["image_id"].to_pylist() == images["image_id"].to_pylist()[6:]
    assert len(run.plan(images, limit=2)) == 2
    attempt_all(run, images)
    assert len(run.plan(images)) == 0


def test_errors_are_done_unless_they_are_to_be_retried(run):
    images = manifest(5)
    attempt_all(run, images.slice(0, 2), error="decode: truncated: ends early")
    assert len(run.plan(images)) == 3
    assert len(run.plan(images, retry_errors=True)) == 5
    table = pq.read_table(run.folder.path("errors.parquet"))
    assert table["stage"].to_pylist() == ["decode"] * 2 and table["kind"].to_pylist() == ["truncated"] * 2
    assert table["retryable"].to_pylist() == [False, False]


def test_retried_errors_leave_each_id_once_for_plain_readers(run, tmp_path):
    images = manifest(7)
    attempt_all(run, images.slice(0, 2), error="fetch: network: gone", per_part=4)
    attempt_all(run, images, per_part=4)
    attempt_all(run, images, per_part=4, retry_errors=True)
    rows = pa.concat_tables(
        pq.read_table(file, partitioning=None) for file in (tmp_path / "run/masks/method=kmeans").glob("*.parquet")
    )
    assert sorted(rows["image_id"].to_pylist()) == images["image_id"].to_pylist()
    assert set(rows["error"].to_pylist()) == {""}
    assert pq.read_table(run.folder.path("errors.parquet")).num_rows == 0


def test_the_newest_good_row_counts_where_an_id_is_committed_twice():
    rows = [
        ("a", "", "part-1"),
        ("a", "segment: crash: x", "part-2"),
        ("b", "e", "part-1"),
        ("b", "e", "part-2"),
        ("c", "", "part-1"),
    ]
    commits = pa.table({name: [row[i] for row in rows] for i, name in enumerate(("image_id", "error", "part"))})
    assert superseded(commits) == {("a", "part-2"), ("b", "part-1")}


def test_a_part_without_record_and_a_record_without_part_are_cleaned_away(run):
    images = manifest(6)
    attempt_all(run, images)
    parts = sorted(run.folder.files("masks/method=kmeans"))
    run.folder.delete("_commits", parts[0])
    run.folder.delete("masks/method=kmeans", parts[1])
    run.clean()
    assert not run.folder.files("masks/method=kmeans") and not run.folder.files("_commits")
    assert len(run.plan(images)) == 6


def test_old_temporary_files_go_and_young_ones_stay(run):
    os.makedirs(run.folder.path("_commits"), exist_ok=True)
    for name in ("_tmp.old", "_tmp.young"):
        open(run.folder.path("_commits", name), "w").close()
    os.utime(run.folder.path("_commits", "_tmp.old"), (0, 0))
    run.clean()
    assert os.listdir(run.folder.path("_commits")) == ["_tmp.young"]
    assert not run.folder.files("_commits")


def test_another_configuration_is_refused_with_a_diff(run):
    with pytest.raises(OtherConfiguration, match=r"k: 2 there, 3 now"):
        run.check_configuration({"k": 3}, defaults={})
    with pytest.raises(OtherConfiguration, match="method: 'kmeans' there, 'watershed' now"):
        Run(run.folder.uri, "watershed").check_configuration({"k": 2}, defaults={})
    with pytest.raises(OtherConfiguration, match="other weights"):
        run.freeze({"k": 2}, {"weights": {"u2net.onnx": "abc"}})
    run.check_configuration({"k": 2}, defaults={})


def test_a_second_holder_is_refused_and_told_who_holds(run):
    with hold(run.folder, "first"), pytest.raises(Locked, match=rf"process {os.getpid()} on .* \(attempt first\)"):
        with hold(Folder(run.folder.uri), "second"):
            raise AssertionError("two holders")
    with hold(run.folder, "third"):
        pass
    assert not os.path.exists(run.folder.path("_runs", "LOCK"))


def test_of_many_contenders_one_gets_the_lock(run):
    os.makedirs(run.folder.path("_runs"), exist_ok=True)
    held, refused, barrier = [], [], threading.Barrier(8)
    release = threading.Event()

    def contend(name):
        barrier.wait()
        try:
            with hold(Folder(run.folder.uri), name):
                held.append(name)
                release.wait(10)
        except Locked:
            refused.append(name)
            if len(refused) == 7:
                release.set()

    threads = [threading.Thread(target=contend, args=(f"attempt-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7


def test_the_lock_of_a_dead_process_is_taken_at_once_and_its_worker_is_fenced_off(run):
    code = (
        "import os; from raypipe.storage import Folder; from raypipe.storage import hold\n"
        f"held = hold(Folder({run.folder.uri!r}), 'dead'); held.__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert json.loads(run.folder.read("_runs", "LOCK"))["attempt"] == "dead"
    images = manifest(3)
    with hold(run.folder, "alive"):
        with pytest.raises(Locked, match="no longer held by attempt dead"):
            run.commit("dead", 0, finished(images, "dead"))
        assert len(run.plan(images)) == 3
        run.commit("alive", 0, finished(images, "alive"))
        run.finish("alive")
    assert load(run)["attempt"].to_pylist() == ["alive"] * 3


def test_loading_what_is_no_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a raypipe run"):
        load(Run(str(tmp_path)))


def test_a_table_of_failures_alone_has_the_same_types(run):
    attempt_all(run, manifest(2), error="decode: corrupt: x")
    file = next(iter(run.folder.files("masks/method=kmeans")))
    stored = pq.read_table(run.folder.path("masks/method=kmeans", file), partitioning=None).schema
    assert stored.equals(schema.MASKS)
    assert stored.metadata[b"raypipe.schema"] == b"3"


def test_columns_can_be_chosen_when_loading(run):
    attempt_all(run, manifest(4))
    assert load(run, ["key", "method"]).column_names == ["key", "method"]


@pytest.mark.parametrize("step", range(8))
def test_a_kill_while_a_run_is_finished_is_made_up_for_by_the_next_start(tmp_path, monkeypatch, step):
    write_images(tmp_path / "photos", [GOOD, RAISES, GOOD])
    job = Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True, max_bad_fraction=1.0)
    label(job, Faulty())
    write_images(tmp_path / "photos", [GOOD] * 3)
    finish = Run.finish

    def killed_finish(self, attempt):
        kill_at(step, patch)
        return finish(self, attempt)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", killed_finish)
        with contextlib.suppress(Killed):
            label(dataclasses.replace(job, retry_errors=True), Faulty())
    Folder(job.output).delete("_runs", "LOCK")
    summary = label(job, Faulty())
    assert (summary.labelled, summary.failed, summary.pending) == (0, 0, 0)
    files = (tmp_path / "run/masks").rglob("*.parquet")
    keys = [key for file in files for key in pq.read_table(file, partitioning=None)["key"].to_pylist()]
    assert sorted(keys) == ["0000.png", "0001.png", "0002.png"]
    assert pq.read_table(tmp_path / "run/errors.parquet").num_rows == 0
    assert (tmp_path / "run/_runs/manifest.json").exists()


def test_settings_are_compared_as_run_json_holds_them(tmp_path):
    run = Run(str(tmp_path), "kmeans")
    run.freeze({"sizes": (4, 8)}, {"weights": {}})
    run.check_configuration({"sizes": (4, 8), "new": 1}, defaults={"sizes": (), "new": 1})
    with pytest.raises(OtherConfiguration, match="new: 1 there, 2 now"):
        run.check_configuration({"sizes": (4, 8), "new": 2}, defaults={"new": 1})


@pytest.mark.parametrize(("content", "parts"), [(b'{"schema": 1, "meth', True), (b"{}", False), (b"[]", False)])
def test_a_damaged_configuration_is_named(run, content, parts):
    """Torn JSON without any part is a run that has not begun; what is no JSON of ours is never written over."""
    if parts:
        attempt_all(run, manifest(2))
    run.folder.write(content, "run.json")
    with pytest.raises(DamagedRun, match="its run.json cannot be read .*verify .* --repair"):
        run.check_configuration({"k": 2}, defaults={})


def test_cleaning_spares_files_that_are_not_ours(run):
    attempt_all(run, manifest(2))
    run.folder.write(b"", run.data, "mine.parquet")
    run.folder.write(b"", run.data, f"part-{new_attempt()}-000000.parquet")
    run.clean()
    assert "mine.parquet" in run.folder.files(run.data) and len(run.folder.files(run.data)) == 2


def test_a_finished_run_copied_without_its_records_is_not_emptied(run):
    attempt_all(run, manifest(2))
    run.mark_complete({})
    for name in run.folder.files("_commits"):
        run.folder.delete("_commits", name)
    with pytest.raises(RuntimeError, match="without its folder _commits"):
        run.clean()
    assert run.folder.files(run.data)


def test_a_lock_from_another_container_counts_by_its_age(run):
    with hold(run.folder, "first"):
        claim = json.loads(run.folder.read("_runs", "LOCK")) | {"machine": "another", "pid": 1, "born": "then"}
        run.folder.write(json.dumps(claim).encode(), "_runs", "LOCK")
        with pytest.raises(Locked), hold(run.folder, "second"):
            raise AssertionError("two holders")
        os.utime(run.folder.path("_runs", "LOCK"), (0, 0))
        with hold(run.folder, "second"):
            pass


def test_a_file_system_without_hard_links_still_has_one_holder(run, monkeypatch):
    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with hold(run.folder, "first"), pytest.raises(Locked), hold(run.folder, "second"):
        raise AssertionError("two holders")


def test_an_unknown_column_is_named_with_the_known_ones(run):
    with pytest.raises(ValueError, match="unknown column 'keys'; choose from: image_id"):
        load(run, ["keys"])
