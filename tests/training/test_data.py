"""The images of a training: what is kept of them, in which order they come, and what each worker takes."""

import json
import pickle
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support.faulty import GOOD, NO_MEMORY, RAISES, write_images
from support.halves import Halves

from raypipe.inputs.manifest import list_inputs
from raypipe.training import data

LIMITS = {"max_bytes": 1_000_000, "max_pixels": 10_000}


@pytest.fixture
def photos(tmp_path):
    """Five images 0000.png to 0004.png of different sizes."""
    write_images(tmp_path / "photos", [GOOD] * 5)
    return tmp_path / "photos"


def pixels(path):
    return np.asarray(Image.open(path))


def test_samples_come_by_index_in_the_order_of_their_keys(photos):
    rows = list_inputs(str(photos))
    samples = data.gather(Halves(), rows.take([3, 0, 4, 2, 1]), **LIMITS)
    assert samples.keys == [f"{i:04d}.png" for i in range(5)] and len(samples) == 5 and samples.skipped == []
    for i in (4, 0, 2):
        np.testing.assert_array_equal(samples[i]["image"], pixels(photos / f"{i:04d}.png")[::2])
    with pytest.raises(IndexError):
        samples[5]
    with pytest.raises(ValueError, match="read-only"):
        samples[0]["image"][0] = 0


def test_samples_survive_pickling(photos):
    samples = data.gather(Halves(), list_inputs(str(photos)), **LIMITS)
    again = pickle.loads(pickle.dumps(samples))
    assert (again.keys, again.digest) == (samples.keys, samples.digest)
    np.testing.assert_array_equal(again[3]["image"], samples[3]["image"])


def test_images_that_cannot_be_trained_on_are_left_out_and_named(tmp_path):
    photos = tmp_path / "photos"
    write_images(photos, [GOOD, RAISES, GOOD, NO_MEMORY, GOOD, GOOD, GOOD])
    (photos / "0002.png").write_bytes((photos / "0002.png").read_bytes()[:60])
    (photos / "0004.png").write_bytes(b"no picture")
    Image.new("RGB", (200, 200)).save(photos / "9.png")
    rows = list_inputs(str(photos))
    (photos / "0006.png").unlink()
    samples = data.gather(Halves(), rows, **LIMITS)
    assert samples.keys == ["0000.png", "0005.png"] and len(samples) == 2
    np.testing.assert_array_equal(samples[1]["image"], pixels(photos / "0005.png")[::2])
    found = {each["key"]: each["error"] for each in samples.skipped}
    assert list(found) == ["0001.png", "0002.png", "0003.png", "0004.png", "0006.png", "9.png"]
    assert found["0001.png"] == "decode: unloved: this image is not liked"
    kinds = [error.rpartition(": ")[0].split(": ")[1] for error in found.values()]
    assert kinds == ["unloved", "truncated", "memory", "unsupported", "missing", "too_large"]
    assert samples.skipped[0]["uri"].endswith("photos/0001.png")


def test_the_digest_is_that_of_keys_files_and_what_the_recipe_added(photos):
    rows = list_inputs(str(photos))
    digest = data.gather(Halves(), rows, **LIMITS).digest
    each = [
        (row["key"], sha256(sha256((photos / row["key"]).read_bytes()).digest() + b"{}")) for row in rows.to_pylist()
    ]
    assert digest == sha256(json.dumps([[key, its.hexdigest()] for key, its in each]).encode()).hexdigest()
    marked = rows.append_column("mark", pa.array(["x"] * 5))
    assert data.gather(Halves(), marked, **LIMITS).digest != digest
    (photos / "0001.png").rename(photos / "0009.png")
    renamed = data.gather(Halves(), list_inputs(str(photos)), **LIMITS).digest
    (photos / "0009.png").rename(photos / "0001.png")
    assert renamed != digest == data.gather(Halves(), list_inputs(str(photos)), **LIMITS).digest
    Image.new("RGB", (6, 9), "white").save(photos / "0001.png")
    assert data.gather(Halves(), rows, **LIMITS).digest != digest


def test_an_order_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = {(seed, epoch): data.order(50, seed=seed, epoch=epoch) for seed in (-1, 0, 1) for epoch in (0, 1)}
    for (seed, epoch), each in orders.items():
        assert sorted(each) == list(range(50))
        np.testing.assert_array_equal(each, data.order(50, seed=seed, epoch=epoch))
    assert len({tuple(each) for each in orders.values()}) == 6


def test_numbers_of_a_sample_depend_on_seed_epoch_and_index_alone():
    places = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1, 2)]
    drawn = {place: data.generator(*place).random(4) for place in places}
    for place in reversed(places):
        np.testing.assert_array_equal(drawn[place], data.generator(*place).random(4))
    assert len({number for each in drawn.values() for number in each}) == 4 * len(places)
    means = [data.generator(7, 3, index).random() for index in range(4000)]
    assert abs(np.mean(means) - 0.5) < 0.02 and abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.05


def test_any_number_of_workers_shares_the_same_global_batches():
    order = data.order(21, seed=0, epoch=0)
    for tail, steps in (("pad", 3), ("drop", 2)):
        batches = [set(order[8 * step : 8 * step + 8]) for step in range(steps)]
        batches[2:] = [set(order[16:]) | set(order[:3])] if tail == "pad" else []
        for workers in (1, 2, 4, 8):
            shares = data.shares(order, workers=workers, batch=8 // workers, tail=tail)
            assert shares.shape == (steps, workers, 8 // workers)
            assert [set(each.ravel()) for each in shares] == batches


def test_a_worker_takes_every_nth_position():
    shares = data.shares(np.arange(10), workers=3, batch=2, tail="pad")
    assert shares.tolist() == [[[0, 3], [1, 4], [2, 5]], [[6, 9], [7, 0], [8, 1]]]
    for rank in range(3):
        assert shares[:, rank].ravel().tolist() == [*range(10), 0, 1][rank::3]


def test_fewer_images_than_a_batch_are_an_error():
    with pytest.raises(ValueError, match="training: 7 images are fewer than the 8 of a batch.*--batch-size"):
        data.shares(np.arange(7), workers=2, batch=4, tail="pad")
