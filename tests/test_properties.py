"""Properties that hold for any value: round trips, and what must never be lost, doubled or shown."""

import json
import pickle
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from raypipe import masks, schema
from raypipe.inputs.items import Item, manifest_of
from raypipe.maintenance.integrity import run_lengths
from raypipe.run import Run, superseded
from raypipe.segmenters.kmeans import Kmeans
from raypipe.storage import Location, join, local_path
from raypipe.sweep.search import parse

settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=60
)  # no clock, the same cases each time
settings.load_profile("suite")

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))
NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=12)


@given(arrays.arrays(bool, SIZES))
def test_run_lengths_give_any_mask_back(mask):
    rle = masks.encode_rle(mask)
    np.testing.assert_array_equal(masks.decode_rle(rle), mask)
    lengths = run_lengths(rle["counts"])
    assert lengths.sum() == mask.size and lengths[1::2].sum() == mask.sum()


@given(arrays.arrays(bool, st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9))))
def test_packed_masks_come_back(found):
    np.testing.assert_array_equal(masks.unpack(masks.pack(found), found.shape, soft=False), found)
    soft = found.astype(np.float32) * np.float32(0.3)
    np.testing.assert_array_equal(masks.unpack(masks.pack(soft), soft.shape, soft=True), soft)


@given(st.integers(-50, 50), st.integers(1, 40), st.integers(1, 9), st.integers(0, 3))
def test_a_swept_range_holds_its_decimals_exactly(first, count, step, digits):
    start, step = Decimal(first).scaleb(-digits), Decimal(step).scaleb(-digits)
    (values,) = parse([f"eps={start}:{start + (count - 1) * step}:{step}"], [Kmeans]).values()
    assert values == list(dict.fromkeys(float(start + i * step) for i in range(count)))


@given(st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=30))
def test_keys_are_unique_and_stay_inside_their_folder(names):
    keys = manifest_of(Item(Location(f"/photos/{i}"), name) for i, name in enumerate(names))[0]["key"].to_pylist()
    assert len(set(keys)) == len(keys) == len(names)
    for key in keys:
        assert local_path(join("/base", key)).startswith("/base/") and not key.startswith("/")


@given(NAMES)
def test_a_location_shows_no_secret_however_it_is_printed(key):
    uri = f"s3://user:a-secret@bucket/{key}?endpoint_override=http://host:1"
    location = Location(uri)
    shown = [str(location), f"{location}", repr(location), json.dumps({"at": location}), location + "#x"]
    assert not any("a-secret" in text or "endpoint" in text for text in shown)
    assert location.uri == uri == pickle.loads(pickle.dumps(location)).uri
    assert Location(location) is location and hash(location) == hash(uri) and location == uri


IDS = st.lists(st.integers(0, 8).map("{:032x}".format), max_size=20)


@given(IDS, IDS, st.integers(0, 5))
def test_what_is_committed_is_never_planned_again_and_nothing_else_is_left_out(wanted, done, limit):
    wanted, done = list(dict.fromkeys(wanted)), list(dict.fromkeys(done))
    manifest = pa.table({"image_id": pa.array(wanted, pa.string())})
    commits = pa.table({"image_id": pa.array(done, pa.string()), "error": pa.array([""] * len(done), pa.string())})
    run = SimpleNamespace(commits=lambda: commits)
    left = Run.plan(run, manifest)["image_id"].to_pylist()
    assert left == [image_id for image_id in wanted if image_id not in done]
    assert Run.plan(run, manifest, limit=limit)["image_id"].to_pylist() == left[:limit]


ROWS = st.tuples(st.integers(0, 3), st.sampled_from(["", "segment: crash: x"]), st.integers(0, 4))


@given(st.lists(ROWS, max_size=25))
def test_of_an_id_that_is_committed_often_one_row_counts_and_a_good_one_first(committed):
    committed = list({(image, part): (f"{image}", error, f"part-{part}") for image, error, part in committed}.values())
    columns = zip(*committed, strict=True) if committed else ([], [], [])
    names = (*schema.COMMIT.names, "part")
    commits = pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})
    lost = superseded(commits)
    for image in {image for image, _, _ in committed}:
        rows = [(error == "", part) for each, error, part in committed if each == image]
        kept = [row for row in rows if (image, row[1]) not in lost]
        assert kept == [max(rows)]
