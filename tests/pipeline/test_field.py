"""Folders, tars and files as people have them, labelled without Ray: a row per photograph, and what is said."""

import io
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from support.malformed import photo, save

import raypipe


def labelled(source, run) -> list[dict]:
    raypipe.label("kmeans", str(source), str(run), foreground="whole", local=True)
    return sorted(pq.read_table(run / "masks").to_pylist(), key=lambda row: row["key"])


def test_a_picture_of_few_levels_has_a_note_and_the_same_picture_in_8_bits_has_none(tmp_path):
    grey = photo(np.random.default_rng(0), 48, 64)[..., 0]
    tiles = {"eight": grey, "full": grey.astype(np.uint16) * 257, "narrow": grey.astype(np.uint16) + 800}
    tiles["twelve"] = grey.astype(np.uint16) * 16
    (tmp_path / "tiles").mkdir()
    for name, values in tiles.items():
        Image.fromarray(values).save(tmp_path / "tiles" / f"{name}.png")
    notes = {row["key"]: row["note"] for row in labelled(tmp_path / "tiles", tmp_path / "run")}
    assert notes == {"eight.png": "", "full.png": "", "narrow.png": "narrow_range", "twelve.png": "narrow_range"}


def test_metadata_in_ruins_are_no_lines_on_the_terminal(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x09\0"  # a directory of nine entries, and there the data end
    (tmp_path / "photos").mkdir()
    Image.fromarray(photo(np.random.default_rng(0), 48, 64)).save(tmp_path / "photos" / "a.jpg", exif=exif)
    words = ["label", "kmeans", "--input", "photos", "--output", "run", "--foreground", "whole", "--local"]
    done = subprocess.run([sys.executable, "-m", "raypipe", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 1 image labelled" in done.stdout and "Warning" not in done.stderr


def test_a_tar_of_photographs_and_masks_is_labelled_by_its_photographs(tmp_path, caplog):
    picture, mask = Image.fromarray(photo(np.random.default_rng(1), 24, 32)), Image.new("L", (32, 24))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for i in range(3):
            members = {"jpg": save(picture, ".jpg"), "seg.png": save(mask, ".png"), "json": b"{}"}
            for ending, content in members.items():
                member = tarfile.TarInfo(f"_{i}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    rows = labelled(tmp_path / "shard.tar", tmp_path / "run")
    assert [(row["key"], row["error"]) for row in rows] == [(f"shard/_{i}.jpg", "") for i in range(3)]
    assert "left out 3 .seg.png (beside a picture), 3 .json" in caplog.text
