"""A recipe without gradients: all that it makes comes of the images at once."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from raypipe.run import OtherConfiguration
from raypipe.training.job import OF_STEPS, Train
from raypipe.training.recipe import Made, Recipe
from raypipe.training.train import train


class Mean(nn.Module, Made):
    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe
        self.register_buffer("colour", torch.zeros(3))

    def finish(self, samples):
        self.colour += torch.stack([torch.from_numpy(np.array(each["mean"])) for each in samples]).mean(0)

    def export(self, folder):
        folder.write(safetensors.torch.save(self.state_dict()), "mean.safetensors")


@dataclass(kw_only=True)
class Stepless(Recipe):
    """The mean colour of all images."""

    epochs: ClassVar[int] = 0
    batch_size: ClassVar[int] = 1
    lr: ClassVar[float] = 1.0
    has_steps = False

    def rows(self, manifest):
        return manifest

    def prepare(self, row, image):
        return {"image": image, "mean": image.mean((0, 1), dtype=np.float32)}

    def student(self, device):
        return Mean(self).to(device)


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 2 * i, 3)).save(tmp_path / f"photos/{i:02}.png")
    (tmp_path / "photos/bad.png").write_bytes(b"none")
    return str(tmp_path / "photos")


def test_it_sees_all_images_that_can_be_used_and_is_made_once(photos, tmp_path):
    made = train(Train(input=photos, output=str(tmp_path / "out"), local=True), Stepless())
    colour = safetensors.torch.load_file(tmp_path / "out/mean.safetensors")["colour"]
    assert colour.tolist() == pytest.approx([9.5, 19, 3])
    assert made.text().startswith("test_stepless: made of 20 images in ") and list(made.skipped) == ["bad.png"]
    page = (tmp_path / "out/training.html").read_text()
    assert "Loss" not in page and "bad.png" in page
    assert not train(Train(input=photos, output=str(tmp_path / "out"), local=True), Stepless()).is_new
    with pytest.raises(OtherConfiguration, match="seed: 0 there, 1 now"):
        train(Train(input=photos, output=str(tmp_path / "out"), local=True), Stepless(seed=1))


@pytest.mark.parametrize("option", OF_STEPS)
def test_options_of_steps_have_no_effect(option, photos, tmp_path):
    value = {"workers": 2, "batch_mode": "throughput", "tail": "drop", "sync_statistics": False}.get(option, 7)
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} {value} has no effect: nothing is learned"):
        train(Train(input=photos, output=str(tmp_path / "out"), **{option: value}), Stepless())
