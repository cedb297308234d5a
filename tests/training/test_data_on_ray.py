"""The images of a training in Ray's object store: read by any worker, whatever dies."""

from pathlib import Path

import pytest
from support.faulty import DIES, GOOD, RAISES, write_images
from support.halves import FAULT_OF_RECIPE, Halves, contents

from raypipe.inputs.manifest import list_inputs
from raypipe.training import data

ray = pytest.importorskip("ray")
LIMITS = {"max_bytes": 10_000_000, "max_pixels": 1_000_000}


@pytest.fixture(scope="module")
def machines():
    """A cluster that this process has joined: a head without cores, and a machine that does all the work."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    worker = cluster.add_node(num_cpus=3)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster, worker
    ray.shutdown()
    cluster.shutdown()


def photographs(folder: Path, kinds: list[int]):
    """Rows of images so large that a block of them does not travel within a message."""
    write_images(folder, kinds, size=(90, 120))
    return list_inputs(str(folder))


def test_an_image_that_kills_its_process_is_left_out_and_all_others_are_as_without_ray(machines, tmp_path):
    kinds = [GOOD] * 40
    kinds[3], kinds[5], kinds[16:32] = DIES, RAISES, [RAISES] * 16
    rows = photographs(tmp_path / "photos", kinds)
    samples = data.gather_on_ray(Halves(), rows, **LIMITS)
    (died,) = [each for each in samples.skipped if each["key"] == "0003.png"]
    assert died["error"] == "decode: crash: its process died, 2 times with this image alone"
    (tmp_path / "photos" / "0003.png").write_bytes(b"")
    expected = data.gather(Halves(), rows, **LIMITS)
    assert [each["key"] for each in samples.skipped] == [each["key"] for each in expected.skipped]
    assert contents(samples) == contents(expected)


def test_a_fault_of_the_recipe_is_no_fault_of_the_image(machines, tmp_path):
    with pytest.raises(KeyError, match="nowhere"):
        data.gather_on_ray(Halves(), photographs(tmp_path / "photos", [GOOD, FAULT_OF_RECIPE]), **LIMITS)


@pytest.mark.slow
def test_any_process_reads_them_also_after_a_machine_was_lost(machines, tmp_path):
    cluster, worker = machines
    rows = photographs(tmp_path / "photos", [GOOD] * 40)
    expected = data.gather(Halves(), rows, **LIMITS)
    samples = data.gather_on_ray(Halves(), rows, **LIMITS)
    read = ray.remote(contents)  # where there is a core: on no machine that stays
    assert ray.get(read.remote(samples)) == contents(expected)
    cluster.remove_node(worker, allow_graceful=False)
    cluster.add_node(num_cpus=3)
    (tmp_path / "photos" / "0001.png").unlink()
    for index in (39, 20, 2, 0):
        assert samples[index]["image"].tobytes() == expected[index]["image"].tobytes()
    with pytest.raises(RuntimeError, match="sample 1: its machine was lost"):
        samples[1]
