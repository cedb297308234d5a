"""Augmentation: equal to torchvision's operations image by image, and the same in any batch."""

import colorsys
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as plain
from torchvision.transforms import InterpolationMode

from raypipe.training import augment, data

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [(40, 57), (61, 40), (40, 40), (43, 52)]


@pytest.fixture
def images() -> list[np.ndarray]:
    """Noise of different sizes, that cannot be written to, with rows of all kinds of colours that have no hue."""
    made = []
    for i, size in enumerate(SIZES):
        image = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        image[0], image[1], image[2] = 0, 255, image[2, :, :1]
        image[3, :, 1] = image[3, :, 0]
        image.flags.writeable = False
        made.append(image)
    return made


def random(index: int) -> np.random.Generator:
    return data.generator(0, 0, index)


def jittered(image: torch.Tensor, draw: augment.Jitter) -> torch.Tensor:
    steps = [plain.adjust_brightness, plain.adjust_contrast, plain.adjust_saturation, plain.adjust_hue]
    for which in draw.order:
        image = steps[which](image, draw[which])
    return image


def assert_close(values, expected, atol=5e-6):
    torch.testing.assert_close(values, expected, atol=atol, rtol=0)


@pytest.mark.filterwarnings("error")
def test_pixels_are_those_of_torchvision(images):
    for found, image in zip(augment.pixels(images, "cpu"), images, strict=True):
        assert torch.equal(found, plain.to_tensor(image.copy()))


def test_jitter_is_torchvisions(images):
    pixels = augment.pixels(images, "cpu")
    for index in range(60):
        draws = [augment.draw_jitter(random(4 * index + i), 0.8, 0.8, 0.8, 0.5, p=0.9) for i in range(len(images))]
        for found, image, draw in zip(augment.jitter(pixels, draws), pixels, draws, strict=True):
            assert_close(found, image if draw is None else jittered(image, draw))
    for image, original in zip(pixels, images, strict=True):
        assert torch.equal(image, plain.to_tensor(original.copy()))


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.07, 0.5])
def test_a_turn_of_the_hue_is_that_of_colorsys(turn):
    colours = [*permutations((0.0, 0.3, 1.0)), (0.2, 0.2, 0.9), (0.9, 0.2, 0.2), (0.4, 0.9, 0.9), (0.6, 0.6, 0.6)]
    image = torch.tensor(colours).T[:, None].contiguous()
    (found,) = augment.jitter([image], [augment.Jitter(1, 1, 1, turn, (0, 1, 2, 3))])
    for colour, changed in zip(colours, found[:, 0].T, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        assert_close(changed, torch.tensor(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)))


def test_jitter_is_drawn_as_torchvision_does():
    draws = [augment.draw_jitter(random(i), 0.4, 2.0, 0.0, 0.1, p=0.8) for i in range(3000)]
    applied = [draw for draw in draws if draw]
    assert 0.77 < len(applied) / len(draws) < 0.83
    numbers = np.array([draw[:4] for draw in applied])
    np.testing.assert_allclose(numbers.min(0), [0.6, 0, 1, -0.1], atol=0.01)
    np.testing.assert_allclose(numbers.max(0), [1.4, 3, 1, 0.1], atol=0.01)
    np.testing.assert_allclose(numbers.mean(0), [1, 1.5, 1, 0], atol=0.05)
    orders = [draw.order for draw in applied]
    assert {orders.count(order) > 60 for order in permutations(range(4))} == {True}  # 100 each on average


def test_colours_crop_and_mirror_equal_the_published_order(images):
    """Jitter, grey, normalise, crop, flip; here images are normalised last, when they are smaller."""
    draws = []
    for i, image in enumerate(images):
        its = random(i)
        draws.append(
            (
                augment.draw_jitter(its, 0.4, 0.4, 0.2, 0.1, 1),
                i % 2 == 0,
                augment.draw_corner(its, image.shape, 32),
                i > 1,
            )
        )
    jitters, greys, corners, flips = zip(*draws, strict=True)
    colours = augment.grey(augment.jitter(augment.pixels(images, "cpu"), jitters), greys)
    found = augment.normalise(augment.flip(augment.crop(colours, corners, 32), flips))
    assert found.shape == (4, 3, 32, 32) and found.is_contiguous()
    for view, image, (jitter, is_grey, corner, is_flipped) in zip(found, images, draws, strict=True):
        expected = jittered(plain.to_tensor(image.copy()), jitter)
        expected = plain.rgb_to_grayscale(expected, 3) if is_grey else expected
        expected = plain.crop(plain.normalize(expected, augment.IMAGENET_MEAN, augment.IMAGENET_STD), *corner, 32, 32)
        assert_close(view, plain.hflip(expected) if is_flipped else expected, atol=2e-5)  # after a division by 0.22


def views(images, draws):
    """All that is done to images, for each by its own draw."""
    pixels = augment.jitter(augment.pixels(images, "cpu"), [draw[0] for draw in draws])
    masks = augment.moved([image[..., 0] > 127 for image in images], "cpu")
    squares, windows = augment.scale_and_crop(pixels, masks, [draw[1] for draw in draws], 32)
    squares = augment.normalise(augment.blur(squares, [draw[2] for draw in draws], 5))
    return [torch.cat([square, window[None]]) for square, window in zip(squares, windows, strict=True)]


def test_an_image_becomes_the_same_bits_beside_any_others_and_on_any_number_of_workers(images):
    images = [*images, *(image[::-1, ::-1] for image in images)]

    def drawn(index):
        its = data.generator(1, 2, index)
        scaled = augment.draw_scaled(its, images[index].shape, 32, 0.3, 1.6)
        return augment.draw_jitter(its, 0.8, 0.8, 0.8, 0.2, 0.8), scaled, augment.draw_blur(its, 0.1, 2.0, 0.5)

    alone = [views([image], [drawn(index)])[0] for index, image in enumerate(images)]
    order = data.order(len(images), seed=1, epoch=2)
    for workers, batch in ((1, 8), (1, 4), (2, 2), (4, 1)):
        for chosen in data.shares(order, workers=workers, batch=batch, tail="drop").reshape(-1, batch).tolist():
            for index, view in zip(chosen, views([images[i] for i in chosen], [drawn(i) for i in chosen]), strict=True):
                assert torch.equal(view, alone[index])


def test_corners_are_uniform_over_all_places():
    corners = [augment.draw_corner(random(i), (12, 10, 3), 10) for i in range(900)]
    assert {left for _, left in corners} == {0}
    counts = np.bincount([top for top, _ in corners])
    assert len(counts) == 3 and counts.min() > 250


def test_scaled_images_are_torchvisions_filled_up_with_their_mean_and_masks_with_nothing(images):
    pixels = augment.pixels(images, "cpu")
    masks = [torch.from_numpy(image[..., 0] > 127) for image in images]
    for index in range(30):
        draws = [
            augment.draw_scaled(random(4 * index + i), image.shape, 40, 0.1, 2.0) for i, image in enumerate(images)
        ]
        squares, windows = augment.scale_and_crop(pixels, masks, draws, 40)
        for square, window, image, mask, draw in zip(squares, windows, pixels, masks, draws, strict=True):
            image = plain.resize(image, draw[:2], antialias=True)
            mask = plain.resize(mask[None].byte(), draw[:2], InterpolationMode.NEAREST)
            right, below = (max(0, 40 - side) for side in (draw.width, draw.height))
            padded = torch.stack([plain.pad(each, [0, 0, right, below], float(each.mean())) for each in image])
            corner = (draw.top, draw.left, 40, 40)
            assert_close(square, plain.crop(padded, *corner))
            expected = plain.crop(plain.pad(mask, [0, 0, right, below]), *corner)[0]
            assert window.dtype == torch.bool and torch.equal(window, expected > 0)


def test_a_scale_is_uniform_and_what_is_smaller_than_the_square_stays_in_its_corner():
    draws = [augment.draw_scaled(random(i), (224, 224, 3), 224, 0.1, 1.0) for i in range(2000)]
    assert all(draw.height == draw.width and draw.top == draw.left == 0 for draw in draws)
    sides = np.array([draw.height for draw in draws])
    assert sides.min() == 22 and sides.max() == 223 and abs(sides.mean() - 0.55 * 224) < 4
    assert augment.draw_scaled(random(0), (3, 5), 2, 0.1, 0.1)[:2] == (1, 1)
    larger = [augment.draw_scaled(random(i), (20, 30), 20, 1.5, 1.5) for i in range(500)]
    assert {draw[:2] for draw in larger} == {(30, 45)}
    assert {draw.top for draw in larger} == set(range(11)) and {draw.left for draw in larger} == set(range(26))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_a_blur_is_torchvisions(images, sigma):
    assert augment.kernel_size(224) == 23 and [augment.kernel_size(side) for side in (9, 32, 60)] == [1, 3, 7]
    pixels = augment.pixels(images, "cpu")
    for size in (1, 3, 23):
        found = augment.blur(pixels, [sigma, None, sigma, sigma], size)
        assert torch.equal(found[1], pixels[1])
        for i in (0, 2, 3):
            assert_close(found[i], plain.gaussian_blur(pixels[i], [size, size], [sigma, sigma]))


def test_a_blur_is_drawn_with_its_probability():
    sigmas = [augment.draw_blur(random(i), 0.1, 2.0, p=0.5) for i in range(2000)]
    applied = [sigma for sigma in sigmas if sigma is not None]
    assert 0.46 < len(applied) / len(sigmas) < 0.54
    assert 0.1 <= min(applied) < 0.15 and 1.95 < max(applied) <= 2 and abs(np.mean(applied) - 1.05) < 0.06


@pytest.mark.gpu
def test_a_gpu_does_the_same(images):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    draws = [augment.draw_jitter(random(i), 0.8, 0.8, 0.8, 0.2, 1) for i in range(4)]
    scaled = [augment.draw_scaled(random(i), image.shape, 32, 0.3, 1.6) for i, image in enumerate(images)]
    results = []
    for device in ("cpu", "cuda"):
        pixels = augment.jitter(augment.pixels(images, device), draws)
        squares, windows = augment.scale_and_crop(
            pixels, augment.moved([i[..., 0] > 9 for i in images], device), scaled, 32
        )
        squares = augment.flip(augment.grey(squares, [True, False] * 2), [True, True, False, False])
        results.append([augment.normalise(augment.blur(squares, [1.0] * 4, 5)).cpu(), windows.cpu()])
    assert_close(results[1][0], results[0][0], atol=1e-4)
    assert torch.equal(results[1][1], results[0][1])
