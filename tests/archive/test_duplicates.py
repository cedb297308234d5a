"""Perceptual hashes and what counts as the same image."""

import io

import numpy as np
import pytest
import scipy.fft
import skimage.data
from PIL import Image

from raypipe.archive.duplicates import Kept, phash


def apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_the_hash_survives_what_copies_go_through_and_tells_photographs_apart(name):
    image = getattr(skimage.data, name)()
    file = io.BytesIO()
    Image.fromarray(image).resize((300, 200)).save(file, "JPEG", quality=60)
    others = [getattr(skimage.data, other)() for other in ("astronaut", "chelsea", "coffee", "rocket") if other != name]
    assert apart(phash(image), phash(np.asarray(Image.open(file)))) <= 4
    assert apart(phash(image), phash((image * 0.8).astype(np.uint8))) <= 4
    assert min(apart(phash(image), phash(other)) for other in others) > 12
    assert apart(phash(image), phash(image[:, ::-1])) > 12


def test_the_hash_is_the_sign_of_low_frequencies_as_scipy_has_them():
    image = np.repeat(np.random.default_rng(0).integers(0, 256, (32, 32, 1), np.uint8), 3, axis=2)
    low = scipy.fft.dctn(image[:, :, 0].astype(float))[1:9, 1:9]
    bits = "".join("1" if value > np.median(low) else "0" for value in low.ravel())
    assert phash(image) == int(bits, 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (700, 3)])
def test_images_of_one_colour_have_the_hash_0_at_any_size(size):
    assert phash(np.full((*size, 3), 77, np.uint8)) == 0


def test_an_image_is_a_duplicate_by_its_bytes_its_hash_or_its_embedding():
    normal = np.random.default_rng(0).normal(size=(8, 2))
    kept, (one, other) = Kept(3, 8), np.linalg.qr(normal)[0].T.astype(np.float32)
    assert kept.duplicate("a", 0, one) == ""
    kept.add("a", 0, one)
    assert kept.duplicate("a", 2**64 - 1, other) == "duplicate"
    assert kept.duplicate("b", 0b1111, other) == "near_duplicate"
    assert kept.duplicate("b", 0b11111, other) == ""
    assert kept.duplicate("b", 2**64 - 1, 0.9851 * one + np.sqrt(1 - 0.9851**2) * other) == "near_duplicate"
    assert kept.duplicate("b", 2**64 - 1, 0.984 * one + np.sqrt(1 - 0.984**2) * other) == ""
    kept.add("b", 2**64 - 1, other)
    assert kept.duplicate("c", 2**63 - 1, other * 0.5) == "near_duplicate"
