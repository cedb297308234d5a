"""Masks that are given as foregrounds: how they are read, how that is said, and what is wrong with them."""

import json

import numpy as np
import pytest
from PIL import Image
from support.faulty import GOOD, write_images

import raypipe
from raypipe.masks import decode_rle
from raypipe.pipeline import foregrounds


@pytest.mark.parametrize(
    ("text", "kind", "folder"),
    [
        ("given:ink:masks", "ink", "masks"),
        ("given:1,2:masks", "1,2", "masks"),
        ("given:alpha:s3://bucket/masks", "alpha", "s3://bucket/masks"),
        ("given:s3://bucket/masks", None, "s3://bucket/masks"),
        ("given:ink", None, "ink"),
        ("given:C:/masks", None, "C:/masks"),
    ],
)
def test_a_foreground_may_say_how_its_masks_are_read(tmp_path, monkeypatch, text, kind, folder):
    monkeypatch.chdir(tmp_path)
    found = foregrounds.parse(text)
    place = folder if "//" in folder else f"{tmp_path}/{folder}"
    assert (found.masks and str(found.masks), found.argument) == (kind, place)
    assert str(found) == found.spec == f"given:{kind}:{place}" if kind else f"given:{place}"
    assert foregrounds.parse(found.spec) == found


def write_given(folder, make, kind: str = "L"):
    """Photographs with a pattern, and a mask file of each, which `make` makes of its bool (H, W)."""
    write_images(folder / "photos", [GOOD] * 2)
    (folder / "masks").mkdir()
    masks = np.zeros((2, 24, 32), bool)
    masks[0, 6:18, 8:24] = masks[1, 4:20, 4:12] = True
    for i, mask in enumerate(masks):
        mask = np.pad(mask, ((0, 0), (0, i)))
        Image.fromarray(make(mask).astype(np.uint8), kind).save(folder / f"masks/{i:04d}_mask.png")
    return masks[0], np.pad(masks[1], ((0, 0), (0, 1)))


@pytest.mark.parametrize(
    ("make", "mode", "kind"),
    [
        (lambda m: m, "L", "nonzero"),
        (lambda m: np.where(m, 1, 2 + (np.arange(m.shape[1]) < 4)), "L", "1"),
        (lambda m: 255 - m * 255, "L", "ink"),
        (lambda m: np.dstack([np.where(m[..., None], (90, 120, 60), 255), m * 255]), "RGBA", "alpha"),
    ],
    ids=["0 and 1", "trimap", "ink", "cut-out"],
)
def test_given_masks_are_read_as_they_look_and_the_run_says_how(tmp_path, make, mode, kind):
    masks, run = write_given(tmp_path, make, mode), tmp_path / "run"
    options = {"foreground": f"given:{tmp_path / 'masks'}", "local": True, "max_bad_fraction": 1.0}
    raypipe.label("kmeans", tmp_path / "photos", run, **options)
    frozen = json.loads((run / "run.json").read_text())
    assert frozen["settings"]["foreground"] == f"given:{tmp_path}/masks" and frozen["provenance"]["mask_kind"] == kind
    rows = sorted(raypipe.load(run).to_pylist(), key=lambda row: row["key"])
    for row, mask in zip(rows, masks, strict=True):
        assert row["error"] == ""
        np.testing.assert_array_equal(decode_rle(row["foreground"]), mask)


@pytest.mark.parametrize("kind", ["ink", None])
def test_a_run_goes_on_as_it_began_and_one_from_before_there_were_kinds_too(tmp_path, kind):
    masks, file = write_given(tmp_path, lambda m: m), tmp_path / "run/run.json"
    options = {"foreground": f"given:{tmp_path / 'masks'}", "local": True}
    raypipe.label("kmeans", tmp_path / "photos", tmp_path / "run", **options, limit=1)
    frozen = json.loads(file.read_text())
    assert frozen["provenance"].pop("mask_kind") == "nonzero"
    frozen["provenance"] |= {"mask_kind": kind} if kind else {}
    file.write_text(json.dumps(frozen))
    raypipe.label("kmeans", tmp_path / "photos", tmp_path / "run", **options)
    rows = {row["key"]: decode_rle(row["foreground"]) for row in raypipe.load(tmp_path / "run").to_pylist()}
    np.testing.assert_array_equal(rows["0000.png"], masks[0])
    assert rows["0001.png"].all() if kind == "ink" else (rows["0001.png"] == masks[1]).all()


def test_given_masks_may_be_read_as_is_said(tmp_path):
    masks = write_given(tmp_path, lambda m: np.where(m, 7, 3))
    options = {"local": True, "output": tmp_path / "run"}
    with pytest.raises(ValueError, match="--foreground given:.*several values, 3 .*, 7 .*given:KIND:DIR"):
        raypipe.label("kmeans", tmp_path / "photos", **options, foreground=f"given:{tmp_path / 'masks'}")
    raypipe.label("kmeans", tmp_path / "photos", **options, foreground=f"given:7:{tmp_path / 'masks'}")
    found = {row["key"]: decode_rle(row["foreground"]) for row in raypipe.load(tmp_path / "run").to_pylist()}
    np.testing.assert_array_equal(found["0000.png"], masks[0])


@pytest.mark.parametrize(
    ("foreground", "message"),
    [
        ("given:nope", "--foreground given:.*nope.*does not exist"),
        ("given:empty", "--foreground given:.*no images"),
        ("given:others", "--foreground given:.*images are named as '0000.png', masks as 'x.png'"),
        ("given:ink:full", "--foreground given:ink:.*no pixel of any"),
        ("run:nope", "--foreground run:.*nope"),
        ("run:empty", "--foreground run:.*not a raypipe run"),
    ],
)
def test_a_foreground_that_cannot_be_is_named_with_its_option(tmp_path, monkeypatch, foreground, message):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", [GOOD])
    for folder, name in (("others", "x.png"), ("full", "0000.png")):
        (tmp_path / folder).mkdir()
        Image.new("L", (32, 24), 255).save(tmp_path / folder / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        raypipe.label("kmeans", "photos", "run", foreground=foreground)
