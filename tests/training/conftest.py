"""What trainings share: the number of threads, a backbone, what they are measured on."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny.dino import write_model


@pytest.fixture(scope="module", autouse=True)
def one_thread_in_fixtures():
    """Torch on one thread in what a module's tests compare with, too: the last bits of sums follow the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    """The folder of a tiny DINO of random weights."""
    return str(write_model(tmp_path_factory.mktemp("models") / "backbone"))


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Options of a validation on ten photographs whose right half is bright."""
    folder, random = tmp_path_factory.mktemp("labelled"), np.random.default_rng(1)
    mask = np.tile(np.arange(24) >= 12, (24, 1))
    for name in ("photos", "masks"):
        (folder / name).mkdir()
    for i in range(10):
        image = random.integers(0, 100, (24, 24, 3), np.uint8)
        image[mask] += 150
        Image.fromarray(image).save(folder / f"photos/{i}.png")
        Image.fromarray(np.uint8(255) * mask).save(folder / f"masks/{i}.png")
    return {"validate": str(folder / "photos"), "labels": str(folder / "masks"), "filters": ("none",)}
