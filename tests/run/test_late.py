"""What comes late, twice or not at all on a store: each was found by a schedule of `test_schedules`."""

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from support.attempts import attempt_all, finished, manifest
from support.simulated import LAG, Rates, World

from raypipe.maintenance.compact import Compact, _read_part, compact
from raypipe.maintenance.verify import Verify, verify
from raypipe.run import DamagedRun, Run, new_attempt
from raypipe.run.rows import batches, load
from raypipe.storage import Locked, hold

PLACE = "simulated://bucket/run"


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(str(tmp_path / "run"), "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    return run


def begin(images: pa.Table, *, per_part: int = 2) -> Run:
    run = Run(PLACE, "kmeans")
    run.freeze({"k": 2}, {"weights": {}})
    attempt_all(run, images, per_part=per_part)
    return run


def seen_ids() -> list[str]:
    return [image for rows in batches(Run(PLACE)) for image in rows["image_id"].to_pylist()]


def plain_rows(run: Run) -> list[str]:
    names = run.folder.files(run.data)
    return sorted(image for name in names for image in table(run, name)["image_id"].to_pylist())


def table(run: Run, name: str) -> pa.Table:
    with run.part(name) as part:
        return part.read()


def test_listings_that_lag_behind_delete_nothing_that_was_committed():
    images = manifest(8)
    for seed in range(10):
        world = World(seed)
        with world.inside():
            run = world.run(lambda: begin(images))
            world.rates = Rates(stale=1.0)
            world.run(run.clean)
            world.rates = Rates()
            world.sleep(LAG)
            assert len(world.run(lambda run=run: run.plan(images))) == 0, seed
            assert world.happened["stale"]


def test_a_listing_that_lacks_a_new_part_is_no_damage():
    images = manifest(8)
    for seed in range(10):
        world = World(seed)
        with world.inside():
            run = world.run(lambda: begin(images))
            world.rates = Rates(stale=1.0)
            assert len(set(world.run(run.parts))) <= 4, seed


def test_a_reader_sees_each_image_once_while_the_parts_are_compacted():
    images, seen = manifest(6), 0
    for seed in range(20):
        world = World(seed)
        with world.inside():
            world.run(lambda: begin(images))
            compaction = world.start(lambda: compact(Compact(PLACE)), host="one")
            while not compaction.done:
                try:
                    ids = world.run(seen_ids)
                except FileNotFoundError:  # a part was replaced while it was read
                    continue
                assert sorted(ids) == images["image_id"].to_pylist(), seed
                seen += 1
    assert seen > 20


def test_a_task_that_runs_twice_never_writes_over_its_own_rows(run):
    images, attempt = manifest(3), new_attempt()
    first = finished(images, attempt)
    again = first.set_column(first.schema.get_field_index("seconds"), "seconds", pa.array([1.0] * 3))
    with hold(run.folder, attempt):
        run.commit(attempt, 0, first)
        run.commit(attempt, 0, again)
        run.commit(attempt, 0, first)  # as it was: the same file
        assert len(run.parts()) == 2 and len(load(run)) == 3
        run.finish(attempt)
    assert plain_rows(run) == images["image_id"].to_pylist()
    assert verify(Verify(str(run))).exit_code == 0


def test_a_record_is_taken_back_when_its_part_was_cleaned_away_before(run):
    images, attempt = manifest(2), new_attempt()
    with hold(run.folder, attempt):
        record = run.write_part(name := f"part-{attempt}-000000.parquet", b"rows", finished(images, attempt))
        run.clean()
        with pytest.raises(Locked, match="was cleaned away before it was committed"):
            run.write_record(attempt, name, record)
        assert not run.folder.files("_commits")


@pytest.mark.parametrize("error", ["", "fetch: network: gone"])
def test_a_late_record_without_part_is_damage_only_where_its_images_have_no_row_as_good(run, error):
    images = manifest(4)
    attempt_all(run, images.slice(0, 2), error=error)
    attempt = new_attempt()
    with hold(run.folder, attempt):
        run.commit(attempt, 0, finished(images.slice(0, 2), attempt))
        name = run.parts()[-1]
        run.folder.delete(run.data, name)
        if error:
            with pytest.raises(DamagedRun, match="1 of 2 parts are gone"):
                load(run)
        else:
            assert len(load(run)) == 2
        run.clean()
    assert len(load(run)) == 2 and len(run.plan(images)) == 2


def test_what_a_late_worker_adds_to_an_ended_run_is_settled_at_its_next_start(run):
    images, late = manifest(4), new_attempt()
    attempt_all(run, images, error="fetch: network: gone")
    attempt = new_attempt()
    with hold(run.folder, late):  # it had passed the fence when its driver died
        run.commit(late, 0, finished(images.slice(0, 2), late))
    with hold(run.folder, attempt):
        commits = run.settled(attempt)
    assert plain_rows(run) == images["image_id"].to_pylist()
    assert len(commits) == 4 == pc.count_distinct(commits["image_id"]).as_py()
    assert sorted(run.errors()["image_id"].to_pylist()) == images["image_id"].to_pylist()[2:]
    assert verify(Verify(str(run))).exit_code == 0


def test_a_run_whose_first_file_was_torn_begins_again(run):
    whole = run.folder.read("run.json")
    run.folder.write(whole[:40], "run.json")
    run = Run(str(run), "kmeans")
    run.check_configuration({"k": 3}, defaults={})
    run.freeze({"k": 3}, {"weights": {}})
    assert run.configuration()["settings"] == {"k": 3}
    attempt_all(run, manifest(2))
    run.folder.write(whole[:40], "run.json")
    with pytest.raises(DamagedRun, match="its run.json cannot be read"):
        Run(str(run), "kmeans").check_configuration({"k": 3}, defaults={})


def test_a_listing_that_lacks_all_records_of_a_finished_run_is_not_taken_for_their_loss():
    images = manifest(2)
    for seed in range(10):
        world = World(seed)
        with world.inside():
            run = world.run(lambda: begin(images))
            run.mark_complete({"images": 2})
            world.rates = Rates(stale=1.0)
            world.run(run.clean)
            world.run(run.parts)
            world.rates = Rates()
            run.folder.delete_folder("_commits")
            with pytest.raises(RuntimeError, match="without its folder _commits"):
                run.clean()


def test_a_part_that_compact_finds_replaced_is_not_called_damaged(run):  # schedule 146
    attempt_all(run, manifest(2))
    (name,) = run.parts()
    run.drop(name)
    with pytest.raises(FileNotFoundError, match="another process has replaced the part"):
        _read_part(run, name)


def test_a_commit_is_two_writes_and_three_small_reads_and_the_end_reads_each_record_once():
    images, attempt = manifest(6), new_attempt()

    def kinds(requests: list[tuple]) -> list[tuple[str, str]]:
        return [(kind, path.removeprefix("bucket/run/").partition("/")[0]) for _, _, _, kind, path, _ in requests]

    world = World(0)
    with world.inside():
        run = Run(PLACE, "kmeans")
        run.freeze({"k": 2}, {"weights": {}})
        with hold(run.folder, attempt):
            for task in range(3):
                world.trace.clear()
                world.run(lambda task=task: run.commit(attempt, task, finished(images.slice(2 * task, 2), attempt)))
                look = ("read", "_runs")
                assert kinds(world.trace) == [("write", "masks"), look, ("write", "_commits"), ("read", "masks"), look]
            world.trace.clear()
            world.run(lambda: run.finish(attempt))
            assert kinds(world.trace).count(("read", "_commits")) == 3
