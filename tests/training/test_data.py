"""The images of a training: what is kept of them, in which order they come, and what each worker takes."""

import json
import pickle
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raypipe.inputs.manifest import list_inputs
from raypipe.training import data
from raypipe.training.recipe import Recipe
from raypipe.types import BadImage

LIMITS = {"max_bytes": 1_000_000, "max_pixels": 10_000}


@dataclass(kw_only=True)
class Halves(Recipe):
    """Keeps every second row of an image, and what stands in the column `mark`."""

    epochs: int = 1
    batch_size: int = 2
    lr: float = 0.1

    def rows(self, manifest):
        return manifest

    def prepare(self, row, image):
        if image.shape[0] < 4:
            raise BadImage("decode", "too_small", f"{image.shape[0]} rows are not enough to train on")
        return {"image": image[::2], "mark": np.array([len(row.get("mark", ""))])}

    def draw(self, random, sample):
        return random.random()

    def student(self, device):
        raise NotImplementedError


@pytest.fixture
def photos(tmp_path):
    """Five images b0.png to b4.png of different sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (8 + i, 6, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"b{i}.png")
    return folder


def pixels(path):
    return np.asarray(Image.open(path))


def test_samples_come_by_index_in_the_order_of_their_keys(photos):
    rows = list_inputs(str(photos))
    samples = data.gather(Halves(), rows.take([3, 0, 4, 2, 1]), **LIMITS)
    assert samples.keys == [f"b{i}.png" for i in range(5)] and len(samples) == 5 and samples.skipped == []
    for i in (4, 0, 2):
        np.testing.assert_array_equal(samples[i]["image"], pixels(photos / f"b{i}.png")[::2])
    with pytest.raises(IndexError):
        samples[5]
    with pytest.raises(ValueError, match="read-only"):
        samples[0]["image"][0] = 0


def test_samples_survive_pickling(photos):
    samples = data.gather(Halves(), list_inputs(str(photos)), **LIMITS)
    again = pickle.loads(pickle.dumps(samples))
    assert (again.keys, again.digest) == (samples.keys, samples.digest)
    np.testing.assert_array_equal(again[3]["image"], samples[3]["image"])


def test_images_that_cannot_be_trained_on_are_left_out_and_named(photos):
    (photos / "a.png").write_bytes(b"no picture")
    (photos / "b2.png").write_bytes((photos / "b2.png").read_bytes()[:60])
    Image.new("RGB", (200, 200)).save(photos / "c.png")
    Image.new("RGB", (6, 2)).save(photos / "d.png")
    rows = list_inputs(str(photos))
    (photos / "b4.png").unlink()
    samples = data.gather(Halves(), rows, **LIMITS)
    assert samples.keys == ["b0.png", "b1.png", "b3.png"]
    np.testing.assert_array_equal(samples[2]["image"], pixels(photos / "b3.png")[::2])
    found = {each["key"]: each["error"] for each in samples.skipped}
    assert list(found) == ["a.png", "b2.png", "b4.png", "c.png", "d.png"]
    assert "decode: unsupported" in found["a.png"] and "decode: truncated" in found["b2.png"]
    assert "fetch: missing" in found["b4.png"] and "decode: too_large" in found["c.png"]
    assert found["d.png"] == "decode: too_small: 2 rows are not enough to train on"
    assert samples.skipped[0]["uri"].endswith("photos/a.png")


def test_the_digest_is_that_of_keys_files_and_what_the_recipe_added(photos):
    rows = list_inputs(str(photos))
    digest = data.gather(Halves(), rows, **LIMITS).digest
    each = [
        (row["key"], sha256(sha256((photos / row["key"]).read_bytes()).digest() + b"{}")) for row in rows.to_pylist()
    ]
    assert digest == sha256(json.dumps([[key, its.hexdigest()] for key, its in each]).encode()).hexdigest()
    marked = rows.append_column("mark", pa.array(["x"] * 5))
    assert data.gather(Halves(), marked, **LIMITS).digest != digest
    (photos / "b1.png").rename(photos / "b9.png")
    renamed = data.gather(Halves(), list_inputs(str(photos)), **LIMITS).digest
    (photos / "b9.png").rename(photos / "b1.png")
    assert renamed != digest == data.gather(Halves(), list_inputs(str(photos)), **LIMITS).digest
    Image.new("RGB", (6, 9)).save(photos / "b1.png")
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
