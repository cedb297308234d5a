"""What SelfMask is to learn from a run: which masks, at which size, of which images, and what is wrong with others."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.written import masks_row, write_run

from raypipe import schema
from raypipe.inputs.manifest import list_inputs
from raypipe.masks import decode_rle
from raypipe.run import Run
from raypipe.training.selfmask import pseudo_masks

SIDE = 16


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six photographs of one size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 64, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def row(file: Path, *found: np.ndarray, **cells) -> dict:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    stack = np.stack(found) if found else np.zeros((0, 40, 64), bool)
    return masks_row(file.name, stack, uri=str(file), sha256=sha256, **cells)


def left(width: int) -> np.ndarray:
    """A mask of so many columns."""
    return np.broadcast_to(np.arange(64) < width, (40, 64))


@pytest.fixture
def run(photos, tmp_path) -> Run:
    """Two good masks, and one image each that has an empty one, a full one, none, and an error."""
    files = [photos / f"{i}.png" for i in range(6)]
    table = [row(files[0], left(32), left(8)), row(files[1], left(0)), row(files[2], left(64)), row(files[3])]
    table += [row(files[4], error="decode: corrupt: no picture"), row(files[5], left(16))]
    return write_run(str(tmp_path / "run"), table)


def read(run: Run, source: Path | None = None) -> dict[str, np.ndarray]:
    """By key, the masks at SIDE."""
    manifest = None if source is None else list_inputs(str(source))
    table = pseudo_masks.read(run, manifest, size=SIDE)
    assert table.schema.names == [*schema.MANIFEST.names, "sha256", "mask"]
    return {row["key"]: decode_rle({"size": (SIDE, SIDE), "counts": row["mask"]}) for row in table.to_pylist()}


def test_the_first_mask_of_each_image_counts_and_what_teaches_nothing_is_counted(run, caplog):
    found = read(run)
    assert sorted(found) == ["0.png", "5.png"]
    np.testing.assert_array_equal(found["0.png"], np.broadcast_to(np.arange(16) < 8, (16, 16)))
    np.testing.assert_array_equal(found["5.png"], np.broadcast_to(np.arange(16) < 4, (16, 16)))
    expected = "4 images left out: 1 failed in the run, 1 of a full mask, 1 of an empty mask, 1 without a mask"
    assert caplog.messages == [f"selfmask: {expected}"]


@pytest.mark.parametrize(("threshold", "columns"), [(None, 8), (0.25, 12)])
def test_probabilities_are_resized_before_the_run_s_threshold(photos, tmp_path, threshold, columns):
    ramp = np.broadcast_to(1 - (np.arange(64, dtype=np.float32) + 0.5) / 64, (40, 64))
    table = [row(photos / "0.png", left(1), soft=ramp[None])]
    run = write_run(str(tmp_path / "run"), table, settings={"threshold": threshold})
    np.testing.assert_array_equal(read(run)["0.png"], np.broadcast_to(np.arange(16) < columns, (16, 16)))


def test_a_mask_is_resized_as_its_photograph_is(photos, tmp_path):
    mask = np.random.default_rng(1).random((40, 64)) > 0.4
    run = write_run(str(tmp_path / "run"), [row(photos / "0.png", mask)])
    expected = Image.fromarray(mask.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read(run)["0.png"], np.asarray(expected) > 0.5)


def test_photographs_that_moved_are_found_in_the_input(run, photos, tmp_path, caplog):
    moved = tmp_path / "moved"
    photos.rename(moved)
    with pytest.raises(ValueError, match="^selfmask: fetch: missing: .*0.png.*; give the images .* with --input"):
        read(run)
    shutil.copy(moved / "0.png", moved / "new.png")
    caplog.clear()
    assert sorted(read(run, moved)) == ["0.png", "5.png"]
    assert "5 images left out" in caplog.text and "1 not in the run" in caplog.text


def test_other_photographs_are_refused(run, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(photos / "0.png", other / "zero.png")
    with pytest.raises(ValueError, match="has none of the 1 image of --input, by id or by key; give those .*0.png"):
        read(run, other)


def test_a_run_without_rows_or_without_a_mask_and_a_folder_that_is_none_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="^selfmask: .*empty has no rows; label"):
        read(write_run(str(tmp_path / "empty"), []))
    with pytest.raises(ValueError, match="^selfmask: .*useless has no mask to learn from: 1 of a full mask"):
        read(write_run(str(tmp_path / "useless"), [row(photos / "0.png", left(64))]))
    with pytest.raises(FileNotFoundError, match="is not a raypipe run"):
        read(Run(str(photos)))
