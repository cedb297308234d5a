"""A class written to the letter of `types.py` runs with every foreground, and a slip is refused early."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny.rembg import write_network

import raypipe
from raypipe import masks
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.types import PatternSegmenter, Segmenter, Segments, fill_preset, name_of


class Letter(PatternSegmenter):
    """The foreground itself."""

    def segment(self, images, foregrounds) -> Iterator[Segments]:
        return (Segments(foreground[None]) for foreground in foregrounds)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two images, dark on the left and bright on the right, and a mask of each one's right half beside them."""
    folder = tmp_path_factory.mktemp("letter")
    for name in ("photos", "masks"):
        (folder / name).mkdir()
    for i in range(2):
        ramp = np.broadcast_to(np.linspace(0, 255, 40 + i), (30, 40 + i)).astype(np.uint8)
        Image.fromarray(ramp).convert("RGB").save(folder / f"photos/{i}.png")
        Image.fromarray((ramp > 127).astype(np.uint8) * 255).save(folder / f"masks/{i}.png")
    return folder


def labelled(photos: Path, output: Path, foreground: str, **options) -> list[np.ndarray]:
    """The one mask of each image by a run without Ray."""
    job = Label(str(photos / "photos"), str(output), local=True)
    label(job, Letter(foreground=foreground, **options))
    rows = sorted(raypipe.load(str(output)).to_pylist(), key=lambda row: row["key"])
    assert [row["error"] for row in rows] == ["", ""]
    return [masks.decode_rle(row["segments"][0]) for row in rows]


def test_it_runs_with_every_foreground(photos, tmp_path):
    rembg = f"rembg:{write_network(tmp_path / 'tiny.onnx', contrast=9)}"
    for mask in labelled(photos, tmp_path / "whole", "whole"):
        assert mask.all()
    for mask in labelled(photos, tmp_path / "grabcut", "grabcut"):
        assert mask.any()
    some, most = (labelled(photos, tmp_path / str(alpha), rembg, fg_alpha_min=alpha) for alpha in (128, 1))
    assert all(0 < a.sum() < b.sum() for a, b in zip(some, most, strict=True))
    given = labelled(photos, tmp_path / "given", f"given:{photos / 'masks'}")
    for i, mask in enumerate(given):
        np.testing.assert_array_equal(mask, np.asarray(Image.open(photos / f"masks/{i}.png")) > 0)
    for mask, other in zip(labelled(photos, tmp_path / "run", f"run:{tmp_path / 'given'}"), given, strict=True):
        np.testing.assert_array_equal(mask, other)


def test_a_foreground_without_its_contract_is_refused_where_the_class_is_defined():
    with pytest.raises(TypeError, match="test_contract: only a PatternSegmenter has a foreground; derive Half from it"):

        @dataclass
        class Half(Segmenter):
            foreground: str = "rembg"

            def segment(self, images, foregrounds=None):
                return iter(())


def test_an_own_default_of_the_alpha_is_no_alpha_that_was_given():
    @dataclass
    class Strict(Letter):
        fg_alpha_min: int = 200

    assert Strict(foreground="whole").fg_alpha_min == 200
    with pytest.raises(ValueError, match="test_contract: fg_alpha_min 1 has no effect: foreground 'whole' is not soft"):
        Strict(foreground="whole", fg_alpha_min=1)
    with pytest.raises(ValueError, match="test_contract: fg_alpha_min must be between 0 and 255, got 256"):
        Letter(fg_alpha_min=256)


@pytest.mark.parametrize("field", ["preset", "refine_preset"])
def test_a_preset_fills_what_is_none(field):
    class Options:
        presets = {"fine": {"steps": 9, "size": 512}}

        def __init__(self, preset: str):
            self.steps, self.size = None, 64
            setattr(self, field, preset)

    options = Options("fine")
    fill_preset(options, field)
    assert (options.steps, options.size) == (9, 64)
    with pytest.raises(ValueError, match=f"test_contract: unknown {field} 'fin'; did you mean 'fine'\\?"):
        fill_preset(Options("fin"), field)
    assert name_of(Options) == "test_contract"
