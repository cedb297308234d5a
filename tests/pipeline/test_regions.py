"""Regions that are given as class maps: which file is an image's, how it is read, and what is wrong with it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image
from support.faulty import GOOD, write_images
from support.tiny import zero_guidance

import raypipe
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.run import OtherConfiguration
from raypipe.types import Segmenter, Segments


@dataclass
class Regions(Segmenter):
    """A segment for each number of a class map, which is its name; without one everything."""

    regions: str | None = None

    source = "the tests"
    licence = "Apache-2.0"
    takes_regions = True

    def segment(self, images, foregrounds=None) -> Iterator[Segments]:
        for i, image in enumerate(images):
            regions = np.ones(image.shape[:2], np.int32) if self.regions is None else foregrounds[i]
            assert regions.dtype == np.int32 and regions.shape == image.shape[:2]
            numbers = np.unique(regions[regions > 0])
            yield Segments(regions == numbers[:, None, None], [str(number) for number in numbers])


@pytest.fixture
def maps(tmp_path):
    """Class maps as VOC has them (a palette), of 16 bits and of one colour, and files that are none."""
    write_images(tmp_path / "photos", [GOOD] * 7)
    (tmp_path / "maps").mkdir()
    voc = np.zeros((24, 32), np.uint8)
    voc[2:9, 3:20], voc[9:20, 10:30], voc[20:22] = 15, 1, 255
    picture = Image.fromarray(voc, "P")
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    picture.save(tmp_path / "maps/0000.png")
    many = np.array([0, 65535, 255, 450], np.uint16)[np.searchsorted([0, 1, 15, 255], voc)]
    Image.fromarray(np.pad(many, ((0, 0), (0, 1)))).save(tmp_path / "maps/0001.png")
    Image.new("L", (34, 24), 255).save(tmp_path / "maps/0002.png")
    Image.new("L", (32, 23), 1).save(tmp_path / "maps/0003.png")
    Image.new("RGB", (33, 24), (1, 2, 3)).save(tmp_path / "maps/0004.png")
    (tmp_path / "maps/0005.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    return voc


def test_each_number_of_a_class_map_is_a_region_of_its_image(tmp_path, maps, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Label("photos", str(tmp_path / "run"), local=True, max_bad_fraction=1.0)
    label(replace(job, limit=2), Regions(regions="given:maps"))
    label(job, Regions(regions=f"given:{tmp_path}/maps/../maps"))  # the same folder goes on
    rows = sorted(raypipe.load(job.output).to_pylist(), key=lambda row: row["key"])
    names = [[segment["label"] for segment in row["segments"]] for row in rows]
    assert names == [["1", "15"], ["255", "450"], [], [], [], [], []]
    assert all(row["foreground"] is None for row in rows)
    np.testing.assert_array_equal(raypipe.decode(rows[0]), np.stack([maps == 1, maps == 15]))
    np.testing.assert_array_equal(raypipe.decode(rows[1])[:, :, :32], np.stack([maps == 15, maps == 255]))
    errors = [row["error"].replace(str(tmp_path), "") for row in rows]
    assert errors[:3] == ["", "", ""]
    assert errors[3] == "foreground: wrong_size: the class map is 32 x 23 pixels, the image 32 x 24"
    assert errors[4].startswith("foreground: other_kind: /maps/0004.png: a label map in colours, expected numbers of")
    assert errors[5].startswith("foreground: ") and "/maps/0005.png" in errors[5]
    assert (
        errors[6]
        == "foreground: missing: given:/maps has no single class map for '0006.png', by relative path or by name"
    )
    frozen = json.loads((tmp_path / "run/run.json").read_text())
    assert frozen["settings"]["regions"] == f"given:{tmp_path}/maps" and "mask_kind" not in frozen["provenance"]
    with pytest.raises(OtherConfiguration, match="regions: 'given:.*/maps' there, None now"):
        label(job, Regions())


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ("given:nope", "--regions given:.*nope.*does not exist"),
        ("given:other", "--regions given:.*images are named as '0000.png', masks as 'x.png'"),
        ("maps", "--regions 'maps': write given:DIR"),
        ("given:", "--regions 'given:': write given:DIR"),
        ("run:maps", "--regions 'run:maps': write given:DIR"),
    ],
)
def test_regions_that_cannot_be_are_named_with_their_option(tmp_path, monkeypatch, maps, regions, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    Image.new("L", (32, 24)).save(tmp_path / "other/x.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        label(Label("photos", "run", local=True), Regions(regions=regions))
    assert not (tmp_path / "run").exists()


def test_without_regions_the_method_gets_none(tmp_path):
    write_images(tmp_path / "photos", [GOOD])
    label(Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True), Regions())
    ((row,),) = (raypipe.load(str(tmp_path / "run")).to_pylist(),)
    assert raypipe.decode(row).all() and row["error"] == ""


def test_regions_of_a_data_set_are_named_and_embedded_by_zero_guidance(tmp_path, maps):
    options = zero_guidance.options(tmp_path)
    del options["size"]  # of DINO, which nobody asks
    options |= {"regions": f"given:{tmp_path}/maps", "keep_embeddings": True, "local": True, "device": "cpu"}
    raypipe.label("zero_guidance", tmp_path / "photos", tmp_path / "run", **options, max_bad_fraction=1.0)
    table = raypipe.load(tmp_path / "run", embeddings=True)
    rows = sorted(table.to_pylist(), key=lambda row: row["key"])
    assert [row["error"].split(":")[0] for row in rows] == [""] * 3 + ["foreground"] * 4
    first, _, none = rows[:3]
    large, small = sorted((maps == 1, maps == 15), key=np.sum, reverse=True)
    np.testing.assert_array_equal(raypipe.decode(first), np.stack([large, small]))
    assert none["segments"] == [] and all(len(each["embedding"]) == 24 for each in first["segments"])
    assert {each["label"] for each in first["segments"]} <= {*zero_guidance.WORDS}
