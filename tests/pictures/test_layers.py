"""The layers of a page's pictures: masks in their colours, contours, and how large it all gets."""

import io
from hashlib import sha256

import numpy as np
from PIL import Image
from support.browsing import open_uri
from support.shares import row

from raypipe import masks
from raypipe.pictures.layers import draw, draw_classes, draw_layers
from raypipe.pictures.overlay import COLOURS
from raypipe.types import BadImage


def test_layers_show_each_mask_in_its_colour_and_the_small_one_on_top():
    large, small = np.zeros((2, 40, 60), bool)
    large[:, :50], small[10:30, 10:30] = True, True
    found = {"segments": masks.encode_segments(np.stack([large, small])), "foreground": masks.encode_rle(large)}
    layers = draw_layers(found, (40, 60))
    fill, contour = (np.asarray(open_uri(uri).convert("RGBA")) for uri in layers)
    assert tuple(fill[20, 20]) == (*COLOURS[1], 255) and tuple(fill[5, 5]) == (*COLOURS[0], 255)
    assert tuple(fill[20, 55]) == (0, 0, 0, 255)  # outside the foreground
    assert tuple(contour[10, 20]) == (*COLOURS[1], 255) and contour[20, 20, 3] == 0


def test_a_picture_shrinks_until_it_fits_its_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    content = encoded(noise)
    found = row("a.png", height=400, width=600, sha256=sha256(content).hexdigest())
    found["segments"] = masks.encode_segments(noise[None, :, :, 0] > 127)
    large = draw(content, [found], side=480, max_bytes=10**9)
    small = draw(content, [found], side=480, max_bytes=60_000)
    assert (large.width, large.height) == (480, 320) and small.width < 480 and small.nbytes <= 60_000


def colours_of(uri: str) -> np.ndarray:
    return np.asarray(open_uri(uri).convert("RGBA"))


def test_classes_are_in_the_colours_of_the_masks_named_like_them_and_what_does_not_count_is_white():
    truth = np.zeros((40, 60), np.int32)
    truth[5:20, 5:25], truth[5:20, 25:50], truth[30:, :] = 2, 3, -1
    masks_ = np.stack([truth == 3, truth == 2, truth == 0])
    found = row("a.png", height=40, width=60, segments=masks.encode_segments(masks_, labels=["dog", "cat", "tree"]))
    nothing = row("a.png", height=40, width=60, segments=[])
    gone, classes = BadImage("fetch", "missing", "gone"), ("background", "bird", "cat", "dog")
    picture = draw(gone, [found, None, nothing], truth=truth, classes=classes, side=480, max_bytes=10**9)
    assert picture.colours == {"cat": 0, "dog": 1, "tree": 2}
    fill, lines = map(colours_of, picture.truth)
    for number, colour in ((2, (*COLOURS[0], 255)), (3, (*COLOURS[1], 255)), (0, (0, 0, 0, 0)), (-1, (255,) * 4)):
        assert (fill[truth == number] == colour).all()
    predicted = colours_of(picture.layers[0].mask)
    assert (predicted[truth > 0] == fill[truth > 0]).all() and (predicted[truth == 0] == (*COLOURS[2], 255)).all()
    white = (lines == 255).all(axis=2)
    assert white[5, 5:50].all() and white[5:20, 24:26].all() and not white[8:18, 8:22].any() and not white[28:].any()
    of_run, absent, empty, of_truth = picture.names
    assert [name.text for name in of_truth] == ["cat", "dog"] and absent == empty == []
    assert [name.text for name in of_run] == ["dog", "cat", "tree"]
    assert all(truth[int(name.y), int(name.x)] == classes.index(name.text) for name in of_truth)


def test_masks_without_a_name_keep_the_colour_of_their_place():
    halves = np.zeros((2, 10, 20), bool)
    halves[0, :, :10], halves[1, :, 10:] = True, True
    found = row("a.png", segments=masks.encode_segments(halves))
    picture = draw(BadImage("fetch", "missing", "gone"), [found], classes=(), side=480, max_bytes=10**9)
    assert tuple(colours_of(picture.layers[0].mask)[5, 15]) == (*COLOURS[1], 255)
    assert picture.names == [[], []] and picture.colours == {}


def test_a_label_map_is_shrunk_without_new_numbers():
    truth = np.arange(400 * 600).reshape(400, 600).astype(np.int32) % 2 * 5
    fill = colours_of(draw_classes(truth, (37, 61), ["no"] * 5 + ["yes"], {"yes": 0}).mask)
    assert {tuple(colour) for colour in fill.reshape(-1, 4)} <= {(0, 0, 0, 0), (*COLOURS[0], 255)}


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
